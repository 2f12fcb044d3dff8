"""Changing a vocabulary that models already use: adding pieces, removing some, and recording what became of each id.

BPE builds a text's pieces by merging the neighbouring pair whose union has the highest score, until none is left. Both
rules here follow from this. Merging: new pieces with scores below all old ones are formed only after every old merge,
so a text in which no new piece occurs is encoded as before. Pruning: a piece is formed by a fixed series of merges
inside itself; if all of these stay, it is formed as before, and a piece that is never formed can be removed.
"""

import itertools
import shlex
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from sentencepiece import sentencepiece_model_pb2 as proto

from minillm.base import files
from minillm.base.errors import UserError
from minillm.tokenizer.folder_files import GENERATION_CONFIG, read_object, to_json
from minillm.tokenizer.sentencepiece_model import SPACE_MARK
from minillm.tokenizer.tokenizer import Tokenizer
from minillm.tokenizer.train import write_readable

WHITESPACE_SCORE = -1e8  # runs of spaces are given scores far below all others (Mistral: -1e9)
RULES = ("safe", "common")


@dataclass
class Merged:
    """What `merge` did. refused: reason → pieces."""

    tokenizer: Tokenizer
    id_map: list[int]
    added: list[str] = field(default_factory=list)
    already_there: int = 0
    refused: dict[str, list[str]] = field(default_factory=dict)


def merge(base: Tokenizer, more: Tokenizer, rule: str = "safe") -> Merged:
    """The base's vocabulary with the pieces of another appended; every old id stays.

    rule "safe": pieces without ASCII characters and spaces, with scores below all of the base, so that text without a
    new piece is encoded as before; a piece that could never be formed is left out. "common": every piece that the base
    lacks, with score 0, as the well-known recipe does: it changes how old text is encoded.
    Raises `UserError` if either is not a BPE model.
    """
    for option, tokenizer in (("--base", base), ("--add", more)):
        if tokenizer.model.proto.trainer_spec.model_type != proto.TrainerSpec.BPE:
            raise UserError(f"{option}: a BPE vocabulary is needed to merge; this one is of another kind (unigram?)")
    if rule not in RULES:
        raise UserError(f"--rule {rule}: choose one of {', '.join(RULES)}")
    result = Merged(base, list(range(base.vocab_size)))

    # What is new, in the order in which it was learnt.
    old_pieces = {piece.piece for piece in base.model.proto.pieces}
    new_pieces = []
    for piece in sorted(more.model.proto.pieces, key=lambda piece: -piece.score):
        any_text_will_do = rule == "common" and piece.type == piece.NORMAL
        reason = None if any_text_will_do else _reason_against(piece)
        if piece.piece in old_pieces:
            result.already_there += 1
        elif reason:
            result.refused.setdefault(reason, []).append(piece.piece)
        else:
            new_pieces.append(piece.piece)

    if rule == "common":
        result.tokenizer = _with_pieces(base, new_pieces, itertools.repeat(0.0))
        result.added = new_pieces
        return result

    # Scores below all of the base's; then leave out what no text is encoded as. A piece that is never formed takes part
    # in no merge, so other pieces do not change without it.
    old_scores = [piece.score for piece in base.model.proto.pieces if piece.type == piece.NORMAL]
    lowest = min(score for score in old_scores if score > WHITESPACE_SCORE)
    tokenizer = _with_pieces(base, new_pieces, itertools.count(lowest - 1, -1))
    unreachable = [
        piece for i, piece in enumerate(new_pieces, base.vocab_size) if not is_reachable(tokenizer, piece, i)
    ]
    if unreachable:
        result.refused["unreachable: an older merge comes before"] = unreachable
        left_out = set(unreachable)
        new_pieces = [piece for piece in new_pieces if piece not in left_out]
        tokenizer = _with_pieces(base, new_pieces, itertools.count(lowest - 1, -1))
    result.tokenizer = tokenizer
    result.added = new_pieces
    return result


