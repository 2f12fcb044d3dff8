"""Measure how many megabytes of text a second one core cleans, beside datasketch and datatrove if they are installed.

python data/bench_cleaning.py --data novels.jsonl.gz
"""

import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.cleaning.mending import How, mended_documents
from data.cleaning.near_duplicates import ENTRIES, SHINGLE, signatures
from data.cleaning.reading import Raw
from data.cleaning.text.features import KNOWN, features
from minillm.base.command_line import parse
from minillm.base.errors import UserError
from minillm.base.options import Options, option
from minillm.base.process import run_script
from minillm.datasets.files.text_files import find_files, texts_of

REPEATS = 5
OTHERS_GET = 100_000  # bytes of text, since they take longer


@dataclass(frozen=True)
class Config(Options):
    data: str = option(help="texts: .txt .jsonl .json (.gz) .parquet, or a folder of these")
    megabytes: int = option(16, "of text to read at most", at_least=1)


def main() -> None:
    measure(parse(Config, __doc__))


def measure(config: Config) -> None:
    """Print the speed of each part of cleaning, and of the others."""
    texts = _read(config)
    size = sum(len(text.encode()) for text in texts)
    raws = [Raw(number, "line", json.dumps({"text": text}).encode(), 0) for number, text in enumerate(texts, 1)]
    documents = mended_documents(raws, How())
    mended = [document["text"] for document in documents]
    known = np.array([document["known"] for document in documents], float).reshape(-1, len(KNOWN))
    sides = {
        "mending": lambda: mended_documents(raws, How()),
        "features": lambda: features(mended, known),
        "signatures": lambda: signatures(mended),
    }
    print(f"{len(texts):,} documents, {size / 1e6:.1f} MB, CPU time of one core, median of {REPEATS}")
    seconds = {name: _cpu_seconds(side) for name, side in sides.items()}
    for name, n_seconds in (*seconds.items(), ("together", sum(seconds.values()))):
        print(f"  {name:<34}{size / n_seconds / 1e6:8.1f} MB/s")

    part = _part(texts)
    size = sum(len(text.encode()) for text in part)
    others = {
        "datasketch, MinHash": _datasketch,
        "datatrove, MinHash": _datatrove_minhash,
        "datatrove, quality rules of Gopher": _datatrove_rules,
    }
    for name, side in others.items():
        try:
            n_seconds = _cpu_seconds(side(part))
            print(f"  {name:<34}{size / n_seconds / 1e6:8.2f} MB/s")
        except ImportError as missing:
            print(f"  {name:<34}     not measured: {missing}")


def _read(config: Config) -> list[str]:
    texts: list[str] = []
    size = 0
    for path in find_files([Path(config.data)]):
        for text, _ in texts_of(path, boundary="file", field="text"):
            texts.append(text)
            size += len(text.encode())
            if size >= config.megabytes * 1_000_000:
                return texts
    if not size:
        raise UserError(f"--data {config.data}: holds no text; give another")
    return texts


def _part(texts: list[str]) -> list[str]:
    """The first texts, OTHERS_GET bytes or a little more."""
    sizes = np.cumsum([len(text.encode()) for text in texts])
    return texts[: int(np.searchsorted(sizes, OTHERS_GET)) + 1]


def _cpu_seconds(side: Callable[[], object]) -> float:
    """The median CPU time of a call, after one that is not measured."""
    side()
    times = []
    for _ in range(REPEATS):
        begin = time.process_time()
        side()
        times.append(time.process_time() - begin)
    return statistics.median(times)


def _datasketch(texts: list[str]) -> Callable[[], object]:
    from datasketch import MinHash

    def signatures_of_all() -> None:
        for text in texts:
            shingles = [text[i : i + SHINGLE].encode() for i in range(len(text) - SHINGLE + 1)]
            MinHash(num_perm=ENTRIES).update_batch(shingles)

    return signatures_of_all


def _datatrove_minhash(texts: list[str]) -> Callable[[], object]:
    from datatrove.pipeline.dedup.minhash import MinhashDedupSignature

    with tempfile.TemporaryDirectory() as folder:  # that its other steps would write to
        step = MinhashDedupSignature(folder, language="zh")  # 14 bands of 8 entries, runs of 5 words

    def signatures_of_all() -> None:
        for text in texts:
            step.get_signature(step.get_shingles(text))

    return signatures_of_all


def _datatrove_rules(texts: list[str]) -> Callable[[], object]:
    from datatrove.data import Document
    from datatrove.pipeline.filters import GopherQualityFilter

    quality = GopherQualityFilter(language="zh")
    numbers = itertools.count()

    def filter_all() -> None:
        for text in texts:  # a new text each time: the words of one that was there before are kept
            quality.filter(Document(text=f"{text}{next(numbers)}", id=""))

    return filter_all


if __name__ == "__main__":
    sys.exit(run_script(main))
