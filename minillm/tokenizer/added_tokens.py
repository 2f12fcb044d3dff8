"""Tokens that a folder adds to its vocabulary (`<|im_end|>` behind a SentencePiece model) become pieces of the model.

They are named in tokenizer_config.json's `added_tokens_decoder`, else in added_tokens.json, and in tokenizer.json. As
pieces they are encoded, shown, exported, merged and resized like all others: a special one as a control piece, which no
text is encoded as, another as a piece that is cut out of a text before anything else.
"""

import dataclasses
from dataclasses import dataclass

from sentencepiece import sentencepiece_model_pb2 as proto

from minillm.base.contents import Contents
from minillm.base.errors import UserError
from minillm.tokenizer import around_text
from minillm.tokenizer.folder_files import read_beside, read_object, special_pieces, to_json
from minillm.tokenizer.sentencepiece_model import SPACE_MARK, SentencePieceModel, parse, with_dummy_prefix
from minillm.tokenizer.tokenizers_model import TokenizersModel

MOST = 1 << 16  # added tokens: a damaged file must not name any number of ids
SPECIAL_LISTS = ("additional_special_tokens", "extra_special_tokens")  # in tokenizer_config.json


@dataclass(frozen=True)
class Added:
    """One added token: its text; whether it is special, so that no text is encoded as it; whether it takes the spaces
    before it (lstrip) or after it (rstrip) with it; and whether it is looked for in the normalized text.
    """

    text: str
    special: bool
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = False


FLAGS = ("special", "lstrip", "rstrip", "normalized")


def named(files: dict[str, bytes], source: str) -> dict[int, Added]:
    """The tokens that a folder's files add, by id.

    Special are those that one of the files flags so, and those that have a role, such as eos_token. The lists of
    special tokens count only where there are no flags: transformers writes others into them, too. Raises `UserError`
    naming what is damaged.
    """
    where = f"{source}: tokenizer_config.json beside it"
    config = Contents(read_beside(files, "tokenizer_config.json", source), where)
    tokens: dict[int, Added] = {}
    special = set(special_pieces(files, source).values())
    if "tokenizer.json" in files:
        described = read_beside(files, "tokenizer.json", source)
        for entry in described.get("added_tokens") or []:
            fields = Contents(entry, f"{source}: tokenizer.json beside it: added_tokens")
            tokens[fields.need("id", int)] = token = _added(fields)
            special.update({token.text} if token.special else ())

    # what tokenizer_config.json says of them counts more
    decoder = config.get("added_tokens_decoder", dict)
    if decoder is None:  # as in folders written before there was that list
        added = read_beside(files, "added_tokens.json", source)
        written = Contents(added, f"{source}: added_tokens.json beside it")
        listed = _special(files, config, source)
        tokens |= {written.need(text, int): Added(text, text in listed) for text in written.values}
    for number, entry in (decoder or {}).items():
        if not str(number).isdecimal():
            raise UserError(f"{where}: damaged, {number!r:.40} in added_tokens_decoder is no id")
        tokens[int(number)] = _added(Contents(entry, f"{where}: added_tokens_decoder"))
    return {
        i: dataclasses.replace(token, special=token.special or token.text in special) for i, token in tokens.items()
    }


def _added(fields: Contents) -> Added:
    if fields.get("single_word", bool, False):
        text = fields.need("content", str)
        raise UserError(f"{fields.source}: {text!r:.80} counts as a single word only (single_word), not supported")
    return Added(fields.need("content", str), *(fields.get(name, bool, False) for name in FLAGS))


def _special(files: dict[str, bytes], config: Contents, source: str) -> set[str]:
    """The texts of the tokens that the folder's settings call special."""
    texts = set(special_pieces(files, source).values())
    for key in SPECIAL_LISTS:
        entries = config.values.get(key) or []
        for entry in entries if isinstance(entries, list) else []:
            texts.add(str(entry.get("content")) if isinstance(entry, dict) else str(entry))
    return texts


