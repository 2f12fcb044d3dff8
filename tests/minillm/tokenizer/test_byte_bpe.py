"""Byte-level BPE: against the tokenizers library, by the lines in docs/en/tokenizer.md, and under GGUF's names."""

import json
import random
import re
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, pre_tokenizers

from minillm.base.errors import UserError
from minillm.tokenizer import byte_bpe
from minillm.tokenizer.tokenizer import Tokenizer

TEXTS = [
    "Hello world, it's 2024 and 1234567 isn't I'LL they'Ve",
    "  two  spaces\n\n\nlines\r\n\ttabs \n end  ",
    "床前明月光，疑是地上霜。举头望明月 123 ½ Ⅷ ² 𝟙",
    "naïve cafe\u0301 \u00a0nbsp \x1c\x1d \x85 \u3000 emoji 😀👍🏽 _under_score __",
    "", " ", "\n", "a", "ſ's 'ſ K's", "<|im_start|>user<|im_end|> <tool>x</tool>",
]  # fmt: skip


def train(split: str) -> tokenizers.Tokenizer:
    """A vocabulary by the library, with the steps that the published tokenizers of this kind have."""
    later = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split in ("gpt-2", "smollm"))
    cut = {"qwen2": "", "llama-bpe": "{1,3}"}.get(split)
    steps = {
        "gpt-2": level,
        "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), level]),
    }
    made = tokenizers.Tokenizer(tokenizers.models.BPE(ignore_merges=split == "llama-bpe"))
    made.pre_tokenizer = steps.get(split) or pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(later.replace("DIGITS", cut)), "isolated"), level]
    )
    if split == "qwen2":
        made.normalizer = tokenizers.normalizers.NFC()
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|end|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(TEXTS * 3, trainer)
    made.add_tokens(["<tool>"])
    return made


@pytest.fixture(scope="module", params=byte_bpe.SPLITS)
def pair(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    theirs = train(request.param)
    theirs.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>", "bos_token": None}))
    return Tokenizer.load(folder), theirs, folder


def library_ids(theirs: tokenizers.Tokenizer, text: str) -> list[int]:
    """Ids where no control piece is recognised in a text, as here."""
    theirs.encode_special_tokens = True
    return theirs.encode(text).ids


def test_ids_and_texts_are_the_librarys(pair):
    ours, theirs, _ = pair
    assert ours.bpe.split in byte_bpe.SPLITS and ours.vocab_size == theirs.get_vocab_size()
    letters = "".join(random.Random(0).choices("helo worldtwspac", k=20_000)).replace(" ", "")  # one word
    for text in [*TEXTS, " ".join(TEXTS), "x" * 5000, letters]:
        ids = ours.encode(text)
        assert ids == library_ids(theirs, text), text
        assert ours.decode(ids) == (text if ours.bpe.split != "qwen2" else theirs.normalizer.normalize_str(text))


@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_any_text_is_cut_as_the_library_cuts_it(pair, text):
    ours, theirs, _ = pair
    assert ours.encode(text) == library_ids(theirs, text)


def test_a_saved_folder_is_the_same_tokenizer_again(pair, tmp_path):
    ours, theirs, _ = pair
    ours.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert again.sha256 == ours.sha256 == Tokenizer.load(tmp_path / "tokenizer.json").sha256
    assert again.encode(TEXTS[0]) == ours.encode(TEXTS[0])
    (tmp_path / "tokenizer.json").write_bytes(byte_bpe.write(ours.bpe, ours.control))
    written = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in TEXTS:
        assert library_ids(written, text) == library_ids(theirs, text)


def test_control_pieces_come_from_no_text_and_show_no_text(pair):
    ours, _, _ = pair
    control = {ours.control[piece] for piece in ("<|end|>", "<|im_start|>", "<|im_end|>")}
    assert not control & set(ours.encode("<|im_start|>user<|end|>")) and ours.decode(control) == ""
    assert (ours.eos_id, ours.bos_id, ours.start_id) == (ours.control["<|end|>"],) * 3


def test_its_settings_are_its_own_and_the_refusal_names_the_option_that_fits(pair):
    ours, _, _ = pair
    for add_bos, fits in ((True, "--wrap eos"), (False, "--wrap bos_eos")):
        with pytest.raises(UserError, match=f"stays as it is.*{fits}$"):
            ours.with_settings(add_bos=add_bos)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d.update(pre_tokenizer={"type": "Whitespace"}), "cuts text by rules"),
        (lambda d: d.update(normalizer={"type": "NFKC"}), "cuts text by rules"),
        (lambda d: d["model"].update(byte_fallback=True), "cuts text by rules"),
        (lambda d: d["model"].pop("merges"), "tokenizer.json: damaged"),
        (lambda d: d["added_tokens"][0].update(id="zero"), "damaged: id is 'zero', not a whole number"),
        (lambda d: d["added_tokens"][0].update(id=7), "damaged, .* both have the id 7"),
        (lambda d: d["model"]["vocab"].update(x=1 << 30), "tokenizer.json: damaged, 'x' has the id 1073741824: ids of"),
    ],
)
def test_rules_without_a_name_in_gguf_and_damaged_files_are_refused(pair, tmp_path, change, words):
    _, _, folder = pair
    described = json.loads((folder / "tokenizer.json").read_text())
    change(described)
    (tmp_path / "tokenizer.json").write_text(json.dumps(described))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|end|>"}')
    with pytest.raises(UserError, match=words):
        _ = Tokenizer.load(tmp_path).bpe


def test_without_an_end_of_text_it_is_refused(pair, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((pair[2] / "tokenizer.json").read_bytes())
    with pytest.raises(UserError, match="eos_token"):
        Tokenizer.load(tmp_path)


def test_what_needs_a_sentencepiece_model_says_so(pair):
    with pytest.raises(UserError, match=r"needs a SentencePiece model"):
        _ = pair[0].model.proto


@pytest.mark.parametrize("text", ["{", "[1]", '{"eos_token": {"id": 3}}'])
def test_a_damaged_config_beside_it_is_named(pair, tmp_path, text):
    (tmp_path / "tokenizer.json").write_bytes((pair[2] / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(text)
    with pytest.raises(UserError, match=r"tokenizer\w*\.json.*: damaged"):
        Tokenizer.load(tmp_path)


@pytest.fixture(scope="module")
def from_the_page(tmp_path_factory):
    """(the class in docs/en/tokenizer.md made from a file of GPT-2's kind, the library's tokenizer of that file)"""
    page = (Path(__file__).parents[3] / "docs" / "en" / "tokenizer.md").read_text(encoding="utf-8")
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "class ByteLevelBPE" in block)
    assert len([line for line in code.splitlines() if line.strip()]) <= 42
    names: dict = {}
    exec(code, names)
    theirs = train("gpt-2")
    path = tmp_path_factory.mktemp("page") / "tokenizer.json"
    theirs.save(str(path))
    return names["ByteLevelBPE"](path), tokenizers.Tokenizer.from_file(str(path))


PLAIN = [text for text in TEXTS if "<tool>" not in text]  # the page has no pieces that are cut out first


def test_the_lines_on_the_page_do_what_the_library_does(from_the_page):
    shown, theirs = from_the_page
    for text in [*PLAIN, " ".join(PLAIN), "x" * 300]:
        assert shown.encode(text) == library_ids(theirs, text), text
        assert shown.decode(shown.encode(text)) == text


@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_the_lines_on_the_page_do_it_for_any_text(from_the_page, text):
    shown, theirs = from_the_page
    if "<tool>" not in text:
        assert shown.encode(text) == library_ids(theirs, text)
