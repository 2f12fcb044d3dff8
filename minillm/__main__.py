"""The commands around training: `python -m minillm generate|chat|eval|merge|plot|info|bench …` (each with --help)."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from minillm.base.command_line import Parser
from minillm.base.errors import UserError
from minillm.base.process import run_script
from minillm.checkpoint import resize
from minillm.commands import bench, bench_tune, convert, info, model_commands, vocab
from minillm.model.config import PRESETS
from minillm.training import plot
from minillm.tuning import folders

COUNTS = ("limit", "max_tokens", "max_new_tokens", "seq_len", "rows", "micro_batch_size", "vocab_size", "lora_rank")
COUNTS += ("max_memory", "pad_to_multiple", "new_tokens", "turns")  # options of any command that mean nothing below 1


def main() -> int:
    args = build_parser().parse_args()
    for name in COUNTS:
        if (value := getattr(args, name, None)) is not None and value < 1:
            raise UserError(f"--{name} {value}: must be at least 1")
    return args.command(args) or 0


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m minillm", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = _maker(commands)
    model_commands.add_parsers(command)
    sub = command(run_plot, "plot")
    sub.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run, or its metrics.jsonl")
    sub.add_argument("--out", help="PNG to write; default: curve.png in the run's folder, curves.png here for several")
    info.add_parser(command)
    text = "train, merge, prune or inspect a vocabulary"
    sub = commands.add_parser("vocab", help=text, description=text, allow_abbrev=False)
    vocab.add_parsers(_maker(sub.add_subparsers(required=True, metavar="train|merge|prune|inspect")))
    _add_surgery(command)
    convert.add_parsers(command)
    sub = command(run_bench, "bench")
    what = ("generate", "train", "tune", "data")
    sub.add_argument("what", choices=what, metavar="|".join(what), help="what to measure")
    sub.add_argument("--preset", default="tiny", choices=tuple(PRESETS), help="the model's shape (default tiny)")
    sub.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    sub.add_argument("--rows", type=int, default=8, help="train, tune: sequences of a step (default 8)")
    sub.add_argument("--seq_len", type=int, default=256, help="train, tune: tokens of a sequence (default 256)")
    sub.add_argument("--new_tokens", type=int, help="generate: tokens to write (default 64, on a GPU 256)")
    sub.add_argument("--vocab_size", type=int, help="train: entries of the vocabulary (default: the preset's usual)")
    return parser


def _maker(commands) -> Callable[[Callable, str], argparse.ArgumentParser]:
    """command(function, name) → the parser of a command that does what the function does, and says what it says."""

    def command(function: Callable, name: str) -> argparse.ArgumentParser:
        text = function.__doc__
        sub = commands.add_parser(name, help=text.split("\n")[0], description=text, allow_abbrev=False)
        sub.set_defaults(command=function)
        return sub

    return command


def _add_surgery(command: Callable[[Callable, str], argparse.ArgumentParser]) -> None:
    """The commands that make one model folder of another."""
    sub = command(run_resize, "resize")
    sub.add_argument("--model", required=True, help="run or model folder whose tokenizer is the old one")
    sub.add_argument("--tokenizer", required=True, help="the new one: folder or .model that vocab merge or prune wrote")
    sub.add_argument("--id_map", help="id_map.json; default: the one beside the new tokenizer")
    sub.add_argument("--out", required=True, help="new model folder")
    text = "new rows: mean of the old sub-tokens' (mean), of all (mean_all), or drawn like all (normal)"
    sub.add_argument("--start", default="mean", choices=resize.STARTS, help=text)
    sub.add_argument("--pad_to_multiple", type=int, default=1, help="of the number of rows (GPUs like 64)")
    sub = command(run_merge, "merge")
    sub.add_argument("--model", required=True, help="the adapter's base: run or model folder")
    sub.add_argument("--adapter", required=True, help="run or folder that holds the adapter, of minillm or PEFT")
    sub.add_argument("--out", required=True, help="new model folder")


def run_plot(args) -> None:
    """Draw loss and validation curves of one or several runs into a PNG."""
    single = Path(args.runs[0])
    folder = single if single.is_dir() else single.parent
    out = Path(args.out) if args.out else folder / "curve.png" if len(args.runs) == 1 else Path("curves.png")
    print(plot.draw(args.runs, out))


def run_resize(args) -> None:
    """Give a model another vocabulary: embedding and head follow the mapping of ids, new pieces get a start."""
    given = Path(args.tokenizer)
    id_map = args.id_map or (given if given.is_dir() else given.parent) / "id_map.json"
    how = dict(start=args.start, multiple=args.pad_to_multiple)
    print(resize.resize_folder(args.model, args.tokenizer, id_map, args.out, **how))


def run_merge(args) -> None:
    """Fold an adapter into its base: a plain model folder, for whatever knows no adapters."""
    print(folders.merge_folder(args.model, args.adapter, args.out))


def run_bench(args) -> None:
    """Measure speed beside other tools on this machine, both sides in one process."""
    if args.what == "data":
        bench.bench_data()
    elif args.what == "generate":
        bench.bench_generate(args.preset, args.device, args.new_tokens)
    elif args.what == "tune":
        bench_tune.bench_tune(args.preset, args.device, args.rows, args.seq_len)
    else:
        bench.bench_train(args.preset, args.device, args.rows, args.seq_len, args.vocab_size)


if __name__ == "__main__":
    sys.exit(run_script(main))
