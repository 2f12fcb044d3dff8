import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from minillm.base.errors import UserError
from minillm.distributed.parallelize import gradients_synced, marked_last, parallelize
from minillm.distributed.ranks import Ranks
from minillm.training.step import Ahead, LossScale, TrainState, clip, seed_step
from tests import launch

CPU = torch.device("cpu")
ROWS = torch.arange(24.0).view(8, 3).sin()


def new_state(model: nn.Module, rank: int = 0, world: int = 1) -> TrainState:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    return TrainState(model, [optimizer], Ranks(rank, world, CPU), torch.float32)


def steps(rank: int, world: int, model: nn.Module, n_steps: int) -> TrainState:
    """Some steps on this rank's share of the rows, in micro-batches of 2, as the scripts take them."""
    state = new_state(model, rank, world)
    parallel_model = parallelize(model, state.ranks, compile=False)
    share = ROWS.chunk(world)[rank]
    for _ in range(n_steps):
        for part, last in marked_last(share.split(2)):
            with gradients_synced(parallel_model, last):
                loss = parallel_model(part).square().sum()
                state.backward(loss, n_targets=len(ROWS))
        state.update(grad_clip=1.0)
    return state


class Idle(nn.Module):
    """A layer, and another that no output depends on."""

    def __init__(self):
        super().__init__()
        self.used = nn.Linear(3, 2)
        self.idle = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.used(x)


def same_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(3, 2)


