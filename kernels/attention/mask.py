"""What a query sees is an interval of keys, and what sees a key is an interval of queries.

Causal order, a sliding window, the end of the sequence and documents in packed rows (whose numbers never decrease
along a row) all say the same kind of thing: query i sees keys begin_i ≤ j < end_i. Both bounds grow with i. So for a
block of queries, keys outside [min begin, max end) need not be read at all, keys inside [max begin, min end) are seen
by every query of the block and need no mask, and only what is left between is compared element by element.

Positions are counted in keys: the Tq queries are the last of the Tk positions.
"""

import triton
import triton.language as tl


@triton.jit
def seen_keys(position, Spans, n_keys, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SPANS: tl.constexpr):
    """Bounds (begin, end), int32, of the keys that queries at `position` (M,) see; both 0 beyond the last query.

    Spans: pointer to this row's (Tk, 2) int32, first and one past the last token of each token's document.
    """
    inside = position < n_keys
    begin = tl.zeros_like(position)
    end = tl.zeros_like(position) + n_keys
    if CAUSAL:
        end = tl.minimum(end, position + 1)
    if WINDOW:
        begin = tl.maximum(begin, position - window + 1)
        end = tl.minimum(end, position + window)
    if SPANS:
        begin = tl.maximum(begin, tl.load(Spans + 2 * position, mask=inside, other=0))
        end = tl.minimum(end, tl.load(Spans + 2 * position + 1, mask=inside, other=0))
    return tl.where(inside, begin, 0), tl.where(inside, end, 0)


@triton.jit
def seeing_queries(key, Spans, first, n_keys, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SPANS: tl.constexpr):
    """Bounds (begin, end), int32, of the positions of queries that see keys at `key` (N,); both 0 beyond the last key.

    first: position of the first query, Tk − Tq.
    """
    inside = key < n_keys
    begin = tl.zeros_like(key) + first
    end = tl.zeros_like(key) + n_keys
    if CAUSAL:
        begin = tl.maximum(begin, key)
    if WINDOW:
        begin = tl.maximum(begin, key - window + 1)
        end = tl.minimum(end, key + window)
    if SPANS:
        begin = tl.maximum(begin, tl.load(Spans + 2 * key, mask=inside, other=0))
        end = tl.minimum(end, tl.load(Spans + 2 * key + 1, mask=inside, other=0))
    return tl.where(inside, begin, 0), tl.where(inside, end, 0)
