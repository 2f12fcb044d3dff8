"""Going on from a checkpoint: which one it is, what it says of the run before, and what has changed since."""

import contextlib
import datetime
import os
from collections.abc import Callable
from pathlib import Path

import torch

from minillm.base.errors import UserError
from minillm.checkpoint import run_folder, train_state
from minillm.distributed import diloco
from minillm.distributed.ranks import Ranks
from minillm.training.config import FREE, TrainingConfig
from minillm.training.schedule import Schedule, rate_change, saved_schedule

DECAY_DATA = "data of the decay"  # the name of its fingerprint


def find_source(training_config: TrainingConfig, ranks: Ranks, log: Callable[[str], None]) -> Path | None:
    """The newest whole checkpoint in the run's folder, which rank 0 finds and all verify together; None for a new run.

    Raises `UserError` if there is any despite `--resume none`.
    """
    folder = Path(training_config.out)
    if ranks.main:
        run_folder.clean_stale(folder)
    has_some = ranks.main and bool(run_folder.step_folders(folder))
    if training_config.resume == "none" and ranks.max(has_some):
        raise UserError(
            f"--resume none: {folder} already holds checkpoints; choose another --out, delete it, "
            "or go on with --resume auto"
        )
    return run_folder.newest_checkpoint(folder, log, ranks)


def first_day(folder: Path) -> int:
    """The day on which the run in this folder began, by any of its checkpoints; today's if it has none."""
    today = datetime.date.today().toordinal()
    for source in run_folder.step_folders(folder):
        with contextlib.suppress(UserError):  # a damaged one
            return train_state.read_state(source).get("day", today)
    return today


def read_saved(source: Path, training_config: TrainingConfig, ranks: Ranks) -> dict:
    """What a checkpoint records of the run. Raises `UserError` if it is of another step, or of other workers."""
    saved = train_state.read_state(source)
    if saved["step"] != run_folder.step_of(source):
        raise UserError(f"{source}: its training state is of step {saved['step']}; bring back a copy")
    diloco.check_resumed(training_config, saved, ranks.world)
    return saved


def take_recorded_threads(saved: dict, ranks: Ranks, log: Callable[[str], None]) -> None:
    """Compute on as many threads as the checkpoint's run, since results depend on them in their last bits.

    The user's OMP_NUM_THREADS comes first. torchrun sets it as well, so another number of ranks takes its own.
    """
    usual, recorded = torch.get_num_threads(), saved.get("threads", 0)
    same_ranks = saved.get("world") == ranks.world
    if ranks.device.type == "cpu" and same_ranks and "OMP_NUM_THREADS" not in os.environ and 0 < recorded < usual:
        torch.set_num_threads(recorded)
        log(f"threads: {recorded} of {usual}, as in the checkpoint; OMP_NUM_THREADS={usual} would take all")


def changes(source: Path, saved: dict, described: dict, training_config: TrainingConfig) -> list[str]:
    """What differs from the checkpoint's run, in lines; described: what a checkpoint would record of this one.

    Raises `UserError` for what must not differ.
    """
    allowed = training_config.allow_data_change
    before = saved_schedule(saved.get("config", {}), training_config)
    after = Schedule.of(training_config)
    has_decay_data = DECAY_DATA in described["fingerprints"]
    lines = []
    if has_decay_data:
        lines.append(_moved_decay(source, saved["step"], before, after, allowed))
    if saved["step"] <= before.decay_begins:  # none of the decay's data was read, so it may still be chosen
        saved, described = _without(saved, DECAY_DATA), _without(described, DECAY_DATA)
    lines += train_state.compare_fingerprints(saved, described, allowed, source, FREE)
    if saved["step"] < training_config.steps and training_config.lr is not None:
        lines.append(rate_change(before, after, saved["step"], may_be_constant=not has_decay_data))
    return [line for line in lines if line]


def _moved_decay(source: Path, step: int, before: Schedule, after: Schedule, allowed: bool) -> str:
    """A line for a decay with data of its own that began, or would have begun, before the checkpoint, but elsewhere.

    Which texts a step reads depends on where the decay begins: what was read since then would come again, and what
    the order has there would never come. Raises `UserError` unless that is allowed. "": nothing of that.
    """
    then, now = before.decay_begins, after.decay_begins
    if then == now or step <= min(then, now):
        return ""
    moved = f"the decay, which reads --decay_data, began after step {then:,} and would now after step {now:,}"
    if allowed:
        return f"{moved}: some texts come again and some never, as --allow_data_change allows"
    raise UserError(
        f"{source}: {moved}, so that some texts would come again and some never; keep --steps, --decay_share and "
        f"--warmup_steps, go on from a checkpoint of at most {min(then, now):,} steps, or accept it by "
        "--allow_data_change"
    )


def _without(state: dict, name: str) -> dict:
    """A training state without the fingerprint of this name, and that of its content."""
    left_out = (name, f"{train_state.CONTENT}{name}")
    fingerprints = {key: value for key, value in state.get("fingerprints", {}).items() if key not in left_out}
    return {**state, "fingerprints": fingerprints}
