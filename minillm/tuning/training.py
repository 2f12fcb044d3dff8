"""What the training scripts need of tuning: the model, defaults that depend on the method, and what to print."""

import dataclasses
import json
from pathlib import Path

import torch

from minillm import UserError, huggingface, optim
from minillm.config import ModelConfig
from minillm.model import Transformer
from minillm.tuning.attach import active_adapter, attach, default_targets, targets
from minillm.tuning.folders import base_sha256
from minillm.tuning.options import VIRTUAL, TuningConfig
from minillm.tuning.peft_format import read_tensors


def choose_optimizer(cfg, dim: int, share: float = 1.0):
    """A script's configuration with optimizer, peak learning rate and weight decay filled in where they are None.

    Existing weights are trained as in pretraining, at `share` of its rate. New parameters are trained by AdamW: Muon
    makes all directions of an update equally large, which has no meaning for a matrix that is one factor of a product.
    Weight decay pulls towards zero, where LoRA and adapters equal the base; IA3 does so at one, virtual tokens nowhere.
    """
    whole = cfg.tune in ("full", "freeze")
    kind = cfg.optimizer or ("muon" if whole else "adamw")
    lr = optim.default_lr(kind, dim) * share if whole else optim.TUNING_LR[cfg.tune] / dim
    decay = 0.0 if cfg.tune in ("ia3", *VIRTUAL) else 0.1
    chosen = dict(optimizer=kind, lr=lr, weight_decay=decay)
    return dataclasses.replace(cfg, **{name: v for name, v in chosen.items() if getattr(cfg, name) is None})


def fingerprints(cfg: TuningConfig, base: Path | None) -> dict[str, str]:
    """What must not change during a run that trains an adapter: its base and its options; {} for a full run."""
    if cfg.tune == "full":
        return {}
    options = {f.name: getattr(cfg, f.name) for f in dataclasses.fields(TuningConfig)}
    return {"base model": base_sha256(base), "tuning": json.dumps(options)}


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
        _check_rank(cfg, model)
    adapter = attach(model, cfg, cfg.seed, keep_base=False)
    adapter.base_folder, adapter.base_sha256 = init.absolute(), base_sha256(init)
    if source is not None:
        read_tensors(adapter, source)
    return model


def _check_rank(cfg: TuningConfig, model: Transformer) -> None:
    """Raise `UserError` if the rank is above the smaller side of every targeted matrix."""
    sides = {}
    for path in targets(model, default_targets(cfg)):
        layer = model.get_submodule(path)
        is_linear = hasattr(layer, "in_features")
        sides[path] = min(layer.in_features, layer.out_features) if is_linear else min(layer.weight.shape)
    largest = max(sides, key=sides.get)
    if cfg.lora_rank > sides[largest]:
        limit = f"at most {sides[largest]}, the smaller side of {largest}"
        raise UserError(f"--lora_rank {cfg.lora_rank}: {limit}; a larger one adds nothing but memory, so lower it")


def n_trained(model: Transformer) -> int:
    """How many parameters are trained."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def describe_parameters(model: Transformer) -> str:
    """Number of parameters, and of trained ones, in a phrase for a run's start."""
    whole, trained = model.config.n_parameters(), n_trained(model)
    if active_adapter(model) is None:
        return f"{whole:,} parameters"
    return f"{trained:,} parameters trained, {trained / whole:.2%} of the base's {whole:,}"


def flops_per_token(model: Transformer, seq_len: int) -> int:
    """Floating-point operations of forward and backward for one token, as `ModelConfig.flops_per_token` counts them.

    A frozen weight gets no gradient, so it takes 4 operations instead of 6; a new parameter takes 6.
    """
    adapter, flops = active_adapter(model), model.config.flops_per_token(seq_len)
    if adapter is None:
        return flops
    own = 2 if adapter.options.tune == "freeze" else 6
    return flops - model.config.flops_per_token(0) // 3 + own * n_trained(model)
