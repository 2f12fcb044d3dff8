"""Lesson 2: the same text in vocabularies of several sizes, and what is comparable between them.

    python docs/course/tokens.py

Learns vocabularies on the training text, cuts the validation text by each, and asks the table of lesson 1 how well it
foretells the pieces.
"""

import contextlib
import io
import json
import tempfile
from pathlib import Path

import lesson
import numpy as np
from bigram import bigram, pairs_of, unigram

from minillm.tokenizer import Tokenizer, train_tokenizer

SIZES = (400, 600, 1000, 2000, 4000)


def texts_of(folder: Path, split: str) -> list[str]:
    """The documents of a split."""
    lines = (folder / "text" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines]


def one_row(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """All documents as ids, (n,) int64, each after bos and before eos."""
    cut = tokenizer.encode_many(texts)
    return np.array([id for ids in cut for id in (tokenizer.bos_id, *ids, tokenizer.eos_id)], dtype=np.int64)


def bytes_a_token(tokenizer: Tokenizer, texts: list[str]) -> float:
    """How much text a token holds on average."""
    return sum(len(text.encode()) for text in texts) / sum(len(ids) for ids in tokenizer.encode_many(texts))


def main() -> None:
    chosen = lesson.options(__doc__)
    train, val = (texts_of(chosen.data, split) for split in ("train", "val"))
    train = train[:500] if chosen.quick else train[:20_000]
    n_bytes = sum(len(text.encode()) for text in val)
    is_chinese = [any("一" <= character <= "鿿" for character in text) for text in val]
    chinese = [text for text, yes in zip(val, is_chinese, strict=True) if yes]
    english = [text for text, yes in zip(val, is_chinese, strict=True) if not yes]

    print("vocabulary  bytes a token: English  Chinese   table: nats a token  bits per byte")
    for size in SIZES[:3] if chosen.quick else SIZES:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            tokenizer = train_tokenizer(train, size, folder)
        x, y = pairs_of(one_row(tokenizer, train), tokenizer.bos_id)
        val_x, val_y = pairs_of(one_row(tokenizer, val), tokenizer.bos_id)
        p_two = bigram(x, y, unigram(y, tokenizer.vocab_size))
        nats = -np.log(p_two[val_x, val_y]).sum()
        held = [bytes_a_token(tokenizer, texts) for texts in (english, chinese)]
        scores = f"{nats / len(val_y):20.3f} {lesson.bits_per_byte(nats, n_bytes):14.3f}"
        print(f"{tokenizer.vocab_size:10,} {held[0]:23.2f} {held[1]:8.2f} {scores}")
    print("   ", " ".join(tokenizer.pieces.piece_of(id) for id in tokenizer.encode(val[0])[:24]))


if __name__ == "__main__":
    lesson.run(main)
