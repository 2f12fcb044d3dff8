"""A checkpoint that all ranks write together, at once or in the background.

1. Rank 0 makes a scratch folder, and all learn its name.
2. Every file has an owner, a rank. Every tensor goes to the owner of its file, part by part where it is sharded.
3. Each owner writes its files, hashes them and reads them back. In the background it has copies of its tensors in host
   memory, and a thread writes them while training goes on.
4. When all have ended, rank 0 writes the manifest and gives the folder its name.

So no rank ever holds more than its own files, and the bytes of the folder do not depend on how many ranks there are.
Only 1, 2 and 4 talk to other ranks; the thread does not, since all ranks must join an exchange in one order.
"""

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice, zip_longest
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from minillm.base import files
from minillm.base.errors import UserError
from minillm.checkpoint import tensor_writer
from minillm.checkpoint.tensor_writer import Kind, TensorFile
from minillm.distributed import shards
from minillm.distributed.ranks import Ranks


class Source(NamedTuple):
    """Where a tensor of a checkpoint comes from."""

    parameter: Tensor  # tells which part of the whole each rank holds
    values: Tensor  # what this rank holds, a plain tensor: the parameter's own numbers or a moment of its optimizer

    @classmethod
    def of(cls, parameter: Tensor, values: Tensor | None = None) -> "Source":
        """The parameter's own numbers, or others of its shape, which are sharded like it if it is sharded."""
        values = shards.local(parameter if values is None else values).detach()
        is_a_number = values.dim() == 0  # a count of steps, the same on every rank
        return cls(values if is_a_number else parameter, values)

    @property
    def kind(self) -> Kind:
        """Shape of the whole tensor, and dtype."""
        return shards.whole_shape(self.parameter), self.values.dtype


class ToWrite(NamedTuple):
    """A file of tensors, and where they come from by their keys."""

    file: TensorFile
    sources: dict[str, Source]


def to_write(planned: list[TensorFile], sources: dict[str, Source]) -> list[ToWrite]:
    """Each file with the sources of its own tensors."""
    return [ToWrite(file, {key: sources[key] for key in file.keys}) for file in planned]


def tensors_to_write(stem: str, sources: dict[str, Source], limit: int | None, **how) -> list[ToWrite]:
    """The files of tensors that are no model's weights; limit, how: as `tensor_writer.plan_tensors` takes them."""
    kinds = {key: source.kind for key, source in sources.items()}
    return to_write(tensor_writer.plan_tensors(stem, kinds, limit, **how), sources)


def owners_of(sizes: list[int], world: int) -> list[int]:
    """Which rank writes each file of so many bytes: rank 0, unless they are more than one file may hold.

    Then each goes to the rank that has least to write so far.
    """
    if sum(sizes) <= tensor_writer.MOST_BYTES:
        return [0] * len(sizes)
    loads = [0] * world
    owners = []
    for size in sizes:
        owner = loads.index(min(loads))
        loads[owner] += size
        owners.append(owner)
    return owners


