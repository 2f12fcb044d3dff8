"""Learning a tokenizer: reproducible, nothing dropped, bounded memory, clear limits."""

import random
import re

import pytest
from transformers import AutoTokenizer

from minillm.base.errors import UserError
from minillm.tokenizer.tokenizer import Tokenizer
from minillm.tokenizer.train import MAX_LINE, Kind, _sample_lines, train_tokenizer

TEXTS = ["the cat sat on the mat and the dog sat on the log\nhello hello world 2024"] * 30


def test_same_text_gives_the_same_file(tmp_path):
    one = train_tokenizer(TEXTS, 380, tmp_path / "a")
    two = train_tokenizer(iter(TEXTS), 380, tmp_path / "b")
    assert one.sha256 == two.sha256
    rows = (tmp_path / "a" / "tokenizer.vocab").read_text(encoding="utf-8").splitlines()
    assert rows[1].split("\t")[:2] == ["1", "<s>"] and len(rows) == 380


def test_largest_possible_vocabulary_is_named_and_possible(tmp_path):
    with pytest.raises(UserError, match=r"vocab_size 5,000: the text gives at most (\d+) pieces") as error:
        train_tokenizer(TEXTS, 5000, tmp_path)
    largest = int(re.search(r"at most (\d+)", str(error.value))[1])
    assert train_tokenizer(TEXTS, largest, tmp_path).vocab_size == largest
    with pytest.raises(UserError, match=f"at most {largest} "):
        train_tokenizer(TEXTS, largest + 1, tmp_path)


def test_limits_below(tmp_path):
    with pytest.raises(UserError, match="vocab_size 100: at least 360"):
        train_tokenizer(TEXTS, 100, tmp_path)
    with pytest.raises(UserError, match="no text"):
        train_tokenizer(["", "\n\n"], 400, tmp_path)


def test_more_characters_than_the_vocabulary_holds(tmp_path):
    """The rare ones are spelt in bytes; SentencePiece alone would give up."""
    many = "".join(map(chr, range(0x4E00, 0x4E00 + 3000)))
    tokenizer = train_tokenizer([many, "天地玄黄" * 50], 500, tmp_path)
    assert tokenizer.decode(tokenizer.encode(many)) == many
    assert len(tokenizer.encode("天地玄黄")) < 4


def test_long_and_oddly_marked_lines_are_learnt_from(tmp_path):
    long_line = "床前明月光疑是地上霜" * 2000  # 60,000 bytes in one line
    tokenizer = train_tokenizer([long_line, "▅举头望▁低头思▅" * 200], 390, tmp_path)
    assert len(tokenizer.encode("床前明月光")) < 5
    assert len(tokenizer.encode("举头望低头思")) < 6


def test_sample_is_bounded_even_and_reproducible():
    texts = [f"line {i:06d}" for i in range(20_000)]  # 11 bytes each
    kept = _sample_lines(texts, 50_000, seed=0)
    assert 15_000 < sum(map(len, kept)) <= 50_000
    first_half = sum(line < "line 010000" for line in kept) / len(kept)
    assert 0.45 < first_half < 0.55
    assert kept == _sample_lines(iter(texts), 50_000, seed=0) != _sample_lines(texts, 50_000, seed=1)
    assert _sample_lines(["a\nb", "", "c" * (MAX_LINE + 1)], 10_000, 0) == ["a", "b", "c" * MAX_LINE, "c"]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"user_defined": ("<t>", "<t>")}, "--user_defined '<t>': given twice"),
        ({"user_defined": ("<t>",), "control": ("<t>",)}, "--control '<t>': given twice"),
        ({"control": ("<|user|>",)}, "in every vocabulary already"),
        ({"user_defined": ("<s>",)}, "in every vocabulary already"),
        ({"user_defined": ("<0x41>",)}, "in every vocabulary already"),
        ({"user_defined": (" ",)}, "in every vocabulary already"),
        ({"user_defined": ("▁",)}, "▁ is SentencePiece's own mark"),
        ({"user_defined": ("a▁b",)}, "▁ is SentencePiece's own mark"),
        ({"user_defined": ("",)}, "must not be empty"),
        ({"control": ("a▅",)}, "must not be empty or hold ▅"),
        ({"required": "月▁"}, "--required_chars '▁'"),
        ({"coverage": 1.5}, "--character_coverage 1.5"),
    ],
)
def test_pieces_that_cannot_be_are_named(tmp_path, asked, said):
    with pytest.raises(UserError, match=re.escape(said)):
        train_tokenizer(TEXTS, 400, tmp_path, kind=Kind(**asked))
    assert not list(tmp_path.iterdir())


