"""Going on from a checkpoint: which one it is, what it says of the run before, and what has changed since."""

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


def find_source(training_config: TrainingConfig, ranks: Ranks, say: Callable[[str], None]) -> Path | None:
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
    return run_folder.newest_checkpoint(folder, say, ranks)


def read_saved(source: Path, training_config: TrainingConfig, ranks: Ranks) -> dict:
    """What a checkpoint records of the run. Raises `UserError` if it is of another step, or of other workers."""
    saved = train_state.read_state(source)
    if saved["step"] != run_folder.step_of(source):
        raise UserError(f"{source}: its training state is of step {saved['step']}; bring back a copy")
    diloco.check_resumed(training_config, saved, ranks.world)
    return saved


def take_recorded_threads(saved: dict, ranks: Ranks, say: Callable[[str], None]) -> None:
    """Compute on as many threads as the checkpoint's run, since results depend on them in their last bits.

    The user's OMP_NUM_THREADS comes first. torchrun sets it as well, so another number of ranks takes its own.
    """
    usual, recorded = torch.get_num_threads(), saved.get("threads", 0)
    same_ranks = saved.get("world") == ranks.world
    if ranks.device.type == "cpu" and same_ranks and "OMP_NUM_THREADS" not in os.environ and 0 < recorded < usual:
        torch.set_num_threads(recorded)
        say(f"threads: {recorded} of {usual}, as in the checkpoint; OMP_NUM_THREADS={usual} would take all")


def changes(source: Path, saved: dict, described: dict, training_config: TrainingConfig) -> list[str]:
    """What differs from the checkpoint's run, in lines; described: what a checkpoint would record of this one.

    Raises `UserError` for what must not differ.
    """
    allowed = training_config.allow_data_change
    before = saved_schedule(saved.get("config", {}), training_config)
    if saved["step"] <= before.decay_begins:  # none of the decay's data was read, so it may still be chosen
        saved, described = _without(saved, DECAY_DATA), _without(described, DECAY_DATA)
    lines = train_state.compare_fingerprints(saved, described, allowed, source, FREE)
    if saved["step"] < training_config.steps and training_config.lr is not None:
        lines.append(rate_change(before, Schedule.of(training_config), saved["step"]))
    return [line for line in lines if line]


def _without(state: dict, name: str) -> dict:
    """A training state without the fingerprint of this name."""
    fingerprints = {key: value for key, value in state.get("fingerprints", {}).items() if key != name}
    return {**state, "fingerprints": fingerprints}
