"""A run that saves: longer than a step may take, and in the background, beside its steps."""

import dataclasses
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from minillm.base import files
from minillm.base.errors import UserError
from minillm.checkpoint import tensor_writer
from minillm.distributed.diloco import DilocoOptions, workers
from minillm.distributed.ranks import Ranks
from minillm.model.config import ModelConfig
from minillm.model.transformer import Transformer
from minillm.training import saving
from minillm.training.config import TrainingConfig
from minillm.training.run import Run
from minillm.training.step import TrainState
from tests.forked_ranks import on_ranks

CPU = torch.device("cpu")
SHAPE = ModelConfig(vocab_size=50, dim=8, n_layers=1, n_heads=2, max_seq_len=8)


def run_of(out: Path, ranks: Ranks, **options) -> tuple[Run, TrainState]:
    cfg = dataclasses.replace(TrainingConfig(out=str(out), lr=0.1), **options)
    model = Transformer(SHAPE)
    model.init_weights(0)
    run = Run(cfg, ranks, {"data": "d"})
    return run, run.start(TrainState(model, [torch.optim.AdamW(model.parameters())], ranks, torch.float32))


def take_steps(run: Run, state: TrainState, seen: list) -> None:
    """The steps of a run, in which nothing is learned; seen: gets the steps that lie on the disk after each."""
    for _ in run.steps(state):
        state.skip()
        run.log_step(state, n_tokens=1)
        seen.append(sorted(int(path.name[5:]) for path in run.folder.glob("step-????????")))


def _save_slowly(rank: int, home: str) -> list:
    """Two ranks, of which rank 1 needs five seconds to write what it owns."""
    tensor_writer.MOST_BYTES = 1_000
    read_back = tensor_writer.check_written
    if rank == 1:
        tensor_writer.check_written = lambda *arguments: (time.sleep(2.5), read_back(*arguments))
    run, state = run_of(Path(home), Ranks(rank, 2, CPU), steps=2, save_every=1, timeout_s=3.0)
    seen = []
    take_steps(run, state, seen)
    return seen


@pytest.mark.slow
def test_a_save_that_takes_longer_than_a_step_may_does_not_end_the_run(tmp_path):
    found = on_ranks(2, tmp_path / "told", _save_slowly, str(tmp_path / "out"))
    assert found == [[[], [1]]] * 2
    for step in (1, 2):
        assert files.verify_folder(tmp_path / "out" / f"step-{step:08d}") == []


@pytest.fixture
def may_write(monkeypatch):
    """Until this event no file reaches the disk."""
    event, read_back = threading.Event(), tensor_writer.check_written
    monkeypatch.setattr(tensor_writer, "check_written", lambda *arguments: (event.wait(), read_back(*arguments)))
    return event


def end(run: Run) -> None:
    run.close()
    run.out.lock.release()


def test_steps_go_on_while_a_checkpoint_is_written_and_there_are_never_two(tmp_path, may_write):
    run, state = run_of(tmp_path / "out", Ranks(0, 1, CPU), steps=6, save_every=3, save_in_background=True)
    for step in run.steps(state):
        state.skip()
        run.log_step(state, n_tokens=1)
        assert not list(run.folder.glob("step-????????")) and run.saver.is_writing == (step > 3)
        if step == 6:
            may_write.set()  # the last save waits for the first
    assert sorted(path.name for path in run.folder.glob("step-*")) == ["step-00000003", "step-00000006"]
    end(run)


@pytest.mark.parametrize(
    ("world", "on_this_machine", "most_bytes", "share"),
    [(1, None, 10**9, 1200), (8, "4", 10**9, 1200), (8, "4", 1000, 600), (8, None, 1000, 1200)],
)
def test_copies_that_no_machine_can_hold_are_refused_before_the_first_step(
    monkeypatch, world, on_this_machine, most_bytes, share
):
    monkeypatch.setattr(tensor_writer, "MOST_BYTES", most_bytes)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if on_this_machine:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", on_this_machine)
    monkeypatch.setattr(files, "memory_bytes", lambda: share)
    saving._check_host_memory(1200, world)
    monkeypatch.setattr(files, "memory_bytes", lambda: share - 1)
    with pytest.raises(UserError, match=f"--save_in_background true: a machine keeps a copy of {share:,} bytes"):
        saving._check_host_memory(1200, world)


def test_workers_that_train_alone_share_the_copies_of_a_checkpoint(tmp_path, monkeypatch):
    """Eight workers on two machines: each machine holds half of weights, outer momentum and two moments a worker."""
    run, state = run_of(tmp_path / "out", Ranks(0, 1, CPU), save_in_background=True)
    state.outer = SimpleNamespace(ranks=Ranks(0, 8, CPU))
    half = 4 * sum(p.numel() for p in state.model.parameters()) * (2 + 2 * 8) // 2
    monkeypatch.setattr(tensor_writer, "MOST_BYTES", 1000)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setattr(files, "memory_bytes", lambda: half)
    saving.check(state, run.folder, run.training_config, None, {})
    monkeypatch.setattr(files, "memory_bytes", lambda: half - 1)
    with pytest.raises(UserError, match=f"keeps a copy of {half:,} bytes"):
        saving.check(state, run.folder, run.training_config, None, {})
    end(run)


