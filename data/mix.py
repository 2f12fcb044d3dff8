"""Decide how much of each source training reads, and print it as the --data of train_pretrain.py.

    python data/mix.py --data data/zh,data/en,data/code --alpha 0.5
    python data/mix.py --data data/zh,data/en,data/code --tokens 20e9 --max_epochs 4
    python data/mix.py --data data/zh:3,data/en:1 --tokens 20e9

Three ways to choose the share w of a source with n tokens:

    weights       those given: w ∝ weight
    --alpha       temperature: w ∝ n^α; 1 is in proportion to size, 0 is all alike (Conneau et al. 2020)
    --max_epochs  UniMax (Chung et al. 2023, arXiv:2304.09151): all alike, but no source more than so many times. From
                  the smallest on, each gets its equal share of what is left of --tokens, or at most n × --max_epochs

The table says how often each source is read in --tokens, and what repeating is worth. Of U tokens read 1 + R times a
model learns as from D′ = U + U R* (1 − e^(−R/R*)) fresh ones, R* = 15.4 (Muennighoff et al. 2023, arXiv:2305.16264): up
to four times nearly nothing is lost, beyond sixteen nothing is won.
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from minillm.base.command_line import parse
from minillm.base.errors import UserError
from minillm.base.options import Options, option
from minillm.base.process import run_script
from minillm.datasets.token_bins import TokenBins, parse_mixture
from minillm.datasets.windows import slots_of

WORTH = 15.39  # R*, in epochs beyond the first
TRIES, STEP = 1000, 0.99  # how often, and by what, a share is lowered that would be read too often
MANY = 4  # epochs, up to which repeating costs nearly nothing


@dataclass(frozen=True)
class Config(Options):
    data: str = option(help="folders of token bins, with commas between, each maybe with a weight: a:3,b:1")
    tokens: float | None = option(None, "tokens that the run will read, e.g. 20e9; none: each source once", above=0)
    alpha: float | None = option(None, "share in proportion to size^alpha", at_least=0, at_most=1)
    max_epochs: float | None = option(None, "all alike, but no source more often than this (UniMax)", above=0)

    def problems(self) -> list[str]:
        problems = super().problems()
        if self.alpha is not None and self.max_epochs is not None:
            problems.append("--alpha and --max_epochs are two ways to choose; give one")
        if self.max_epochs is not None and self.tokens is None:
            problems.append("--max_epochs: needs the length of the run; give --tokens")
        return problems


def main() -> None:
    config = parse(Config, __doc__)
    mixture = parse_mixture(config.data)
    for path, _ in mixture:
        if path.is_file():
            raise UserError(f"--data {path}: a file; give folders of token bins, as data/prepare.py makes them")
    sizes = np.array([TokenBins(path, "train").n_tokens for path, _ in mixture])
    given = np.array([weight for _, weight in mixture])
    is_chosen = config.alpha is not None or config.max_epochs is not None
    if is_chosen and len(set(given.tolist())) > 1:
        raise UserError(f"--data {config.data}: has weights already; leave them out, or --alpha and --max_epochs")
    n_tokens = float(config.tokens or sizes.sum())
    if config.alpha is not None:
        shares = by_temperature(sizes, config.alpha)
    elif config.max_epochs is not None:
        shares = unimax(sizes, n_tokens, config.max_epochs)
    else:
        shares = given

    # what training will really read: whole slots of a block
    slots = whole_slots(shares)
    if config.max_epochs is not None:
        slots = slots_up_to(shares, sizes * config.max_epochs / n_tokens)
    shares = slots / slots.sum()
    for line in table([path for path, _ in mixture], sizes, shares, n_tokens):
        print(line)
    most = (shares * n_tokens / sizes).max()
    if config.max_epochs is not None and most > config.max_epochs * (1 + 1e-6):
        print(f"\nin whole slots of a block one is read {most:.3g} times; give fewer --tokens, or more data")
    parts = [f"{path}:{n_slots}" for (path, _), n_slots in zip(mixture, slots.tolist(), strict=True)]
    print(f"\n--data {','.join(parts)}")


def whole_slots(shares: np.ndarray) -> np.ndarray:
    """The slots of a block that each source gets, (n,) int64: weights of which training makes the same shares again."""
    slots = np.diff(slots_of(shares.tolist()))
    again = np.diff(slots_of((slots / slots.sum()).tolist()))
    while not np.array_equal(again * slots.sum(), slots * again.sum()):
        slots = again
        again = np.diff(slots_of((slots / slots.sum()).tolist()))
    return slots


def slots_up_to(shares: np.ndarray, most: np.ndarray) -> np.ndarray:
    """Slots (n,) as `whole_slots` gives, rounded so that no source has a larger share than `most`, (n,).

    A source that rounding gives too much gets less until it has not; the others share what it leaves. If nearly all are
    needed as often as they may be read, that cannot be, and the slots are those that exceed `most` by the least.
    """
    best, least = whole_slots(shares), math.inf
    for _ in range(TRIES):
        slots = whole_slots(shares)
        excess = slots / slots.sum() / most
        if excess.max() < least:
            best, least = slots, excess.max()
        if least <= 1:
            break
        shares = np.where(excess > 1, STEP * shares, shares)
        shares = shares / shares.sum()
    return best


def by_temperature(sizes: np.ndarray, alpha: float) -> np.ndarray:
    """w ∝ n^α, (n,), summing to one. sizes: tokens of each source, (n,)."""
    weights = np.asarray(sizes, dtype=float) ** alpha
    return weights / weights.sum()


def unimax(sizes: np.ndarray, n_tokens: float, max_epochs: float) -> np.ndarray:
    """Shares (n,) that are as equal as they can be while no source is read more than max_epochs times in n_tokens.

    Raises UserError if all sources so often read are fewer tokens than the run.
    """
    most = np.asarray(sizes, dtype=float) * max_epochs
    if most.sum() < n_tokens:
        raise UserError(
            f"--tokens {n_tokens:g}: all sources read {max_epochs:g} times are only {most.sum():.4g}; raise "
            "--max_epochs, or add data"
        )
    left = n_tokens
    budgets = np.zeros(len(most))
    order = np.argsort(most, kind="stable")
    for n_done, source in enumerate(order):
        budgets[source] = min(left / (len(order) - n_done), most[source])
        left -= budgets[source]
    return budgets / budgets.sum()


def worth(epochs: float) -> float:
    """As how many passes over fresh text so many over the same one count."""
    if epochs <= 1:
        return epochs
    return 1 + WORTH * (1 - math.exp(-(epochs - 1) / WORTH))


def table(paths: list[Path], sizes: np.ndarray, shares: np.ndarray, n_tokens: float) -> list[str]:
    """A line for each source, below a line of headings."""
    width = max(len("source"), *(len(str(path)) for path in paths))
    lines = [f"{'source':{width}}  {'tokens':>15}  {'share':>7}  {'epochs':>6}  worth"]
    for path, size, share in zip(paths, sizes.tolist(), shares.tolist(), strict=True):
        epochs = share * n_tokens / size
        note = f"  repeated more than {MANY} times" if epochs > MANY + 1e-3 else ""
        lines.append(f"{path!s:{width}}  {size:15,}  {share:7.2%}  {epochs:6.2f}  {worth(epochs):5.2f}{note}")
    return lines


if __name__ == "__main__":
    sys.exit(run_script(main))