def from_pieces(
    pieces: list[tuple[str, float, str]], ids: dict[str, int], *, dummy_prefix: bool, source: str
) -> Tokenizer:
    """A BPE vocabulary from its pieces (text, score, name of the type: NORMAL, BYTE, …), nothing normalized.

    ids: of "bos", "eos", "pad" as far as there are any. dummy_prefix: put a space before each text. Raises `UserError`
    if SentencePiece refuses them.
    """
    model = proto.ModelProto()
    for text, score, kind in pieces:
        model.pieces.add(piece=text, score=score, type=kind)

    spec = model.trainer_spec
    spec.model_type = proto.TrainerSpec.BPE
    spec.vocab_size = len(pieces)
    spec.byte_fallback = any(kind == "BYTE" for *_, kind in pieces)
    unknown = [i for i, (*_, kind) in enumerate(pieces) if kind == "UNKNOWN"]
    special = {"unk": unknown[0] if unknown else -1, "bos": -1, "eos": -1, "pad": -1, **ids}
    for role, i in special.items():
        setattr(spec, f"{role}_id", i)
        setattr(spec, f"{role}_piece", pieces[i][0] if i >= 0 else f"<no {role}>")

    rules = model.normalizer_spec
    rules.name = "identity"
    rules.add_dummy_prefix = dummy_prefix
    rules.remove_extra_whitespaces = False
    try:
        return Tokenizer(model.SerializeToString(), source)
    except RuntimeError as problem:
        raise UserError(f"{source}: its pieces make no SentencePiece model ({problem})") from None


def piece_texts(tokenizer: Tokenizer) -> list[str]:
    """The texts of all normal pieces."""
    return [p.piece.replace(SPACE_MARK, " ") for p in tokenizer.model.proto.pieces if p.type == p.NORMAL]


def is_reachable(tokenizer: Tokenizer, piece: str, piece_id: int) -> bool:
    """Whether a text is encoded as this piece: its own text is, if any."""
    return tokenizer.model.no_prefix.encode(piece) == [piece_id]


def _reason_against(piece) -> str | None:
    if piece.type != piece.NORMAL:
        return "no piece of text (control, byte, unknown or user-defined)"
    if SPACE_MARK in piece.piece:
        return "holds a space"
    if any(character.isascii() for character in piece.piece):
        return "holds an ASCII character"
    return None


def _with_pieces(base: Tokenizer, pieces: Iterable[str], scores: Iterable[float]) -> Tokenizer:
    model = proto.ModelProto.FromString(base.model.data)
    for piece, score in zip(pieces, scores, strict=False):
        model.pieces.add(piece=piece, score=score, type=proto.ModelProto.SentencePiece.NORMAL)
    return _finish(model, base)


def _finish(model: proto.ModelProto, base: Tokenizer) -> Tokenizer:
    model.trainer_spec.vocab_size = len(model.pieces)
    tokenizer = Tokenizer(model.SerializeToString(), "the new vocabulary")
    return _with_settings_of(tokenizer, base)


def _with_settings_of(tokenizer: Tokenizer, other: Tokenizer) -> Tokenizer:
    """A copy whose files have `other`'s chat template, special pieces, ends of texts, and rule about bos."""
    files = dict(tokenizer.own_companions)
    if other.files and "tokenizer.json" not in other.files:  # whose rules would count more than the folder's
        files.pop("tokenizer.json", None)
    ends = [tokenizer.model.id_of(other.model.piece_of(i)) for i in other.end_ids if i < other.vocab_size]
    if other.generation_config:
        moved = {name: i for name, i in tokenizer.special_ids.items() if name in other.generation_config}
        files[GENERATION_CONFIG] = to_json(other.generation_config | moved | {"eos_token_id": ends})
    # the settings of the other, but for the ids of added tokens
    ours = read_object(files["tokenizer_config.json"], "the new vocabulary")["added_tokens_decoder"]
    theirs = {entry["content"]: entry for entry in other.config.get("added_tokens_decoder", {}).values()}
    decoder = {i: theirs.get(entry["content"], entry) for i, entry in ours.items()}
    files["tokenizer_config.json"] = to_json(other.config | {"added_tokens_decoder": decoder})
    named = {name: piece for name, piece in other.special_pieces.items() if tokenizer.model.id_of(piece) is not None}
    return Tokenizer(tokenizer.model.data, "the new vocabulary", files).with_settings(
        add_bos=other.begins_with_bos,
        after_eos=other.begins_after_eos,
        chat_template=other.chat_template,
        named=named,
        ends=ends,
    )


