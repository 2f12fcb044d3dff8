"""Tokenizers in the metadata of a GGUF file: pieces, scores or merges, and special ids ↔ ours."""

import base64
from collections.abc import Callable

from minillm.base.contents import Contents
from minillm.base.errors import UnsupportedError, UserError
from minillm.tokenizer import byte_bpe, jinja_template
from minillm.tokenizer.edit import from_pieces
from minillm.tokenizer.folder_files import GENERATION_CONFIG, to_json
from minillm.tokenizer.tokenizer import AFTER_EOS, JsonTokenizer, Tokenizer

KINDS = ("llama", "gpt2")  # SentencePiece's BPE and byte-level BPE
BOS_IN_FRONT = {"llama-bpe"}  # the names in byte_bpe.SPLITS with which llama.cpp puts bos in front unless told not to
MORE_ENDS = ("eot", "eom")  # where llama.cpp ends a text besides eos: the end of a turn, of a message
ROLES = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}  # our name → GGUF's
TYPES = {1: "NORMAL", 2: "UNKNOWN", 3: "CONTROL", 4: "USER_DEFINED", 5: "UNUSED", 6: "BYTE"}  # of pieces
NUMBER_OF_TYPE = {name: number for number, name in TYPES.items()}
PADDING = "[PAD{}]"  # the text of an id without a piece: llama.cpp wants a token for each row of the embedding
OWN_FILE = "minillm.tokenizer_file"  # the tokenizer's file in base64: the standard keys say only how it cuts text
LEGACY = "minillm.tokenizer_legacy"  # where Llama's class puts spaces, its `legacy`: GGUF has one rule of its own

# What llama.cpp must cut as we do, a chat among it; and what a model rarely reads, where a difference is only said.
ORDINARY = ("The cat sat on 42 mats.\n", "a  b\n\n c", "你好，世界", "Ｆ①ﬁ é e\u0301")
ORDINARY_CHAT = (
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "c"},
)
RARE = (" a", "{eos}a", "{eos} a")


def special_ids(contents: Contents) -> dict[str, int]:
    """The ids of "bos", "eos", "pad" and "unk", as far as the metadata name them."""
    ids = {role: contents.get(f"tokenizer.ggml.{name}_token_id", int) for role, name in ROLES.items()}
    return {role: i for role, i in ids.items() if i is not None}


# ---- reading


def read(metadata: dict, source: str) -> Tokenizer:
    """The tokenizer that a GGUF file's metadata describe.

    Raises `UnsupportedError` if its kind is not supported, `UserError` if the metadata are damaged.
    """
    contents = Contents(metadata, f"{source}: its tokenizer")
    kind = contents.get("tokenizer.ggml.model", str)
    if kind not in KINDS:
        raise UnsupportedError(f"{source}: a tokenizer of the kind {kind!r} is not supported; choose llama or gpt2")
    pieces = _read_pieces(contents)
    ids = special_ids(contents)
    for role, i in ids.items():
        if not 0 <= i < len(pieces):
            raise UserError(f"{contents.source}: damaged: its {role} is {i}, but it has {len(pieces):,} pieces")
    if contents.get("tokenizer.ggml.add_eos_token", bool, False):
        raise UnsupportedError(f"{source}: its tokenizer puts eos behind each text, which is not supported")
    split = None if kind == "llama" else _split_rules(contents)
    usual = kind == "llama" or split in BOS_IN_FRONT
    begins_with_bos = contents.get("tokenizer.ggml.add_bos_token", bool, usual) and "bos" in ids
    if kind == "gpt2":
        return _read_byte_level(contents, pieces, ids, begins_with_bos, split)
    return _read_sentencepiece(contents, pieces, ids, begins_with_bos)


