"""The floor and the bytes are those of the very documents evaluated, however they are wrapped."""

import contextlib
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data.choose_tokenizer import with_wrap
from data.prepare import prepare
from minillm.base.errors import UserError
from minillm.datasets.batch import shifted
from minillm.datasets.token_bins import TokenBins
from minillm.distributed.ranks import Ranks
from minillm.evaluation.validation import ROWS, Validation, answer_loss, read_text
from minillm.model.config import ModelConfig
from minillm.model.transformer import Transformer
from minillm.tokenizer.tokenizer import Tokenizer
from minillm.tokenizer.train import train_tokenizer
from tests.minillm.tokenizer.test_tokenizer import train_foreign, train_llama

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


def scores_of(validation: Validation, vocab_size: int) -> dict[str, float]:
    model = Transformer(ModelConfig(vocab_size=vocab_size, dim=16, n_layers=1, n_heads=2, max_seq_len=32))
    model.init_weights(0)
    return validation.scores(model, Ranks(0, 1, torch.device("cpu")), contextlib.nullcontext())


TEXTS = ["Ana ran.", "the  man sat", "ＡＢ①  ﬁne\n\tthe 猫 sat", "on the mat 🙂 "]
KINDS = {
    "ours": lambda: None,
    "normalizing, without bytes": lambda: train_foreign("unigram", vocab_size=90),
    "dummy prefix": train_llama,
}


@pytest.mark.parametrize("wrap", ["eos", "bos_eos"])
@pytest.mark.parametrize("max_tokens", [1, 300, 2000])
def test_no_more_of_a_text_is_read_than_is_scored(tokenizer, tmp_path, wrap, max_tokens):
    own = with_wrap(tokenizer, wrap)
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"Ana ran {n} times."}) + "\n" for n in range(1000)))
    whole = Validation(read_text(path, own, allow_lossy=True), own, 8, max_tokens)
    path.write_text(path.read_text() + "{broken")  # so far it is not read
    first = read_text(path, own, allow_lossy=True, max_tokens=2 * max_tokens + 1)
    part = Validation(first, own, 8, max_tokens)
    assert first.n_documents < 1000 and part.part.n_documents < first.n_documents
    for ours, theirs in zip(part.part, whole.part, strict=True):
        assert np.array_equal(ours, theirs)
    assert part.n_bytes == whole.n_bytes


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_are_those_of_the_texts_whatever_the_tokenizer_does_to_them(tokenizer, tmp_path, kind):
    """The same number for each tokenizer, so that bits per byte compare: from a file, and from bins of some parts."""
    own = KINDS[kind]() or tokenizer
    n_bytes = [len(text.encode()) for text in TEXTS]
    rows = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    (tmp_path / "a.jsonl").write_text(rows.replace('"text": "', '"text": "to train on: '))  # no copy of the others
    (tmp_path / "b.jsonl").write_text(rows)
    validation = Validation(read_text(tmp_path / "b.jsonl", own, allow_lossy=True), own, 8, 1 << 20)
    assert validation.n_bytes == sum(n_bytes)
    scores = scores_of(validation, own.vocab_size)
    nats = scores["val_loss"] * validation.part.mask.sum()
    assert scores["val_bpb"] == pytest.approx(nats / np.log(2) / sum(n_bytes))

    own.save(tmp_path / "tok")
    inputs = dict(tokenizer=tmp_path / "tok", val_inputs=[tmp_path / "b.jsonl"], allow_lossy=True)
    meta = prepare([tmp_path / "a.jsonl"], tmp_path / "bins", **inputs)
    bins = TokenBins(tmp_path / "bins", "val")
    assert meta["bytes"] == {"train": sum(n_bytes) + len(TEXTS) * len("to train on: "), "val": sum(n_bytes)}
    assert bins.document_bytes.tolist() == n_bytes
    ends = np.flatnonzero(bins.arrays[0] == bins.eos_id) + 1
    n_bos = int(bins.start_id != bins.eos_id)
    for n in (1, 2, 4):
        part = Validation(bins, own, 8, int(ends[n - 1]) - n * n_bos)
        assert part.part.n_documents == n and part.n_bytes == sum(n_bytes[:n])


