"""Text → ids → text, what cannot be forged, and the same ids and templates in transformers."""

import io
import json
import random

import numpy as np
import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st

from minillm.base.errors import UserError
from minillm.tokenizer.chat_template import JINJA
from minillm.tokenizer.stream_decoder import StreamDecoder
from minillm.tokenizer.tokenizer import Tokenizer
from minillm.tokenizer.train import train_tokenizer

CORPUS = [
    "Ana and Nana saw a banana in Panama. The man ran; the dog sat on 12 mats, and 345 cats looked on.",
    "小明在厨房里。他拿着三个苹果，去了花园。小红说：“你好，小明！”今天天气很好。",
    "def f(x):\n    if x:\n        return    x + 1\n\t# a tab\n",
    "once upon a time there was a little girl who lived in a house near the wood with her mother",
]
PIECES = [*"an b", "na", "the ", "The", "  ", "\n", "\r\n", "\t", "\0", "▁", "▅", "😀", "👩‍👩‍👧", "é", "e\u0301"]
PIECES += ["中", "你好，", "，。", "<s>", "</s>", "<|user|>", "<0x0A>", "<unk>", "7", "42", "\u2028", "\x85", "\ufeff"]
FORGED = ("▁", "<s>", "</s>", "<|user|>", "<unk>")


def mixed_texts(count: int, pieces: list[str]) -> list[str]:
    draw = random.Random(7)
    return ["".join(draw.choices(pieces, k=draw.randrange(20))) for _ in range(count)]


@pytest.fixture(scope="module")
def ours(tmp_path_factory) -> Tokenizer:
    return train_tokenizer(CORPUS * 20, 480, tmp_path_factory.mktemp("ours"))


def train_foreign(kind: str, **options) -> Tokenizer:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 20), model_writer=model, model_type=kind, minloglevel=2, **options
    )
    return Tokenizer(model.getvalue(), kind)


def train_llama() -> Tokenizer:
    """Llama's way: a dummy space before each text, no pad piece, no roles."""
    return train_foreign(
        "bpe",
        vocab_size=420,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
    )


@pytest.fixture(scope="module")
def foreign() -> Tokenizer:
    return train_llama()


@given(st.text(st.characters(exclude_categories=["Cs"])) | st.lists(st.sampled_from(PIECES)).map("".join))
@example("\0")
@example("▁▁ ▁a▁ ")
@example(" \n\n   \t ")
@example("\U0010ffff\ufffe𠮷")
@settings(max_examples=400, deadline=None)
def test_round_trip(ours, foreign, text):
    for tokenizer in (ours, foreign):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
    # ids 0 to 6 are special: no text yields one; and every byte of the text is accounted for
    ids = ours.encode(text)
    assert all(i >= 7 for i in ids)
    assert ours.byte_lengths()[ids].sum() == len(text.encode())


def test_special_ids_and_printable_ascii(ours):
    assert ours.special_ids == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
    assert (ours.bos_id, ours.eos_id, ours.pad_id, ours.vocab_size) == (1, 2, 3, 480)
    assert ours.byte_lengths().dtype == np.int64
    assert ours.byte_lengths()[:7].tolist() == [3, 0, 0, 0, 0, 0, 0]  # unk shows as U+FFFD
    assert all(len(ours.encode(chr(code))) == 1 for code in range(33, 127))
    assert ours.encode("\n") == [7 + 10]  # the byte piece
    assert ours.encode("▁") == [7 + 0xE2, 7 + 0x96, 7 + 0x81]
    assert len(ours.encode("12345")) == 5
    assert ours.encode("") == []
    assert ours.decode([1, *ours.encode("a b"), 2, 3, 5]) == "a b"


def test_lone_surrogate_is_named(ours):
    for encode in (ours.encode, lambda text: ours.encode_many(["fine", text])):
        with pytest.raises(UserError, match=r"character 2.*U\+D83D"):
            encode("ab\ud83d")


def test_an_id_beyond_the_vocabulary_is_shown_as_such(ours):
    """A model may have more rows than its tokenizer has pieces, and draw one of them."""
    text = ours.encode("Ana")
    assert ours.decode([*text, 480, 777, *text]) == "Ana<id 480><id 777>Ana"
    stream = StreamDecoder(ours)
    assert [stream.push(i) for i in (777, *text)] == ["<id 777>", *(ours.decode([i]) for i in text)]
    with pytest.raises(UserError, match="token id -1: below 0"):
        ours.decode([7, -1])


def test_stream_never_shows_half_a_character(ours):
    text = "Ana 😀你好▁é\n 𠮷"
    stream = StreamDecoder(ours)
    shown = [stream.push(i) for i in ours.encode(text)]
    assert "".join(shown) == text and stream.flush() == ""
    assert "" in shown and not any("\ufffd" in part for part in shown)
    cut = StreamDecoder(ours)
    assert cut.push(ours.encode("😀")[0]) == ""
    assert cut.flush() == "\ufffd"


def test_a_folder_or_its_file_is_loaded(ours, tmp_path):
    ours.save(tmp_path)
    assert Tokenizer.load(tmp_path).sha256 == Tokenizer.load(tmp_path / "tokenizer.model").sha256 == ours.sha256
    with pytest.raises(UserError, match="cannot read the tokenizer"):
        Tokenizer.load(tmp_path / "none.model")


