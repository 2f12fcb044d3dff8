"""The corpus that comes with the project: written by a generator, in seconds, wherever it is needed.

    python data/bundled.py                          data/bundled/: texts, token bins, instructions, the floor
    python data/bundled.py --out FOLDER             the same elsewhere

A folder holds text/{train,val}.jsonl ({"text", "bits"}), the token bins with their tokenizer (`data/prepare.py`),
val_bits.npy (float64, one a validation document: its exact information in bits, the floor of validation loss),
sft_{train,heldout}.jsonl (`data/world/instructions.py`), requests_{train,heldout}.jsonl (`data/world/requests.py`), and
preferences_{train,heldout}.jsonl (`data/world/preferences.py`). world.json tells which version of the generator has
written them; another version writes them anew.

Read next: data/world/texts.py, where the texts come from; data/prepare.py, what turns text into token bins.
"""

import hashlib
import itertools
import json
import re
import shlex
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from data.bin_writer import NUMBERED, read_json
from data.bin_writer import SPLITS as SPLITS_OF_TEXT
from data.prepare import prepare
from data.world.instructions import SPLITS, instructions
from data.world.preferences import preferences
from data.world.requests import requests
from data.world.texts import documents
from data.world.words import WORDS_ZH
from minillm.base.bundled_files import FILES, FOLDER
from minillm.base.command_line import parse
from minillm.base.errors import UserError
from minillm.base.files import refuse_link, write_file, write_json_atomically
from minillm.base.options import Options, option
from minillm.base.process import RunLock, run_script
from minillm.datasets.token_bins import TokenBins
from minillm.tokenizer.train import train_tokenizer

SIZES = {
    "train_bytes": 10_000_000,
    "val_documents": 2_000,
    "sft_train": 50_000,
    "sft_heldout": 960,  # 104 to 123 of each family
    "requests_train": 8_000,
    "requests_heldout": 600,
    "preferences_train": 20_000,
    "preferences_heldout": 2_000,
    "vocab_size": 2048,
}
ROWS = {
    "sft": instructions,
    "requests": requests,
    "preferences": preferences,
}  # file → the endless rows of a seed and a split
SEEDS = {"train": 1, "val": 2}  # of the documents; all other rows are those of seed 0
GENERATOR = Path(__file__).parent / "world"  # the source of the texts and of the rows


def fingerprint() -> str:
    """SHA-256 over the sizes, the seeds and the generator's source: another value, another corpus.

    Every source file below `GENERATOR` counts, with its name, at whatever depth. Line endings do not count, since git
    may check the same source out with others.
    """
    digest = hashlib.sha256(json.dumps([SIZES, SEEDS]).encode())
    sources = {path.relative_to(GENERATOR).as_posix(): path for path in GENERATOR.rglob("*.py")}
    for name in sorted(sources):
        source = sources[name].read_bytes().replace(b"\r\n", b"\n")
        digest.update(f"\n{name} {len(source)}\n".encode())
        digest.update(source)
    return digest.hexdigest()


def write_lines(path: Path, rows: Iterable[dict]) -> None:
    """Write rows as JSON Lines."""

    def write(scratch: Path) -> None:
        with scratch.open("w", encoding="utf-8", newline="\n") as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")

    write_file(path, write)


def write_documents(path: Path, seed: int, *, count: int | None = None, size: int | None = None) -> list[float]:
    """Write `count` documents, or as many as give `size` bytes of text; returns their bits."""
    all_bits = []

    def rows():
        n_bytes = 0
        for text, bits in itertools.islice(documents(seed), count):
            all_bits.append(bits)
            n_bytes += len(text.encode())
            yield {"text": text, "bits": round(bits, 6)}
            if size and n_bytes >= size:
                return

    write_lines(path, rows())
    return all_bits


def different(rows: Iterable[dict], count: int) -> Iterator[dict]:
    """The first `count` rows whose questions differ."""
    seen = set()
    for row in rows:
        question = tuple(texts_of(row)[:-1])  # all but the answer
        if question in seen:
            continue
        seen.add(question)
        yield row
        if len(seen) == count:
            return