def test_where_the_bytes_were_not_written_down_they_are_not_guessed(tokenizer, tmp_path):
    """Bins made elsewhere, and a part of a document, have the bytes of their pieces, if these are the text's."""
    for kind, make in KINDS.items():
        own = make() or tokenizer
        ids = [i for text in DOCUMENTS for i in (*own.encode(text), own.eos_id)]
        np.array(ids, "<u2").tofile(tmp_path / "val-00000.bin")
        files = {"train": [], "val": [{"name": "val-00000.bin", "tokens": len(ids), "documents": 4}]}
        meta = {"dtype": "uint16", "vocab_size": own.vocab_size, "eos_id": own.eos_id, "files": files}
        (tmp_path / "meta.json").write_text(json.dumps(meta))
        bins = TokenBins(tmp_path, "val")
        for max_tokens in (len(ids), 3):
            validation = Validation(bins, own, 6, max_tokens)
            if kind == "ours":
                n_cut = len(own.decode(ids[:3]))
                assert validation.n_bytes == (sum(map(len, DOCUMENTS)) if max_tokens > 3 else n_cut)
                continue
            assert validation.n_bytes is None
            assert "stand for no fixed number of bytes" in validation.no_bytes
            assert set(scores_of(validation, own.vocab_size)) == {"val_loss"}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (np.array(BITS[:3]), "not 4 numbers from 0 up"),
        (np.array([*BITS, 1.0]), "not 4 numbers"),
        (np.array([BITS]), "not 4 numbers"),
        (np.array([1.0, np.nan, 2.0, 3.0]), "not 4 numbers"),
        (np.array([1.0, -1.0, 2.0, 3.0]), "not 4 numbers"),
        (np.array(BITS, dtype=np.float32), "not 4 numbers"),
        (np.array(["a", "b", "c", "d"]), "not 4 numbers"),
        (np.array([{}, 1, 2, 3], dtype=object), "damaged"),
        (b"", "damaged"),
        (b"\x93NUMPY\x01\x00", "damaged"),
        (b"\x93NUMPY\x01\x00v\x00{'descr': '<f8', 'fortran_order': False, 'shape': (9999999999999,), }", "damaged"),
    ],
)
def test_a_damaged_floor_is_named(tokenizer, tmp_path, content, reason):
    ids = [i for text in DOCUMENTS for i in (*tokenizer.encode(text), tokenizer.eos_id)]
    np.array(ids, "<u2").tofile(tmp_path / "val-00000.bin")
    files = {"train": [], "val": [{"name": "val-00000.bin", "tokens": len(ids), "documents": 4}]}
    meta = {"dtype": "uint16", "vocab_size": 365, "eos_id": 2, "files": files}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    path = tmp_path / "val_bits.npy"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.save(path, content, allow_pickle=True)
    with pytest.raises(UserError, match=reason) as error:
        Validation(TokenBins(tmp_path, "val"), tokenizer, 6, 1 << 20)
    assert str(path) in str(error.value)


def test_sizes_that_are_damaged_are_named(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("\n\n".join(TEXTS))
    tokenizer.save(tmp_path / "tok")
    prepare([tmp_path / "a.txt"], tmp_path / "bins", tokenizer=tmp_path / "tok", val_fraction=0.5)
    path = tmp_path / "bins" / "val-00000.sizes"
    sizes = np.fromfile(path, "<u4")
    for damaged in (sizes[:-1], sizes + 1):
        damaged.tofile(path)
        with pytest.raises(UserError, match=r"prepare (it )?again"):
            TokenBins(tmp_path / "bins", "val")
