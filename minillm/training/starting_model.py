"""The model a run starts from: where it comes from, its checks, its adapter, and what to print of it."""

import contextlib
import dataclasses
import os
import shlex
from pathlib import Path
from typing import NamedTuple

import torch

from minillm.base.errors import UserError
from minillm.checkpoint import architectures, huggingface, run_folder, train_state
from minillm.datasets.token_bins import parse_mixture
from minillm.distributed.hosts import differences
from minillm.distributed.ranks import Ranks
from minillm.distributed.shards import whole_shape
from minillm.model import size
from minillm.model.config import ModelConfig
from minillm.model.transformer import Transformer
from minillm.tokenizer.tokenizer import Tokenizer
from minillm.training import sharding
from minillm.training.config import NextTokenOptions
from minillm.training.optim import default_lr
from minillm.tuning import folders
from minillm.tuning.adapter import active_adapter, attach
from minillm.tuning.options import VIRTUAL
from minillm.tuning.peft_format import read_tensors
from minillm.tuning.target_modules import check_rank

# ---- before the run: which model, and how it is trained


class Start(NamedTuple):
    """What a run that trains an existing model begins with."""

    init: Path  # the model's folder
    model_config: ModelConfig
    tokenizer: Tokenizer

    def fingerprints(self, training_config, rows, *order: object) -> dict[str, str]:
        """What must not change while a run goes on: data, their order, tokenizer and model.

        rows: the samples, with a `fingerprint`. order: what the order of these depends on besides batch size, sequence
        length and seed.
        """
        template = self.tokenizer.resolve_template(training_config.template)
        order = (training_config.batch_size, training_config.seq_len, training_config.seed, *order)
        return {
            "data": train_state.fingerprint(rows.fingerprint, template),
            train_state.ORDER: train_state.fingerprint(*order),
            "tokenizer": self.tokenizer.sha256,
            **fingerprints(training_config, self.model_config, self.init),
        }

    def turns(self, n_turns: int) -> dict[str, int]:
        """What a checkpoint records of the turns that its model knows, after prompts of at most `n_turns`.

        Learning from its own answers or from pairs makes a model forget no conversations, so the turns that it was
        taught before count too. Nothing is recorded for a model made elsewhere, whose turns are not known.
        """
        if not (self.init / "resume").is_dir():
            return {}
        return {"turns": max(n_turns, train_state.read_state(self.init).get("turns", 0))}


def find_start(
    training_config,
    ranks: Ranks,
    lr_scale: float,
    adapter_lr_scale: float = 1.0,
    score_head: bool = False,
):
    """(the options with optimizer, learning rate and weight decay filled in, the `Start`) of a run from --init_from.

    lr_scale, adapter_lr_scale: see `choose_optimizer`. score_head: whether a reward model is trained, from a language
    model or from another reward model, which is refused without.
    Raises `UserError` if model and tokenizer do not belong together, if the machine cannot hold what is trained, or if
    --seq_len is beyond the model's context.
    """
    init = find_init(training_config, ranks)
    stored = huggingface.load_config(init, with_score_head=None if score_head else False)
    model_config = dataclasses.replace(stored, dropout=training_config.dropout, score_head=score_head)
    tokenizer = Tokenizer.load(init)
    huggingface.check_vocabulary(model_config, tokenizer, init)
    training_config = sharding.choose_layout(training_config, model_config, ranks)
    training_config = choose_optimizer(training_config, model_config.dim, lr_scale, adapter_lr_scale)
    if training_config.seq_len > model_config.max_seq_len:
        raise UserError(
            f"--seq_len {training_config.seq_len}: the model's longest context is {model_config.max_seq_len}; lower "
            "it, or take a model pretrained with a longer --max_seq_len"
        )
    return training_config, Start(init, model_config, tokenizer)


def find_init(training_config, ranks: Ranks) -> Path | None:
    """The model folder of --init_from, checked by all ranks together; None without one.

    A run that goes on takes the checkpoint that it began with, though --init_from may have newer ones by now. If it is
    gone, a run that trains all weights takes shape and tokenizer from its own checkpoint. Raises `UserError` on every
    rank if machines hold different ones, or if an adapter's base is gone.
    """
    if not training_config.init_from:
        return None
    init = training_config.init_from
    if ranks.max(len(run_folder.step_folders(training_config.out))):  # alike on all ranks
        # `Run` reports the broken ones
        own = run_folder.resolve_checkpoint(training_config.out, log=lambda line: None, ranks=ranks)
        init = _begun_with(training_config, own, ranks)
        if init == own:
            return own
    if not ranks.max(int(Path(init).exists())):  # else the machines that lack it are named
        raise UserError(f"--init_from {init}: no such folder; give a run, a checkpoint or a Hugging Face model folder")
    init = run_folder.resolve_checkpoint(init, ranks=ranks)
    if ranks.world > 1:
        lines = differences(ranks, {"weights": folders.base_sha256(init)[:12]})
        if lines:
            raise UserError(
                f"--init_from {training_config.init_from}: the machines hold different models ({'; '.join(lines)}): "
                "copy the same to all of them"
            )
    return init


