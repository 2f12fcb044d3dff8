import pytest
import torch
import torch.distributed as dist
from torch import nn

from minillm.distributed import shards
from minillm.distributed.shards import Cut
from tests.forked_ranks import on_ranks

WHOLE = torch.arange(35.0).view(7, 5)
HALVES = {None: [WHOLE[:, :4]] * 2, 0: list(WHOLE[:6].chunk(2)), 1: list(WHOLE[:, :4].chunk(2, 1))}


def sharded(weight: torch.Tensor, mesh) -> nn.Module:
    """A linear layer with this weight, dealt out by FSDP."""
    from torch.distributed.fsdp import fully_shard

    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = nn.Parameter(weight.clone())
    fully_shard(layer, mesh=mesh)
    return layer


def _look(rank: int, layer: nn.Module, whole: torch.Tensor) -> dict:
    """What the functions say of a layer's weight, as plain numbers."""
    parameter = layer.weight
    here = shards.local(parameter).detach()
    doubled = shards.gather_to(parameter, dist.get_world_size() - 1, values=2 * here)
    found = {
        "here": here.tolist(),
        "placed": whole[shards.place_of(parameter)].tolist(),
        "shape": tuple(shards.whole_shape(parameter)),
        "gathered": [shards.gather_to(parameter, owner) for owner in range(dist.get_world_size())],
        "doubled": doubled,
        "full": shards.full(parameter),
        "sizes": [sum(whole[place].numel() for place in shards.holders(parameter, owner).values()) for owner in (0, 1)],
    }
    shards.fill(parameter, -whole)
    found["filled"] = shards.full(parameter)
    return found


def _by_rows(rank: int, replicas: int, shards_of_one: int) -> dict:
    from torch.distributed.device_mesh import init_device_mesh

    if replicas == 1:
        mesh = init_device_mesh("cpu", (shards_of_one,))
    else:
        mesh = init_device_mesh("cpu", (replicas, shards_of_one), mesh_dim_names=("replicate", "shard"))
    return _look(rank, sharded(WHOLE, mesh), WHOLE)


def _cut(rank: int, dim: int | None) -> dict:
    """2 × 2 ranks: FSDP over two of them, tensor parallelism over the neighbours."""
    from torch.distributed.device_mesh import DeviceMesh

    mesh = DeviceMesh("cpu", torch.tensor([[0, 2], [1, 3]]), mesh_dim_names=("tensor", "shard"))
    layer = sharded(HALVES[dim][rank % 2], mesh["shard"])
    shards.mark_cut(layer.weight, Cut(dim, rank % 2, 2))
    whole = HALVES[None][0] if dim is None else torch.cat(HALVES[dim], dim)
    return _look(rank, layer, whole)


def check(found: list[dict], whole: torch.Tensor) -> None:
    world = len(found)
    for rank, seen in enumerate(found):
        assert seen["here"] == seen["placed"]
        assert seen["shape"] == tuple(whole.shape)
        assert seen["sizes"] == [whole.numel()] * 2  # each number once
        for owner, gathered in enumerate(seen["gathered"]):
            assert (gathered is None) == (owner != rank)
        assert torch.equal(seen["gathered"][rank], whole)
        assert torch.equal(seen["full"], whole)
        assert torch.equal(seen["filled"], -whole)
    assert torch.equal(found[world - 1]["doubled"], 2 * whole)


@pytest.mark.parametrize(("replicas", "parts"), [(1, 2), (1, 3), (2, 2), (1, 4)])
def test_rows_dealt_out_come_together_again(tmp_path, replicas, parts):
    check(on_ranks(replicas * parts, tmp_path, _by_rows, replicas, parts), WHOLE)


@pytest.mark.parametrize("dim", [None, 0, 1])
def test_parts_of_rows_or_columns_dealt_out_come_together_again(tmp_path, dim):
    whole = HALVES[None][0] if dim is None else torch.cat(HALVES[dim], dim)
    check(on_ranks(4, tmp_path, _cut, dim), whole)


def test_a_plain_tensor_is_its_own_whole():
    weight = nn.Parameter(torch.ones(3, 2))
    assert shards.local(weight) is weight and not shards.is_sharded(weight)
    assert shards.place_of(weight) == (slice(0, 3), slice(0, 2)) and shards.whole_shape(weight) == (3, 2)
    assert torch.equal(shards.gather_to(weight, 0), weight) and torch.equal(shards.full(weight), weight)
    shards.fill(weight, torch.zeros(3, 2))
    assert not weight.any()


@pytest.mark.parametrize("n_rows", [0, 1, 2, 7, 515])
@pytest.mark.parametrize("parts", [1, 2, 3, 8])
def test_rows_follow_the_rule_of_chunk(n_rows, parts):
    rows = torch.arange(n_rows)
    chunks = [*rows.chunk(parts), *[rows[:0]] * parts][:parts]
    for index, chunk in enumerate(chunks):
        assert torch.equal(rows[shards.rows_of_part(n_rows, index, parts)], chunk)
