"""The model a run starts from: found, checked, loaded, given its adapter; and what to say of it."""

import dataclasses
from pathlib import Path

import torch

from minillm.base.errors import UserError
from minillm.checkpoint import huggingface, run_folder, train_state
from minillm.datasets.token_bins import parse_mixture
from minillm.model import size
from minillm.model.config import ModelConfig
from minillm.model.transformer import Transformer
from minillm.tokenizer.tokenizer import Tokenizer
from minillm.training import schedule
from minillm.tuning import options
from minillm.tuning.adapter import active_adapter, attach
from minillm.tuning.folders import base_sha256
from minillm.tuning.options import VIRTUAL
from minillm.tuning.peft_format import read_tensors
from minillm.tuning.target_modules import check_rank


def init_is_gone(cfg) -> bool:
    """Whether --init_from names a model that does not exist (any more)."""
    return bool(cfg.init_from) and not Path(cfg.init_from).exists()


def find_init(cfg) -> Path | None:
    """The model folder of --init_from, checked; None without one.

    If it is gone, a run that started from it and trains all weights takes shape and tokenizer from its own checkpoint.
    """
    if not cfg.init_from:
        return None
    begun = cfg.tune == "full" and cfg.resume != "none" and run_folder.step_folders(cfg.out)
    if begun and init_is_gone(cfg):
        at = run_folder.resume_from(cfg.out, cfg.resume)
        own = run_folder.resolve_checkpoint(at, log=lambda line: None)  # `Run` reports the broken ones
        if train_state.read_state(own)["config"]["init_from"] == cfg.init_from:
            return own
    return run_folder.resolve_checkpoint(cfg.init_from)


def check_tokenizer(model: Path, data: str) -> None:
    """Raise `UserError` unless the data was prepared with the model folder's tokenizer; a raw .bin is not checked."""
    first = parse_mixture(data)[0][0]
    if first.is_dir() and Tokenizer.load(first).sha256 != Tokenizer.load(model).sha256:
        raise UserError(
            f"--init_from {model} has another tokenizer than {data}; prepare the data with the model's own: "
            f"data/prepare.py --tokenizer {model}"
        )


def choose_optimizer(cfg, dim: int, share: float = 1.0):
    """A script's configuration with optimizer, peak learning rate and weight decay filled in where they are None.

    Existing weights are trained as in pretraining, at `share` of its rate. New parameters are trained by AdamW: Muon
    makes all directions of an update equally large, which has no meaning for a matrix that is one factor of a product.
    Weight decay pulls towards zero, where LoRA and adapters equal the base; IA3 does so at one, virtual tokens nowhere.
    """
    whole = cfg.tune in ("full", "freeze")
    kind = cfg.optimizer or ("muon" if whole else "adamw")
    lr = schedule.default_lr(kind, dim) * share if whole else options.TUNING_LR[cfg.tune] / dim
    decay = 0.0 if cfg.tune in ("ia3", *VIRTUAL) else 0.1
    chosen = dict(optimizer=kind, lr=lr, weight_decay=decay)
    return dataclasses.replace(cfg, **{name: v for name, v in chosen.items() if getattr(cfg, name) is None})


def load_model(cfg, shape: ModelConfig, init: Path, source: Path | None, device: torch.device) -> Transformer:
    """The model to train, in fp32: that of the checkpoint `source`, else of `init`.

    With --tune it is always that of `init`, frozen and perhaps quantized, with an adapter: new (by the seed), or from
    `source`. Raises `UserError` for a rank above that of every targeted matrix.
    """
    tuned = cfg.tune != "full"
    dtype = None if cfg.base_bits else torch.float32  # do not widen to fp32 what is quantized anyway
    where = dict(device=device, dtype=dtype, base_bits=cfg.base_bits)
    model = huggingface.load_model(init if tuned else source or init, config=shape, **where)
    if not tuned:
        return model
    if cfg.tune in ("lora", "dora"):
        check_rank(cfg, model)
    adapter = attach(model, cfg, cfg.seed, keep_base=False)
    adapter.base_folder, adapter.base_sha256 = init.absolute(), base_sha256(init)
    if source is not None:
        read_tensors(adapter, source)
    return model


def n_trained(model: Transformer) -> int:
    """How many parameters are trained."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def describe_parameters(model: Transformer) -> str:
    """Number of parameters, and of trained ones, in a phrase for a run's start."""
    whole, trained = size.n_parameters(model.config), n_trained(model)
    if active_adapter(model) is None:
        return f"{whole:,} parameters"
    return f"{trained:,} parameters trained, {trained / whole:.2%} of the base's {whole:,}"


def flops_per_token(model: Transformer, seq_len: int) -> int:
    """Floating-point operations of forward and backward for one token, as `size.flops_per_token` counts them.

    A frozen weight gets no gradient, so it takes 4 operations instead of 6; a new parameter takes 6.
    """
    adapter, flops = active_adapter(model), size.flops_per_token(model.config, seq_len)
    if adapter is None:
        return flops
    own = 2 if adapter.options.tune == "freeze" else 6
    return flops - size.flops_per_token(model.config, 0) // 3 + own * n_trained(model)
