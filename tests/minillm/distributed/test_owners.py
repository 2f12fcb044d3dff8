import os

import pytest
import torch
from torch import nn

from minillm.distributed.owners import deal, group_of_copies, results_of_all, share_work
from minillm.distributed.ranks import Ranks
from tests.forked_ranks import on_ranks

CPU = torch.device("cpu")


def test_the_dearest_go_first_and_all_ranks_have_about_as_much_to_do():
    assert deal((5, 8, 1, 5, 3), 2) == [[1, 4], [0, 3, 2]]  # 11 each
    assert deal((3, 3, 3, 3), 3) == [[0, 3], [1], [2]]  # of equal ones each rank gets one before any gets two
    assert deal((7,), 3) == [[0], [], []]
    assert deal((), 2) == [[], []]


@pytest.mark.parametrize("n_owners", [2, 8])
def test_ranks_differ_by_no_more_than_one_piece_of_work(n_owners):
    costs = tuple(int(cost) for cost in torch.randint(1, 1000, (100,), generator=torch.Generator().manual_seed(0)))
    owned = deal(costs, n_owners)
    assert sorted(number for numbers in owned for number in numbers) == list(range(100))
    loads = [sum(costs[number] for number in numbers) for numbers in owned]
    last = owned[loads.index(max(loads))][-1]  # when it was dealt, that rank had least to do
    assert max(loads) - min(loads) <= costs[last]


SHAPES = [[(2, 3, 5), (1, 4)], [], [(1, 7, 1)]]  # of three ranks' results


def results_of(rank: int) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(rank)
    return [torch.randn(shape, generator=draw).bfloat16() for shape in SHAPES[rank]]


def _send(rank: int) -> list:
    own = [result.mT.contiguous().mT for result in results_of(rank)]  # as those of tall matrices lie in memory
    return results_of_all(own, SHAPES, torch.empty(0, dtype=torch.bfloat16), torch.distributed.group.WORLD)


@pytest.mark.slow
def test_all_ranks_have_all_results_bit_for_bit(tmp_path):
    for received in on_ranks(3, tmp_path, _send):
        for owner, results in enumerate(received):
            expected = results_of(owner)
            assert len(results) == len(expected)
            assert all(torch.equal(mine, its) for mine, its in zip(results, expected, strict=True))


def _groups(rank: int, n_here: list[int]) -> list[int] | None:
    """The ranks with which this one shares work, where its machine has so many."""
    os.environ.update(LOCAL_RANK="0", LOCAL_WORLD_SIZE=str(n_here[rank]))
    model = nn.Linear(2, 2)
    share_work(model, Ranks(rank, len(n_here), CPU))
    group = group_of_copies(model.weight)
    return None if group is None else torch.distributed.get_process_group_ranks(group)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("n_here", "expected"),
    [
        ([2, 2, 2, 2], [[0, 1], [0, 1], [2, 3], [2, 3]]),  # nothing goes between machines
        ([3, 3, 3], [[0, 1, 2]] * 3),
        ([1, 1], [None, None]),
        ([2, 2, 1], [None, None, None]),
    ],
)
def test_the_ranks_of_a_machine_share_work(tmp_path, n_here, expected):
    assert on_ranks(len(n_here), tmp_path, _groups, n_here) == expected
