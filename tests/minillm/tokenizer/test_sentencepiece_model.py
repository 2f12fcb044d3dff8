"""Many and long texts give the ids of each at one go; a damaged file is told. Round trips are in test_tokenizer.py."""

import pytest

from minillm.base.errors import UserError
from minillm.tokenizer import sentencepiece_model
from minillm.tokenizer.sentencepiece_model import SentencePieceModel
from minillm.tokenizer.tokenizer import Tokenizer
from minillm.tokenizer.train import train_tokenizer
from tests.minillm.tokenizer.test_tokenizer import CORPUS, PIECES, mixed_texts, train_llama


@pytest.fixture(scope="module")
def ours(tmp_path_factory) -> Tokenizer:
    return train_tokenizer(CORPUS * 20, 480, tmp_path_factory.mktemp("ours"))


def test_many_texts_at_once(ours):
    texts = mixed_texts(300, PIECES)
    assert ours.encode_many(texts, threads=2) == [ours.encode(text) for text in texts]


def test_long_texts_are_cut_where_nothing_changes(ours, monkeypatch):
    both = (ours, train_llama())
    texts = [" ".join(mixed_texts(8, [p for p in PIECES if p != "▁"])) + CORPUS[i % 4] for i in range(60)]
    whole = [tokenizer.model.processor.encode(texts) for tokenizer in both]
    monkeypatch.setattr(sentencepiece_model, "LONG_TEXT", 40)
    assert [tokenizer.encode_many(texts) for tokenizer in both] == whole
    endless = "an" * 500  # no place to cut
    assert ours.decode(ours.encode(endless)) == endless


class Counting:
    """A processor of SentencePiece that counts the lists it is given: for each it starts threads."""

    def __init__(self, processor):
        self.processor, self.n_lists = processor, 0

    def encode(self, text, **options):
        self.n_lists += isinstance(text, list)
        return self.processor.encode(text, **options)


def test_no_thread_is_started_for_the_short_text_between_two_marks(ours, monkeypatch):
    counting = Counting(ours.model.no_prefix)
    monkeypatch.setattr(ours.model, "no_prefix", counting)
    mark = ours.encode("▁")
    assert len(mark) == 3 and ours.encode("▁" * 500) == mark * 500
    assert ours.encode("an▁▁the▁") == [*ours.encode("an"), *mark * 2, *ours.encode("the"), *mark]
    assert counting.n_lists == 0


def test_damaged_files(ours):
    data = ours.model.data
    for cut in (*range(0, len(data), 61), *range(len(data) - 250, len(data))):
        with pytest.raises(UserError, match="copy or train it again"):
            SentencePieceModel(data[:cut], "cut.model")


def test_pieces_of_invalid_bytes_are_refused(ours):
    """Each piece of several bytes in turn with its last byte broken: how protobuf shows such a text differs."""
    data = ours.model.data
    pieces = [piece.piece.encode() for piece in ours.model.proto.pieces]
    places = [data.index(piece) + len(piece) - 1 for piece in pieces if len(piece) > 1]
    for place in places:
        damaged = data[:place] + b"\xff" + data[place + 1 :]
        with pytest.raises(UserError, match="damaged: copy or train it again"):
            SentencePieceModel(damaged, "damaged.model")
