import contextlib

import pytest
import torch
import torch._inductor.exc
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from minillm.distributed.parallelize import compiled, gradients_synced, parallelize
from minillm.distributed.ranks import Ranks
from tests import launch

CPU = torch.device("cpu")


def test_one_rank_keeps_the_model_as_it_is():
    model = nn.Linear(2, 2)
    assert parallelize(model, Ranks(0, 1, CPU), compile=False) is model
    assert isinstance(gradients_synced(model, last=False), contextlib.nullcontext)


def test_compiled_shares_its_weights_with_the_model():
    model = nn.Linear(2, 2)
    trained = parallelize(model, Ranks(0, 1, CPU), compile=True)
    assert trained is not model
    assert [p.data_ptr() for p in trained.parameters()] == [p.data_ptr() for p in model.parameters()]


def test_a_message_about_custom_ops_does_not_write_out_the_graph(monkeypatch):
    issue = torch._inductor.exc.OperatorIssue
    monkeypatch.setattr(issue, "operator_str", staticmethod(issue.operator_str))
    monkeypatch.setattr(torch, "__version__", "2.11.0+cu130")
    compiled(nn.Linear(2, 2))

    class Node:
        def __str__(self):
            raise AssertionError("written out")

    assert issue.operator_str("minillm::rope", [Node()], {}) == "minillm::rope"


def build(seed: int) -> nn.Module:
    """A model with a buffer, whose weights depend on the seed."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    model.register_buffer("table", torch.full((2,), float(seed)))
    return model


def _rank(rank: int, folder: str) -> None:
    """One of two ranks: three micro-batches of its half of the rows, as the scripts accumulate them."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = build(seed=rank)
    trained = parallelize(model, Ranks(rank, 2, CPU), compile=False)
    assert isinstance(trained, DistributedDataParallel)
    rows = torch.arange(36.0).view(12, 3).sin()[rank * 6 : rank * 6 + 6]
    model.table.fill_(10.0 + rank)
    unsynced = []
    for i, part in enumerate(rows.split(2)):
        with gradients_synced(trained, last=i == 2):
            (trained(part).sum() / 12).backward()
        unsynced.append(model[0].weight.grad.clone())
    saved = {name: p.grad for name, p in model.named_parameters()}
    torch.save((saved, unsynced, model.table, model.state_dict()), f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    launch.server()
    mp.start_processes(_rank, args=(str(folder),), nprocs=2, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def _one_of_three(rank: int, folder: str) -> None:
    """Gradients of the first pass, and of the same pass once more, each rank with rows of its own."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=3)
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(24, 24) for _ in range(6)))
    frozen = model[2].weight.requires_grad_(False)
    trained = parallelize(model, Ranks(rank, 3, CPU), compile=False)
    rows, passes = torch.randn(64, 24, generator=torch.Generator().manual_seed(rank)), []
    assert frozen.grad is None and not any(p.grad is not None for p in model.parameters())
    for _ in range(2):
        trained(rows).square().sum().backward()
        passes.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
        model.zero_grad(set_to_none=True)
    torch.save(passes, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_the_first_pass_of_a_start_adds_gradients_as_all_others_do(tmp_path):
    """Else a run that goes on would leave the track of one never stopped; of two ranks no order can be told."""
    launch.server()
    mp.start_processes(_one_of_three, args=(str(tmp_path),), nprocs=3, start_method="forkserver")
    first, second = torch.load(tmp_path / "0.pt")
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_gradients_of_two_ranks_add_up_to_that_of_the_whole_batch(two_ranks):
    model = build(seed=0)  # rank 0's weights are everybody's
    rows = torch.arange(36.0).view(12, 3).sin()
    (model(rows).sum() / 12).backward()
    for gradients, *_ in two_ranks:
        for name, p in model.named_parameters():
            torch.testing.assert_close(gradients[name], p.grad, rtol=1e-5, atol=1e-7)


def test_only_the_last_micro_batch_sends_gradients(two_ranks):
    (_, first, *_), (_, second, *_) = two_ranks
    assert not torch.equal(first[0], second[0]) and not torch.equal(first[1], second[1])
    assert torch.equal(first[2], second[2])


def test_buffers_are_not_sent_with_every_pass(two_ranks):
    assert [float(table[0]) for _, _, table, _ in two_ranks] == [10.0, 11.0]
