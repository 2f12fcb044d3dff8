"""The corpus that comes with the project: written by a generator, in seconds, wherever it is needed.

    python data/bundled.py                          data/bundled/: texts, token bins, instructions, the floor
    python data/bundled.py --out FOLDER             the same elsewhere

A folder holds text/{train,val}.jsonl ({"text", "bits"}), the token bins with their tokenizer (`data/prepare.py`),
val_bits.npy (float64, one a validation document: its exact information in bits, the floor of validation loss), and
sft_train.jsonl and sft_heldout.jsonl (`data/world/questions.py`).
"""

import argparse
import hashlib
import itertools
import json
import re
import shlex
import sys
import time
from pathlib import Path

import numpy as np

from data.prepare import prepare
from data.world.questions import SPLITS, tasks
from data.world.texts import documents
from data.world.words import WORDS_ZH
from minillm.base.command_line import Parser
from minillm.base.errors import UserError
from minillm.base.process import RunLock, run_script
from minillm.tokenizer.train import train_tokenizer

FOLDER = "data/bundled"  # where the training scripts look for it
SIZES = {
    "train_bytes": 10_000_000,
    "val_documents": 2_000,
    "sft_train": 40_000,
    "sft_heldout": 840,  # 120 of each family
    "vocab_size": 2048,
}
SEEDS = {"train": 1, "val": 2}  # of the documents; the instructions have their own


def fingerprint() -> str:
    """SHA-256 over the generator's source and the sizes: another value, another corpus."""
    digest = hashlib.sha256(json.dumps([SIZES, SEEDS]).encode())
    for source in sorted((Path(__file__).parent / "world").glob("*.py")):
        digest.update(source.read_bytes().replace(b"\r\n", b"\n"))
    return digest.hexdigest()


def write_lines(path: Path, rows) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_documents(path: Path, seed: int, *, count: int | None = None, size: int | None = None) -> list[float]:
    """Write `count` documents, or as many as give `size` bytes of text; returns their bits."""
    bits = []

    def rows():
        written = 0
        for text, information in itertools.islice(documents(seed), count):
            bits.append(information)
            written += len(text.encode())
            yield {"text": text, "bits": round(information, 6)}
            if size and written >= size:
                return

    write_lines(path, rows())
    return bits


def different(rows, count: int):
    """The first `count` rows whose questions differ."""
    seen = set()
    for row in rows:
        question = (row["instruction"], row["input"])
        if question not in seen:
            seen.add(question)
            yield row
            if len(seen) == count:
                return


def build(folder: str | Path = FOLDER) -> None:
    """Write the bundled corpus into `folder`, unless it is there already, and print what is being done.

    Raises `UserError` if there are other files: an older corpus is deleted, and they would be too.
    """
    folder = Path(folder)
    if finished(folder):
        return
    text = folder / "text"
    if folder.is_dir() and any(folder.iterdir()) and not (text / "lock").exists():
        raise UserError(f"{folder}: holds files that are no bundled corpus; empty it, or give another folder by --out")
    lock = RunLock(text)
    try:
        if finished(folder):  # by another process, meanwhile
            return
        started = time.monotonic()
        print(f"{folder}: writing the bundled corpus", flush=True)
        for path in (folder / "meta.json", *folder.glob("*.*")):  # first what says that an older one is whole
            path.unlink(missing_ok=True)
        train_bits = write_documents(text / "train.jsonl", SEEDS["train"], size=SIZES["train_bytes"])
        val_bits = write_documents(text / "val.jsonl", SEEDS["val"], count=SIZES["val_documents"])
        np.save(folder / "val_bits.npy", np.array(val_bits))
        for split in SPLITS:
            rows = different(tasks(0, split), SIZES[f"sft_{split}"])
            write_lines(folder / f"sft_{split}.jsonl", rows)
        (folder / "world.json").write_text(json.dumps({"fingerprint": fingerprint()}) + "\n")
        seconds = time.monotonic() - started
        print(f"{folder}: {len(train_bits):,} documents, {len(val_bits):,} for validation, in {seconds:.1f} s")
        learn_tokenizer(folder)
        prepare([text / "train.jsonl"], folder, val_inputs=[text / "val.jsonl"], tokenizer=text)
    finally:
        lock.release()


def learn_tokenizer(folder: Path) -> None:
    """Learn the vocabulary of texts and questions, in which no Chinese piece spans more than one word.

    Chinese has no spaces, so pieces would grow across words ("a hat", "puts the hat", "red hat" as a piece each), and
    a tiny model would have to learn for each piece what a hat is. The generator knows its words; a line ends at each.
    """
    words = re.compile("|".join(map(re.escape, WORDS_ZH)))

    def texts():
        for name, keys in (("text/train.jsonl", ["text"]), ("sft_train.jsonl", ["instruction", "input", "output"])):
            with (folder / name).open(encoding="utf-8") as lines:
                for row in map(json.loads, lines):
                    yield words.sub(lambda word: f"\n{word[0]}\n", "\n".join(row[key] for key in keys))

    train_tokenizer(texts(), SIZES["vocab_size"], folder / "text")


def finished(folder: Path) -> bool:
    """Whether `folder` holds the complete corpus of this version of the generator."""
    try:
        made_by = json.loads((folder / "world.json").read_text())["fingerprint"]
    except (OSError, ValueError, KeyError):
        return False
    return made_by == fingerprint() and (folder / "meta.json").exists()


def main() -> None:
    parser = Parser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=FOLDER, metavar="FOLDER", help=f"where to write it (default {FOLDER})")
    out = parser.parse_args().out
    build(out)
    print(f"{out}: the bundled corpus is there; next: python train_pretrain.py --data {shlex.quote(str(out))}")


if __name__ == "__main__":
    sys.exit(run_script(main))
