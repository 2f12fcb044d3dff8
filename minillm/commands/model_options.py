"""The options of all commands that use a trained model, and loading the model that they name."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from minillm.alignment.reward_model import open_reward_model
from minillm.base.device import DTYPES, pick_device
from minillm.base.errors import UserError
from minillm.base.options import Options, option
from minillm.base.printing import log_line, print_text
from minillm.checkpoint import train_state
from minillm.distributed.ranks import Ranks
from minillm.generation import load
from minillm.generation.compiled_step import CompiledStep
from minillm.model.quant import GENERATION_BITS
from minillm.model.transformer import Transformer
from minillm.tokenizer.chat_template import TEMPLATES
from minillm.training import kernel_check


@dataclass(frozen=True)
class BitsOptions(Options):
    """How weights lie in memory."""

    bits: int | None = option(
        None, "put the weights of linear layers into so many bits; none: not", GENERATION_BITS, group="model"
    )


@dataclass(frozen=True)
class CompileOptions(Options):
    """How one answer's tokens are computed."""

    compile: bool = option(
        False, "compile a step of one answer for a CPU; half a minute at first, seconds later", group="model"
    )


@dataclass(frozen=True)
class ModelOptions(BitsOptions):
    """Which model, and where it computes."""

    model: str | None = option(
        None, "run or model folder; none: the newest of out/sft, else of out/pretrain", group="model"
    )
    base: str | None = option(
        None, "the base of an adapter given by --model; none: where the adapter says", group="model"
    )
    device: str = option("auto", "auto, cpu, cuda, cuda:N or mps", group="model")
    dtype: str | None = option(None, "of the weights; none: as stored", tuple(DTYPES), group="model")


@dataclass(frozen=True)
class TemplateOptions(Options):
    """How messages become a text."""

    template: str = option(
        "auto", "prompt format; auto: the one that the model was trained with", TEMPLATES, group="model"
    )


@dataclass(frozen=True)
class OutputOptions(Options):
    """How a model's text is printed."""

    raw: bool = option(
        False,
        "send control characters to a terminal as they are; without it they are shown (\\x1b), since it obeys them",
        group="output",
    )


def load_model(config: ModelOptions) -> load.Loaded:
    """The model of --model, or the newest checkpoint, once the kernels have been checked on its device."""
    folder = load.find_model(config.model, log=log_line)
    return load_folder(folder, config.base, config.device, config.dtype, config.bits)


def load_folder(folder: Path, base: str | None, device: str, dtype: str | None, bits: int | None = None) -> load.Loaded:
    """The model of a folder, once the kernels have been checked on its device."""
    return load.load(folder, base=base, device=device, dtype=dtype, bits=bits, check_kernels=_check_kernels)


def prepare_steps(config: CompileOptions, model: Transformer) -> None:
    """Compile the model's step of one row, if --compile asks for it."""
    if config.compile:
        log_line("compiling a step ...")
        model.compiled_step = CompiledStep(model)


def load_reward_model(config: ModelOptions, folder: Path) -> load.Loaded:
    """The reward model of a folder, once the kernels have been checked on its device."""
    if config.bits is not None:
        raise UserError(f"--bits {config.bits}: is for language models, and {folder} is a reward model")
    device = pick_device(config.device)
    _check_kernels(device, None)
    return load.Loaded(*open_reward_model(folder, config.base, device, DTYPES[config.dtype or "float32"]), folder)


def _check_kernels(device: torch.device, base_bits: int | None) -> None:
    kernel_check.KernelCheck(Ranks(0, 1, device), log_line, base_bits=base_bits).settle()


def trained_with(folder: Path) -> dict:
    """What a checkpoint's training state says; empty for a folder without one."""
    return train_state.read_state(folder) if (folder / "resume").is_dir() else {}


def learned_texts_only(trained: dict) -> bool:
    """Whether `trained_with` tells of a run on texts: train_pretrain.py alone has no prompt format."""
    return "config" in trained and "template" not in trained["config"]


def template_of(config: TemplateOptions, folder: Path) -> str:
    """The prompt format: --template, else the one that the checkpoint was trained with."""
    if config.template != "auto":
        return config.template
    return trained_with(folder).get("config", {}).get("template", "auto")


def print_stream(stream: Iterator[str], pieces: list[str], raw: bool = False):
    """Print a stream's pieces as they come, and append them to `pieces`; returns what the stream returns.

    raw: print control characters as they are, to a terminal as well.
    """
    while True:
        try:
            piece = next(stream)
        except StopIteration as end:
            return end.value
        pieces.append(piece)
        print_text(piece, raw)
