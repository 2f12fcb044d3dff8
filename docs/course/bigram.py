"""Lesson 1: a language model that is a table, and how far it is from the best there can be.

    python docs/course/bigram.py

Counts which token follows which in the training text, and measures how well the counts foretell the validation text.
"""

import lesson
import numpy as np

from minillm.datasets import TokenBins
from minillm.tokenizer import Tokenizer

PRIOR = 1.0  # how many tokens' worth of trust the shorter context has


def tokens_of(folder, split: str) -> np.ndarray:
    """All tokens of a split, (n,) int64: bos, a document's tokens, eos, bos, …"""
    return np.concatenate([np.asarray(tokens, dtype=np.int64) for tokens in TokenBins(folder, split).arrays])


def pairs_of(tokens: np.ndarray, bos_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Each token and the one after it: X and Y, shifted by one. A document's start is nothing to foretell."""
    x, y = tokens[:-1], tokens[1:]
    is_target = y != bos_id
    return x[is_target], y[is_target]


def unigram(y: np.ndarray, vocab_size: int) -> np.ndarray:
    """How often each token comes, whatever was before it: p(y), (V,). One is added, so that none is impossible."""
    counts = np.bincount(y, minlength=vocab_size) + 1.0
    return counts / counts.sum()


def bigram(x: np.ndarray, y: np.ndarray, p_one: np.ndarray) -> np.ndarray:
    """How often y comes after x: p(y | x), (V, V).

    Rare x have few counts, so the unigram has a say of `PRIOR` tokens: (n_xy + k p(y)) / (n_x + k).
    """
    vocab_size = len(p_one)
    counts = np.bincount(x * vocab_size + y, minlength=vocab_size**2).reshape(vocab_size, vocab_size)
    return (counts + PRIOR * p_one) / (counts.sum(axis=1, keepdims=True) + PRIOR)


def sample(p_two: np.ndarray, bos_id: int, eos_id: int, rng: np.random.Generator) -> list[int]:
    """A text by the table: each token is drawn after the one before it."""
    ids = [bos_id]
    while ids[-1] != eos_id and len(ids) < 60:
        ids.append(int(rng.choice(len(p_two), p=p_two[ids[-1]])))
    return ids[1:]


def main() -> None:
    chosen = lesson.options(__doc__)
    bins = TokenBins(chosen.data, "val")
    n_bytes, floor_bits = int(bins.document_bytes.sum()), float(np.load(chosen.data / "val_bits.npy").sum())
    x, y = pairs_of(tokens_of(chosen.data, "train"), bins.start_id)
    val_x, val_y = pairs_of(tokens_of(chosen.data, "val"), bins.start_id)

    # three models, each knowing more than the one before, and what the generator of the texts knows
    p_one = unigram(y, bins.vocab_size)
    p_two = bigram(x, y, p_one)
    nats = {
        "every token alike": len(val_y) * np.log(bins.vocab_size),
        "unigram": -np.log(p_one[val_y]).sum(),
        "bigram": -np.log(p_two[val_x, val_y]).sum(),
    }
    nats["floor"] = floor_bits * np.log(2)
    for name, total in nats.items():
        a_token, a_byte = total / len(val_y), lesson.bits_per_byte(total, n_bytes)
        print(f"{name:18} {a_token:6.3f} nats a token {a_byte:7.3f} bits per byte")

    # texts by the last of them
    tokenizer = Tokenizer.load(chosen.data)
    rng = np.random.default_rng(0)
    for _ in range(3):
        print("  ", tokenizer.decode(sample(p_two, bins.start_id, bins.eos_id, rng)).strip())


if __name__ == "__main__":
    lesson.run(main)
