"""Giving a model another vocabulary: the rows of its embedding and head follow the mapping of ids.

A row whose id still exists is copied. A new piece gets by default the mean of the rows of the old pieces that its text
was encoded as, since these are what the model has read so far in its place.
"""

import dataclasses
import json
from pathlib import Path

import torch
from torch import Tensor

from minillm.base import files
from minillm.base.errors import UserError
from minillm.checkpoint import huggingface, run_folder
from minillm.model.transformer import Transformer
from minillm.tokenizer.sentencepiece_model import SPACE_MARK
from minillm.tokenizer.tokenizer import Tokenizer

STARTS = ("mean", "mean_all", "normal")


def read_id_map(path: str | Path) -> dict:
    """id_map.json as `python -m minillm vocab merge` and `prune` write it. Raises `UserError` if it is damaged."""
    try:
        described = json.loads(Path(path).read_text(encoding="utf-8"))
        ids = described["new_id_of_old"]
        if not all(isinstance(i, int) for i in ids) or len({i for i in ids if i >= 0}) < sum(i >= 0 for i in ids):
            raise ValueError("an id is no number, or given twice")
        return {"old_sha256": str(described["old_sha256"]), "new_sha256": str(described["new_sha256"]), "ids": ids}
    except OSError as problem:
        raise UserError(
            f"--id_map {path}: cannot be read ({problem.strerror}); vocab merge and prune write it"
        ) from None
    except (ValueError, KeyError, TypeError) as problem:
        raise UserError(
            f"--id_map {path}: no id map ({problem}); give the one that vocab merge or prune wrote"
        ) from None


def old_pieces_of(new: Tokenizer, old: Tokenizer, ids: list[int]) -> list[list[int]]:
    """For each new id, the old ids whose rows it starts from: its own old id, or those its text was encoded as."""
    rows: list[list[int]] = [[] for _ in range(new.vocab_size)]
    for before, after in enumerate(ids):
        if after >= 0:
            rows[after] = [before]
    for i, piece in enumerate(new.model.proto.pieces):
        if not rows[i] and piece.type in (piece.NORMAL, piece.USER_DEFINED):
            rows[i] = old.model.no_prefix.encode(piece.piece.replace(SPACE_MARK, " "))
    return rows


def resize_rows(table: Tensor, rows: list[list[int]], n_rows: int, start: str = "mean", seed: int = 0) -> Tensor:
    """A table (n_rows, C) for the new ids from the old one (V, C), in its dtype.

    rows: for each new id the old ids it is made of: one is copied, several (start "mean") are averaged. start
    "mean_all": every new piece gets the mean of all old rows; "normal": it is drawn from a normal distribution with
    their mean and standard deviation, by seed. Rows beyond len(rows) are padding and get the mean of all.
    """
    wide = table.float()
    mean, spread = wide.mean(0), wide.std(0)
    out = mean.repeat(n_rows, 1)
    generator = torch.Generator().manual_seed(seed)
    for i, old in enumerate(rows):
        if len(old) == 1:
            out[i] = wide[old[0]]
        elif old and start == "mean":
            out[i] = wide[old].mean(0)
        elif start == "normal":
            out[i] = mean + spread * torch.randn(mean.shape, generator=generator)
    return out.to(table.dtype)


def resize(
    model: Transformer, old: Tokenizer, new: Tokenizer, ids: list[int], *, start: str = "mean", multiple: int = 1
) -> Transformer:
    """The model with the new vocabulary; everything but embedding and head is shared with the old one.

    ids: new id of each old id, or -1. multiple: the number of rows is padded to a multiple of it.
    """
    if start not in STARTS:
        raise UserError(f"--start {start}: choose one of {', '.join(STARTS)}")
    if multiple < 1:
        raise UserError(f"--pad_to_multiple {multiple}: at least 1")
    n_rows = -(-new.vocab_size // multiple) * multiple
    rows = old_pieces_of(new, old, ids)
    if start != "mean":  # else a new piece that was one old token would be copied
        kept = {after for after in ids if after >= 0}
        rows = [row if i in kept else [] for i, row in enumerate(rows)]
    config = dataclasses.replace(model.config, vocab_size=n_rows)
    with torch.device("meta"):
        changed = Transformer(config)
    weights = dict(model.state_dict())
    for name in ("embed_tokens.weight", "lm_head.weight"):
        if name == "lm_head.weight" and config.tie_embeddings:
            weights[name] = weights["embed_tokens.weight"]
        else:
            weights[name] = resize_rows(weights[name], rows, n_rows, start)
    changed.load_state_dict(weights, assign=True)
    changed.tie()
    changed.build_rotation()
    return changed


def resize_folder(
    model: str | Path, tokenizer: str | Path, id_map: str | Path, out: str | Path, *, start: str, multiple: int
) -> str:
    """Write the model folder `out`: `model` with the vocabulary of `tokenizer`. Returns a line that says what was done.

    model: a model folder, or a run, of which the newest checkpoint is taken. Raises `UserError` if the mapping belongs
    to other vocabularies, or `out` is there already; nothing is half written.
    """
    files.refuse_existing(out)
    model = run_folder.resolve_checkpoint(model)
    huggingface.load_config(model)  # refuses an adapter
    old = Tokenizer.load(model)
    new = Tokenizer.load(run_folder.tokenizer_folder(tokenizer))
    described = read_id_map(id_map)
    for given, wanted, name in (
        (old, "old_sha256", f"--model {model}"),
        (new, "new_sha256", f"--tokenizer {tokenizer}"),
    ):
        if given.sha256 != described[wanted]:
            raise UserError(f"{name}: its tokenizer is not the one that {id_map} was written for")
    ids = described["ids"]
    if len(ids) != old.vocab_size or max(ids) >= new.vocab_size:
        raise UserError(f"--id_map {id_map}: does not fit vocabularies of {old.vocab_size} and {new.vocab_size} pieces")
    loaded = huggingface.load_model(model)
    if loaded.config.vocab_size < old.vocab_size:
        raise UserError(f"--model {model}: {loaded.config.vocab_size} rows for a tokenizer of {old.vocab_size} pieces")
    changed = resize(loaded, old, new, ids, start=start, multiple=multiple)

    def fill(folder: Path) -> None:
        huggingface.save_model(changed, folder, special_ids=new.special_ids)
        new.save(folder)

    files.write_folder(out, fill)
    kept = sum(i >= 0 for i in ids)
    return f"{out}: {kept:,} rows kept, {new.vocab_size - kept:,} new ({start}), {changed.config.vocab_size:,} in all"
