"""The floor and the bytes are those of the very documents evaluated, however they are wrapped."""

import json

import numpy as np
import pytest

from minillm.data import TokenBins
from minillm.tokenizer import Tokenizer
from minillm.validation import Validation
from minillm.vocab import train_tokenizer

DOCUMENTS = ["the cat sat", "a dog", "on the log the cat sat", "the end"]
BITS = [5.0, 2.5, 8.0, 1.0]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    return train_tokenizer(DOCUMENTS * 20, 365, tmp_path_factory.mktemp("tok"))


@pytest.mark.parametrize("wrap", ["eos", "bos_eos"])
def test_floor_and_bytes_by_hand(tokenizer, tmp_path, wrap):
    begin = [tokenizer.bos_id] if wrap == "bos_eos" else []
    ids = [t for text in DOCUMENTS for t in (*begin, *tokenizer.encode(text), tokenizer.eos_id)]
    np.array(ids, "<u2").tofile(tmp_path / "val-00000.bin")
    np.save(tmp_path / "val_bits.npy", np.array(BITS))
    files = {"train": [], "val": [{"name": "val-00000.bin", "tokens": len(ids), "documents": 4}]}
    meta = {"dtype": "uint16", "vocab_size": 365, "bos_id": 1, "eos_id": 2, "wrap": wrap, "files": files}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    last = len(begin) + len(tokenizer.encode(DOCUMENTS[-1])) + 1
    found = Validation(TokenBins(tmp_path, "val"), tokenizer, 6, len(ids) - last)  # the first three whole documents
    sizes = np.array([len(text) for text in DOCUMENTS[:3]])
    floor = sum(BITS[:3]) / sizes.sum()
    assert found.n_bytes == sizes.sum() and found.floor == pytest.approx(floor)
    residual = np.array(BITS[:3]) - floor * sizes
    assert found.floor_error == pytest.approx(np.sqrt((residual**2).sum() * 3 / 2) / sizes.sum())
    assert found.part.mask.sum() == sum(len(tokenizer.encode(text)) + 1 for text in DOCUMENTS[:3])
