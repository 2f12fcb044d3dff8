"""Folders of other tools: how their texts begin and end, and which tokens they add, as transformers has it."""

import json
import random
import shutil

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

from minillm.base.errors import UserError
from minillm.tokenizer import edit
from minillm.tokenizer.stream_decoder import StreamDecoder
from minillm.tokenizer.tokenizer import Tokenizer
from minillm.tokenizer.train import Kind, train_tokenizer
from tests.minillm.tokenizer.test_tokenizer import CORPUS, train_foreign, train_llama

PIECES = [*"an bT", "the ", "  ", "\n", "\t", "é", "中", "你好，", "42", "<x>", " <x> ", "the <x>", "<y>"]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHAT = [{"role": "user", "content": " the cat "}, {"role": "assistant", "content": "ran <x> "}]


def texts() -> list[str]:
    draw = random.Random(5)
    some = ["".join(draw.choices(PIECES, k=draw.randrange(14))) for _ in range(300)]
    return ["", " ", "a", " the", "  the", "<x>an", *some, *CORPUS]


def token(i: int, text: str, special: bool = False, **flags) -> dict:
    usual = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
    return {str(i): {"content": text, "special": special} | usual | flags}


def without_prefix():
    plain = dict(byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False)
    return train_foreign("bpe", vocab_size=420, add_dummy_prefix=False, **plain)


LLAMA = {"tokenizer_class": "LlamaTokenizer"}
FAST = {"tokenizer_class": "PreTrainedTokenizerFast"}
ENDS = token(420, "<|im_end|>", True) | token(421, "<|im_start|>", True)
ADDED = LLAMA | {"added_tokens_decoder": ENDS | token(422, "<x>") | token(423, "<y>", rstrip=True)}
BOTH = (train_llama, without_prefix)
INFILLING = ("▁<PRE>", "▁<MID>", "▁<SUF>", "▁<EOT>", "<FILL_ME>")
CODE = {k: v for i, text in enumerate(INFILLING, 420) for k, v in token(i, text, True).items()}
SETTINGS = {
    "nothing said": None,
    "a class and no more": LLAMA,
    "bos": LLAMA | {"add_bos_token": True},
    "no bos": LLAMA | {"add_bos_token": False},
    "bos, and none that is called so": LLAMA | {"add_bos_token": True, "bos_token": None},
    "another piece is bos": LLAMA | {"add_bos_token": True, "bos_token": "</s>"},
    "no space in front": LLAMA | {"add_prefix_space": False},
    "a space in front of each part": ADDED | {"legacy": True},
    "the fast class": FAST | {"add_bos_token": True},
    "the fast class, new rules": FAST | {"legacy": False},
    "a class that does not exist": {"tokenizer_class": "SomeTokenizer", "add_bos_token": True},
    "code's class": {"tokenizer_class": "CodeLlamaTokenizerFast", "added_tokens_decoder": CODE},
    "added tokens": ADDED | {"eos_token": "<|im_end|>", "add_bos_token": True},
    "added tokens, the fast class": FAST | {"added_tokens_decoder": ADDED["added_tokens_decoder"]},
    "a learnt piece is an added token": LLAMA | {"added_tokens_decoder": token(300, "")},
}


def agree(folder, added: bool = True) -> Tokenizer:
    """The tokenizer of a folder, once it has given the ids that transformers gives."""
    ours, theirs = Tokenizer.load(folder), AutoTokenizer.from_pretrained(folder)
    for text in texts():
        ids = theirs(text)["input_ids"]
        assert ours.prompt_ids(text) == ids or not text, text
        if text and not text.startswith(" "):
            shown = theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            assert ours.decode(ids) == shown
    assert (ours.eos_id, ours.vocab_size) == (theirs.eos_token_id, len(theirs))
    assert ours.begins_with_bos == (theirs("a")["input_ids"][:1] == [theirs.bos_token_id])
    return ours