def _begun_with(training_config, own: Path, ranks: Ranks) -> Path | str:
    """The folder whose model a run began with, from its checkpoint `own`; where that is gone, `own` if it will do.

    --init_from itself, if another one was given then, or the checkpoint does not say. Raises `UserError` for an
    adapter's base that is gone from a run which is there.
    """
    saved = train_state.read_state(own)
    if saved.get("config", {}).get("init_from") != training_config.init_from:
        return training_config.init_from
    is_gone = bool(ranks.max(init_is_gone(training_config)))
    recorded = saved.get("started_from")
    init = Path(os.path.normpath(Path(training_config.out) / recorded)) if recorded else None
    if init is not None and not ranks.max(not init.is_dir()):
        return init
    if training_config.tune == "full":
        return own if is_gone else training_config.init_from
    if init is not None and not is_gone:
        raise UserError(
            f"--init_from {training_config.init_from}: {own} is an adapter over {init}, which is not there any more; "
            "bring it back, or begin anew in another --out"
        )
    return training_config.init_from


def context_before(training_config, ranks: Ranks) -> int:
    """The longest context of the model in a run's newest checkpoint, on every rank; 0 for a new run."""
    longest = 0
    if ranks.main:
        for own in run_folder.step_folders(training_config.out)[-1:]:
            with contextlib.suppress(UserError):  # `Run` reports a broken one
                longest = huggingface.load_config(own).max_seq_len
    return ranks.exchange(longest)[0]


def init_is_gone(training_config) -> bool:
    """Whether --init_from names a model that does not exist (any more)."""
    return bool(training_config.init_from) and not Path(training_config.init_from).exists()


def check_row_fits(training_config, model_config: ModelConfig, init: Path | None) -> None:
    """Raise `UserError` for rows longer than the context, since a single document may fill a row."""
    seq_len = training_config.seq_len
    n_virtual = training_config.virtual_positions
    if seq_len + n_virtual <= model_config.max_seq_len:
        return
    virtual = f" and --n_virtual {n_virtual}" if n_virtual else ""
    remedy = "raise --max_seq_len"
    if init:
        remedy = f"extend the context by --max_seq_len {seq_len} (see --rope_scaling)"
    raise UserError(
        f"--seq_len {seq_len}{virtual}: the model's longest context is {model_config.max_seq_len} tokens, "
        f"and a row may be all one document; lower it, or {remedy}"
    )


def check_tokenizer(model: Path, data: str) -> None:
    """Raise `UserError` unless the data was prepared with the model folder's tokenizer; a raw .bin is not checked."""
    first_folder, _ = parse_mixture(data)[0]
    if not first_folder.is_dir():
        return
    if Tokenizer.load(first_folder).sha256 != Tokenizer.load(model).sha256:
        raise UserError(
            f"--init_from {model} has another tokenizer than {data}; prepare the data with the model's own: "
            f"data/prepare.py --tokenizer {shlex.quote(str(model))}"
        )


def choose_optimizer(training_config, dim: int, lr_scale: float = 1.0, adapter_lr_scale: float = 1.0):
    """A script's options with optimizer, peak learning rate and weight decay filled in where they are None.

    lr_scale: what the learning rate of pretraining is multiplied by for existing weights; adapter_lr_scale: what an
    adapter's rate for instructions is multiplied by.

    New parameters are trained by AdamW: Muon makes all directions of an update equally large, which has no meaning for
    a matrix that is one factor of a product.
    Weight decay pulls towards zero, where LoRA and adapters equal the base; IA3 does so at one, virtual tokens nowhere.
    """
    tune = training_config.tune
    existing_weights = tune in ("full", "freeze")
    kind = training_config.optimizer
    lr = training_config.lr
    decay = training_config.weight_decay
    if kind is None:
        kind = "muon" if existing_weights else "adamw"
    if lr is None:
        lr = default_lr(kind, tune, dim) * (lr_scale if existing_weights else adapter_lr_scale)
    if decay is None:
        decay = 0.0 if tune in ("ia3", *VIRTUAL) else 0.1
    return dataclasses.replace(training_config, optimizer=kind, lr=lr, weight_decay=decay)