def _split_rules(contents: Contents) -> str:
    """The name of the rules that cut a text before its bytes are merged. Raises `UnsupportedError` if it is unknown."""
    split = contents.get("tokenizer.ggml.pre", str)
    if split not in byte_bpe.SPLITS:
        rules = f"cuts text by the rules {split!r}" if split else "does not say by which rules it cuts text"
        raise UnsupportedError(
            f"{contents.source} {rules} (tokenizer.ggml.pre); known are {', '.join(byte_bpe.SPLITS)}; "
            "give the model's own tokenizer by --tokenizer"
        )
    return split


def end_ids(contents: Contents) -> list[int]:
    """The ids at which a text ends, eos first. Raises `UserError` for what is no id."""
    ids = [contents.get(f"tokenizer.ggml.{name}_token_id", int, at_least=0) for name in ("eos", *MORE_ENDS)]
    return list(dict.fromkeys(i for i in ids if i is not None))


def _read_pieces(contents: Contents) -> list[tuple[str, str]]:
    """Text and type of each piece, without the padding at the end."""
    texts = contents.need("tokenizer.ggml.tokens", list[str])
    types = contents.need("tokenizer.ggml.token_type", list[int])
    unknown = set(types) - set(TYPES)
    if len(types) != len(texts) or unknown:
        problem = f"types {sorted(unknown)}" if unknown else f"{len(types):,} types"
        raise UserError(f"{contents.source}: damaged: {len(texts):,} pieces, but {problem}")
    n_pieces = len(texts)
    while n_pieces and texts[n_pieces - 1] == PADDING.format(n_pieces - 1):
        n_pieces -= 1
    return [(text, TYPES[number]) for text, number in zip(texts[:n_pieces], types[:n_pieces], strict=True)]


def _read_sentencepiece(
    contents: Contents, pieces: list[tuple[str, str]], ids: dict[str, int], begins_with_bos: bool
) -> Tokenizer:
    scores = contents.need("tokenizer.ggml.scores", list[float])
    if len(scores) < len(pieces):
        raise UserError(f"{contents.source}: damaged: {len(pieces):,} pieces, but {len(scores):,} scores")
    scored = [(text, score, kind) for (text, kind), score in zip(pieces, scores, strict=False)]  # padding has scores
    prefix = contents.get("tokenizer.ggml.add_space_prefix", bool, True)
    rebuilt = from_pieces(scored, ids, dummy_prefix=prefix, source=contents.source)
    template = contents.get("tokenizer.chat_template", str)
    after_eos = contents.get(f"minillm.{AFTER_EOS}", bool, False)
    named = {f"{role}_token": pieces[i][0] for role, i in ids.items()}
    legacy = contents.get(LEGACY, bool)
    if legacy is not None:
        named |= {"tokenizer_class": "LlamaTokenizer", "legacy": legacy}

    def settled(tokenizer: Tokenizer) -> Tokenizer:
        return tokenizer.with_settings(
            add_bos=begins_with_bos,
            after_eos=after_eos,
            chat_template=template,
            named=named,
            ends=end_ids(contents),
        )

    return _exported_file(contents, settled(rebuilt), lambda data: settled(Tokenizer(data, contents.source)))


def _read_byte_level(
    contents: Contents, pieces: list[tuple[str, str]], ids: dict[str, int], begins_with_bos: bool, split: str
) -> Tokenizer:
    merges = [tuple(merge.split(" ", 1)) for merge in contents.need("tokenizer.ggml.merges", list[str])]
    if any(len(pair) != 2 for pair in merges):
        raise UserError(f"{contents.source}: damaged: one of its merges is not two pieces with a space between them")

    # A tokenizer.json and its tokenizer_config.json, as if they were the files of a folder.
    of_type: dict[str, dict[str, int]] = {name: {} for name in TYPES.values()}
    for i, (text, kind) in enumerate(pieces):
        of_type[kind][text] = i
    bpe = byte_bpe.ByteBPE(
        of_type["NORMAL"],
        merges,
        split,
        of_type["USER_DEFINED"],
        nfc=usual_nfc(split),
        words_first=usual_words_first(split),
    )
    config = {f"{role}_token": pieces[i][0] for role, i in ids.items()}
    config |= {
        "add_bos_token": begins_with_bos,
        "chat_template": contents.get("tokenizer.chat_template", str),
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
    }
    control = of_type["CONTROL"] | of_type["UNKNOWN"]
    if begins_with_bos and config["bos_token"] not in control:
        raise UserError(f"{contents.source}: damaged: its bos is {config['bos_token']!r}, which is no control piece")
    first_piece = config["bos_token"] if begins_with_bos else None
    files = {
        "tokenizer.json": byte_bpe.write(bpe, control, first_piece),
        "tokenizer_config.json": to_json(config),
    }
    if len(ends := end_ids(contents)) > 1:
        files[GENERATION_CONFIG] = to_json({"eos_token_id": ends})
    rebuilt = JsonTokenizer(files, contents.source)
    return _exported_file(
        contents, rebuilt, lambda data: JsonTokenizer(files | {"tokenizer.json": data}, contents.source)
    )