def test_pieces_of_all_sorts(tmp_path):
    """Spaces, line ends and single letters can be pieces of one's own; the .vocab stays one piece a line."""
    kind = Kind(required="龘 \n", user_defined=("the cat", "\t", "a", "é"), control=("<|end|>",))
    made = train_tokenizer(TEXTS, 400, tmp_path, kind=kind)
    pieces = {p.piece: p.type for p in made.model.proto.pieces}
    assert set("龘\n09~") <= set(pieces) and pieces["the▁cat"] == pieces["a"] == 4 and pieces["<|end|>"] == 3
    text = "on the cat\ta é 龘<|end|>\n"
    cut = [made.model.proto.pieces[i].piece for i in made.encode(text)]
    assert {"the▁cat", "\t", "a", "é", "龘", "\n"} <= set(cut) and "<|end|>" not in cut
    assert made.decode(made.encode(text)) == text
    rows = [row.split("\t") for row in (tmp_path / "tokenizer.vocab").read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 400 and all(len(row) == 3 for row in rows) and "\\n" in [row[1] for row in rows]


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
@pytest.mark.parametrize(
    "pieces", [("  ",), (" x ", "x"), (" <y>", "<y>"), ("    ", "  ", "\t"), ("cat ",), (" the", "the cat"), ("<t>",)]
)
def test_pieces_with_spaces_are_cut_out_by_us_and_by_transformers(tmp_path, pieces, model_type):
    """As trained, as loaded, and as transformers reads the folder; the longest at a place counts."""
    kind = Kind(model_type=model_type, user_defined=pieces)
    draw = random.Random(0)
    more = ["".join(draw.choices("abcdefghijklm nopqrstuvwxyz", k=200)) for _ in range(200)]
    made = train_tokenizer([*TEXTS, *more], 400, tmp_path, kind=kind)
    loaded = Tokenizer.load(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in (
        *pieces,
        "a  b",
        "     c",
        " x  x  x x",
        "a <y><y> <y>",
        "the cat the  cat the cat ",
        "\t\t  \n  e<t>",
    ):
        ids = loaded.encode(text)
        assert loaded.decode(ids) == text
        assert ids == made.encode(text) == theirs(text, add_special_tokens=False)["input_ids"]
    assert [loaded.encode(piece) for piece in pieces] == [[made.model.id_of(p.replace(" ", "▁"))] for p in pieces]


def test_character_coverage_is_what_was_asked_for(tmp_path):
    """200 characters, ever rarer; of the room for 100 half goes to single ones unless a coverage is asked for."""
    letters = [chr(0x4E00 + i) for i in range(200)]
    text = "".join(letter * (400 // (i + 1)) for i, letter in enumerate(letters)) + "天地玄黄" * 50
    known = {}
    for coverage in (None, 0.5, 0.85):
        made = train_tokenizer([text], 460, tmp_path, kind=Kind(coverage=coverage))
        single = {p.piece for p in made.model.proto.pieces if len(p.piece) == 1}
        known[coverage] = sum(letter in single for letter in text) / len(text)
    assert 0.5 <= known[0.5] < 0.6 and 0.85 <= known[0.85] < 0.86 and known[0.5] < known[None] < known[0.85]


def test_more_pieces_than_sentencepiece_counts_are_too_many_for_the_text(tmp_path):
    with pytest.raises(UserError, match=r"--vocab_size 1,000,000,000,000: the text gives at most \d+ pieces"):
        train_tokenizer(TEXTS, 10**12, tmp_path)


def test_learning_prints_one_line_before_and_one_after(tmp_path, capfd):
    train_tokenizer(TEXTS, 400, tmp_path)
    printed = capfd.readouterr()
    before, after = printed.out.splitlines()
    assert before == "learning 400 pieces from 0.0 MB of text" and after.startswith("learnt 400 pieces in ")
    assert printed.err == ""


def test_ascii_is_learnt_however_small_the_vocabulary(tmp_path):
    tokenizer = train_tokenizer(["apple 世界 " * 20] * 20, 365, tmp_path)
    assert len(tokenizer.encode("apple apple")) < 11