class SharedSave:
    """A checkpoint on its way to the disk. All ranks make one together, and `finish` it together."""

    def __init__(
        self,
        path: Path,
        ranks: Ranks,
        contents: list[ToWrite],
        write_rest: Callable[[Path], None],
        in_background: bool = False,
    ):
        """Begin to write the folder `path`; without in_background all files are written in the end.

        write_rest(folder): writes, on rank 0, all that is no tensor. It may be called in another thread. Raises
        `UserError` on every rank if the folder cannot be made.
        """
        self.path, self.ranks, self.write_rest = path, ranks, write_rest
        self.problem = ""  # why this rank could not write
        self.entries: dict[str, dict] = {}  # of the manifest, for the files that this rank has written
        self.thread: threading.Thread | None = None
        self._make_scratch(sorted({str(Path(each.file.name).parent) for each in contents} - {"."}))

        # the tensors of this rank's files, in the order in which they are written
        owners = owners_of([each.file.n_bytes for each in contents], ranks.world)
        self.own = [each.file for each, owner in zip(contents, owners, strict=True) if owner == ranks.rank]
        arriving = _arriving(contents, owners, ranks.rank)
        if in_background:
            kept = deque(tensor.to("cpu", copy=True) for tensor in arriving)
            self.thread = threading.Thread(target=self._write_all, args=(_emptied(kept),), daemon=True)
            self.thread.start()
        else:
            self._write_all(arriving)

    def _make_scratch(self, folders: list[str]) -> None:
        """Make a folder beside the one to be written, with these folders in it, and tell all ranks its name."""
        self.scratch = files.scratch_name(self.path)
        if self.ranks.main:
            with self._noting_problems():
                self.path.parent.mkdir(parents=True, exist_ok=True)
                for folder in (self.scratch, *(self.scratch / name for name in folders)):
                    folder.mkdir()
        self.scratch = self.path.with_name(self.ranks.exchange(self.scratch.name)[0])
        self._raise_any_problem()

    def _write_all(self, arriving: Iterator[Tensor]) -> None:
        """Write this rank's files, each with the next tensors that arrive, and note what goes wrong."""
        with self._noting_problems():
            for file in self.own:
                files.wait_for((self.scratch / file.name).parent)
                self.entries[file.name] = tensor_writer.write_file(self.scratch, file, islice(arriving, len(file.keys)))
        for _ in arriving:
            pass  # after a problem: the others still need this rank's parts of their tensors
        with self._noting_problems():
            if not self.problem:
                for name, entry in self.entries.items():
                    tensor_writer.check_written(self.scratch / name, entry)
                if self.ranks.main:
                    self.write_rest(self.scratch)

    @contextlib.contextmanager
    def _noting_problems(self) -> Iterator[None]:
        """A context in which an error is noted, to be raised on every rank in the end."""
        try:
            yield
        except OSError as problem:
            self.problem = self.problem or files.why_not_written(self.path, self.scratch, problem)
        except UserError as problem:
            self.problem = self.problem or str(problem)
        except Exception as problem:
            if self.thread is None:
                raise
            self.problem = f"{self.path}: {type(problem).__name__}: {problem}"  # a thread has nobody to raise it to

    def _raise_any_problem(self) -> None:
        """Delete the scratch folder and raise `UserError` on every rank, if any has noted a problem."""
        problems = [problem for problem in self.ranks.exchange(self.problem) if problem]
        if problems:
            if self.ranks.main:
                files.discard(self.scratch)
            raise UserError(problems[0])

    @property
    def is_written(self) -> bool:
        """Whether this rank has ended its part, so that `finish` need not wait for it."""
        return self.thread is None or not self.thread.is_alive()

    def finish(self) -> None:
        """Wait until all ranks have written their files, then give the folder its name.

        Raises `UserError` on every rank if one could not write; of the folder nothing is left then.
        """
        if self.thread is not None:
            self.thread.join()
        entries = {}
        for of_one_rank in self.ranks.exchange(self.entries):
            entries |= of_one_rank
        self._raise_any_problem()
        if self.ranks.main:
            with self._noting_problems():
                files.complete(self.scratch, self.path, entries)
        self._raise_any_problem()

    def abandon(self) -> None:
        """Wait for this rank's part, and leave nothing of the folder."""
        if self.thread is not None:
            self.thread.join()
        self.ranks.barrier()
        if self.ranks.main:
            files.discard(self.scratch)


def _arriving(contents: list[ToWrite], owners: list[int], rank: int) -> Iterator[Tensor]:
    """The whole tensors of this rank's files, one after another. All ranks must exhaust it, whatever they own.

    In each round every owner receives one tensor, so that all of them write at the same time.
    """
    queues: dict[int, list[Source]] = {}
    for each, owner in zip(contents, owners, strict=True):
        queues.setdefault(owner, []).extend(each.sources.values())
    for in_round in zip_longest(*queues.values()):
        mine = None
        for owner, source in zip(queues, in_round, strict=True):
            if source is None:
                continue  # this owner has all of its tensors
            whole = shards.gather_to(source.parameter, owner, source.values)
            mine = whole if owner == rank else mine
        if mine is not None:
            yield mine


def _emptied(kept: deque[Tensor]) -> Iterator[Tensor]:
    """The tensors in their order; each is let go when the next is taken."""
    while kept:
        yield kept.popleft()
