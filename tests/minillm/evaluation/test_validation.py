"""The floor and the bytes are those of the very documents evaluated, however they are wrapped."""

import contextlib
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from minillm.datasets.batch import shifted
from minillm.datasets.token_bins import TokenBins
from minillm.distributed.ranks import Ranks
from minillm.evaluation.validation import ROWS, Validation, answer_loss
from minillm.model.config import ModelConfig
from minillm.model.transformer import Transformer
from minillm.tokenizer.tokenizer import Tokenizer
from minillm.tokenizer.train import train_tokenizer

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


@pytest.mark.parametrize("kind", ["texts", "answers"])
def test_ranks_share_out_the_batches_and_together_score_as_one(tmp_path, kind):
    """Four batches, three of them full: each rank has those of its own, which together are those of a single rank."""
    torch.manual_seed(0)
    model = Transformer(ModelConfig(vocab_size=50, dim=8, n_layers=1, n_heads=1, max_seq_len=8))
    ids = np.random.default_rng(0).integers(0, 50, (3 * ROWS + 2, 9))
    answers = SimpleNamespace(rows_per_epoch=len(ids), seq_len=8, batch=lambda positions: shifted(ids[positions]))
    ids.astype("<u2").tofile(tmp_path / "x.bin")
    bins = TokenBins(tmp_path / "x.bin", "train", dtype="uint16", vocab_size=50)
    texts = Validation(bins, None, 8, (3 * ROWS + 2) * 8 + 1)

    def given(world: int) -> np.ndarray:
        """Nats and targets of each rank: (world, 2)."""
        summed = []

        class Apart(Ranks):
            def sum(self, *values: float) -> list[float]:
                summed.append(values)
                return list(values)

        for rank in range(world):
            ranks = Apart(rank, world, torch.device("cpu"))
            if kind == "texts":
                texts.scores(model, ranks, contextlib.nullcontext())
            else:
                answer_loss(model, answers, 10**6, ranks, contextlib.nullcontext())
        return np.array(summed)

    (whole,) = given(1)
    assert whole[1] == (3 * ROWS + 2) * 8
    for world, rows in ((2, [2 * ROWS, ROWS + 2]), (3, [ROWS + 2, ROWS, ROWS])):
        parts = given(world)
        assert parts[:, 1].tolist() == [8 * n for n in rows]
        assert parts.sum(0) == pytest.approx(whole, rel=1e-5)


def test_without_bytes_of_ids_no_bits_per_byte_are_given_and_the_reason_is(tmp_path):
    """A vocabulary that changes texts: the bytes of its pieces are not those of the text."""
    from minillm.evaluation.validation import read_text
    from tests.minillm.tokenizer.test_tokenizer import train_foreign

    (tmp_path / "a.txt").write_text("Ana ran.\n\nthe  man sat")
    changing = train_foreign("unigram", vocab_size=90)
    validation = Validation(read_text(tmp_path / "a.txt", changing), changing, 8, 1 << 20)
    assert validation.n_bytes is None and validation.floor is None
    assert "stand for no fixed number of bytes (its normalizer (nmt_nfkc) changes texts)" in validation.no_bytes
    model = Transformer(ModelConfig(vocab_size=90, dim=16, n_layers=1, n_heads=2, max_seq_len=32))
    model.init_weights(0)
    scores = validation.scores(model, Ranks(0, 1, torch.device("cpu")), contextlib.nullcontext())
    assert set(scores) == {"val_loss"}
