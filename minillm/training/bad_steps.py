"""Steps that were not applied, since loss or gradient was not finite: they are told, and too many end the run."""

from collections.abc import Callable
from pathlib import Path

from minillm.base.errors import UserError
from minillm.checkpoint import run_folder
from minillm.distributed.diloco import Rounds
from minillm.distributed.ranks import Ranks
from minillm.training.step import TrainState


class BadSteps:
    """Counts a run's bad steps in a row.

    Ranks that step together see the same ones; with --diloco_steps each has its own.
    """

    def __init__(self, limit: int, ranks: Ranks, rounds: Rounds, log: Callable[[str], None]):
        """limit: so many in a row are too many. log: prints a line, on rank 0."""
        self.limit, self.ranks, self.rounds, self.log = limit, ranks, rounds, log
        self.in_a_row = 0
        self.problem = ""  # once there were too many

    def count(self, step: int, state: TrainState) -> None:
        """Note whether a step was applied, and print a line if it was not."""
        refused = state.take_refused()
        self.in_a_row = self.in_a_row + 1 if refused else 0
        for what in refused:
            line = f"step {step}: {what}: not applied ({self.in_a_row} in a row)"
            if self.rounds.is_unheard:
                print(f"rank {self.ranks.rank}: {line}", flush=True)
            self.log(line)
        if self.in_a_row >= self.limit and not self.problem:
            who = f"rank {self.ranks.rank}: " if self.rounds.n_workers > 1 else ""
            self.problem = f"{who}step {step}: {self.in_a_row} steps in a row were not finite"

    def end_run(self, folder: Path) -> None:
        """Raise `UserError` on every rank, all of which must call this, since on one there were too many.

        folder: the run's, whose last checkpoint is kept.
        """
        problems = [problem for problem in self.ranks.exchange(self.problem) if problem]
        raise UserError(
            f"{problems[0]}; lower --lr, raise --warmup_steps or choose --dtype float32, and "
            f"{run_folder.earlier_start(folder)}"
        )
