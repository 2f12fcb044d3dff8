"""Lesson 3, to be filled in; then `pytest docs/course/checks/attention.py`."""

from torch import Tensor


def windowed_attention(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Causal attention in which a token sees itself and the `window` − 1 tokens before it: (T, H, D).

    q: (T, H, D), k, v: (T, K, D). H is a multiple of K: H / K neighbouring query heads share a key and value head.
    """
    raise NotImplementedError


# The tokens before the last one are shuffled, and positions are not told (no RoPE). Does the attention's output at the
# last token change? "changes" or "stays".
SHUFFLED = ""

# Scores are not divided by √D, with queries and keys whose numbers have a variance of 1. Does the entropy of a row of
# weights, −Σ p log p, fall, rise or stay? "falls", "stays" or "rises".
ENTROPY_WITHOUT_SCALE = ""