def test_a_checkpoint_that_cannot_be_written_in_the_background_ends_the_run(tmp_path, monkeypatch):
    def fail(path: Path, entry: dict) -> None:
        raise OSError(28, "No space left on device")

    run, state = run_of(tmp_path / "out", Ranks(0, 1, CPU), steps=6, save_every=1, save_in_background=True)
    monkeypatch.setattr(tensor_writer, "check_written", fail)
    with pytest.raises(UserError, match=r"step-00000001: writing failed .*No space left"):
        take_steps(run, state, [])
    assert not list((tmp_path / "out").glob("step-*"))
    end(run)


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("steps", r"2 steps in a row were not finite; .* go on from a checkpoint before that: copy \S+step-00000001"),
        ("weights", r"weights are not finite any more, .* go on from a checkpoint before that: copy \S+step-00000001"),
    ],
)
def test_a_run_that_goes_wrong_leaves_the_good_checkpoint_that_was_under_way(tmp_path, may_write, what, words):
    options = {"steps": 6, "save_every": 1 if what == "weights" else 0, "max_bad_steps": 2, "save_in_background": True}
    run, state = run_of(tmp_path / "out", Ranks(0, 1, CPU), **options)
    with pytest.raises(UserError, match=words):
        for step in run.steps(state):
            state.skip()
            if step > 1 and what == "steps":
                state.applied = False
            run.log_step(state, n_tokens=1)
            if step == 1 and what == "steps":
                run.save(state)
            if step == 2 and what == "weights":
                state.model.norm.weight.data.fill_(torch.nan)
            threading.Timer(0.3, may_write.set).start()
    assert [path.name for path in run.folder.glob("step-*")] == ["step-00000001"]
    assert files.verify_folder(run.folder / "step-00000001") == []
    end(run)


@dataclasses.dataclass(frozen=True)
class WorkersConfig(DilocoOptions, TrainingConfig):
    """The options of a run whose ranks train alone between exchanges."""


def _one_worker_goes_wrong(rank: int, home: str) -> str:
    """Two workers, of which rank 1 takes no step after the third, whose checkpoint it is still writing; the error."""
    tensor_writer.MOST_BYTES = 1_000
    may_write, read_back = threading.Event(), tensor_writer.check_written
    if rank == 1:
        tensor_writer.check_written = lambda *arguments: (may_write.wait(), read_back(*arguments))
    how = dict(steps=9, diloco_steps=3, save_every=3, max_bad_steps=2, save_in_background=True)
    ranks = Ranks(rank, 2, CPU)
    run = Run(WorkersConfig(out=home, lr=0.1, **how), ranks, {"data": "d"})
    model = Transformer(SHAPE)
    model.init_weights(0)
    optimizers = [torch.optim.AdamW(model.parameters())]
    outer = workers(run.training_config, model, optimizers, ranks)
    state = run.start(TrainState(model, optimizers, run.rounds.step_ranks, torch.float32, outer=outer))
    try:
        for step in run.steps(state):
            state.skip()
            state.applied = step <= 3 or rank == 0
            run.exchange(state)
            run.log_step(state, n_tokens=1)
            if step == 5:
                assert run.saver.under_way is not None
                threading.Timer(0.3, may_write.set).start()
    except UserError as error:
        return str(error)


def test_a_worker_that_goes_wrong_ends_all_once_the_checkpoint_under_way_is_whole(tmp_path):
    told = on_ranks(2, tmp_path / "told", _one_worker_goes_wrong, str(tmp_path / "out"))
    assert told[0] == told[1] and told[0].startswith("rank 1: step 5: 2 steps in a row were not finite; lower --lr")
    assert [path.name for path in (tmp_path / "out").glob("step-*")] == ["step-00000003"]
    assert files.verify_folder(tmp_path / "out" / "step-00000003") == []


def test_a_folder_that_is_lost_while_a_checkpoint_is_written_is_made_again(tmp_path, may_write):
    run, state = run_of(tmp_path / "out", Ranks(0, 1, CPU), steps=4, save_every=2, save_in_background=True)
    for step in run.steps(state):
        if step == 3:
            (tmp_path / "out").rename(tmp_path / "moved")
            may_write.set()
        state.skip()
        run.log_step(state, n_tokens=1)
    assert sorted(path.name for path in (tmp_path / "out").glob("step-*")) == ["step-00000003", "step-00000004"]
    end(run)
