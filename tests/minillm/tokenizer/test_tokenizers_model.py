"""Every kind of tokenizer.json gives the ids that transformers gives, and its text comes back."""

import json
import random
import sys
import unicodedata

import numpy as np
import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from minillm.base.errors import UserError
from minillm.tokenizer.stream_decoder import StreamDecoder
from minillm.tokenizer.tokenizer import JsonTokenizer, Tokenizer
from minillm.tokenizer.tokenizers_model import TokenizersModel
from tests.minillm.tokenizer.test_byte_bpe import TEXTS
from tests.minillm.tokenizer.test_tokenizer import CORPUS

SPECIAL = ["<unk>", "<s>", "</s>", "<|im_end|>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def learn(library: tokenizers.Tokenizer, trainer) -> tokenizers.Tokenizer:
    library.train_from_iterator(CORPUS * 5, trainer)
    return library


def unigram() -> tokenizers.Tokenizer:
    """T5's kind: ▁ for spaces, NFKC, no bytes."""
    library = tokenizers.Tokenizer(models.Unigram())
    library.normalizer = normalizers.NFKC()
    library.pre_tokenizer = pre_tokenizers.Metaspace()
    library.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False, max_piece_length=8
    )
    return learn(library, trainer)


def word_piece() -> tokenizers.Tokenizer:
    """BERT's kind: lower case, words cut at spaces and signs."""
    library = tokenizers.Tokenizer(models.WordPiece(unk_token="<unk>"))
    library.normalizer = normalizers.BertNormalizer()
    library.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    library.decoder = decoders.WordPiece()
    return learn(library, trainers.WordPieceTrainer(vocab_size=400, special_tokens=SPECIAL, show_progress=False))


def word_level() -> tokenizers.Tokenizer:
    """Whole words, put together with spaces."""
    library = tokenizers.Tokenizer(models.WordLevel(unk_token="<unk>"))
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    return learn(library, trainers.WordLevelTrainer(vocab_size=90, special_tokens=SPECIAL, show_progress=False))


def llama2() -> tokenizers.Tokenizer:
    """Llama 2's kind: BPE over ▁, bytes for what has no piece, a space in front of the text."""
    library = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    library.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=[*SPECIAL, *BYTES], show_progress=False)
    library = learn(library, trainer)
    described = json.loads(library.to_str())
    # As converted from SentencePiece: byte pieces are ordinary pieces, and not added ones.
    described["added_tokens"] = [token for token in described["added_tokens"] if token["content"] in SPECIAL]
    return tokenizers.Tokenizer.from_str(json.dumps(described))


def llama3() -> tokenizers.Tokenizer:
    """Byte-level BPE, control pieces behind the vocabulary, bos put there by the post-processor, a limit on length."""
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    library = learn(library, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False))
    library.add_special_tokens(SPECIAL)
    library.add_tokens(["<think>"])
    first = ("<s>", library.token_to_id("<s>"))
    library.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[first])
    library.enable_truncation(5)
    return library


KINDS = {maker.__name__: maker for maker in (unigram, word_piece, word_level, llama2, llama3)}
WITHOUT_BYTES = {
    "unigram": "normalizer (NFKC) changes texts",
    "word_piece": "decoder (WordPiece) puts pieces together",
    "word_level": "decoder (none) puts pieces together",
    "llama2": "it puts a space before a text",
}


def write_folder(library: tokenizers.Tokenizer, folder, **settings) -> None:
    library.save(str(folder / "tokenizer.json"))
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "clean_up_tokenization_spaces": False}
    config = named | {"tokenizer_class": "PreTrainedTokenizerFast"} | settings
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module", params=KINDS)
def kind(request, tmp_path_factory):
    """(name, our tokenizer, transformers', its folder)"""
    folder = tmp_path_factory.mktemp(request.param)
    write_folder(KINDS[request.param](), folder)
    return request.param, Tokenizer.load(folder), PreTrainedTokenizerFast.from_pretrained(folder), folder


PLAIN = [text for text in TEXTS if "<|im_start|>" not in text] + CORPUS