def prune(base: Tokenizer, texts: Iterable[str], keep: Iterable[str] = ()) -> tuple[Tokenizer, list[int]]:
    """The base's vocabulary with only what these texts use, which are encoded as before; and old id → new id, or -1.

    Special, byte and user-defined pieces stay, as do the pieces in `keep`, and all pieces that a kept one is merged
    from.
    """
    pieces = base.model.proto.pieces
    ids = {piece.piece: i for i, piece in enumerate(pieces)}

    # Ids that the texts use; many models put a space before each text, so lines are encoded alone as well.
    used = {i for i, piece in enumerate(pieces) if piece.type != piece.NORMAL}
    used.update(i for i in base.end_ids if i < base.vocab_size)
    if SPACE_MARK in ids:
        used.add(ids[SPACE_MARK])  # a space is never bytes
    for text in texts:
        used.update(base.encode(text))
        for row in base.encode_many(text.split("\n")):
            used.update(row)
    for piece in keep:
        marked = piece.replace(" ", SPACE_MARK)
        if marked not in ids:
            raise UserError(f"--keep {piece!r}: no piece of the vocabulary")
        used.add(ids[marked])

    # And what these are merged from.
    if base.model.proto.trainer_spec.model_type == proto.TrainerSpec.BPE:
        scores = {piece.piece: piece.score for piece in pieces if piece.type == piece.NORMAL}
        for i in list(used):
            if pieces[i].type == pieces[i].NORMAL:
                used.update(ids[part] for part in merges_of(pieces[i].piece, scores))

    old_ids = sorted(used)
    new_ids = {old: new for new, old in enumerate(old_ids)}
    model = proto.ModelProto.FromString(base.model.data)
    del model.pieces[:]
    model.pieces.extend(pieces[i] for i in old_ids)
    for role in ("unk_id", "bos_id", "eos_id", "pad_id"):
        old = getattr(model.trainer_spec, role)
        setattr(model.trainer_spec, role, new_ids.get(old, -1))
    return _finish(model, base), [new_ids.get(i, -1) for i in range(base.vocab_size)]


def merges_of(piece: str, scores: dict[str, float]) -> set[str]:
    """Every piece that is formed while BPE merges `piece`, including itself and single characters."""
    parts = list(piece)
    formed = {part for part in parts if part in scores}
    while len(parts) > 1:
        pairs = [left + right for left, right in itertools.pairwise(parts)]
        known = [i for i, union in enumerate(pairs) if union in scores]
        if not known:
            break
        best = max(known, key=lambda i: scores[pairs[i]])  # the leftmost of the highest score
        parts[best : best + 2] = [pairs[best]]
        formed.add(pairs[best])
    return formed


def save(tokenizer: Tokenizer, out: str | Path, old: Tokenizer | None = None, id_map: list[int] | None = None) -> None:
    """Write tokenizer.model, a readable tokenizer.vocab and, for a changed one, id_map.json; whole or not at all.

    Raises `UserError` if `out` is there already.
    """
    files.refuse_existing(out)

    def fill(folder: Path) -> None:
        tokenizer.save(folder)
        write_readable(tokenizer, folder)
        if id_map is not None:
            described = {"old_sha256": old.sha256, "new_sha256": tokenizer.sha256, "new_id_of_old": id_map}
            files.write_json_atomically(folder / "id_map.json", described)

    files.write_folder(out, fill)


def next_command(out: str) -> str:
    """The command that gives a model the changed vocabulary in `out`."""
    return f"next: python -m minillm resize --model MODEL --tokenizer {shlex.quote(out)} --out DIR"
