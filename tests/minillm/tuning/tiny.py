"""A random tiny model, ours and transformers' with the same weights, and what peft calls our parameters."""

import warnings
from pathlib import Path

import torch

from minillm.checkpoint import huggingface
from minillm.model.config import ModelConfig
from minillm.model.transformer import Transformer

IDS = torch.randint(0, 50, (2, 20), generator=torch.Generator().manual_seed(3))
TARGETS = torch.randint(0, 50, (2, 20), generator=torch.Generator().manual_seed(4))


def base(tie: bool = False, bias: bool = False, seed: int = 1, **shape) -> Transformer:
    """Grouped queries, weights of N(0, 0.1²): at 0.02 faults would hide."""
    shape = dict(vocab_size=50, dim=16, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=32, max_seq_len=64) | shape
    model = Transformer(ModelConfig(**shape, tie_embeddings=tie, qkv_bias=bias))
    model.init_weights()
    shake(dict(model.named_parameters()), seed)
    return model


def shake(parameters: dict[str, torch.Tensor], seed: int = 5) -> None:
    """Add N(0, 0.1²) to each, by its name's order."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name in sorted(parameters):
            parameter = parameters[name]
            parameter += torch.randn(parameter.shape, generator=generator) * 0.1


def is_plain(model: Transformer) -> bool:
    """Whether it has the modules of a model without any adapter, and no others."""
    return [(name, type(m)) for name, m in model.named_modules()] == [
        (name, type(m)) for name, m in Transformer(model.config).named_modules()
    ]


def write(model: Transformer, folder: Path) -> Path:
    folder.mkdir(parents=True)
    huggingface.save_model(model, folder)
    return folder


def theirs(folder: Path):
    """The same model in transformers."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)


def with_peft(folder: Path, config):
    """transformers' model with a new adapter of peft's, shaken."""
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(theirs(folder), config)
    shake({name: p for name, p in model.named_parameters() if p.requires_grad})
    return model


def save_peft(model, folder: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
    return folder


def load_peft(base_folder: Path, adapter: Path, train: bool = False):
    """transformers' model with an adapter of ours, as peft loads it; any complaint of it is an error."""
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", ".*`ensure_weight_tying` is not set")  # ours means it so
        return peft.PeftModel.from_pretrained(theirs(base_folder), adapter, is_trainable=train)


def peft_gradients(model) -> dict[str, torch.Tensor]:
    """Gradients of what peft trains, under the names that its files have."""
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    for extra in (".modules_to_save.default", ".default.weight", ".default"):
        keep = ".weight" if extra == ".default.weight" else ""
        grads = {
            name.replace(extra, "" if "magnitude" in name else keep) if extra in name else name: g
            for name, g in grads.items()
        }
    return grads
