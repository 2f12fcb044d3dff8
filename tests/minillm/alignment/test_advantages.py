import pytest
import torch

from minillm.alignment.grpo.advantages import group_advantages, has_spread, overlong_penalty, token_advantages
from minillm.base.errors import UserError
from minillm.distributed.ranks import Ranks

ONE_RIGHT = torch.tensor([[1.0, 0, 0, 0]])
ALONE = Ranks(0, 1, torch.device("cpu"))


@pytest.mark.parametrize("loss", ["grpo", "bnpo", "dapo", "gspo", "cispo"])
def test_the_std_of_the_group_is_unbiased(loss):
    assert group_advantages(ONE_RIGHT, loss)[0].tolist() == pytest.approx([1.49970006, *[-0.49990002] * 3], abs=1e-6)
    two = group_advantages(torch.tensor([[1.0, 1, 0, 0]]), loss)[0]
    assert two.tolist() == pytest.approx([0.86587543, 0.86587543, -0.86587543, -0.86587543], abs=1e-6)


def test_others_do_not_divide_by_it():
    assert group_advantages(ONE_RIGHT, "dr_grpo")[0].tolist() == [0.75, -0.25, -0.25, -0.25]
    assert group_advantages(ONE_RIGHT, "rloo")[0].tolist() == pytest.approx([1, -1 / 3, -1 / 3, -1 / 3])
    close = torch.tensor([[1e6, 1e6 + 0.5, 1e6, 1e6]])
    assert group_advantages(close, "rloo").abs().max() < 1  # no cancellation


@pytest.mark.parametrize("loss", ["grpo", "dr_grpo", "rloo"])
def test_equal_rewards_say_nothing(loss):
    rewards = torch.tensor([[0.3, 0.3, 0.3], [0, 1, 0], [1, 1, 1]])
    assert has_spread(rewards).tolist() == [False, True, False]
    assert (group_advantages(rewards, loss)[[0, 2]] == 0).all()
    assert (group_advantages(torch.tensor([[0.7]]), loss) == 0).all()  # nor does a group of one


def test_a_cost_in_the_reward_does_not_change_the_scale():
    with_cost = ONE_RIGHT - torch.tensor([[0.4, 0.1, 0.1, 0.2]])
    advantages = group_advantages(with_cost, "grpo", scale_by=ONE_RIGHT)
    assert advantages[0].tolist() == pytest.approx(((with_cost - 0.05) / (0.5 + 1e-4))[0].tolist(), abs=1e-6)


def test_reinforce_whitens_what_is_still_to_come():
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]]).bool()
    rewards = torch.tensor([1.0, 0, 0, 0])
    advantages = token_advantages(rewards, torch.full((4, 4), 9.0), mask, 0.0, ALONE)
    assert torch.allclose(advantages[0, :3], torch.tensor(1.4491376449), atol=1e-6)
    assert torch.allclose(advantages[1:][mask[1:]], torch.tensor(-0.6210589898), atol=1e-6)
    assert (advantages[~mask] == 0).all()
    kl = torch.tensor([[0.5, 0.25, 0, 9]] * 4)
    returns = rewards[0] - 0.1 * torch.tensor([0.75, 0.25, 0])
    priced = token_advantages(rewards[:1], kl[:1], mask[:1], 0.1, ALONE)[0, :3]
    assert torch.allclose(priced, (returns - returns.mean()) / returns.std(), atol=1e-4)


def test_long_answers_cost_something_softly():
    lengths = torch.tensor([10, 60, 70, 80, 100])
    assert overlong_penalty(lengths, 100, 40).tolist() == [0, 0, -0.25, -0.5, -1]
    with pytest.raises(UserError, match="overlong_cushion 0"):
        overlong_penalty(lengths, 100, 0)
