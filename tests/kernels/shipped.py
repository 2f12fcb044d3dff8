"""Calls that between them start every configuration that is shipped, for tensors of the meta device.

`calls(architecture)` gives (name, call) pairs, gathered from `shipped_*.py`, one file for each subject.
"""

from collections.abc import Callable, Iterator

from tests.kernels import (
    shipped_attention,
    shipped_attention_sm90,
    shipped_decode,
    shipped_loss,
    shipped_optim,
    shipped_quant,
    shipped_rowwise,
)

SUBJECTS = (
    shipped_attention,
    shipped_attention_sm90,
    shipped_decode,
    shipped_loss,
    shipped_optim,
    shipped_quant,
    shipped_rowwise,
)


def calls(architecture: int) -> Iterator[tuple[str, Callable]]:
    for subject in SUBJECTS:
        yield from subject.calls(architecture)