def usual_nfc(split: str) -> bool:
    """Whether a vocabulary with these rules normalizes texts to NFC: GGUF says only the rules' name."""
    return split == "qwen2"


def usual_words_first(split: str) -> bool:
    """Whether a vocabulary with these rules takes a word that is itself a piece without merging."""
    return split == "llama-bpe"


def _exported_file(contents: Contents, rebuilt: Tokenizer, load: Callable[[bytes], Tokenizer]) -> Tokenizer:
    """The tokenizer as it was exported, if the pieces beside it still mean the same, else `rebuilt`.

    Token bins identify a tokenizer by its file's SHA-256, so a model that comes back should have the same file. load:
    the tokenizer of a file's bytes.
    """
    encoded = contents.get(OWN_FILE, str)
    if encoded is None:
        return rebuilt
    try:
        data = base64.b64decode(encoded, validate=True)
    except ValueError:
        raise UserError(f"{contents.source}: damaged: {OWN_FILE} is not base64") from None
    exported = load(data)
    means_the_same = _described(exported, rebuilt.vocab_size) == _described(rebuilt, rebuilt.vocab_size)
    return exported if means_the_same else rebuilt


# ---- writing


def describe(tokenizer: Tokenizer, n_rows: int) -> dict:
    """Metadata with which llama.cpp encodes text as our tokenizer does; n_rows: of the embedding.

    Raises `UserError` for a vocabulary that has no place there.
    """
    if isinstance(tokenizer, JsonTokenizer):
        bpe = tokenizer.bpe
        if (bpe.nfc, bpe.words_first) != (usual_nfc(bpe.split), usual_words_first(bpe.split)):
            raise UserError(
                f"--format gguf: only the rules' name {bpe.split} has a place there, which a vocabulary with "
                f"nfc {bpe.nfc} and ignore_merges {bpe.words_first} is not usual for; choose hf"
            )
    else:
        spec = tokenizer.model.proto.trainer_spec
        if spec.model_type != spec.BPE:
            raise UserError("--format gguf: only BPE vocabularies have a place there; this one is of another kind")
    if len(tokenizer.end_ids) > 1 + len(MORE_ENDS):
        raise UserError(
            f"--format gguf: texts end at the ids {tokenizer.end_ids}, and {1 + len(MORE_ENDS)} have a place there; "
            "choose hf"
        )
    metadata = _described(tokenizer, n_rows)
    _compare_with_llama_cpp(tokenizer, metadata)
    return metadata


