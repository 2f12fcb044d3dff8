"""Whether the exercises of lesson 8 are solved."""

import math

import torch


def test_turns_that_can_be_drawn(answers):
    x = torch.tensor([1.0, 0.0, 0.0, 2.0], dtype=torch.float64).expand(3, 1, 4)
    # base (π/2)⁻² and D = 4: the pairs turn by 1 and by π/2 radians a token
    turned = answers.rotate_pairs(x, torch.tensor([0, 1, 2]), base=(math.pi / 2) ** -2, stretch=1.0)
    wanted = [[1, 0, 0, 2], [math.cos(1), math.sin(1), -2, 0], [math.cos(2), math.sin(2), 0, -2]]
    torch.testing.assert_close(turned[:, 0], torch.tensor(wanted, dtype=torch.float64))


def test_it_is_the_experiments_with_the_numbers_in_another_order(answers, experiment):
    torch.manual_seed(0)
    x, positions = torch.randn(7, 2, 16, dtype=torch.float64), torch.arange(7) * 11
    ours = answers.rotate_pairs(x, positions, base=500.0, stretch=1.0)
    for head in range(2):
        halves = torch.cat((x[:, head, 0::2], x[:, head, 1::2]), -1)  # pairs (i, i + D/2)
        wanted = experiment.rotate(halves, positions, base=500.0)
        torch.testing.assert_close(torch.cat((ours[:, head, 0::2], ours[:, head, 1::2]), -1), wanted)


def test_stretched_positions_fall_between_the_old_ones(answers):
    torch.manual_seed(0)
    x = torch.randn(1, 3, 8, dtype=torch.float64)
    stretched = answers.rotate_pairs(x, torch.tensor([12]), base=100.0, stretch=4.0)
    torch.testing.assert_close(stretched, answers.rotate_pairs(x, torch.tensor([3]), base=100.0, stretch=1.0))


def test_predictions(answers, experiment):
    torch.manual_seed(0)
    q, k = torch.randn(2, 5, 32, dtype=torch.float64)
    here, there = (
        experiment.rotate(q, p) @ experiment.rotate(k, p).T for p in (torch.arange(5), torch.arange(5) + 1000)
    )
    assert ("stays" if torch.allclose(here, there) else "changes") == answers.SHIFTED

    def turn_of(pair: int, base: float) -> float:
        """Tokens that a pair takes for a turn, from the angle of one token."""
        x = torch.zeros(1, 32, dtype=torch.float64)
        x[0, pair] = 1
        turned = experiment.rotate(x, torch.tensor([1]), base)
        return 2 * math.pi / float(torch.atan2(turned[0, pair + 16], turned[0, pair]))

    for pair, given in ((15, answers.SLOWEST), (0, answers.FASTEST)):
        before, after = turn_of(pair, 1e4), turn_of(pair, 1e6)
        assert given == ("as many" if math.isclose(before, after) else "more" if after > before else "fewer")