@pytest.mark.parametrize("model_type", ["llama", "mistral"])
@pytest.mark.parametrize("maker", BOTH)
@pytest.mark.parametrize("kind", SETTINGS)
def test_a_sentencepiece_folder_gives_the_ids_of_transformers(kind, maker, model_type, tmp_path):
    made = maker()
    config = SETTINGS[kind]
    if kind == "a learnt piece is an added token":
        config = LLAMA | {"added_tokens_decoder": token(400, made.model.piece_of(400))}
    (tmp_path / "tokenizer.model").write_bytes(made.data)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    if config is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours = agree(tmp_path)

    # saved by us, as beside token bins or another model, where the same rules hold without the model's config.json
    ours.save(tmp_path / "ours")
    for model_config in (None, '{"model_type": "llama"}'):
        if model_config:
            (tmp_path / "ours" / "config.json").write_text(model_config)
        again = agree(tmp_path / "ours")
        for text in texts():
            assert again.prompt_ids(text) == ours.prompt_ids(text), (model_config, text)

    # beside its own model, and saved again by transformers, which writes a tokenizer.json alone
    shutil.copy(tmp_path / "config.json", tmp_path / "ours")
    assert agree(tmp_path / "ours").sha256 == ours.sha256
    AutoTokenizer.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    shutil.copy(tmp_path / "config.json", tmp_path / "theirs")
    assert not (tmp_path / "theirs" / "tokenizer.model").exists()
    agree(tmp_path / "theirs")
    shutil.copy(tmp_path / "ours" / "tokenizer.model", tmp_path / "theirs")  # both, as most folders have
    agree(tmp_path / "theirs")


UNLISTED = ("nothing said", "a class and no more", "no bos", "no space in front", "the fast class")


@pytest.mark.parametrize("legacy", [None, False, True])
@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("kind", UNLISTED)
def test_user_defined_pieces_that_no_settings_list_are_cut_out_as_by_transformers(kind, prefix, legacy, tmp_path):
    """What stands beside such a piece is encoded as beside an added token: spaces in front of a part, or none."""
    plain = dict(byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False)
    made = train_foreign(
        "bpe", vocab_size=420, add_dummy_prefix=prefix, user_defined_symbols=["<x>", "<y>", "the <x>"], **plain
    )
    (tmp_path / "tokenizer.model").write_bytes(made.data)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    config = SETTINGS[kind]
    if config is not None:
        config = config if legacy is None else config | {"legacy": legacy}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    agree(tmp_path).save(tmp_path / "ours")
    agree(tmp_path / "ours")


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
@pytest.mark.parametrize("pieces", [(), ("<x>", "<y>")])
def test_a_vocabulary_of_ours_gives_transformers_the_same_ids(model_type, pieces, tmp_path):
    """transformers' class for Llama's tokenizers is BPE, whatever the model is."""
    train_tokenizer(CORPUS * 20, 370, tmp_path, kind=Kind(model_type, user_defined=pieces)).save(tmp_path)
    agree(tmp_path)


BOS, EOS = "<|begin|>", "<|end|>"


def template(*parts: str) -> dict:
    """A post_processor that puts these pieces where they stand; "A" is the text."""
    single = [{"Sequence" if part == "A" else "SpecialToken": {"id": part, "type_id": 0}} for part in parts]
    ids = {BOS: 0, EOS: 1}
    special = {part: {"id": part, "ids": [ids[part]], "tokens": [part]} for part in parts if part in ids}
    return {"type": "TemplateProcessing", "single": single, "pair": [*single, *single], "special_tokens": special}


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
ROBERTA = {"type": "RobertaProcessing", "sep": [EOS, 1], "cls": [BOS, 0], "trim_offsets": True}
PROCESSORS = {
    "none": (None, False),
    "offsets": (BYTE_LEVEL, False),
    "bos": (template(BOS, "A"), True),
    "bos in a sequence": ({"type": "Sequence", "processors": [BYTE_LEVEL, template(BOS, "A")]}, True),
    "eos in front": (template(EOS, "A"), True),
}
REFUSED = {
    "eos behind": template(BOS, "A", EOS),
    "Roberta's": ROBERTA | {"add_prefix_space": False},
    "two in front": template(BOS, EOS, "A"),
    "no text": template(BOS),
    "an unknown kind": {"type": "Something"},
}