def _compare_with_llama_cpp(tokenizer: Tokenizer, metadata: dict) -> None:
    """Raise `UserError` if llama.cpp would cut ordinary texts otherwise than our tokenizer does; print if rare ones.

    It knows what the standard keys say and no other rule: where there is a space in front, it comes before each part
    that follows an added token as well, and no token takes spaces with it. `read` makes that tokenizer.
    """
    theirs = read({name: value for name, value in metadata.items() if not name.startswith("minillm.")}, "GGUF")
    whole = tokenizer.bpe.whole if isinstance(tokenizer, JsonTokenizer) else tokenizer.model.whole
    texts = [*ORDINARY, "".join(f"a{piece}b {piece} c" for piece in whole)]
    wrong = [text for text in texts if tokenizer.encode(text) != theirs.encode(text)]

    def differs(rendered: str) -> bool:
        return tokenizer.encode_rendered(rendered, {}) != theirs.encode_rendered(rendered, {})

    if tokenizer.chat_template:
        try:
            pieces = tokenizer.special_pieces
            chat = jinja_template.render(tokenizer.chat_template, list(ORDINARY_CHAT), pieces, True)
        except UserError as problem:
            print(f"--format gguf: its chat template was not compared with llama.cpp ({problem})")
        else:
            wrong += [chat] if differs(chat) else []
    if wrong:
        raise UserError(
            f"--format gguf: llama.cpp would cut {wrong[0][:60]!r} otherwise: it puts a space before each part behind "
            'an added token (as "legacy": true in tokenizer_config.json has it), lets no token take spaces with it, '
            "and changes no letters; choose hf"
        )
    eos = tokenizer.pieces.piece_of(tokenizer.eos_id)
    rare = [text for text in (form.format(eos=eos) for form in RARE) if differs(text)]
    if rare:
        print(f"--format gguf: llama.cpp puts another number of spaces in front of {' and '.join(map(repr, rare))}")


def _described(tokenizer: Tokenizer, n_rows: int) -> dict:
    """As `describe`, unchecked."""
    if isinstance(tokenizer, JsonTokenizer):
        described = _byte_level_described(tokenizer)
    else:
        described = _sentencepiece_described(tokenizer)
    for i in range(len(described["tokens"]), n_rows):
        described["tokens"].append(PADDING.format(i))
        described["token_type"].append(NUMBER_OF_TYPE["UNUSED"])
        if "scores" in described:
            described["scores"].append(0.0)
    for role in ("bos", "eos", "pad"):
        described[f"{ROLES[role]}_token_id"] = getattr(tokenizer, f"{role}_id")
    for name, i in zip(MORE_ENDS, tokenizer.end_ids[1:], strict=False):
        described[f"{name}_token_id"] = i
    described["add_bos_token"] = tokenizer.begins_with_bos
    metadata = {f"tokenizer.ggml.{name}": value for name, value in described.items()}
    if tokenizer.begins_after_eos:  # GGUF has no key for it
        metadata[f"minillm.{AFTER_EOS}"] = True
    if not isinstance(tokenizer, JsonTokenizer) and (space := tokenizer.model.space).before and space.spared:
        metadata[LEGACY] = space.each_part
    if tokenizer.chat_template:
        metadata["tokenizer.chat_template"] = tokenizer.chat_template
    return metadata


def _sentencepiece_described(tokenizer: Tokenizer) -> dict:
    pieces = tokenizer.model.proto.pieces
    return {
        "model": "llama",
        "tokens": [piece.piece for piece in pieces],
        "token_type": [piece.type for piece in pieces],
        "pre": "default",
        "scores": [piece.score for piece in pieces],
        "add_space_prefix": tokenizer.model.dummy_prefix,
    }


def _byte_level_described(tokenizer: JsonTokenizer) -> dict:
    bpe = tokenizer.bpe
    tokens = [PADDING.format(i) for i in range(tokenizer.vocab_size)]  # ids may have gaps
    types = [NUMBER_OF_TYPE["UNUSED"]] * tokenizer.vocab_size
    for kind, ids in (("NORMAL", bpe.ids), ("USER_DEFINED", bpe.whole), ("CONTROL", tokenizer.control)):
        for text, i in ids.items():
            tokens[i] = text
            types[i] = NUMBER_OF_TYPE[kind]
    return {
        "model": "gpt2",
        "tokens": tokens,
        "token_type": types,
        "pre": bpe.split,
        "merges": [" ".join(pair) for pair in bpe.merges],
    }
