"""The outer step beside torch's own SGD, on two and three workers; and what does not fit."""

import types

import pytest
import torch
import torch.distributed as dist
from torch import nn

from minillm.base.errors import UserError
from minillm.distributed import diloco
from minillm.distributed.diloco import Diloco, check_options, check_resumed
from minillm.distributed.ranks import Ranks
from minillm.training.optim import build_optimizers
from tests.forked_ranks import on_ranks

N_ROWS = 6  # of a batch


def these_ranks() -> Ranks:
    """The ranks of the process group."""
    return Ranks(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))


class Small(nn.Module):
    """Matrices that Muon trains and a bias that AdamW trains."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.layers = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def rows(step: int) -> torch.Tensor:
    """The batch of a step, (N_ROWS, 4)."""
    return torch.randn(N_ROWS, 4, generator=torch.Generator().manual_seed(step))


def train_alone(model: nn.Module, optimizers, part: torch.Tensor) -> None:
    """A step of one worker on its rows."""
    model.layers(part).square().mean().backward()
    for optimizer in optimizers:
        optimizer.step()
    model.zero_grad(set_to_none=True)


def expected(world: int, kind: str, n_steps: int, every: int, lr: float, momentum: float) -> dict[str, torch.Tensor]:
    """The weights after so many steps: all workers in one process, the outer step by torch's SGD."""
    common = Small()
    workers = [Small() for _ in range(world)]
    inner = [build_optimizers(worker, kind, lr=0.02, weight_decay=0.1) for worker in workers]
    outer = torch.optim.SGD(common.parameters(), lr=lr, momentum=momentum, nesterov=momentum > 0)
    for step in range(1, n_steps + 1):
        parts = rows(step).chunk(world)
        for worker, optimizers, part in zip(workers, inner, parts, strict=True):
            train_alone(worker, optimizers, part)
        if step % every:
            continue
        of_all = zip(common.parameters(), *(worker.parameters() for worker in workers), strict=True)
        for weight, *theirs in of_all:
            weight.grad = torch.stack([weight.detach() - each.detach() for each in theirs]).mean(0)
        outer.step()
        for worker in workers:
            worker.load_state_dict(common.state_dict())
    return {name: p.detach() for name, p in common.named_parameters()}


def worker_run(ranks: Ranks, kind: str, n_steps: int, every: int, lr: float, momentum: float) -> None:
    model = Small()
    optimizers = build_optimizers(model, kind, lr=0.02, weight_decay=0.1)
    outer = Diloco(model, optimizers, ranks, lr=lr, momentum=momentum)
    for step in range(1, n_steps + 1):
        train_alone(model, optimizers, rows(step).chunk(ranks.world)[ranks.rank])
        if step % every == 0:
            outer.exchange()
    for name, weight in expected(ranks.world, kind, n_steps, every, lr, momentum).items():
        torch.testing.assert_close(model.get_parameter(name).detach(), weight, rtol=1e-5, atol=1e-6)


def both_kinds(rank: int) -> None:
    for kind in ("adamw", "muon"):
        worker_run(these_ranks(), kind, 9, 3, 0.7, 0.9)


@pytest.mark.parametrize("world", [2, 3])
def test_workers_follow_the_formula(world, tmp_path):
    on_ranks(world, tmp_path, both_kinds)


def test_one_worker_alone_follows_it_too():
    worker_run(Ranks(0, 1, torch.device("cpu")), "adamw", 6, 2, 0.7, 0.9)


