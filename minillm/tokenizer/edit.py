"""Changing a vocabulary that models already use: adding pieces, removing some, and recording what became of each id.

BPE builds a text's pieces by merging the neighbouring pair whose union has the highest score, until none is left. Both
rules here follow from this. Merging: new pieces with scores below all old ones are formed only after every old merge,
so a text in which no new piece occurs is encoded as before. Pruning: a piece is formed by a fixed series of merges
inside itself; if all of these stay, it is formed as before, and a piece that is never formed can be removed.
"""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from sentencepiece import sentencepiece_model_pb2 as proto

from minillm.base import files
from minillm.base.errors import UserError
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
    for name, tokenizer in (("--base", base), ("--add", more)):
        if tokenizer.model.proto.trainer_spec.model_type != proto.TrainerSpec.BPE:
            raise UserError(f"{name}: a BPE vocabulary is needed to merge; this one is of another kind (unigram?)")
    if rule not in RULES:
        raise UserError(f"--rule {rule}: choose one of {', '.join(RULES)}")
    there = {p.piece for p in base.model.proto.pieces}
    done = Merged(base, list(range(base.vocab_size)))
    taken = []
    ranked = sorted(more.model.proto.pieces, key=lambda p: -p.score)  # the order in which they were learnt
    for piece in ranked:
        reason = None if rule == "common" and piece.type == piece.NORMAL else _reason_against(piece)
        if piece.piece in there:
            done.already_there += 1
        elif reason:
            done.refused.setdefault(reason, []).append(piece.piece)
        else:
            taken.append(piece.piece)
    lowest = min(p.score for p in base.model.proto.pieces if p.type == p.NORMAL and p.score > WHITESPACE_SCORE)
    scores = itertools.repeat(0.0) if rule == "common" else itertools.count(lowest - 1, -1)
    tokenizer = _with_pieces(base, taken, scores)
    if rule == "safe":
        # A piece that is never formed takes part in no merge, so other pieces do not change without it.
        lost = {piece for i, piece in enumerate(taken, base.vocab_size) if not _arises(tokenizer, piece, i)}
        if lost:
            done.refused["unreachable: an older merge comes before"] = [p for p in taken if p in lost]
            taken = [p for p in taken if p not in lost]
            tokenizer = _with_pieces(base, taken, itertools.count(lowest - 1, -1))
    done.tokenizer, done.added = tokenizer, taken
    return done


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
    spec, rules = model.trainer_spec, model.normalizer_spec
    spec.model_type, spec.vocab_size = proto.TrainerSpec.BPE, len(pieces)
    spec.byte_fallback = any(kind == "BYTE" for *_, kind in pieces)
    unknown = [i for i, (*_, kind) in enumerate(pieces) if kind == "UNKNOWN"]
    for role, i in {"unk": unknown[0] if unknown else -1, "bos": -1, "eos": -1, "pad": -1, **ids}.items():
        setattr(spec, f"{role}_id", i)
        setattr(spec, f"{role}_piece", pieces[i][0] if i >= 0 else f"<no {role}>")
    rules.name, rules.add_dummy_prefix, rules.remove_extra_whitespaces = "identity", dummy_prefix, False
    try:
        return Tokenizer(model.SerializeToString(), source)
    except RuntimeError as problem:
        raise UserError(f"{source}: its pieces make no SentencePiece model ({problem})") from None


def piece_texts(tokenizer: Tokenizer) -> list[str]:
    """The texts of all normal pieces."""
    return [p.piece.replace(SPACE_MARK, " ") for p in tokenizer.model.proto.pieces if p.type == p.NORMAL]


def _arises(tokenizer: Tokenizer, piece: str, piece_id: int) -> bool:
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
    made = Tokenizer(model.SerializeToString(), "the new vocabulary")
    return made.with_chat_template_of(base)


def prune(base: Tokenizer, texts: Iterable[str], keep: Iterable[str] = ()) -> tuple[Tokenizer, list[int]]:
    """The base's vocabulary with only what these texts use, which are encoded as before; and old id → new id, or -1.

    Special, byte and user-defined pieces stay, as do the pieces in `keep`, and all pieces that a kept one is merged
    from.
    """
    pieces = base.model.proto.pieces
    ids = {p.piece: i for i, p in enumerate(pieces)}
    used = {i for i, p in enumerate(pieces) if p.type != p.NORMAL or p.piece == SPACE_MARK}  # a space is never bytes
    for text in texts:
        used.update(base.encode(text))
        for row in base.encode_many(text.split("\n")):  # many models put a space before each text they are given
            used.update(row)
    for piece in keep:
        if (marked := piece.replace(" ", SPACE_MARK)) not in ids:
            raise UserError(f"--keep {piece!r}: no piece of the vocabulary")
        used.add(ids[marked])
    if base.model.proto.trainer_spec.model_type == proto.TrainerSpec.BPE:
        scores = {p.piece: p.score for p in pieces if p.type == p.NORMAL}
        parts = {
            part for i in used if pieces[i].type == pieces[i].NORMAL for part in merges_of(pieces[i].piece, scores)
        }
        used |= {ids[part] for part in parts}
    model = proto.ModelProto.FromString(base.model.data)
    kept = sorted(used)
    del model.pieces[:]
    model.pieces.extend(pieces[i] for i in kept)
    new = {old: i for i, old in enumerate(kept)}
    for role in ("unk_id", "bos_id", "eos_id", "pad_id"):
        old = getattr(model.trainer_spec, role)
        setattr(model.trainer_spec, role, new.get(old, -1))
    return _finish(model, base), [new.get(i, -1) for i in range(base.vocab_size)]


def merges_of(piece: str, scores: dict[str, float]) -> set[str]:
    """Every piece that is formed while BPE merges `piece`, including itself and single characters."""
    parts = list(piece)
    seen = {part for part in parts if part in scores}
    while len(parts) > 1:
        unions = [(scores[a + b], -i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in scores]
        if not unions:
            break
        at = -max(unions)[1]  # the highest score, leftmost first
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
        seen.add(parts[at])
    return seen


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
