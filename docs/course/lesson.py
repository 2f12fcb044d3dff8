"""What the experiments of the course share: two options, and the bundled corpus.

An experiment is a script: `python docs/course/bigram.py`. With `--quick` it does the same on a small corpus in a few
seconds; its numbers then mean nothing, they only show that it runs.
"""

import argparse
import inspect
import math
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch

from data import bundled
from minillm.base.errors import UserError
from minillm.base.process import run_script
from minillm.checkpoint import load_model, newest_checkpoint
from minillm.model import Transformer, preset
from minillm.tokenizer import Tokenizer

SMALL = {
    "train_bytes": 300_000,
    "val_documents": 100,
    "sft_train": 400,
    "sft_heldout": 40,
    "requests_train": 100,
    "requests_heldout": 20,
    "preferences_train": 200,
    "preferences_heldout": 40,
    "vocab_size": 600,
}


def run(main: Callable[[], None]) -> None:
    """Run an experiment as the scripts of the project run: a mistake is one line, and `| head` ends it quietly."""
    sys.exit(run_script(main))


def options(description: str, with_corpus: bool = True) -> argparse.Namespace:
    """The options of an experiment: `quick`, and `data`, the folder of a corpus that is there.

    description: what `--help` says, the docstring of the script. with_corpus: whether the lesson reads a corpus.
    """
    parser = argparse.ArgumentParser(
        description=inspect.cleandoc(description), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a small corpus and few steps, to see that it runs")
    if not with_corpus:
        return parser.parse_args()
    parser.add_argument("--data", help=f"a bundled corpus; none: {bundled.FOLDER}, which is written if it is missing")
    chosen = parser.parse_args()
    chosen.data = Path(chosen.data or corpus(chosen.quick))
    return chosen


def corpus(quick: bool) -> str:
    """The folder of the bundled corpus, or of a small one of the same kind; each is written once."""
    if not quick:
        bundled.build()
        return bundled.FOLDER
    folder = Path(tempfile.gettempdir()) / f"minillm-course-{bundled.fingerprint()[:12]}"
    with mock.patch.object(bundled, "SIZES", SMALL):
        bundled.build(folder)
    return str(folder)


def trained_model(run: str, chosen: argparse.Namespace) -> Transformer:
    """The newest model of a run on the CPU; with `--quick` one of the same shape that has learned nothing."""
    if chosen.quick:
        tokenizer = Tokenizer.load(chosen.data)
        model = Transformer(preset("tiny", vocab_size=tokenizer.vocab_size, n_layers=2))
        model.init_weights(seed=0)
        return model.eval()
    if not Path(run).is_dir():
        command = {"out/pretrain": "train_pretrain.py", "out/sft": "train_sft.py"}[run]
        raise UserError(f"{run}: no model is there yet; run `python {command}`")
    return load_model(newest_checkpoint(run), dtype=torch.float32).eval()


def bits_per_byte(nats: float, n_bytes: int) -> float:
    """Nats of a text's tokens, summed, as bits for each of its UTF-8 bytes."""
    return nats / math.log(2) / n_bytes
