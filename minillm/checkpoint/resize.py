"""Giving a model another vocabulary: the rows of its embedding and head follow the mapping of ids.

A row whose id still exists is copied. A new piece gets by default the mean of the rows of the old pieces that its text
was encoded as, since these are what the model has read so far in its place.
"""

import dataclasses
import math
from pathlib import Path

import torch
from torch import Tensor

from minillm.base import files
from minillm.base.contents import Contents
from minillm.base.errors import UserError
from minillm.base.json_door import read_json
from minillm.checkpoint import huggingface, run_folder
from minillm.model.transformer import Transformer
from minillm.tokenizer.sentencepiece_model import SPACE_MARK
from minillm.tokenizer.tokenizer import Tokenizer

STARTS = ("mean", "mean_all", "normal")
EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"  # the tensors with a row for each id


@dataclasses.dataclass(frozen=True)
class IdMap:
    """Which id of a new vocabulary each old id became. old_sha256, new_sha256: of the two vocabularies' files.

    new_of_old: for each old id the new one, or a negative number if its piece is gone.
    """

    old_sha256: str
    new_sha256: str
    new_of_old: list[int]


def read_id_map(path: str | Path) -> IdMap:
    """id_map.json as `python -m minillm vocab merge` and `prune` write it. Raises `UserError` if it is damaged."""
    try:
        written = read_json(path)
    except UserError as problem:
        raise UserError(f"--id_map {problem}; it is no id map that vocab merge or prune wrote") from None
    contents = Contents(written, f"--id_map {path}: no id map that vocab merge or prune wrote")
    new_of_old = contents.need("new_id_of_old", list[int])
    kept = [new_id for new_id in new_of_old if new_id >= 0]
    if len(set(kept)) < len(kept):
        raise UserError(f"{contents.source}: it gives one new id to two old ones")
    return IdMap(contents.need("old_sha256", str), contents.need("new_sha256", str), new_of_old)


def old_pieces_of(new: Tokenizer, old: Tokenizer, new_of_old: list[int]) -> list[list[int]]:
    """For each new id, the old ids whose rows it starts from: its own old id, or those its text was encoded as."""
    old_ids: list[list[int]] = [[] for _ in range(new.vocab_size)]
    for old_id, new_id in enumerate(new_of_old):
        if new_id >= 0:
            old_ids[new_id] = [old_id]
    for new_id, piece in enumerate(new.model.proto.pieces):
        is_text = piece.type in (piece.NORMAL, piece.USER_DEFINED)
        if not old_ids[new_id] and is_text:
            text = piece.piece.replace(SPACE_MARK, " ")
            old_ids[new_id] = old.model.no_prefix.encode(text)
    return old_ids


def resize_rows(table: Tensor, old_ids: list[list[int]], n_rows: int, start: str) -> Tensor:
    """A table (n_rows, C) for the new ids from the old one (V, C), in its dtype.

    old_ids: for each new id the old ids it is made of: one is copied, several (start "mean") are averaged. start
    "mean_all": every new piece gets the mean of all old rows; "normal": it is drawn from a normal distribution with
    their mean and standard deviation. Rows beyond len(old_ids) are padding and get the mean of all.
    """
    old_rows = table.float()  # (V, C)
    mean = old_rows.mean(0)  # (C,)
    spread = old_rows.std(0)  # (C,)
    new_rows = mean.repeat(n_rows, 1)  # (n_rows, C)
    generator = torch.Generator().manual_seed(0)
    for new_id, ids in enumerate(old_ids):
        if len(ids) == 1:
            new_rows[new_id] = old_rows[ids[0]]
        elif ids and start == "mean":
            new_rows[new_id] = old_rows[ids].mean(0)
        elif start == "normal":
            new_rows[new_id] = mean + spread * torch.randn(mean.shape, generator=generator)
    return new_rows.to(table.dtype)


