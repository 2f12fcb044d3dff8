"""Model folders in Hugging Face's format: config.json and the weights, written and read, whole or tensor by tensor."""

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from minillm.base.contents import Contents
from minillm.base.errors import UserError, naming
from minillm.checkpoint import score_head, tensor_files, tensor_writer
from minillm.checkpoint.architectures import ARCHITECTURES, SHARED, SPECIAL_IDS, from_hf, to_hf
from minillm.checkpoint.config_json import check_kinds, read_config
from minillm.checkpoint.together import Source, ToWrite, to_write
from minillm.distributed import shards
from minillm.model import quant
from minillm.model.config import ModelConfig
from minillm.model.size import empty_model
from minillm.model.transformer import Transformer

ROTATED = ("self_attn.q_proj.weight", "self_attn.k_proj.weight")  # whose rows depend on how positions are rotated


def export_name(name: str) -> str:
    """The key of our parameter `name` in a Hugging Face file; of a module, its path in transformers' model."""
    return name if name.partition(".")[0] in ("lm_head", "score") else "model." + name


def shapes_of(config: ModelConfig) -> dict[str, torch.Size]:
    """Key and shape of each tensor in a Hugging Face file, which leaves out a tied head."""
    shapes = {export_name(name): tensor.shape for name, tensor in empty_model(config).state_dict().items()}
    if config.tie_embeddings:
        del shapes["lm_head.weight"]
    return shapes


def check_parameters(config: ModelConfig, folder: str | Path) -> None:
    """Raise `UserError` naming the options of `config` that ask for other parameters than a folder's model has.

    What changes no parameter, such as dropout, a window or a longer context with rotary positions, may differ.
    """
    stored = load_config(folder, config.score_head)
    shapes, wanted = shapes_of(stored), shapes_of(config)
    if wanted == shapes:
        return
    options = [
        f"{name} {getattr(config, name)} (there {getattr(stored, name)})"
        for name in (f.name for f in dataclasses.fields(config))
        if getattr(config, name) != getattr(stored, name) and _changes_shapes(stored, name, getattr(config, name))
    ]
    changed = [key for key in {**wanted, **shapes} if wanted.get(key) != shapes.get(key)]
    raise UserError(
        f"{folder}: its config.json decides which parameters the model has, and {', '.join(options)} would change "
        f"{len(changed)} of them, such as {changed[0]}: leave that out, or train a new model, without --init_from"
    )


def _changes_shapes(stored: ModelConfig, name: str, value) -> bool:
    """Whether a model has other parameters when this one option has another value."""
    try:
        return shapes_of(dataclasses.replace(stored, **{name: value})) != shapes_of(stored)
    except UserError:  # possible only together with another option
        return True


@dataclass
class StoredModel:
    """A model in a file or in memory, from which tensors are read one at a time.

    dtype: of the embedding as stored. read(key, dtype): the tensor of a Hugging Face key, rotary positions half-split;
    it may share memory with a model. special_ids: bos_token_id and the like, for config.json.
    """

    config: ModelConfig
    dtype: torch.dtype
    read: Callable[[str, torch.dtype], Tensor]
    special_ids: dict[str, int] = field(default_factory=dict)


def _refuse_quantized(model: Transformer) -> None:
    if quant.is_quantized(model):
        raise UserError("a quantized base is not saved: save its adapter, or call quant.dequantize_base first")


def weights_of(model: Transformer) -> dict[str, Tensor]:
    """The tensors to save, under Hugging Face's keys.

    Raises `UserError` for a quantized model, since other loaders do not know its format.
    """
    _refuse_quantized(model)
    state = {export_name(name): tensor.detach() for name, tensor in model.state_dict().items()}
    return {key: state[key].contiguous() for key in shapes_of(model.config)}


def weights_to_write(model: Transformer) -> list[ToWrite]:
    """The files of a model's weights in a checkpoint, and which tensors go into them; the model may be sharded.

    Raises `UserError` for a quantized model.
    """
    _refuse_quantized(model)
    tensors = dict(model.named_buffers()) | dict(model.named_parameters(remove_duplicate=False))
    named = {export_name(name): tensor for name, tensor in tensors.items()}
    shapes = shapes_of(model.config)
    planned = tensor_writer.plan_weights(shapes, model.embed_tokens.weight.dtype, tensor_writer.MOST_BYTES)
    return to_write(planned, {key: Source.of(named[key]) for key in shapes})


def write_config(config: ModelConfig, folder: Path, special_ids: dict[str, int], dtype: torch.dtype) -> None:
    """Write config.json into an existing folder. dtype: of its weights."""
    written = to_hf(config, special_ids, str(dtype).removeprefix("torch."))
    (folder / "config.json").write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")


def save_model(model: Transformer, folder: Path, *, special_ids: dict[str, int] | None = None) -> None:
    """Write config.json and model.safetensors into an existing folder, in the model's dtype."""
    weights = weights_of(model)
    dtype = model.embed_tokens.weight.dtype
    in_memory = StoredModel(model.config, dtype, lambda key, dtype: weights[key].to(dtype), special_ids or {})
    write_folder(in_memory, folder)


def write_folder(
    model: StoredModel, folder: Path, *, dtype: torch.dtype | None = None, max_shard_size: int | None = None
) -> None:
    """Write config.json and the weights into an existing folder, tensor by tensor.

    dtype: of the files; None: the model's. max_shard_size: bytes of tensors in one file; None: one file.
    """
    dtype = dtype or model.dtype
    shapes = shapes_of(model.config)
    tensor_writer.write_weights(folder, shapes, dtype, lambda key: model.read(key, dtype), max_shard_size)
    write_config(model.config, folder, model.special_ids, dtype)