def beyond(tokens: dict[int, Added], ids: dict[str, int], n_pieces: int, source: str) -> list[Added]:
    """The added tokens that lie beyond a vocabulary of n_pieces, in the order of their ids.

    ids: of the vocabulary's pieces. Raises `UserError` where an id is another piece's, or the ids leave a gap:
    transformers would then give the token another id than the folder says.
    """
    for i, token in tokens.items():
        has_id = ids.get(token.text, ids.get(spelt(token)))
        if has_id != i and (has_id is not None or i < n_pieces):
            what = f"has the id {has_id} in it" if has_id is not None else "is no piece of it"
            raise UserError(f"{source}: names the added token {token.text!r:.80} with the id {i}, but it {what}")
    numbers = sorted(i for i in tokens if i >= n_pieces)
    if len(numbers) > MOST or (numbers and numbers[-1] != n_pieces + len(numbers) - 1):
        raise UserError(
            f"{source}: its {len(numbers)} added tokens (the last is {numbers[-1]}) do not follow the vocabulary's "
            f"{n_pieces} pieces id by id; name what is missing in tokenizer_config.json's added_tokens_decoder"
        )
    return [tokens[i] for i in numbers]


def into_sentencepiece(model_bytes: bytes, files: dict[str, bytes], source: str) -> bytes:
    """A SentencePiece model with the folder's added tokens as pieces; the same bytes where there is nothing to add."""
    tokens = named(files, source)
    try:
        model = parse(model_bytes, source)
    except UserError as problem:
        if "tokenizer.json" not in files:
            raise
        raise UserError(f"{problem}, or remove it: then the tokenizer.json beside it is read") from None
    pieces = model.pieces
    ids = {piece.piece: i for i, piece in enumerate(pieces)}
    more = beyond(tokens, ids, len(pieces), source)
    learnt = [i for i in tokens if i < len(pieces) and pieces[i].type in (pieces[i].NORMAL, pieces[i].UNUSED)]
    if not more and not learnt:
        return model_bytes
    for i in learnt:  # whole in a text, whatever merges lead to it
        pieces[i].type = _type(tokens[i])
    for token in more:
        pieces.add(piece=spelt(token), score=0.0, type=_type(token))
    model.trainer_spec.vocab_size = len(pieces)
    return model.SerializeToString()


def open_model(model_bytes: bytes, files: dict[str, bytes], source: str) -> SentencePieceModel:
    """The SentencePiece model of a folder, with all that its files add and the rules that transformers encodes by.

    files: as `read_companions` gives them. Raises `UserError` where these rules are none of a SentencePiece model.
    """
    data = into_sentencepiece(model_bytes, files, source)
    model = SentencePieceModel(data, source)
    config = read_beside(files, "tokenizer_config.json", source)
    space = around_text.space_before(files, config, model.dummy_prefix, source)
    if around_text.is_llama(files, config) and model.rewrites:
        raise UserError(
            f"{source}: {model.rewrites}, which the class LlamaTokenizer in its tokenizer_config.json does not do in "
            "transformers; set tokenizer_class there to PreTrainedTokenizerFast"
        )
    if space.before != model.dummy_prefix:
        model = SentencePieceModel(with_dummy_prefix(data, space.before), source)
    model.space = space
    if around_text.is_llama(files, config):  # for which transformers makes them added tokens, listed or not
        model.whole |= {piece: i for piece, i in model.user_defined.items() if SPACE_MARK not in piece}
    for token in named(files, source).values():
        if (piece := spelt(token)) in model.user_defined:
            text = token.text.replace(SPACE_MARK, " ") if token.normalized else token.text
            model.whole[text] = model.user_defined[piece]
        for side, texts in model.eats_spaces.items():
            if getattr(token, side):
                texts.add(token.text)
    return model


def open_json(files: dict[str, bytes], source: str) -> TokenizersModel:
    """The tokenizer.json of a folder, with the tokens that only the files beside it add; see `open_model`."""
    config = read_beside(files, "tokenizer_config.json", source)
    rules = None
    if around_text.is_llama(files, config):
        rules = around_text.llama_rules(around_text.space_before(files, config, False, source))
    pieces = TokenizersModel(files["tokenizer.json"], source, rules)
    tokens = named(files, source)
    first = pieces.vocab_size
    tokens |= enumerate(beyond(tokens, pieces.ids, first, source), first)
    described = read_object(pieces.data, source)
    written = {entry["id"]: entry for entry in described.get("added_tokens") or []}
    entries = {
        i: written.get(i, {"id": i, "content": token.text, "single_word": False})
        | {name: getattr(token, name) for name in FLAGS}
        for i, token in tokens.items()
    }
    if entries == written:
        return pieces
    described["added_tokens"] = list(entries.values())
    return TokenizersModel(to_json(described), source, rules)


def _type(token: Added) -> int:
    kinds = proto.ModelProto.SentencePiece
    return kinds.CONTROL if token.special else kinds.USER_DEFINED


def spelt(token: Added) -> str:
    """A token's text as a SentencePiece model writes it."""
    return token.text if token.special else token.text.replace(" ", SPACE_MARK)
