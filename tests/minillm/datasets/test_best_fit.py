"""Rows of whole documents, held to documents that are listed one token after another."""

from itertools import pairwise

import numpy as np
import pytest

from minillm.base.errors import UserError
from minillm.datasets import best_fit
from minillm.datasets.best_fit import PackedDocuments
from minillm.datasets.token_bins import TokenBins
from minillm.datasets.windows import TokenWindows
from tests.minillm.datasets.test_windows import EOS, write_bins

BOS = 1
T = 16
LENGTHS = np.random.default_rng(0).integers(1, 60, 200)  # tokens of text; a third of the documents is longer than a row


def write_documents(folder, with_bos: bool, lengths=LENGTHS) -> tuple[TokenBins, list[list[int]]]:
    """Bins in two files, and their documents, whose tokens are all different within a document."""
    texts = [[3 + (7 * number + i) % 990 for i in range(length)] for number, length in enumerate(lengths)]
    documents = [[*([BOS] if with_bos else []), *text, EOS] for text in texts]
    half = len(documents) // 2
    arrays = [np.concatenate(part) for part in (documents[:half], documents[half:])]
    changes = dict(wrap="bos_eos", bos_id=BOS, format=2) if with_bos else dict(format=2)
    return TokenBins(write_bins(folder, {"train": arrays}, **changes), "train"), documents


def with_beginnings(documents: list[list[int]], with_bos: bool) -> list[list[int]]:
    """Each document with what it begins after: its bos, else the eos before it, which the first does not have."""
    if with_bos:
        return documents
    return [documents[0], *([EOS, *document] for document in documents[1:])]


def steps_of(documents: list[list[int]], with_bos: bool) -> list[tuple[int, int]]:
    """(input, target) of every target: each token of a document follows the one before."""
    pairs = []
    for tokens in with_beginnings(documents, with_bos):
        pairs += pairwise(tokens)
    return sorted(pairs)


@pytest.mark.parametrize("with_bos", [True, False])
def test_every_target_comes_once_and_after_the_token_before_it(tmp_path, with_bos):
    bins, documents = write_documents(tmp_path / "d", with_bos)
    data = TokenWindows([(bins, 1.0)], T, seed=0, best_fit=True)
    batch = data.batch(np.arange(data.n_windows))
    assert batch.x.shape == batch.y.shape == batch.mask.shape == batch.documents.shape == (data.n_windows, T)
    x, y = batch.x[batch.mask].tolist(), batch.y[batch.mask].tolist()
    assert sorted(zip(x, y, strict=True)) == steps_of(documents, with_bos)


@pytest.mark.parametrize("with_bos", [True, False])
def test_attention_stays_inside_one_document(tmp_path, with_bos):
    """What attention sees together is a stretch of one document, from its beginning if it is no longer than a row."""
    bins, documents = write_documents(tmp_path / "d", with_bos)
    data = TokenWindows([(bins, 1.0)], T, seed=0, best_fit=True)
    stretches, fitting = set(), set()  # of T + 1 tokens, or up to the end of a longer document
    for tokens in with_beginnings(documents, with_bos):
        stretches |= {tuple(tokens[begin : begin + T + 1]) for begin in range(0, len(tokens) - 1, T)}
        if len(tokens) <= T + 1:
            fitting.add(tuple(tokens))

    found = set()
    batch = data.batch(np.arange(data.n_windows))
    for x, y, mask, numbers in zip(*batch[:4], strict=True):
        assert (numbers.diff() >= 0).all()
        for number in numbers.unique():
            targets = mask & (numbers == number)
            if targets.any():
                found.add((*x[targets].tolist(), int(y[targets][-1])))
                # nothing else is in sight of them: at most the eos that ends the document itself
                assert (numbers == number).sum() - targets.sum() <= 1
    assert found == stretches and fitting <= found


def test_what_is_said_is_what_was_cut(tmp_path):
    bins, documents = write_documents(tmp_path / "d", with_bos=True)
    packed = PackedDocuments(bins, T)
    assert packed.n_documents == len(documents)
    assert packed.n_cut == sum(len(document) > T + 1 for document in documents)
    ends = np.cumsum([len(document) for document in documents])
    in_a_window = [
        any(k * T <= end - len(document) and end <= k * T + T + 1 for k in range(bins.n_tokens // T + 1))
        for end, document in zip(ends, documents, strict=True)
    ]
    assert packed.n_cut_by_windows == len(documents) - sum(in_a_window)
    room = sum(int(packed.row(number).is_room.sum()) for number in range(packed.n_rows))
    assert packed.padding == pytest.approx(room / (packed.n_rows * (T + 1)))
    assert f"{len(documents):,} documents in {packed.n_rows:,} rows" in packed.describe()


def test_rows_depend_on_the_bins_alone_and_blocks_bound_what_is_packed_at_once(tmp_path, monkeypatch):
    lengths = np.random.default_rng(1).integers(1, T, 2000)
    bins, documents = write_documents(tmp_path / "d", True, lengths)
    first, again = PackedDocuments(bins, T), PackedDocuments(bins, T)
    assert np.array_equal(first.order, again.order) and np.array_equal(first.edges, again.edges)
    fewest = sum(map(len, documents)) / (T + 1)
    assert first.n_rows < 1.03 * fewest

    monkeypatch.setattr(best_fit, "PACKED", 256)
    monkeypatch.setattr(best_fit, "SCANNED", 100)
    blocks = PackedDocuments(bins, T)
    assert sorted(blocks.order) == list(range(2000)) and first.n_rows <= blocks.n_rows < 1.05 * fewest
    assert all(len(blocks.row(number).tokens) == T + 1 for number in range(blocks.n_rows))


def test_order_mixtures_and_the_decay_are_those_of_windows(tmp_path):
    a, _ = write_documents(tmp_path / "a", True)
    b, _ = write_documents(tmp_path / "b", True, LENGTHS[:50])
    data = TokenWindows([(a, 0.75), (b, 0.25)], T, seed=1, best_fit=True)
    sources, rows = data.locate(np.arange(1024))
    assert np.bincount(sources).tolist() == [768, 256]
    n_rows = data.packed[1].n_rows
    assert n_rows < 256 / 2  # so `b` comes round twice
    assert set(rows[sources == 1]) == set(range(n_rows))
    whole = data.batch(np.arange(20))
    part = data.batch(np.arange(5, 9))
    assert all((one[5:9] == other).all() for one, other in zip(whole[:4], part[:4], strict=True))
    later = TokenWindows([(b, 1.0)], T, seed=1, best_fit=True, after=(data, 256))
    assert later.turns_done.tolist() == [64] and later.batch(np.arange(256, 260)).x.shape == (4, T)


def test_a_raw_bin_has_no_documents(tmp_path):
    np.arange(1000).astype("<u2").tofile(tmp_path / "raw.bin")
    with pytest.raises(UserError, match="--pack best_fit cannot be"):
        PackedDocuments(TokenBins(tmp_path / "raw.bin", "train", dtype="uint16", vocab_size=1000), T)
