"""Putting an adapter into a model and taking it out.

An `Adapter` is a set of modules, each with its place in the model ("layers.0.self_attn.q_proj"). While it is active
they replace the base's own modules there; with none active the model is the base again, bit for bit. So a model can
have any number of adapters over one base, and shows the parameters of the active one only.
"""

import contextlib
import copy
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from minillm.base.errors import UserError
from minillm.distributed.shards import is_sharded_model
from minillm.model.quant import QuantLinear
from minillm.model.transformer import Transformer
from minillm.tuning.bottleneck import Bottleneck
from minillm.tuning.ia3 import Ia3Linear
from minillm.tuning.lora import LoraEmbedding, LoraLinear
from minillm.tuning.options import VIRTUAL, TuningConfig
from minillm.tuning.target_modules import chosen_targets, default_targets, modules_to_save, train_layers
from minillm.tuning.virtual_tokens import attach_virtual


@dataclass
class Adapter:
    """Modules by their place in the model, the base's modules there, and which model they were made for."""

    options: TuningConfig
    parts: dict[str, nn.Module]
    base: dict[str, nn.Module] = field(default_factory=dict)
    tied: bool = False  # whether the base's head shares the embedding's weight
    merged: bool = False
    base_folder: Path | None = None
    base_sha256: str | None = None

    @property
    def worth_merging(self) -> bool:
        """Whether it can be merged and should be: merging a quantized base would give up the memory it saves."""
        return self.options.mergeable and not self.options.base_bits

    @property
    def leaves_base(self) -> bool:
        """Whether the base is as it was once the adapter is off: none of its own modules is trained in full."""
        return not any(part is self.base[path] for path, part in self.parts.items())

    def parameters(self) -> dict[str, Tensor]:
        """What is trained, by its name in the model; a parameter that two parts share comes under both names."""
        return {
            f"{path}.{name}": parameter
            for path, part in self.parts.items()
            for name, parameter in part.named_parameters(remove_duplicate=False)
            if not name.startswith("base_layer.")
        }


def attach(
    model: Transformer, options: TuningConfig, seed: int = 0, name: str = "default", keep_base: bool = True
) -> Adapter:
    """Freeze the model, add what `options.tune` trains, and make it active. Raises `UserError` for unknown modules.

    Initial values depend on the seed alone. keep_base False: modules that are trained in full are the base's own, not
    copies, which saves memory but means that the base cannot be restored.
    """
    adapters = vars(model).setdefault("adapters", {})
    if name in adapters:
        raise UserError(f"adapter {name!r} is there already; give the new one another name")
    set_adapter(model, None)
    model.requires_grad_(False)
    parts = _build(model, options, seed, keep_base)
    base = {path: _at(model, path) for path in parts}
    if options.tune in ("lora", "dora", "ia3"):  # what is saved names them
        options = dataclasses.replace(options, target_modules=default_targets(model, options))
    adapters[name] = Adapter(options, parts, base, model.config.tie_embeddings)
    set_adapter(model, name)
    return adapters[name]


def active_adapter(model: nn.Module) -> Adapter | None:
    """The adapter that a model computes with now; None: the base alone, also if it never had an adapter."""
    return vars(model).get("active")


def set_adapter(model: Transformer, name: str | None) -> None:
    """Compute with the adapter of this name from now on; None: with the base alone."""
    adapters = vars(model).get("adapters", {})
    if name is not None and name not in adapters:
        raise UserError(f"adapter {name!r}: no such adapter; there are {', '.join(adapters) or 'none'}")

    # the base's own modules come back …
    before = active_adapter(model)
    if before is not None:
        before.merged = False
        _place(model, before.base)

    # … and the new adapter's take their places
    model.active = None if name is None else adapters[name]
    if name is not None:
        _place(model, adapters[name].parts)
    _mark_tying(model)


def remove_adapter(model: Transformer, name: str) -> None:
    """Forget an adapter; if it was active, the model computes with the base alone."""
    if model.adapters[name] is active_adapter(model):
        set_adapter(model, None)
    del model.adapters[name]


def merge(model: Transformer, keep: bool = True) -> None:
    """Merge the active adapter into plain layers, computed in fp32. `unmerge` restores base and adapter unchanged.

    keep False: free the adapter and the modules it replaces, layer by layer, to save memory. A quantized base is
    dequantized. If the merge unties embedding and head, the config says so. Raises `UserError` if there is nothing to
    merge, if it is merged already, or if the method cannot be merged.
    """
    adapter = active_adapter(model)
    if adapter is None:
        raise UserError("merge: no adapter is active")
    if adapter.merged:
        raise UserError("merge: the adapter is merged already; a second time would apply it twice")
    if not adapter.options.mergeable:
        raise UserError(f"merge: --tune {adapter.options.tune} adds what no plain weight can hold; keep the adapter")

    # each part gives a plain layer; one that is trained in full is plain already
    for path in [*adapter.parts]:
        part = adapter.parts[path] if keep else adapter.parts.pop(path)
        _place(model, {path: part.merged() if hasattr(part, "merged") else part})
        if not keep:
            del adapter.base[path]

    # the rest of a quantized base
    quantized = [path for path, module in model.named_modules() if isinstance(module, QuantLinear)]
    for path in quantized:
        layer = model.get_submodule(path)
        _place(model, {path: layer.dequantize()})
        if keep:
            adapter.base[path] = layer
    adapter.merged = True
    _mark_tying(model)
    if not keep:
        remove_adapter(model, _name_of(model, adapter))


def unmerge(model: Transformer) -> None:
    """Undo `merge`, bit for bit: the base's own modules were kept."""
    adapter = active_adapter(model)
    if adapter is None or not adapter.merged:
        raise UserError("unmerge: no adapter is merged")
    set_adapter(model, _name_of(model, adapter))