def resize(
    model: Transformer, old: Tokenizer, new: Tokenizer, new_of_old: list[int], *, start: str = "mean", multiple: int = 1
) -> Transformer:
    """The model with the new vocabulary; everything but embedding and head is shared with the old one.

    new_of_old: new id of each old id, or -1. multiple: the number of rows is padded to a multiple of it.
    """
    if start not in STARTS:
        raise UserError(f"--start {start}: choose one of {', '.join(STARTS)}")
    if multiple < 1:
        raise UserError(f"--pad_to_multiple {multiple}: at least 1")
    n_rows = math.ceil(new.vocab_size / multiple) * multiple
    old_ids = old_pieces_of(new, old, new_of_old)
    if start != "mean":  # else a new piece that was one old token would be copied
        kept = set(new_of_old)
        old_ids = [ids if new_id in kept else [] for new_id, ids in enumerate(old_ids)]

    # An empty model of the new size, whose tensors are those of the old one but for the two tables.
    config = dataclasses.replace(model.config, vocab_size=n_rows)
    with torch.device("meta"):
        resized = Transformer(config)
    weights = dict(model.state_dict())
    weights[EMBEDDING] = resize_rows(weights[EMBEDDING], old_ids, n_rows, start)  # (n_rows, C)
    if config.tie_embeddings:
        weights[HEAD] = weights[EMBEDDING]
    else:
        weights[HEAD] = resize_rows(weights[HEAD], old_ids, n_rows, start)  # (n_rows, C)
    resized.load_state_dict(weights, assign=True)
    resized.tie()
    resized.build_rotation()
    return resized


def resize_folder(
    model: str | Path, tokenizer: str | Path, id_map: str | Path, out: str | Path, *, start: str, multiple: int
) -> str:
    """Write the model folder `out`: `model` with the vocabulary of `tokenizer`. Returns a line that says what was done.

    model: a model folder, or a run, of which the newest checkpoint is taken. Raises `UserError` if the mapping belongs
    to other vocabularies, or `out` is there already; nothing is half written.
    """
    files.refuse_existing(out)
    folder = run_folder.resolve_checkpoint(model)
    huggingface.load_config(folder)  # refuses an adapter
    old = Tokenizer.load(folder)
    new = Tokenizer.load(run_folder.tokenizer_folder(tokenizer))
    mapping = read_id_map(id_map)
    _check_mapping(mapping, old, new, names=(f"--model {folder}", f"--tokenizer {tokenizer}", f"--id_map {id_map}"))
    loaded = huggingface.load_model(folder)
    if loaded.config.vocab_size < old.vocab_size:
        raise UserError(f"--model {folder}: {loaded.config.vocab_size} rows for a tokenizer of {old.vocab_size} pieces")
    resized = resize(loaded, old, new, mapping.new_of_old, start=start, multiple=multiple)

    def fill(scratch: Path) -> None:
        huggingface.save_model(resized, scratch, special_ids=new.special_ids)
        new.save(scratch)

    files.write_folder(out, fill)
    n_kept = sum(new_id >= 0 for new_id in mapping.new_of_old)
    n_new = new.vocab_size - n_kept
    return f"{out}: {n_kept:,} rows kept, {n_new:,} new ({start}), {resized.config.vocab_size:,} in all"


def _check_mapping(mapping: IdMap, old: Tokenizer, new: Tokenizer, *, names: tuple[str, str, str]) -> None:
    """Raise `UserError` unless the mapping belongs to these vocabularies; names: of all three, as errors name them."""
    old_name, new_name, mapping_name = names
    for tokenizer, sha256, name in ((old, mapping.old_sha256, old_name), (new, mapping.new_sha256, new_name)):
        if tokenizer.sha256 != sha256:
            raise UserError(
                f"{name}: its tokenizer is not the one that {mapping_name} was written for; `vocab merge` or `prune` "
                "with the model as --base makes a vocabulary that can follow the model's"
            )
    if len(mapping.new_of_old) != old.vocab_size or max(mapping.new_of_old) >= new.vocab_size:
        raise UserError(f"{mapping_name}: does not fit vocabularies of {old.vocab_size} and {new.vocab_size} pieces")
