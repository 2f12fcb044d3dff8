"""The nats of texts alone: each text by itself, without its end, as other tools count.

`Validation` scores documents as they are trained on: windows over one stream of them, and the eos of each is a target.
Here each text has windows of its own, in which nothing but its own ids are targets. So the sum is the log-likelihood
that lm-evaluation-harness calls `loglikelihood_rolling`, if its longest input is as long as the windows here.
"""

import numpy as np

from minillm.datasets.batch import Batch, shifted
from minillm.datasets.windows import ValidationPart

ROWS = 16  # rows per batch


def text_batches(part: ValidationPart, start_id: int, eos_id: int, seq_len: int) -> list[Batch]:
    """The texts of a validation part as batches of windows, of up to seq_len + 1 tokens each.

    start_id: what stands before a text. Every token of a text is a target once. The first window begins with start_id;
    each later one goes on where the one before ended, and the last is filled up with the tokens before it:

        text   ^ a b c d e f           seq_len = 4, ^ = start_id
        rows   ^ a b c d               targets a b c d
               b c d e f               targets e f
    """
    targets = part.rows[:, 1:][part.mask]  # (all targets,): the texts, each with its eos
    rows: list[tuple[np.ndarray, int]] = []  # tokens, and how many of them, the last ones, are targets
    for text in np.split(targets, np.flatnonzero(targets == eos_id) + 1):
        tokens = np.array([start_id, *text[text != eos_id]])
        for end in range(seq_len, len(tokens) - 1 + seq_len, seq_len):
            window = tokens[: end + 1][-(seq_len + 1) :]
            n_targets = len(tokens[: end + 1]) - (end + 1 - seq_len)
            rows.append((window, n_targets))

    # rows of like length together, so that little is filled up; what fills them is no target
    rows.sort(key=lambda row: len(row[0]))
    batches = []
    for begin in range(0, len(rows), ROWS):
        members = rows[begin : begin + ROWS]
        width = len(members[-1][0])
        tokens = np.zeros((len(members), width), dtype=np.int64)  # (B, T + 1)
        mask = np.zeros((len(members), width - 1), dtype=bool)  # (B, T)
        for number, (window, n_targets) in enumerate(members):
            tokens[number, : len(window)] = window
            mask[number, len(window) - 1 - n_targets : len(window) - 1] = True
        batches.append(shifted(tokens, mask))
    return batches