def texts_of(row: dict) -> list[str]:
    """The texts of a row in their order: the last one is its answer ("": it has none)."""
    if "messages" in row:
        return [message["content"] for message in row["messages"]]
    if "prompt" in row:
        return [row["prompt"], ""]
    return [row["instruction"], row["input"], row["output"]]


def build(folder: str | Path = FOLDER) -> None:
    """Write the bundled corpus into `folder`, unless it is there already, and print what is being done.

    Raises `UserError` if there are only other files.
    """
    folder = Path(folder)
    if finished(folder):
        return
    text = folder / "text"
    refuse_link(text)
    if folder.is_dir() and any(folder.iterdir()) and not (text / "lock").exists():
        raise UserError(f"{folder}: holds files that are no bundled corpus; empty it, or give another folder by --out")

    lock = RunLock(text)
    try:
        if finished(folder):  # by another process, meanwhile
            return
        started = time.monotonic()
        print(f"{folder}: writing the bundled corpus", flush=True)

        # An older corpus goes, and first of all the file that says that it is whole. Other files stay.
        bins = [path.name for path in folder.iterdir() if NUMBERED.fullmatch(path.name)]
        for name in (*FILES, "tokenizer.model", "tokenizer.json", "unfinished/next.meta.json", *bins):
            (folder / name).unlink(missing_ok=True)

        # Texts with their bits, then instructions, requests and preferences.
        train_bits = write_documents(text / "train.jsonl", SEEDS["train"], size=SIZES["train_bytes"])
        val_bits = write_documents(text / "val.jsonl", SEEDS["val"], count=SIZES["val_documents"])
        write_file(folder / "val_bits.npy", partial(_save_array, np.array(val_bits)))
        for name, rows_of in ROWS.items():
            for split in SPLITS:
                file = f"{name}_{split}"
                write_lines(folder / f"{file}.jsonl", different(rows_of(0, split), SIZES[file]))
        write_json_atomically(folder / "world.json", {"fingerprint": fingerprint()})
        seconds = time.monotonic() - started
        print(f"{folder}: {len(train_bits):,} documents, {len(val_bits):,} for validation, in {seconds:.1f} s")

        # A vocabulary, and the texts as tokens. `prepare` writes meta.json last of all.
        learn_tokenizer(folder)
        prepare([text / "train.jsonl"], folder, val_inputs=[text / "val.jsonl"], tokenizer=text)
    finally:
        lock.release()


def _save_array(values: np.ndarray, path: Path) -> None:
    with path.open("wb") as file:  # given a name, numpy would add .npy to it
        np.save(file, values)


def learn_tokenizer(folder: Path) -> None:
    """Learn the vocabulary of texts and questions, in which no Chinese piece spans more than one word.

    Chinese has no spaces, so pieces would grow across words ("a hat", "puts the hat", "red hat" as a piece each), and
    a tiny model would have to learn for each piece what a hat is. The generator knows its words; a line ends at each.
    """
    train_tokenizer(texts_by_words(folder), SIZES["vocab_size"], folder / "text")


def texts_by_words(folder: Path) -> Iterator[str]:
    """Every text and every question, with each Chinese word on a line of its own."""
    any_word = re.compile("|".join(re.escape(word) for word in WORDS_ZH))
    for path in (folder / "text" / "train.jsonl", folder / "sft_train.jsonl"):
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                row = json.loads(line)
                text = row["text"] if "text" in row else "\n".join(texts_of(row))
                yield any_word.sub(r"\n\g<0>\n", text)


def finished(folder: Path) -> bool:
    """Whether `folder` holds the complete corpus of this version of the generator, its bins as training takes them."""
    if read_json(folder / "world.json").get("fingerprint") != fingerprint():
        return False
    try:
        for split in SPLITS_OF_TEXT:
            TokenBins(folder, split)
    except UserError:
        return False
    return all((folder / name).is_file() for name in FILES)


@dataclass(frozen=True)
class Config(Options):
    out: str = option(FOLDER, "folder to write it into")


def main() -> None:
    out = parse(Config, __doc__).out
    build(out)
    print(f"{out}: the bundled corpus is there; next: python train_pretrain.py --data {shlex.quote(out)}")


if __name__ == "__main__":
    sys.exit(run_script(main))