def fingerprints(training_config, model_config: ModelConfig, init: Path | None) -> dict[str, str]:
    """What must not change while a run goes on: architecture, with --tune base and method, and what the loss adds."""
    of_loss = training_config.loss_fingerprints if isinstance(training_config, NextTokenOptions) else {}
    architecture = train_state.fingerprint(architectures.to_hf(dataclasses.replace(model_config, trained_seq_len=None)))
    return {"architecture": architecture, **of_loss, **folders.fingerprints(training_config, init)}


# ---- the model itself


def make_model(
    training_config, model_config: ModelConfig, init: Path | None, source: Path | None, ranks: Ranks
) -> Transformer:
    """The model to train, in fp32: that of the checkpoint `source`, else of `init`, else a new one drawn by the seed.

    With --tune it is always that of `init`, frozen and perhaps quantized, with an adapter, which is new (by the seed)
    or comes from `source`. Of a model that is shared out over ranks, each gets its part. Raises `UserError` for a LoRA
    rank above that of every targeted matrix.
    """
    device = sharding.loading_device(training_config, ranks)
    if training_config.tune != "full":
        if training_config.base_bits is not None:  # a quantized base stays whole
            device = ranks.device
        model = _adapted(training_config, model_config, init, source, device)
        sharding.shard(training_config, model, ranks)
    elif sharding.is_divided(training_config) and not model_config.score_head:
        model = sharding.made_in_shards(training_config, model_config, source or init, ranks)
    elif source or init:
        model = _load(source or init, model_config, training_config.seed, device=device, dtype=torch.float32)
        sharding.shard(training_config, model, ranks)
    else:
        model = Transformer(model_config)
        model.init_weights(training_config.seed)
        model = model.to(device)
    model.checkpoint_activations = training_config.checkpoint_activations
    return model


def _load(folder: Path, model_config: ModelConfig, seed: int, **how) -> Transformer:
    """The model of a folder; a score head that it does not have yet is a new one, drawn by the seed."""
    if not model_config.score_head:
        return huggingface.load_model(folder, config=model_config, **how)
    stored = huggingface.load_config(folder, with_score_head=None)
    wanted = dataclasses.replace(model_config, score_head=stored.score_head, tie_embeddings=stored.tie_embeddings)
    model = huggingface.load_model(folder, config=wanted, **how)
    if not stored.score_head:
        model.give_score_head(seed)
    return model


def _adapted(
    training_config, model_config: ModelConfig, init: Path, source: Path | None, device: torch.device
) -> Transformer:
    """The model of `init`, frozen, with an adapter: see `make_model`."""
    bits = training_config.base_bits
    dtype = None if bits else torch.float32  # weights that are then quantized need not become fp32 first
    model = _load(init, model_config, training_config.seed, device=device, dtype=dtype, base_bits=bits)
    if training_config.tune in ("lora", "dora"):
        check_rank(training_config, model)
    adapter = attach(model, training_config, training_config.seed, keep_base=False)
    adapter.base_folder = init.absolute()
    adapter.base_sha256 = folders.base_sha256(init)
    if source is not None:
        read_tensors(adapter, source)
    return model


def n_trained(model: Transformer) -> int:
    """How many parameters are trained."""
    return sum(whole_shape(p).numel() for p in model.parameters() if p.requires_grad)


def describe_parameters(model: Transformer) -> str:
    """Number of parameters, and of trained ones, in a phrase for a run's start."""
    n_all = size.n_parameters(model.config)
    if active_adapter(model) is None:
        return f"{n_all:,} parameters"
    return f"{n_trained(model):,} parameters trained, {n_trained(model) / n_all:.2%} of the base's {n_all:,}"


def flops_per_token(model: Transformer, seq_len: float) -> float:
    """Floating-point operations of forward and backward for one token, as `size.flops_per_token` counts them.

    A frozen weight gets no gradient, so it takes 4 operations instead of 6; a new parameter takes 6.
    """
    flops = size.flops_per_token(model.config, seq_len)
    adapter = active_adapter(model)
    if adapter is None:
        return flops
    weight_gradients = size.flops_per_token(model.config, 0) // 3  # 2 of 6 operations a weight
    per_trained = 2 if adapter.options.tune == "freeze" else 6  # freeze: weights of the base, whose other 4 are in
    return flops - weight_gradients + per_trained * n_trained(model)
