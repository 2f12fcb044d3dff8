"""Tokenizers through GGUF; transformers, which reads it itself, is the oracle."""

import base64
import dataclasses
import json

import pytest
import tokenizers
import torch
import transformers

from minillm.base.errors import UserError
from minillm.checkpoint import gguf_tokenizer
from minillm.checkpoint.gguf import open_file, write_file
from minillm.tokenizer.edit import from_pieces
from minillm.tokenizer.tokenizer import Tokenizer
from minillm.tokenizer.train import train_tokenizer
from tests.minillm.checkpoint.test_gguf import BASE, stored
from tests.minillm.tokenizer.test_other_folders import (
    BOTH,
    CHAT,
    CHATML,
    ENDS,
    FAST,
    LLAMA,
    SETTINGS,
    agree,
    texts,
    token,
)
from tests.minillm.tokenizer.test_tokenizer import train_foreign


@pytest.mark.parametrize("dummy_prefix", [True, False])
def test_a_vocabulary_goes_both_ways(dummy_prefix, tmp_path):
    text = ["The cat sat on the mat, 2024 times.\n  床前明月光，疑是地上霜。"] * 20
    tokenizer = train_tokenizer(text, 420, tmp_path / "vocabulary").with_settings(add_bos=False, after_eos=True)
    pieces = [(p.piece, p.score, gguf_tokenizer.TYPES[p.type]) for p in tokenizer.model.proto.pieces]
    if dummy_prefix:
        made = from_pieces(pieces, {"bos": 1, "eos": 2}, dummy_prefix=True, source="made")
        tokenizer = made.with_settings(add_bos=True)
    config = dataclasses.replace(BASE, vocab_size=448)  # more rows than pieces
    write_file(stored(config), tokenizer, tmp_path / "m.gguf", torch.float32)
    _, metadata = open_file(tmp_path / "m.gguf")
    assert len(metadata["tokenizer.ggml.tokens"]) == len(metadata["tokenizer.ggml.scores"]) == 448
    again = gguf_tokenizer.read(metadata, "m.gguf")
    assert again.sha256 == tokenizer.sha256  # by which its token bins know it
    assert [(p.piece, p.score, gguf_tokenizer.TYPES[p.type]) for p in again.model.proto.pieces] == pieces
    assert again.begins_after_eos is not dummy_prefix
    assert (again.bos_id, again.eos_id, again.pad_id, again.start_id) == (
        1,
        2,
        2 + (not dummy_prefix),
        2 - dummy_prefix,
    )
    assert again.chat_template == tokenizer.chat_template
    metadata["tokenizer.ggml.scores"][419] -= 1  # by another program, which leaves our own key as it is
    changed = gguf_tokenizer.read(metadata, "m.gguf")
    assert changed.model.proto.pieces[419].score == pieces[419][1] - 1 and changed.sha256 != tokenizer.sha256
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    for line in ("The cat sat on 42 mats", "明月光 and 😀", "", "x", "a  b\n"):
        ids = again.encode(line)
        assert ids == tokenizer.encode(line)
        if dummy_prefix:  # transformers puts a space before each text whatever the file says
            assert ids == theirs(line, add_special_tokens=False).input_ids, line
    again.save(tmp_path / "again")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "again")
    assert theirs("The cat").input_ids == [1] * dummy_prefix + again.encode("The cat")


@pytest.mark.parametrize("split", ["gpt-2", "smollm", "qwen2", "llama-bpe"])
def test_a_byte_level_vocabulary_goes_both_ways(split, tmp_path):
    from tests.minillm.tokenizer.test_byte_bpe import TEXTS, train

    train(split).save(str(tmp_path / "tokenizer.json"))
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    settled = {"eos_token": "<|im_end|>", "bos_token": {"content": "<|im_start|>"}, "chat_template": template}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settled))
    tokenizer = Tokenizer.load(tmp_path)
    config = dataclasses.replace(BASE, vocab_size=tokenizer.vocab_size + 5)
    write_file(stored(config), tokenizer, tmp_path / "m.gguf", torch.float32)
    _, metadata = open_file(tmp_path / "m.gguf")
    again = gguf_tokenizer.read(metadata, "m.gguf")
    again.save(tmp_path / "again")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "again")
    assert (again.bos_id, again.eos_id, again.sha256) == (tokenizer.bos_id, tokenizer.eos_id, tokenizer.sha256)
    assert again.chat_template == template == theirs.chat_template and theirs.eos_token_id == again.eos_id
    for text in TEXTS[:5]:
        assert again.encode(text) == tokenizer.encode(text) == theirs(text, add_special_tokens=False).input_ids