@contextlib.contextmanager
def merged(model: Transformer) -> Iterator[None]:
    """Context in which the active adapter, if any, is merged where that is worth it: plain layers generate faster.

    A model that is dealt out over ranks stays as it is: its layers are gathered as they were when it was shared out.
    """
    adapter = active_adapter(model)
    if adapter is None or adapter.merged or not adapter.worth_merging or is_sharded_model(model):
        yield
        return
    merge(model)
    try:
        yield
    finally:
        unmerge(model)


@contextlib.contextmanager
def switched_off(model: Transformer) -> Iterator[None]:
    """Context in which the model computes with its base alone; the adapter that was active is so again afterwards."""
    adapter = active_adapter(model)
    if adapter is None:
        yield
        return
    was_merged = adapter.merged
    set_adapter(model, None)
    try:
        yield
    finally:
        set_adapter(model, _name_of(model, adapter))
        if was_merged:
            merge(model)


def _name_of(model: Transformer, adapter: Adapter) -> str:
    return next(name for name, other in model.adapters.items() if other is adapter)


def _at(model: nn.Module, path: str) -> nn.Module | None:
    """The base's module at a place; it has none where virtual tokens go."""
    return None if path == "virtual" else model.get_submodule(path)


def _place(model: nn.Module, modules: dict[str, nn.Module]) -> None:
    """Put modules into their places in the model, on its device and in its mode."""
    for path, module in modules.items():
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, module)
        if module is None:
            continue
        device = model.norm.weight.device
        if any(tensor.device != device for tensor in (*module.parameters(), *module.buffers())):
            module.to(device)  # else not: it would take from sharded parameters what is noted of them (`shards.Cut`)
        module.train(model.training)


def _mark_tying(model: Transformer) -> None:
    """Update the config's `tie_embeddings`, since a merge may have untied embedding and head."""
    adapter = active_adapter(model)
    if adapter is not None and adapter.tied:
        tied = not adapter.merged or model.lm_head.weight is model.embed_tokens.weight
        model.config = dataclasses.replace(model.config, tie_embeddings=tied)


# ---- its parts


def _build(model: Transformer, options: TuningConfig, seed: int, keep_base: bool) -> dict[str, nn.Module]:
    """The parts of a new adapter, by place; with a score head that is trained in full, whatever the method."""
    head = ["score"] if model.config.score_head else []
    return _parts_of_method(model, options, seed, keep_base) | _trained_in_full(model, head, keep_base, tied=False)


def _parts_of_method(model: Transformer, options: TuningConfig, seed: int, keep_base: bool) -> dict[str, nn.Module]:
    """What the method itself adds or trains, by place."""
    tune = options.tune
    if tune in VIRTUAL:
        encoder = None if options.encoder == "auto" else options.encoder
        attach_virtual(model, tune, options.n_virtual, encoder=encoder, hidden=options.encoder_dim, seed=seed)
        return {"virtual": model.virtual}
    if tune == "freeze":
        return _trained_in_full(model, train_layers(model, options.train_layers or ""), keep_base, tied=True)

    # few new parameters on the targets
    if tune == "adapter":
        targets = [f"layers.{i}.{name}" for i in range(len(model.layers)) for name in ("self_attn", "mlp")]
    else:
        targets = chosen_targets(model, options)
    generator = torch.Generator().manual_seed(seed)
    parts = {path: _wrapped(model, path, options, generator) for path in targets}

    # and some modules in full besides
    saved = modules_to_save(model, options.modules_to_save, targets)
    tied = options.ensure_weight_tying
    if tied is None:
        tied = {"embed_tokens", "lm_head"} <= set(saved)
    return parts | _trained_in_full(model, saved, keep_base, tied)


def _wrapped(model: Transformer, path: str, options: TuningConfig, generator: torch.Generator) -> nn.Module:
    """The module that replaces the base's module at `path`, and calls it. Raises `UserError` for another kind."""
    base = model.get_submodule(path)
    tune = options.tune
    if tune == "adapter":
        return Bottleneck(base, model.config.dim, options.bottleneck_dim, generator)
    if type(base) not in (nn.Linear, QuantLinear, nn.Embedding):
        raise UserError(
            f"--tune {tune}: {path} is a {type(base).__name__}, not a plain linear layer, and cannot be adapted; leave "
            "it out of --target_modules"
        )
    if tune == "ia3":
        if not path.startswith("layers."):
            raise UserError(f"--target_modules {path}: IA3 scales layers of attention and the feed-forward network")
        return Ia3Linear(base, on_input=path.endswith("down_proj"))
    rank, scaling, dora = options.lora_rank, options.lora_scaling, tune == "dora"
    if path == "embed_tokens":
        return LoraEmbedding(base, rank, scaling, dora, generator)
    dropout = 0.0 if path == "lm_head" else options.lora_dropout  # the loss reads only the head's weight
    return LoraLinear(base, rank, scaling, dropout, dora, generator)


def _trained_in_full(model: Transformer, paths: list[str], keep_base: bool, tied: bool) -> dict[str, nn.Module]:
    """The modules at these places, or copies of them, to be trained; tied: a head tied to the embedding stays so."""
    pair = ("embed_tokens", "lm_head")
    one_weight = model.config.tie_embeddings and any(path in pair for path in paths)
    if one_weight and tied:  # who trains one of them trains both
        paths = [*(path for path in paths if path not in pair), *pair]
    parts = {path: model.get_submodule(path) for path in paths}
    if keep_base or (one_weight and not tied):
        parts = {path: copy.deepcopy(module) for path, module in parts.items()}
    if one_weight and tied:
        parts["lm_head"].weight = parts["embed_tokens"].weight
    for module in parts.values():
        module.requires_grad_(True)
    return parts