def plain_gradient_descent(rank: int) -> None:
    """An exchange after every step of plain SGD, without outer momentum, at an outer rate of 1: data parallelism."""
    ranks = these_ranks()
    model, together = Small(), Small()
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    outer = Diloco(model, [inner], ranks, lr=1.0, momentum=0.0)
    whole_batch = torch.optim.SGD(together.parameters(), lr=0.1)
    for step in range(1, 5):
        train_alone(model, [inner], rows(step).chunk(ranks.world)[ranks.rank])
        outer.exchange()
        train_alone(together, [whole_batch], rows(step))
    for one, other in zip(model.parameters(), together.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_an_exchange_in_every_step_of_plain_descent_is_data_parallelism(tmp_path):
    on_ranks(2, tmp_path, plain_gradient_descent)


def with_own_first_weights(rank: int) -> dict[str, torch.Tensor]:
    """The weights after an exchange of workers that began with different ones, such as two releases of torch draw."""
    model = Small()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += rank
    inner = build_optimizers(model, "adamw", lr=0.02, weight_decay=0.1)
    Diloco(model, inner, these_ranks(), lr=0.7, momentum=0.9).exchange()
    return {name: p.detach() for name, p in model.named_parameters()}


def test_all_workers_begin_with_the_weights_of_the_first(tmp_path):
    for weights in on_ranks(3, tmp_path, with_own_first_weights):
        for name, weight in Small().named_parameters():
            assert torch.equal(weights[name], weight)


def in_small_groups(rank: int) -> None:
    """How many numbers are sent at once does not matter, and the groups hold every parameter once."""
    diloco.MOST_AT_ONCE = 20
    groups = list(diloco._groups(dict(Small().named_parameters())))
    assert [name for group in groups for name in group] == [name for name, _ in Small().named_parameters()]
    assert len(groups) == 3  # 20, then 5 and 15, then 3 numbers
    worker_run(these_ranks(), "adamw", 4, 2, 0.7, 0.9)


def test_the_weights_are_sent_in_groups(tmp_path):
    on_ranks(2, tmp_path, in_small_groups)


def test_creating_an_optimizer_s_state_changes_nothing():
    """The first steps of an optimizer with a state of zeros are those of one without."""
    for kind in ("adamw", "muon"):
        plain, prepared = Small(), Small()
        of_plain = build_optimizers(plain, kind, lr=0.02, weight_decay=0.1)
        of_prepared = build_optimizers(prepared, kind, lr=0.02, weight_decay=0.1)
        Diloco(prepared, of_prepared, Ranks(0, 1, torch.device("cpu")), lr=0.7, momentum=0.9)
        for step in range(3):
            train_alone(plain, of_plain, rows(step))
            train_alone(prepared, of_prepared, rows(step))
        for one, other in zip(plain.parameters(), prepared.parameters(), strict=True):
            assert torch.equal(one, other)


def config(**values) -> types.SimpleNamespace:
    return types.SimpleNamespace(**{"diloco_steps": 10, "shard": "auto", **values})


def test_what_does_not_fit_is_refused():
    check_options(config(), torch.bfloat16)
    check_options(config(shard="1", tensor_parallel=1), torch.float32)
    check_options(config(diloco_steps=0, shard="4"), torch.float16)
    with pytest.raises(UserError, match="10: each rank trains a whole model alone, so --shard must be 1, not 2"):
        check_options(config(shard="2"), torch.float32)
    with pytest.raises(UserError, match="--tensor_parallel must be 1, not 2"):
        check_options(config(tensor_parallel=2), torch.float32)
    with pytest.raises(UserError, match="float16"):
        check_options(config(), torch.float16)


def test_a_checkpoint_of_another_kind_or_number_of_workers_is_refused():
    of_workers = {"step": 20, "config": {"diloco_steps": 5}, "world": 2}
    check_resumed(config(), of_workers, 2)
    check_resumed(config(), {"step": 0}, 3)
    check_resumed(config(diloco_steps=0), {"step": 20, "config": {}, "world": 2}, 3)
    with pytest.raises(UserError, match=r"3 rank\(s\): the checkpoint holds an optimizer for each of 2 workers"):
        check_resumed(config(), of_workers, 3)
    with pytest.raises(UserError, match="--diloco_steps 0: the checkpoint was made with 5"):
        check_resumed(config(diloco_steps=0), of_workers, 2)
    with pytest.raises(UserError, match="--diloco_steps 10: the checkpoint was made with 0"):
        check_resumed(config(), {"step": 20, "config": {}}, 2)