def _rank(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store-{world}", rank=rank, world_size=world)
    model = same_model()
    state = steps(rank, world, model, 2)
    torch.save((state.loss, state.grad_norm, model.state_dict()), f"{folder}/{rank}.pt")
    problem = ""
    try:
        steps(rank, world, Idle(), 2)
    except UserError as refusal:
        problem = str(refusal)
    Path(folder, f"{rank}.txt").write_text(problem)
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    launch.server()
    mp.start_processes(_rank, args=(2, str(folder)), nprocs=2, start_method="forkserver")
    return folder


def test_a_step_is_the_same_on_two_ranks_and_by_hand(two_ranks):
    by_hand = same_model()
    for _ in range(2):
        loss = by_hand(ROWS).square().sum() / len(ROWS)
        gradients = torch.autograd.grad(loss, list(by_hand.parameters()))
        norm = torch.stack([g.norm() for g in gradients]).norm()
        with torch.no_grad():
            for p, g in zip(by_hand.parameters(), gradients, strict=True):
                p -= 0.1 * g / max(1.0, float(norm))
    alone = same_model()
    one = steps(0, 1, alone, 2)
    results = [(one.loss, one.grad_norm, alone.state_dict())]
    results += [torch.load(two_ranks / f"{rank}.pt") for rank in range(2)]
    for step_loss, grad_norm, weights in results:
        assert step_loss == pytest.approx(loss.item(), rel=1e-5) and grad_norm == pytest.approx(norm.item(), rel=1e-5)
        torch.testing.assert_close(weights, by_hand.state_dict(), rtol=1e-5, atol=1e-6)


def test_a_parameter_without_gradient_is_refused_by_name_on_any_number_of_ranks(two_ranks):
    with pytest.raises(UserError, match=r"^idle.weight, idle.bias: trained, but the loss does not depend") as alone:
        steps(0, 1, Idle(), 2)
    assert [(two_ranks / f"{rank}.txt").read_text() for rank in range(2)] == [str(alone.value)] * 2

    frozen = Idle()
    frozen.idle.requires_grad_(False)
    assert steps(0, 1, frozen, 2).applied


def test_a_step_that_is_not_finite_changes_nothing_and_the_next_one_counts_anew():
    model = same_model()
    state = new_state(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state.backward(model(ROWS).sum() * math.inf, n_targets=8)
    assert not math.isfinite(state.update(grad_clip=1.0)) and not state.applied
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())

    state.backward(model(ROWS).sum(), n_targets=8)
    state.update(grad_clip=1.0)
    assert state.applied and math.isfinite(state.loss)
    assert not torch.equal(model.weight, before["weight"])


def test_a_step_without_any_target_has_a_loss_of_0_and_moves_nothing():
    """Such as a row whose only target is a bos."""
    model = same_model()
    state = new_state(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state.backward(0.0 * model(ROWS).sum(), n_targets=0)
    assert state.update(grad_clip=1.0) == 0.0 and state.loss == 0.0 and state.applied
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_what_is_made_ahead_is_made_once_and_never_for_a_step_beyond_the_last():
    made = []

    def make(step: int) -> int:
        made.append(step)
        return 10 * step

    ahead = Ahead(make, last_step=5)
    assert ahead.take(3) == 30  # the first step of a run that goes on
    ahead.prepare(4)
    assert made == [3, 4] and ahead.take(4) == 40 and made == [3, 4]
    ahead.prepare(5)
    assert ahead.take(5) == 50
    ahead.prepare(6)
    assert made == [3, 4, 5] and not ahead.prepared


def test_what_cannot_be_made_fails_in_its_own_step():
    def make(step: int) -> int:
        if step == 2:
            raise UserError("rows.jsonl: line 7 has changed")
        return step

    ahead = Ahead(make, last_step=5)
    assert ahead.take(1) == 1
    ahead.prepare(2)  # step 1 can still be saved
    with pytest.raises(UserError, match="line 7"):
        ahead.take(2)


def test_a_step_s_dropout_depends_on_seed_step_and_rank_alone():
    def draw(*key):
        seed_step(*key)
        return torch.rand(4).tolist()

    keys = [(0, 1, 0), (0, 2, 0), (1, 1, 0), (0, 1, 1), (0, 1, 2), (2**40, 2**40, 7)]
    draws = [draw(*key) for key in keys]
    assert draws == [draw(*key) for key in keys]
    assert len({tuple(d) for d in draws}) == len(keys)


@pytest.mark.parametrize(("limit", "after"), [(1.0, 1.0), (0.0, 5.0), (10.0, 5.0)])
@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_clipping_undoes_the_scale_and_returns_the_norm_of_before(limit, after, scale):
    model = nn.Linear(2, 1, bias=False)
    (scale * (model.weight * torch.tensor([3.0, 4.0])).sum()).backward()
    assert clip(model, limit, scale) == pytest.approx(5.0)
    assert float(model.weight.grad.norm()) == pytest.approx(after, rel=1e-5)


@pytest.mark.parametrize("limit", [0.5, 4.9, 5.0, 5.0 + 1e-7, 5.1])
def test_clipping_is_torchs_bit_for_bit(limit):
    grads = torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, 4.0]])
    models = [nn.Linear(2, 1, bias=False) for _ in grads]
    for model, grad in zip(models, grads, strict=True):
        model.weight.grad = grad
    clip(models[0], limit)
    nn.utils.clip_grad_norm_(models[1].parameters(), limit)
    assert torch.equal(*grads)


def test_the_loss_scale_is_torchs():
    """Over overflows and more good steps than make it grow, and from what torch's scaler has recorded."""
    theirs = torch.amp.GradScaler("cpu")
    ours = LossScale(enabled=True)
    weight = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    overflows = {3, 4, 2010}
    for step in range(4020):
        theirs.scale(weight.sum()).backward()
        if step in overflows:
            weight.grad[0] = torch.inf
        theirs.step(optimizer)
        theirs.update()
        optimizer.zero_grad()
        ours.update(step not in overflows)
        if step in (2, 4, 2003, 2005, 2010, 4010, 4019):
            assert ours.factor == theirs.get_scale()
        if step == 2500:
            ours = LossScale(enabled=True)
            ours.load_state_dict(theirs.state_dict())
    assert ours.state_dict().items() <= theirs.state_dict().items()