def test_a_folder_of_another_format_says_what_is_read(ours, tmp_path):
    with pytest.raises(UserError, match=r"holds no tokenizer\.model; copy the one there"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer\.json: damaged, .* can only be pretrained on"):
        Tokenizer.load(tmp_path)
    ours.save(tmp_path)  # with both, as Llama 2 has, the model is what counts
    assert Tokenizer.load(tmp_path).sha256 == ours.sha256


@pytest.mark.parametrize("wanted", [True, False])
def test_what_a_text_begins_after_is_kept_in_the_folder(ours, foreign, tmp_path, wanted):
    from transformers import AutoTokenizer

    for name, tokenizer in {"ours": ours, "foreign": foreign}.items():
        tokenizer.with_settings(add_bos=not wanted).with_settings(add_bos=wanted).save(tmp_path / name)
        again = Tokenizer.load(tmp_path / name)
        assert again.start_id == (tokenizer.bos_id if wanted else tokenizer.eos_id) and again.sha256 == tokenizer.sha256
        ids = AutoTokenizer.from_pretrained(tmp_path / name).encode("a b")
        assert ids == again.prompt_ids("a b") == [tokenizer.bos_id] * wanted + tokenizer.encode("a b")
        assert again.prompt_ids("") == [again.start_id]


def test_folders_that_say_that_documents_begin_after_eos_are_prompted_so(ours, tmp_path):
    written = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": False,
        "add_prefix_space": False,
        "legacy": False,
        **{f"{name}_token": piece for name, piece in {"bos": "<s>", "eos": "</s>", "unk": "<unk>"}.items()},
    }
    ours.with_settings(add_bos=False).save(tmp_path)  # its tokenizer.json puts nothing before a text

    def prompt(**changes) -> list[int]:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(written | changes))
        return Tokenizer.load(tmp_path).prompt_ids("a b")

    # another's folder says nothing of it
    assert prompt() == prompt(documents_begin_after_eos=False) == ours.encode("a b")
    assert prompt(documents_begin_after_eos=True) == [ours.eos_id, *ours.encode("a b")]
    ours.with_settings(add_bos=True).save(tmp_path)
    assert prompt(add_bos_token=True) == [ours.bos_id, *ours.encode("a b")]


@pytest.mark.parametrize("model_type", [None, "llama", "qwen3", "mistral"])
def test_transformers_gives_equal_ids(ours, foreign, tmp_path, model_type):
    from transformers import AutoTokenizer

    plain = [piece for piece in PIECES if piece not in FORGED]
    texts = mixed_texts(1500, plain) + mixed_texts(1500, [*"anbhe "]) + CORPUS
    chat = [
        {"role": "system", "content": "Be  kind\n"},
        {"role": "user", "content": " 你好 "},
        {"role": "assistant", "content": "\n ok"},
        {"role": "user", "content": ""},
    ]
    for name, tokenizer in {"ours": ours, "foreign": foreign}.items():
        folder = tmp_path / name
        tokenizer.save(folder)
        if model_type:
            (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
        theirs = AutoTokenizer.from_pretrained(folder)
        assert theirs(texts)["input_ids"] == [tokenizer.prompt_ids(text) for text in texts]
        assert theirs(texts, add_special_tokens=False)["input_ids"] == tokenizer.encode_many(texts)
        assert {name: getattr(theirs, name) for name in tokenizer.special_ids} == tokenizer.special_ids
        for template in ("auto", *(name for name in JINJA if name != "chat" or tokenizer.roles)):
            tokenizer.save(folder, template=template)
            theirs = AutoTokenizer.from_pretrained(folder)
            for prompt in (True, False):
                ids = tokenizer.encode_chat(chat, template=template, add_generation_prompt=prompt)[0]
                assert theirs.apply_chat_template(chat, add_generation_prompt=prompt)["input_ids"] == ids
        tokenizer.save(folder, template="auto")


def test_a_loaded_folder_keeps_its_own_files(ours, tmp_path):
    ours.save(tmp_path / "a")
    config = json.loads((tmp_path / "a" / "tokenizer_config.json").read_text()) | {"chat_template": "their own"}
    (tmp_path / "a" / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "a" / "chat_template.jinja").write_text("their own")
    loaded = Tokenizer.load(tmp_path / "a")
    loaded.save(tmp_path / "b")
    assert json.loads((tmp_path / "b" / "tokenizer_config.json").read_text()) == config
    assert (tmp_path / "b" / "chat_template.jinja").read_text() == "their own"
    loaded.save(tmp_path / "c", template="simple")
    assert not (tmp_path / "c" / "chat_template.jinja").exists()
    written = json.loads((tmp_path / "c" / "tokenizer_config.json").read_text())["chat_template"]
    assert written == JINJA["simple"]


def test_other_kinds_of_models_load(tmp_path):
    """T5's kind: no bytes, text normalized; an unknown character shows as U+FFFD."""
    tokenizer = train_foreign("unigram", vocab_size=90, bos_id=-1)
    assert tokenizer.bos_id == tokenizer.eos_id == tokenizer.pad_id == 2
    assert tokenizer.decode(tokenizer.encode("the  man ran")) == "the man ran"
    assert "\ufffd" in tokenizer.decode(tokenizer.encode("the 龘 cat"))
    tokenizer.save(tmp_path)
    assert not (tmp_path / "tokenizer.json").exists()
    with pytest.raises(UserError, match="no end-of-text piece"):
        train_foreign("unigram", vocab_size=90, eos_id=-1)