def load_config(folder: str | Path, with_score_head: bool | None = False) -> ModelConfig:
    """The `ModelConfig` of a model folder: its config.json's, but untied if the weights have a head of their own.

    with_score_head: False: raise `UserError` for a reward or value model, True: for any other, None: take either.
    """
    source = f"{folder}/config.json"
    written = read_config(folder)
    if Contents(written, source).get("model_type", str) in ARCHITECTURES:  # others are refused by name
        check_kinds(written, source, SHARED)
    with naming(source):
        config = from_hf(written)
    score_head.check_head(config.score_head, with_score_head, folder, written)
    if config.tie_embeddings and tensor_files.has_own_head(folder):
        return dataclasses.replace(config, tie_embeddings=False)
    return config


def check_vocabulary(config: ModelConfig, tokenizer, folder: str | Path) -> None:
    """Raise `UserError` if the folder's tokenizer has ids that the model's embedding has no rows for."""
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"{folder}: its tokenizer has {tokenizer.vocab_size} ids, more than the model's {config.vocab_size}; copy "
            "the one there that the model was trained with, or give the model more rows (python -m minillm resize)"
        )


def _find_weights(folder: str | Path, config: ModelConfig) -> dict[str, tensor_files.Place]:
    """Where each tensor is stored, by key. Raises `UserError` listing everything that does not fit the config."""
    if quantized := Contents(read_config(folder), f"{folder}/config.json").get("quantization_config", dict):
        method = quantized.get("quant_method")
        raise UserError(
            f"{folder}: its weights are quantized ({method!r:.40}), as config.json says; get them unquantized"
        )
    places = tensor_files.find_weights(folder)
    tied = {"lm_head.weight"} if config.tie_embeddings else set()  # a second copy of the embedding
    tables = {key for key in places if key.endswith("rotary_emb.inv_freq")}  # we compute these
    places = {key: place for key, place in places.items() if key not in tied | tables}
    if config.n_layers > len(places):  # listing what is missing would take long
        raise UserError(f"{folder}: {config.n_layers:,} layers, as config.json says, in {len(places):,} tensors")
    whole = [f"{key} ({place.dtype})" for key, place in places.items() if not place.dtype.is_floating_point]
    if whole:
        raise UserError(f"{folder}: holds whole numbers where weights belong: {', '.join(whole)}; get a whole copy")
    source = f"{folder}: read as its config.json says"
    tensor_files.match_tensors(shapes_of(config), {key: place.shape for key, place in places.items()}, source)
    return places


def _usual_dtype(places: dict[str, tensor_files.Place], folder: str | Path) -> torch.dtype:
    """What a folder's weights are read as unless another dtype is asked for: the embedding's, so that a model has one.

    Prints a line if that rounds others.
    """
    dtype = places["model.embed_tokens.weight"].dtype
    rounded = [key for key, place in places.items() if torch.promote_types(place.dtype, dtype) != dtype]
    if rounded:
        count = f"{len(rounded)} tensor{'s' if len(rounded) > 1 else ''}, as {rounded[0]} ({places[rounded[0]].dtype})"
        print(f"{folder}: {count}: rounded to {dtype}, which the embedding has, unless another dtype is asked for")
    return dtype


def open_folder(folder: str | Path) -> StoredModel:
    """The model of a folder; only the headers have been read and checked."""
    config = load_config(folder)
    places = _find_weights(folder, config)

    def read(key: str, dtype: torch.dtype) -> Tensor:
        tensor = places[key].read(dtype)
        tensor_files.check_finite(key, tensor, folder, places[key].read)
        return tensor

    written = read_config(folder)
    special_ids = {name: written[name] for name in SPECIAL_IDS if written.get(name) is not None}
    return StoredModel(config, _usual_dtype(places, folder), read, special_ids)


@torch.no_grad()
def fill_model(model: Transformer, folder: str | Path) -> None:
    """Give a model, which may be dealt out over ranks, the weights of a folder, in the model's dtype.

    Each rank reads what it holds, and no other byte of the tensors. Raises `UserError` listing all that does not fit.
    """
    check_parameters(model.config, folder)
    places = _find_weights(folder, model.config)
    for name, parameter in model.named_parameters():
        key = export_name(name)
        read = partial(places[key].read, part=shards.place_of(parameter))
        numbers = read(parameter.dtype)
        tensor_files.check_finite(key, numbers, folder, read)
        shards.local(parameter).copy_(numbers)


def load_model(
    folder: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    config: ModelConfig | None = None,
    base_bits: int | None = None,
) -> Transformer:
    """Load a model folder tensor by tensor: memory holds the model and one tensor on its way to the device.

    dtype: convert floating weights to it (None: as the embedding is stored). config: to use instead of the folder's,
    e.g. with dropout or a longer context. base_bits: 16, 8 or 4: quantize while loading (see `minillm.model.quant`).
    Raises `UserError` listing everything that does not fit.
    """
    if base_bits is not None:
        quant.check_bits(base_bits)
    if config is None:
        config = load_config(folder)
    else:
        check_parameters(config, folder)
    places = _find_weights(folder, config)
    dtype = dtype or _usual_dtype(places, folder)
    model = empty_model(config)
    loaded = {}
    for name in model.state_dict():
        if (key := export_name(name)) in places:
            tensor = places[key].read(dtype)
            tensor_files.check_finite(key, tensor, folder, places[key].read)
            tensor = tensor.to(device)
            if base_bits is None or not quant.take_weight(model, name, tensor, base_bits):
                loaded[name] = tensor
    model.load_state_dict(loaded, strict=False, assign=True)
    model.tie()
    model.build_rotation()
    if base_bits is not None:
        quant.prepare_base(model)
    return model