@pytest.mark.parametrize("rule", ["nfc", "words_first"])
def test_rules_that_a_name_does_not_say_are_refused(rule, tmp_path):
    from tests.minillm.tokenizer.test_byte_bpe import train

    train("gpt-2").save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    tokenizer = Tokenizer.load(tmp_path)
    setattr(tokenizer.bpe, rule, True)
    with pytest.raises(UserError, match="--format gguf: only the rules' name gpt-2 has a place there"):
        gguf_tokenizer.describe(tokenizer, tokenizer.vocab_size)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tokenizer.ggml.model": "t5"}, "kind 't5'"),
        ({"tokenizer.ggml.tokens": ["a"]}, "its tokenizer: damaged"),
        ({"tokenizer.ggml.tokens": [1, 2, 3]}, "its tokenizer: damaged"),
        ({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2"}, "its tokenizer: damaged"),
        ({"minillm.tokenizer_file": "damaged"}, "its tokenizer: damaged"),
        ({"tokenizer.ggml.scores": None}, "its tokenizer: damaged"),
        ({"tokenizer.ggml.scores": [0.0, 0.0]}, "its tokenizer: damaged: 3 pieces, but 2 scores"),
        ({"tokenizer.ggml.token_type": [2, 3]}, "its tokenizer: damaged: 3 pieces, but 2 types"),
        ({"tokenizer.ggml.token_type": [2, 3, 77]}, r"its tokenizer: damaged: 3 pieces, but types \[77\]"),
        ({"tokenizer.ggml.eos_token_id": 99999}, "its tokenizer: damaged: its eos is 99999"),
        ({"tokenizer.ggml.eos_token_id": "last"}, "its tokenizer: damaged: tokenizer.ggml.eos_token_id is 'last'"),
        (
            {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.merges": ["ab"]},
            "damaged: one of its merges",
        ),
        (
            {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.merges": [], "tokenizer.ggml.pre": "tekken"},
            "rules 'tekken'",
        ),
    ],
)
def test_a_tokenizer_we_do_not_have_is_refused(change, words):
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>"],
        "tokenizer.ggml.scores": [0.0, 0.0, 0.0],
        "tokenizer.ggml.token_type": [2, 3, 3],
        "tokenizer.ggml.eos_token_id": 2,
    }
    with pytest.raises(UserError, match=words):
        gguf_tokenizer.read(metadata | change, "m.gguf")


@pytest.mark.parametrize("split", ["gpt-2", "smollm", "qwen2", "llama-bpe"])
def test_bos_where_the_file_does_not_say_is_as_llama_cpp_has_it(split, tmp_path):
    """src/llama-vocab.cpp: add_bos is true for SentencePiece's kind and for the rules of Llama 3, else false."""
    from tests.minillm.tokenizer.test_byte_bpe import train

    train(split).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>", "bos_token": "<|im_start|>"}')
    tokenizer = Tokenizer.load(tmp_path)
    metadata = gguf_tokenizer.describe(tokenizer, tokenizer.vocab_size)
    assert metadata.pop("tokenizer.ggml.add_bos_token") is tokenizer.begins_with_bos is False
    read = gguf_tokenizer.read(metadata, "m.gguf")
    assert read.begins_with_bos == (split == "llama-bpe")
    assert read.prompt_ids("a b") == [read.bos_id] * read.begins_with_bos + tokenizer.encode("a b")
    assert gguf_tokenizer.read(metadata | {"tokenizer.ggml.add_bos_token": True}, "m.gguf").begins_with_bos
    for name, value, words in (
        ("pre", None, r"m\.gguf: its tokenizer does not say by which rules it cuts text .*--tokenizer"),
        ("pre", "tekken", "by the rules 'tekken'"),
        ("add_eos_token", True, "puts eos behind each text"),
    ):
        with pytest.raises(UserError, match=words):
            gguf_tokenizer.read(metadata | {f"tokenizer.ggml.{name}": value}, "m.gguf")


def test_added_tokens_and_all_ends_of_texts_go_both_ways(tmp_path):
    from tests.minillm.tokenizer.test_tokenizer import train_llama

    (tmp_path / "tokenizer.model").write_bytes(train_llama().data)
    added = {"added_tokens_decoder": ENDS | token(422, "<x>") | token(423, "<y>")}
    settings = FAST | added | {"eos_token": "<|im_end|>", "chat_template": CHATML, "add_bos_token": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [420, 2]}')
    tokenizer = Tokenizer.load(tmp_path)
    write_file(stored(dataclasses.replace(BASE, vocab_size=430)), tokenizer, tmp_path / "m.gguf", torch.float32)
    model, metadata = open_file(tmp_path / "m.gguf")
    assert metadata["tokenizer.ggml.tokens"][420:424] == ["<|im_end|>", "<|im_start|>", "<x>", "<y>"]
    assert metadata["tokenizer.ggml.token_type"][420:424] == [3, 3, 4, 4]
    again = gguf_tokenizer.read(metadata, "m.gguf")
    assert again.sha256 == tokenizer.sha256 and again.begins_with_bos
    assert again.end_ids == tokenizer.end_ids == model.special_ids["eos_token_id"] == [420, 2]
    assert again.encode("the <x>") == tokenizer.encode("the <x>") and again.control == tokenizer.control
    many = {"eos_token_id": [420, 2, 1, 421]}
    (tmp_path / "generation_config.json").write_text(json.dumps(many))
    with pytest.raises(UserError, match=r"texts end at the ids \[420, 1, 2, 421\], and 3 have a place"):
        gguf_tokenizer.describe(Tokenizer.load(tmp_path), 430)


def through_gguf(tokenizer: Tokenizer, keep_ours: bool) -> Tokenizer:
    """What comes back from a file; keep_ours: with the keys that only this project reads."""
    metadata = gguf_tokenizer.describe(tokenizer, tokenizer.vocab_size)
    metadata[gguf_tokenizer.OWN_FILE] = base64.b64encode(tokenizer.data).decode()
    return gguf_tokenizer.read(
        {name: value for name, value in metadata.items() if keep_ours or not name.startswith("minillm.")}, "m.gguf"
    )


TURNS = {"added_tokens_decoder": ENDS, "eos_token": "<|im_end|>"}
RULES = SETTINGS | {"turns": LLAMA | TURNS, "turns, a space in front of each part": LLAMA | TURNS | {"legacy": True}}


@pytest.mark.parametrize("maker", BOTH)
@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("kind", [kind for kind in RULES if kind != "a learnt piece is an added token"])
def test_a_folder_s_rules_come_back_or_are_refused(kind, chat, maker, tmp_path, capsys):
    """Without our keys `read` gives llama.cpp's ids: checked against llama.cpp itself, as docs/en/interop.md says."""
    (tmp_path / "tokenizer.model").write_bytes(maker().data)
    settings = (RULES[kind] or {}) | ({"chat_template": CHATML} if chat else {})
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = Tokenizer.load(tmp_path)
    space, has_prefix = tokenizer.model.space, tokenizer.model.dummy_prefix
    is_cut_otherwise = has_prefix and not space.each_part and chat and "<|im_end|>" in tokenizer.control
    if is_cut_otherwise or any(tokenizer.model.eats_spaces.values()):
        with pytest.raises(UserError, match=r"--format gguf: llama\.cpp would cut .* otherwise: .*choose hf"):
            through_gguf(tokenizer, keep_ours=True)
        return
    again, by_others = (through_gguf(tokenizer, keep_ours) for keep_ours in (True, False))
    assert ("llama.cpp puts another number of spaces in front of ' a'" in capsys.readouterr().out) == (
        has_prefix and space.spared
    )
    for text in texts()[:100]:
        assert again.prompt_ids(text) == tokenizer.prompt_ids(text)
        if not text.startswith(" "):
            assert by_others.prompt_ids(text) == tokenizer.prompt_ids(text)
    if not chat:
        return
    ids = [t.encode_chat(CHAT[1:], add_generation_prompt=True)[0] for t in (tokenizer, again, by_others)]
    assert ids[0] == ids[1] == ids[2]
    again.save(tmp_path / "again")
    (tmp_path / "again" / "config.json").write_text('{"model_type": "llama"}')
    is_same_file = agree(tmp_path / "again").sha256 == tokenizer.sha256
    assert is_same_file or kind == "another piece is bos"


def test_tokens_that_take_spaces_and_changed_letters_have_no_place(tmp_path):
    from tests.minillm.tokenizer.test_byte_bpe import train

    library = train("gpt-2")
    library.add_tokens([tokenizers.AddedToken("<x>", rstrip=True, normalized=False)])
    library.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    with pytest.raises(UserError, match=r"llama\.cpp would cut '.*a<x>b <x> c' otherwise"):
        through_gguf(Tokenizer.load(tmp_path), keep_ours=True)
    with pytest.raises(UserError, match=r"llama\.cpp would cut .* otherwise: .* changes no letters"):
        through_gguf(train_foreign("bpe", vocab_size=150), keep_ours=True)  # SentencePiece's usual normalizer
