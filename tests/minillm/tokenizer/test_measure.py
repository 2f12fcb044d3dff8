"""Whether a tokenizer gives a text back, counted in characters."""

import pytest
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers, trainers

from minillm.base.errors import UserError
from minillm.tokenizer.measure import check_round_trip
from minillm.tokenizer.tokenizer import Tokenizer
from tests.minillm.tokenizer.test_jinja_template import byte_level_folder
from tests.minillm.tokenizer.test_tokenizer import train_foreign, train_llama

TEXT = "Ana, （ran）。 ﬁne\n\n  x 猫猫"  # 23 characters


def without_all_bytes(tmp_path) -> Tokenizer:
    """Byte-level, but with the bytes of its training text alone."""
    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.train_from_iterator(["Ana ran. fine x,\n"] * 9, trainers.BpeTrainer(vocab_size=60, show_progress=False))
    library.add_special_tokens(["</s>"])
    library.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    return Tokenizer.load(tmp_path)


def byte_level(tmp_path) -> Tokenizer:
    byte_level_folder(tmp_path)
    return Tokenizer.load(tmp_path)


KINDS = {  # what makes it, and the characters of TEXT that are lost, counted by hand
    "bytes": (byte_level, ""),
    "dummy prefix": (lambda _: train_llama(), ""),
    "bytes of the corpus alone": (without_all_bytes, "（）。ﬁ猫猫"),
    # NFKC writes （ ） ﬁ as ( ) fi and line ends as spaces, of which one in a row is left, and has no piece for 猫
    "normalizing": (lambda _: train_foreign("unigram", vocab_size=90), "（）ﬁ猫猫\n\n"),
    "spaces taken together": (
        lambda _: train_foreign("bpe", vocab_size=420, byte_fallback=True, normalization_rule_name="identity"),
        " ",
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_tokenizer_loses_is_counted_and_refused(tmp_path, capsys, kind):
    make, lost = KINDS[kind]
    tokenizer = make(tmp_path)
    given_back = tokenizer.decode(tokenizer.encode(TEXT))
    assert (given_back == TEXT) == (not lost)
    if not lost:
        check_round_trip(tokenizer, [TEXT], "a.txt", False)
        assert capsys.readouterr().out == ""
        return
    for character in lost:
        assert TEXT.count(character) > given_back.count(character)
    with pytest.raises(UserError, match=r"a\.txt: the tokenizer loses .* of their first 23 characters .*--allow_lossy"):
        check_round_trip(tokenizer, [TEXT], "a.txt", False)
    check_round_trip(tokenizer, [TEXT], "a.txt", True)
    assert "the tokenizer loses" in capsys.readouterr().out


def test_a_rare_loss_is_said_and_no_more(tmp_path, capsys):
    tokenizer = without_all_bytes(tmp_path)
    check_round_trip(tokenizer, ["Ana ran." * 200, "猫"], "a.txt", False)
    assert "loses 0.06% of their first 1,601 characters ('猫' 1 times)" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"loses 0\.12%"):
        check_round_trip(tokenizer, ["Ana ran." * 200, "猫猫"], "a.txt", False)
