"""A trained model and its tokenizer, from a run, a model folder, or an adapter, ready to generate."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from minillm.base import waiting
from minillm.base.device import DTYPES, keep_to_quota, pick_device
from minillm.base.errors import UserError
from minillm.base.huge_pages import use_huge_pages
from minillm.checkpoint import huggingface, run_folder
from minillm.model.quant import quantize_for_generation
from minillm.model.transformer import Transformer
from minillm.tokenizer.tokenizer import Tokenizer
from minillm.tuning import folders, peft_format

DEFAULT_RUNS = ("out/sft", "out/pretrain")


class Loaded(NamedTuple):
    """A model with its tokenizer, and the folder that they come from."""

    model: Transformer
    tokenizer: Tokenizer
    folder: Path


def find_model(path: str | None, log: Callable[[str], None]) -> Path:
    """The model folder at `path`, which may also be a run; None: the newest checkpoint of `DEFAULT_RUNS`."""
    if path is None:
        path = next((run for run in DEFAULT_RUNS if run_folder.step_folders(run)), None)
    if path is None:
        raise UserError(
            f"no checkpoint in {' or '.join(DEFAULT_RUNS)}: train one (python train_pretrain.py) or give --model"
        )
    return run_folder.resolve_checkpoint(path, log=log)


def load(
    folder: Path,
    *,
    base: str | None = None,
    device: str = "auto",
    dtype: str | None = None,
    bits: int | None = None,
    check_kernels: Callable[[torch.device, int | None], None],
) -> Loaded:
    """The model of a folder, in evaluation mode, with its tokenizer.

    base: the base of an adapter, if it is not where the adapter says. dtype: of the weights; None: as they are stored,
    but float32 on a CPU, since half precision is slow on most of them. bits: 16, 8 or 4, into which to put the weights
    of the linear layers; None: not. check_kernels(device, bits): called before weights are loaded, with the bits that
    kernels are needed for.
    """
    is_adapter = folders.is_adapter(folder)
    if base and not is_adapter:
        raise UserError(f"--base {base}: {folder} is a model of its own and no adapter; leave --base out")

    # where it computes, in which dtype, by which kernels
    torch_device = pick_device(device)
    if torch_device.type == "cpu":
        keep_to_quota()
        waiting.of_this_process()
    base_bits = None
    if is_adapter:
        written, facts = peft_format.read_config(folder)
        base_bits = facts["bits"]
        if bits and written["peft_type"] == "MINILLM_ADAPTER":  # the other methods leave the layers as they were
            raise UserError(
                f"--bits {bits}: {folder} is an adapter of kind adapter, which cannot be merged; leave --bits out"
            )
    if bits and base_bits:
        raise UserError(f"--bits {bits}: the base of {folder} is in {base_bits} bits already; leave --bits out")
    check_kernels(torch_device, bits or base_bits)
    if dtype is None and torch_device.type == "cpu":
        dtype = "float32"
    torch_dtype = DTYPES[dtype] if dtype else None

    # the weights, an adapter's folded into its base
    if is_adapter:
        model, base_folder = folders.load_adapted(folder, base, device=torch_device, dtype=torch_dtype, merged=True)
        tokenizer = folders.tokenizer_of(folder, base_folder)
    else:
        model = huggingface.load_model(folder, device=torch_device, dtype=torch_dtype)
        tokenizer = Tokenizer.load(folder)
    huggingface.check_vocabulary(model.config, tokenizer, folder)
    if bits:
        quantize_for_generation(model, bits)
    elif torch_device.type == "cpu":
        use_huge_pages()
    model.eval()
    return Loaded(model, tokenizer, folder)
