"""Tokens a second that one core reads from token bins in training order."""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from minillm.base.options import Options, option
from minillm.commands.bench.measure import REPEATS, medians
from minillm.datasets.token_bins import TokenBins
from minillm.datasets.windows import TokenWindows

BATCHES = 50  # read in one measurement


@dataclass(frozen=True)
class Config(Options):
    tokens: int = option(100_000_000, "tokens in the bin", at_least=1)
    rows: int = option(32, "windows of a batch", at_least=1)
    seq_len: int = option(1024, "tokens of a window", at_least=1)


class Reader:
    """Reads the next batches, so that no call finds its windows in a cache."""

    def __init__(self, windows: TokenWindows, rows: int):
        self.windows = windows
        self.rows = rows
        self.position = 0

    def __call__(self) -> None:
        for _ in range(BATCHES):
            self.windows.batch(np.arange(self.position, self.position + self.rows))
            self.position += self.rows


def run(config: Config) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokens.bin"
        np.random.default_rng(0).integers(0, 50_000, config.tokens, dtype=np.uint16).tofile(path)
        bins = TokenBins(path, "train", dtype="uint16", vocab_size=50_000)
        windows = TokenWindows([(bins, 1.0)], config.seq_len, seed=0)
        seconds = medians({"read": Reader(windows, config.rows)})["read"]
    torch.set_num_threads(threads)
    n_read = BATCHES * config.rows * config.seq_len
    print(
        f"{config.tokens:,} tokens of uint16, batches of {config.rows} × {config.seq_len}, one core, "
        f"median of {REPEATS}"
    )
    print(f"  {n_read / seconds / 1e6:,.0f} million tokens/s, X and Y as int64")