def json_folder(folder, processor: dict | None, **settings) -> None:
    """A byte-level vocabulary whose bos and eos are the ids 0 and 1."""
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    kinds = dict(vocab_size=300, special_tokens=[BOS, EOS], initial_alphabet=alphabet, show_progress=False)
    library.train_from_iterator(CORPUS, trainers.BpeTrainer(**kinds))
    described = json.loads(library.to_str()) | {"post_processor": processor}
    (folder / "tokenizer.json").write_text(json.dumps(described))
    (folder / "config.json").write_text('{"model_type": "llama"}')
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": EOS} | settings
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    "class_name", ["PreTrainedTokenizerFast", "LlamaTokenizerFast", "GPT2Tokenizer", "GPTNeoXTokenizer"]
)
@pytest.mark.parametrize("add_bos", [None, True, False])
@pytest.mark.parametrize("kind", PROCESSORS)
def test_the_post_processor_says_how_a_text_begins(kind, add_bos, class_name, tmp_path):
    processor, begins = PROCESSORS[kind]
    settings = {} if add_bos is None else {"add_bos_token": add_bos}
    json_folder(tmp_path, processor, tokenizer_class=class_name, **settings)
    ours, theirs = Tokenizer.load(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for text in texts():
        assert ours.prompt_ids(text) == theirs(text)["input_ids"] or not text, text
    assert ours.begins_with_bos == (begins and class_name != "GPTNeoXTokenizer")
    assert ours.start_id == (theirs("a")["input_ids"][0] if ours.begins_with_bos else ours.eos_id)


@pytest.mark.parametrize("kind", REFUSED)
def test_what_else_stands_around_a_text_is_refused_by_name(kind, tmp_path):
    json_folder(tmp_path, REFUSED[kind])
    with pytest.raises(
        UserError,
        match=r"tokenizer\.json: .*(puts more around each text than bos|post_processor|damaged, or of a kind)",
    ):
        Tokenizer.load(tmp_path)


def test_an_end_or_rules_around_a_text_that_no_file_states_are_refused(tmp_path):
    json_folder(tmp_path, None, tokenizer_class="T5TokenizerFast")
    with pytest.raises(UserError, match="tokenizer_class T5Tokenizer puts tokens around each text"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.model").write_bytes(train_llama().data)
    for wrong, words in (({"add_eos_token": True}, "add_eos_token"), ({"add_bos_token": "yes"}, "not true or false")):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(LLAMA | wrong))
        with pytest.raises(UserError, match=words):
            Tokenizer.load(tmp_path)
    lossy = train_foreign("bpe", vocab_size=150)
    (tmp_path / "tokenizer.model").write_bytes(lossy.data)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(LLAMA))
    with pytest.raises(UserError, match=r"changes texts, which the class LlamaTokenizer .* does not do"):
        Tokenizer.load(tmp_path)


def fewer_merges(described: dict) -> None:
    del described["model"]["merges"][-40:]


def lower_case(described: dict) -> None:
    described["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Lowercase"}, described["normalizer"]]}


def no_space(described: dict) -> None:
    described["normalizer"]["normalizers"] = described["normalizer"]["normalizers"][1:]


