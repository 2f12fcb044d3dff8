"""Lesson 6, to be filled in; then `pytest docs/course/checks/optimizers.py`."""

from torch import Tensor


def lion(w: Tensor, grad: Tensor, m: Tensor, *, lr: float, weight_decay: float) -> tuple[Tensor, Tensor]:
    """One step of Lion (Chen et al. 2023, arXiv:2302.06675): the new parameter and the new m, both of w's shape.

        c = 0.9 m + 0.1 g        w ← w − lr (sign(c) + λ w)        m ← 0.99 m + 0.01 g

    It keeps one number a parameter where AdamW keeps two. Nothing that is given may be written to.
    """
    raise NotImplementedError


# The loss, and with it every gradient, is multiplied by 1,000 in all steps; nothing is clipped. What happens to the
# steps of SGD, AdamW and Muon? "stays" or "× 1000".
SGD_STEP = ""
ADAMW_STEP = ""
MUON_STEP = ""

# The embedding of a rare token has had no gradient for 100 steps; now it gets its first. How large is AdamW's step for
# it, with betas of 0.9 and 0.95, beside the rate? "0.1", "0.45", "1" or "4.5" times the rate.
FIRST_GRADIENT_LATE = ""