def test_ids_of_plain_text_are_those_of_transformers(kind):
    _, ours, theirs, _ = kind
    ids = theirs(PLAIN, add_special_tokens=False)["input_ids"]
    assert ours.encode_many(PLAIN, threads=2) == ids == [ours.encode(text) for text in PLAIN]
    assert ours.vocab_size == len(theirs) and (ours.bos_id, ours.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert ours.control == {piece: theirs.convert_tokens_to_ids(piece) for piece in SPECIAL}


@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
@example("<|im_end|>")
@example("a <s> b</s> c<|im_end|> <unk>")
@settings(max_examples=100, deadline=None, derandomize=True)
def test_ids_of_any_text_are_those_of_transformers(kind, text):
    """But for control pieces written out, which are text here: texts come from constants in the sources as well."""
    _, ours, theirs, _ = kind
    ids = ours.encode(text)
    assert not {i for piece, i in ours.control.items() if piece != "<unk>"} & set(ids)
    if not any(piece in unicodedata.normalize("NFKC", text) for piece in SPECIAL):
        assert ids == theirs(text, add_special_tokens=False)["input_ids"]


def test_decoding_gives_what_transformers_gives(kind):
    name, ours, theirs, _ = kind
    for text in PLAIN:
        ids = ours.encode(text)
        assert ours.decode([ours.bos_id, *ids, ours.eos_id]) == theirs.decode(ids, skip_special_tokens=True)
        if name.startswith("llama"):
            assert ours.decode(ids) == text
    assert ours.decode([]) == ""
    ids = ours.encode("the mat")
    beyond = f"<id {ours.vocab_size}>"
    first, _, last = ours.decode([*ids, ours.vocab_size, *ids]).partition(beyond)
    assert first == last.strip() == ours.decode(ids)
    stream = StreamDecoder(ours)
    assert beyond in "".join([stream.push(i) for i in (ours.vocab_size, *ids)])


def test_no_text_forges_a_control_piece(kind):
    name, ours, _, _ = kind
    text = "a <s> b</s> c<|im_end|> </s>"
    control = {i for piece, i in ours.control.items() if piece != "<unk>"}
    assert not control & set(ours.encode(text))
    if name == "llama3":
        assert ours.decode(ours.encode(text)) == text
        assert ours.pieces.ids["<think>"] in ours.encode("so <think> what")  # an added piece that is no control piece


def test_a_stream_shows_the_whole_text_and_no_part_of_a_character(kind):
    _, ours, _, _ = kind
    for text in [*PLAIN, "the mat 😀 你好 x"]:
        ids = ours.encode(text)
        stream = StreamDecoder(ours)
        shown = [stream.push(i) for i in ids]
        assert "\ufffd" not in "".join(shown) or "\ufffd" in ours.decode(ids)
        before = ours.encode("a")  # a stream goes on from a prompt
        assert ours.decode(before) + "".join(shown) + stream.flush() == ours.decode(before + ids)


def test_bytes_of_ids_add_up_or_are_refused_by_name(kind):
    name, ours, _, _ = kind
    if name in WITHOUT_BYTES:
        with pytest.raises(UserError) as refused:
            ours.byte_lengths()
        assert WITHOUT_BYTES[name] in str(refused.value) and "no fixed number of bytes" in str(refused.value)
        return
    lengths = ours.byte_lengths()
    assert lengths.dtype == np.int64 and len(lengths) == ours.vocab_size
    for text in filter(None, PLAIN):
        assert lengths[ours.encode(text)].sum() == len(text.encode())
    assert lengths[list(ours.control.values())].sum() == 0


def test_lone_surrogates_are_named(kind):
    with pytest.raises(UserError, match=r"character 2.*U\+D83D"):
        kind[1].encode_many(["fine", "ab\ud83d"])


def test_a_saved_folder_is_the_same_tokenizer(kind, tmp_path):
    _, ours, _, folder = kind
    ours.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert again.sha256 == ours.sha256
    assert (tmp_path / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    assert again.encode_many(PLAIN) == ours.encode_many(PLAIN)


@pytest.mark.parametrize("threads", [1, 3])
def test_a_long_text_and_many_texts(kind, threads):
    _, ours, theirs, _ = kind
    draw = random.Random(1)
    texts = ["".join(draw.choices("the mat. 你好 ", k=draw.randrange(30))) for _ in range(500)] + ["ab " * 20_000]
    assert ours.encode_many(texts, threads=threads) == theirs(texts, add_special_tokens=False)["input_ids"]


def test_a_sentencepiece_model_that_changes_texts_has_no_bytes_either():
    from tests.minillm.tokenizer.test_tokenizer import train_foreign

    with pytest.raises(UserError, match=r"its normalizer \(nmt_nfkc\) changes texts"):
        train_foreign("unigram", vocab_size=90).byte_lengths()
    plain = dict(normalization_rule_name="identity", remove_extra_whitespaces=False)
    with pytest.raises(UserError, match="characters without a piece are lost"):
        train_foreign("bpe", vocab_size=150, **plain).byte_lengths()


@pytest.mark.parametrize("value", [None, -1, "é", [], {}, 1e30, True])
def test_a_wrong_value_anywhere_is_one_line_or_still_a_tokenizer(kind, value):
    """The library takes much that is odd; what it takes must encode, and what it does not must be named."""
    name, _, _, folder = kind
    text = (folder / "tokenizer.json").read_text()
    config = (folder / "tokenizer_config.json").read_bytes()
    draw = random.Random(f"{name}{value}")
    for path in draw.sample(list(places(json.loads(text))), 12):
        described = json.loads(text)
        place = described
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value
        files = {"tokenizer.json": json.dumps(described).encode(), "tokenizer_config.json": config}
        try:
            tokenizer = JsonTokenizer(files, "damaged")
            assert isinstance(tokenizer.decode(tokenizer.encode("the <s> 你")), str), path
        except UserError as problem:
            assert str(problem).startswith("damaged"), path


def places(value, path=()):
    """The path to each value of a JSON document, of long lists and mappings the first few."""
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(items)[:12]:
        yield from places(inner, (*path, key))


def test_without_the_library_the_extra_is_named(kind, monkeypatch):
    _, _, _, folder = kind
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match=r'tokenizer.json: reading it needs .* pip install -e "\.\[hf\]"'):
        Tokenizer.load(folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda file: file["model"]["vocab"].update(a="1"), "vocab is .*, not an object of names and whole numbers"),
        (lambda file: file["model"]["vocab"].update(a=True), "not an object of names and whole numbers"),
        (
            lambda file: file["model"]["vocab"].update(a=2**63 - 1),
            "'a' has the id 9223372036854775807: ids",
        ),
        (lambda file: file["model"]["vocab"].update(a=10**9), "'a' has the id 1000000000"),
        (lambda file: file["model"]["vocab"].update(a=-1), "'a' has the id -1"),
        (lambda file: file["model"]["vocab"].update(a=file["model"]["vocab"]["b"]), "both have the id"),
        (lambda file: file["added_tokens"].append("x"), "added_tokens is .*, not a list of objects"),
        (
            lambda file: file["added_tokens"][0].update(id="0"),
            r"added_tokens\[0\].* id is .0., not a whole",
        ),
        (
            lambda file: file["added_tokens"][0].update(id=2**62),
            r"added_tokens\[0\].* id is 4611686018427387904",
        ),
        (lambda file: file["added_tokens"][0].update(content=["x"]), r"content is \['x'\], not a text"),
        (lambda file: file.update(model=[]), "it holds no model"),
    ],
    ids=range(11),
)
def test_ids_of_the_wrong_kind_or_beyond_any_table_are_refused_at_once(change, words):
    vocab = {"<s>": 0, "a": 1, "b": 2}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = {"id": 0, "content": "<s>", "special": True, **flags}
    file = {"model": {"type": "WordLevel", "vocab": vocab, "unk_token": "<s>"}, "added_tokens": [added]}
    assert TokenizersModel(json.dumps(file).encode(), "tokenizer.json").ids == vocab
    change(file)
    with pytest.raises(UserError, match=words):
        TokenizersModel(json.dumps(file).encode(), "tokenizer.json")