@pytest.mark.parametrize("class_name", ["LlamaTokenizer", "PreTrainedTokenizerFast"])
@pytest.mark.parametrize("change", [fewer_merges, lower_case, no_space])
def test_a_stale_tokenizer_json_beside_the_model_is_refused(change, class_name, tmp_path):
    train_llama().save(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text()) | {"tokenizer_class": class_name}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    described = json.loads((tmp_path / "tokenizer.json").read_text())
    agree(tmp_path)
    change(described)
    (tmp_path / "tokenizer.json").write_text(json.dumps(described))
    # Llama's class has normalizers of its own; where spaces go is read from tokenizer.json
    if change is no_space or (class_name == "LlamaTokenizer" and change is lower_case):
        agree(tmp_path)
        return
    with pytest.raises(UserError, match=r"it and the tokenizer\.json beside it cut .* differently, .*: remove the one"):
        Tokenizer.load(tmp_path)


def test_a_model_that_is_none_beside_a_tokenizer_json_can_be_removed(tmp_path):
    json_folder(tmp_path, None)
    (tmp_path / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")  # another kind of vocabulary under that name
    with pytest.raises(UserError, match=r"no SentencePiece model.*or remove it: then the tokenizer\.json beside it"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.model").unlink()
    agree(tmp_path)


def test_added_tokens_are_pieces_that_no_user_can_forge(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(train_llama().data)
    settings = ADDED | {"eos_token": "<|im_end|>", "chat_template": CHATML}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    ours, theirs = Tokenizer.load(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert (ours.eos_id, ours.vocab_size, ours.stop_ids()) == (420, 424, [420])
    assert ours.control["<|im_start|>"] == 421 and not {420, 421} & set(ours.encode("<|im_start|>a<|im_end|>"))
    for prompt in (True, False):
        ids, learn = ours.encode_chat(CHAT, add_generation_prompt=prompt)
        assert ids == theirs.apply_chat_template(CHAT, add_generation_prompt=prompt)["input_ids"]
    assert ours.decode([i for i, learned in zip(ids, learn, strict=True) if learned]).strip() == "ran <x>"
    stream = StreamDecoder(ours)
    assert [stream.push(i) for i in (420, 422, 424)] == ["", "<x>", "<id 424>"]


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        (token(425, "<x>"), r"its 1 added tokens \(the last is 425\) do not follow the vocabulary's 420 pieces"),
        (token(10, "<x>"), r"added token '<x>' with the id 10, but it is no piece of it"),
        (token(420, "</s>", True), r"added token '</s>' with the id 420, but it has the id 2 in it"),
        (token(420, "<x>", single_word=True), "'<x>' counts as a single word only"),
        ({"420": {"content": 7}}, "content is 7, not a text"),
        ({"-1": {"content": "<x>"}}, "'-1' in added_tokens_decoder is no id"),
    ],
)
def test_added_tokens_that_transformers_would_number_otherwise_are_refused(tokens, words, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(train_llama().data)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(LLAMA | {"added_tokens_decoder": tokens}))
    with pytest.raises(UserError, match=words):
        Tokenizer.load(tmp_path)


def test_tokens_of_the_older_file_and_those_beside_a_tokenizer_json_are_added(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(train_llama().data)
    (tmp_path / "added_tokens.json").write_text('{"<|im_end|>": 420, "<x>": 421}')
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(LLAMA | {"eos_token": "<|im_end|>"}))
    assert agree(tmp_path).control["<|im_end|>"] == 420
    (tmp_path / "json").mkdir()
    json_folder(tmp_path / "json", template(BOS, "A"), eos_token="<|im_end|>")
    settings = json.loads((tmp_path / "json" / "tokenizer_config.json").read_text())
    settings["added_tokens_decoder"] = token(300, "<|im_end|>", True) | token(301, "<x>")
    (tmp_path / "json" / "tokenizer_config.json").write_text(json.dumps(settings))
    ours = agree(tmp_path / "json")
    ours.save(tmp_path / "again")
    assert (
        ours.eos_id == 300
        and agree(tmp_path / "again").sha256 == ours.sha256 == Tokenizer.load(tmp_path / "again").sha256
    )


ALL_FLAGS = ["special", "lstrip", "rstrip", "normalized"]
NAMED_SPECIAL = [
    *({f"{role}_token": "<x>"} for role in ("bos", "eos", "pad", "sep", "cls", "mask")),
    {"extra_special_tokens": {"image_token": "<x>"}},
    {"added_tokens_decoder": token(300, "<x>", True)},
]


def folder_with_token(folder, written: dict, settings: dict) -> None:
    """A folder with "<x>" in its tokenizer.json, flagged as `written`; in lower case, so that `normalized` counts."""
    json_folder(folder, None, **settings)
    described = json.loads((folder / "tokenizer.json").read_text())
    described["normalizer"] = {"type": "Lowercase"}
    described["added_tokens"] += token(300, "<x>", **written).values()
    described["added_tokens"][-1]["id"] = 300
    (folder / "tokenizer.json").write_text(json.dumps(described))


@pytest.mark.parametrize("flag", ALL_FLAGS[1:])
@pytest.mark.parametrize("value", [True, False])
def test_flags_in_the_settings_count_more_than_those_in_tokenizer_json(flag, value, tmp_path):
    folder_with_token(tmp_path, {flag: not value}, {"added_tokens_decoder": token(300, "<x>", **{flag: value})})
    ours, theirs = Tokenizer.load(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for text in ("<x> a", "a <x>", "a<X>b", "a  <x>  b", *texts()):
        assert ours.encode(text) == theirs(text, add_special_tokens=False)["input_ids"], text
    ours.save(tmp_path / "again")
    assert Tokenizer.load(tmp_path / "again").sha256 == ours.sha256


@pytest.mark.parametrize("settings", NAMED_SPECIAL)
def test_a_token_with_a_role_is_special_whatever_tokenizer_json_says(settings, tmp_path):
    folder_with_token(tmp_path, {}, settings)
    ours, theirs = Tokenizer.load(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.decode([300], skip_special_tokens=True) == ours.decode([300]) == ""
    assert ours.control["<x>"] == 300 and 300 not in ours.encode("a <x> b")


def test_a_template_has_the_pieces_of_every_role(tmp_path):
    named = {"sep_token": BOS, "cls_token": "<x>", "extra_special_tokens": {"image_token": "<x>"}}
    template = "{{ sep_token }}{{ cls_token }}{{ mask_token }}{{ image_token }}" + CHATML.replace("<|im_end|>", EOS)
    folder_with_token(tmp_path, {}, named | {"chat_template": template})
    theirs = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(CHAT[:1], add_generation_prompt=True)
    assert Tokenizer.load(tmp_path).encode_chat(CHAT[:1], add_generation_prompt=True)[0] == theirs["input_ids"]


ENDS_NAMED = {
    "nowhere": ({}, None, [1]),
    "in a list": ({"eos_token_id": [1, 5]}, None, [1, 5]),
    "in both files": ({"eos_token_id": 7}, {"eos_token_id": [5, 1], "temperature": 0.6}, [1, 5, 7]),
    "in the second": ({"eos_token_id": None}, {"eos_token_id": 9, "top_p": 0.9}, [1, 9]),
}


@pytest.mark.parametrize("where", ENDS_NAMED)
def test_a_text_ends_at_every_id_that_the_folder_names_and_so_it_is_saved(where, tmp_path):
    model_config, generation, ends = ENDS_NAMED[where]
    json_folder(tmp_path, None)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"} | model_config))
    if generation:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    ours = Tokenizer.load(tmp_path)
    assert ours.end_ids == ours.stop_ids() == ends
    assert ours.special_ids["eos_token_id"] == (ends if len(ends) > 1 else 1)
    ours.save(tmp_path / "again")  # such as a folder of token bins, which has no config.json
    assert Tokenizer.load(tmp_path / "again").end_ids == ends
    if len(ends) > 1:
        written = json.loads((tmp_path / "again" / "generation_config.json").read_text())
        assert written == (generation or {}) | {"eos_token_id": ends}


@pytest.mark.parametrize("wrong", ["two", [1, True], -1, 1.0, 1 << 40, {}])
def test_an_end_that_is_no_id_is_named(wrong, tmp_path):
    json_folder(tmp_path, None)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": wrong}))
    with pytest.raises(UserError, match=r"generation_config\.json beside it: damaged, eos_token_id holds .* no id"):
        _ = Tokenizer.load(tmp_path).end_ids


def no_bos(folder) -> None:
    json_folder(folder, None, bos_token=None, add_bos_token=False)


def llama_without_template(folder) -> None:
    (folder / "tokenizer.model").write_bytes(train_llama().data)
    (folder / "tokenizer_config.json").write_text(json.dumps(LLAMA | {"add_bos_token": True}))


def llama_with_chatml(folder) -> None:
    (folder / "tokenizer.model").write_bytes(train_llama().data)
    (folder / "tokenizer_config.json").write_text(json.dumps(ADDED | {"chat_template": CHATML, "add_bos_token": True}))


def another_bos(folder) -> None:
    """bos is put in front and called nothing."""
    json_folder(folder, template(BOS, "A"), bos_token=None)


FOLDERS = {
    "bos in the post-processor": lambda folder: json_folder(folder, template(BOS, "A")),
    "no bos": no_bos,
    "a bos without a name": another_bos,
    "a bare model": lambda folder: (folder / "tokenizer.model").write_bytes(train_llama().data),
    "Llama's class": llama_without_template,
    "a template of its own": llama_with_chatml,
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_the_chat_template_that_is_written_gives_transformers_the_ids_that_were_trained(kind, tmp_path):
    FOLDERS[kind](tmp_path)
    ours = Tokenizer.load(tmp_path)
    ours.save(tmp_path / "trained", template="auto")  # as train_sft.py does
    again = Tokenizer.load(tmp_path / "trained")
    assert again.resolve_template("auto") == ours.resolve_template("auto")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "trained")
    chats = [CHAT, [*CHAT, *CHAT], [{"role": "system", "content": "Be kind."}, *CHAT], CHAT[:1]]
    for messages in chats:
        for prompt in (False, True):
            ids, learn = again.encode_chat(messages, add_generation_prompt=prompt)
            assert ids == ours.encode_chat(messages, add_generation_prompt=prompt)[0]
            assert ids == theirs.apply_chat_template(messages, add_generation_prompt=prompt)["input_ids"]
            if len(messages) > 1 and not prompt:
                assert any(learn) and ids[max(i for i, learned in enumerate(learn) if learned)] in again.stop_ids()


@pytest.mark.parametrize("kind", ["added tokens", "added tokens, the fast class", "the fast class, new rules"])
def test_a_changed_vocabulary_keeps_added_tokens_ends_and_rules(kind, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(train_llama().data)
    settings = SETTINGS[kind] | {"chat_template": CHATML, "add_bos_token": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    ends = {"eos_token_id": [Tokenizer.load(tmp_path).eos_id, 2], "bos_token_id": 1, "temperature": 0.5}
    (tmp_path / "generation_config.json").write_text(json.dumps(ends))
    base = Tokenizer.load(tmp_path)
    more = train_foreign("bpe", vocab_size=500, byte_fallback=True, normalization_rule_name="identity")
    merged = edit.merge(base, more)
    some = ["Ana and Nana", " a banana", "<x>Ana <x>"]
    pruned, new_ids = edit.prune(base, some)
    assert merged.added and min(new_ids) < 0
    for name, changed, id_of in (("merged", merged.tokenizer, merged.id_map), ("pruned", pruned, new_ids)):
        changed.save(tmp_path / name)
        again = agree(tmp_path / name) if name == "merged" else Tokenizer.load(tmp_path / name)
        assert again.end_ids == [id_of[i] for i in base.end_ids] and again.begins_with_bos
        assert again.control == {piece: id_of[i] for piece, i in base.control.items()}
        assert again.chat_template == CHATML and again.generation_config["temperature"] == 0.5
        for text in some:
            assert again.prompt_ids(text) == [id_of[i] for i in base.prompt_ids(text)]
