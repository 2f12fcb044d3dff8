"""Whether the exercises of lesson 12 are solved."""

import math

import torch

ZERO = torch.zeros(1)


def test_loss_by_hand(answers):
    torch.testing.assert_close(answers.dpo_loss(ZERO, ZERO, ZERO, ZERO, 0.1), torch.tensor([math.log(2)]))
    # βΔ = ln 3, and σ(ln 3) = 3/4
    found = answers.dpo_loss(torch.tensor([math.log(9)]), ZERO, ZERO, ZERO, 0.5)
    torch.testing.assert_close(found, torch.tensor([-math.log(0.75)]))
    assert answers.dpo_loss(ZERO - 2000, ZERO, ZERO, ZERO, 1.0).item() == 2000  # no overflow


def test_at_the_best_policy_it_is_the_loss_of_the_true_rewards(answers):
    # π* ∝ π_ref e^{r/β}: then β (u_w − u_l) = r_w − r_l, whatever Z is
    beta, rewards = 0.3, torch.tensor([0.2, 1.0, 0.7])
    log_ref = torch.tensor([0.2, 0.3, 0.5]).log()
    log_p = (log_ref + rewards / beta).log_softmax(0)
    better, worse = torch.tensor([1, 1, 2]), torch.tensor([0, 2, 0])
    found = answers.dpo_loss(log_p[better], log_p[worse], log_ref[better], log_ref[worse], beta)
    torch.testing.assert_close(found, torch.log1p(torch.exp(rewards[worse] - rewards[better])))


def test_push_is_what_finite_differences_say(answers):
    values = torch.tensor([[-3.0, -5.0], [-4.0, -2.0], [-3.5, -5.5], [-3.0, -2.5]], dtype=torch.float64)
    step = torch.zeros_like(values)
    step[0] = 1e-5
    slope = (answers.dpo_loss(*(values + step), 0.4) - answers.dpo_loss(*(values - step), 0.4)) / 2e-5
    torch.testing.assert_close(answers.push(*values, 0.4), -slope, rtol=1e-6, atol=1e-8)


def test_predictions(answers, experiment):
    def loss(chosen: float, rejected: float, beta: float) -> float:
        pairs = experiment.Pairs(ZERO + chosen, ZERO + rejected, ZERO, ZERO, ZERO, ZERO)
        return float(experiment.sigmoid(pairs, experiment.LossOptions(beta=beta)))

    def change(before: float, after: float) -> str:
        return "falls" if after < before - 1e-4 else "rises" if after > before + 1e-4 else "stays"

    assert change(loss(2.0, -1.0, 0.1), loss(-3.0, -6.0, 0.1)) == answers.BOTH_FALL
    assert change(loss(2.0, -1.0, 0.1), loss(2.0, -1.0, 0.2)) == answers.BETA_DOUBLED
