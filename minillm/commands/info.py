"""`python -m minillm info`: parameters, FLOPs and memory of a model's shape, by formula."""

import argparse
import dataclasses
from collections.abc import Callable

from minillm.base.errors import UserError
from minillm.checkpoint import huggingface, run_folder
from minillm.commands import bench
from minillm.model import quant
from minillm.model.config import PRESETS, ModelConfig, preset
from minillm.model.memory import activations, memory_estimate
from minillm.model.size import flops_per_token, n_parameters


def add_parser(command: Callable[[Callable, str], argparse.ArgumentParser]) -> None:
    """Add the command; command(function, name): makes a parser."""
    parser = command(run_info, "info")
    parser.add_argument("--preset", choices=tuple(PRESETS), help="a preset's shape")
    parser.add_argument("--model", help="a run or model folder's shape, in place of a preset's")
    parser.add_argument("--vocab_size", type=int, help="ids; default: GPT-2's 50257, small presets less")
    parser.add_argument("--seq_len", type=int, help="tokens of a sequence; default: the model's context")
    parser.add_argument("--micro_batch_size", type=int, default=8, help="sequences in one forward pass (default 8)")
    parser.add_argument(
        "--lora_rank", type=int, help="add the memory of training adapters of this rank on a frozen base"
    )
    parser.add_argument("--base_bits", type=int, choices=quant.BITS, help="of that base (default: 32)")


def run_info(args) -> None:
    """Parameters, FLOPs a token, and memory for training and generation, by formula."""
    if bool(args.preset) == bool(args.model):
        raise UserError("info: give either --preset NAME or --model DIR")
    if args.model:
        shape = huggingface.load_config(run_folder.resolve_checkpoint(args.model))
    else:
        shape = preset(args.preset, vocab_size=args.vocab_size or bench.VOCABULARY.get(args.preset, 50_257))
    seq_len, rows = shape.max_seq_len if args.seq_len is None else args.seq_len, args.micro_batch_size
    if args.base_bits is not None and args.lora_rank is None:
        raise UserError(
            f"--base_bits {args.base_bits}: this is the base of adapters; give their rank too (--lora_rank)"
        )
    n = n_parameters(shape)
    flops = flops_per_token(shape, seq_len)
    print("\n".join(f"  {name:<16}{value}" for name, value in dataclasses.asdict(shape).items() if value is not None))
    print(f"\nparameters          {n:,}")
    print(f"FLOPs a token       {flops / 1e6:,.1f} M to train at {seq_len} tokens, {flops / 3e6:,.1f} M forward")
    state = 16 * n  # fp32: weights, gradients, and AdamW's two moments
    print(f"training            {_bytes(state)} of state: weights, gradients and AdamW's two moments, fp32")
    for name, size in (("float32", 4), ("bfloat16", 2)):
        kept, least = activations(shape, rows, seq_len, size)
        print(
            f"  + {name:<16}{_bytes(kept)} of activations at {rows} × {seq_len} tokens; "
            f"{_bytes(least)} with --checkpoint_activations"
        )
    for name, size in (("float32", 4), ("bfloat16", 2)):
        cache = 2 * shape.n_layers * shape.n_kv_heads * shape.head_dim * seq_len * size
        print(f"generation {name:<9}{_bytes(n * size)} of weights + {_bytes(cache)} of cache for {seq_len} tokens")
    if args.lora_rank is not None:
        _print_adapters(shape, args.base_bits, args.lora_rank, rows, seq_len)


def _print_adapters(shape: ModelConfig, bits: int | None, rank: int, rows: int, seq_len: int) -> None:
    """Memory for training adapters on a frozen base, item by item."""
    items = memory_estimate(shape, bits, rank, rows, seq_len)
    print(f"\nLoRA, {rows} × {seq_len} tokens in bfloat16 with --checkpoint_activations")
    print("\n".join(f"  {name:<30}{_bytes(size):>10}" for name, size in {**items, "all": sum(items.values())}.items()))


def _bytes(n: float) -> str:
    """A size in GB, or in MB below a tenth of one."""
    return f"{n / 1e9:.2f} GB" if n >= 1e8 else f"{n / 1e6:.1f} MB"
