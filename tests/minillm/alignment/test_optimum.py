import math

import pytest
import torch

from minillm.alignment.optimum import estimated_optimum, objective, right_wrong_optimum, share_of_optimum

P_REFERENCE = torch.tensor([0.5, 0.2, 0.2, 0.06, 0.04], dtype=torch.float64)  # five answers that can be counted
REWARDS = torch.tensor([0.2, 0.0, 1.0, 0.7, 0.0], dtype=torch.float64)


@pytest.mark.parametrize("beta", [0.05, 0.3, 2.0])
def test_no_policy_is_worth_more_and_one_is_worth_it(beta):
    """The optimum found by following the gradient of E[r] − β KL itself, over the policy's five logits."""
    logits = P_REFERENCE.log().clone().requires_grad_()
    optimizer = torch.optim.LBFGS([logits], max_iter=500, line_search_fn="strong_wolfe", tolerance_grad=1e-12)

    def value() -> torch.Tensor:
        log_p = torch.log_softmax(logits, 0)
        return (log_p.exp() * (REWARDS - beta * (log_p - P_REFERENCE.log()))).sum()

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        (-value()).backward()
        return -value()

    optimizer.step(closure)
    best = beta * torch.log((P_REFERENCE * (REWARDS / beta).exp()).sum())
    assert float(value().detach()) == pytest.approx(float(best), abs=1e-6)
    # as many answers of each kind as it has probability: the estimate is exact
    counts = (P_REFERENCE * 50).round().int()
    sampled = torch.repeat_interleave(REWARDS, counts)[None]  # (1, 50)
    assert float(estimated_optimum(sampled, beta)) == pytest.approx(float(best), abs=1e-12)


def test_a_policys_answers_find_what_the_reference_rarely_says():
    generator = torch.Generator().manual_seed(0)
    beta, p_right = 0.05, 1e-5
    exact = float(right_wrong_optimum(torch.tensor(math.log(p_right)), beta))
    assert exact > 0.4
    assert float(estimated_optimum((torch.rand(20, 64, generator=generator) < p_right).double(), beta).mean()) < 0.1
    right = torch.rand(20, 64, generator=generator) < 0.6  # of a policy that is right in 6 of 10 answers
    kl = torch.where(right, math.log(0.6 / p_right), math.log(0.4 / (1 - p_right)))
    estimate = estimated_optimum(right.double(), beta, kl)
    assert float(estimate.mean()) == pytest.approx(exact, abs=0.02)
    assert (estimate >= (right.double() - beta * kl).mean(1)).all()
    optimal = p_right * torch.tensor([math.exp(1 / beta), 1 / p_right - 1])  # π* itself: exact from any answer
    kl = torch.log(optimal / optimal.sum() / torch.tensor([p_right, 1 - p_right]))
    assert estimated_optimum(torch.tensor([[1.0], [0.0]]), beta, kl[:, None]).tolist() == pytest.approx(
        [exact] * 2, abs=1e-6
    )


def test_right_and_wrong_is_the_same_formula():
    for p in (1e-9, 0.2, 0.999):
        for beta in (0.02, 0.1, 1.0):
            found = float(right_wrong_optimum(torch.tensor(math.log(p)), beta))
            expected = 1 + beta * math.log(p + (1 - p) * math.exp(-1 / beta))  # without e^{1/β}, which may overflow
            assert found == pytest.approx(expected, abs=1e-6)
    assert float(right_wrong_optimum(torch.tensor(0.0), 0.1)) == pytest.approx(1)  # always right
    assert float(right_wrong_optimum(torch.tensor(-math.inf), 0.1)) == pytest.approx(0)  # never


def test_the_estimate_is_too_low_and_rises_with_the_number_of_answers():
    generator = torch.Generator().manual_seed(0)
    exact = float(right_wrong_optimum(torch.tensor(math.log(0.1)), 0.1))
    found = []
    for n in (4, 32, 256, 4096):
        drawn = (torch.rand(400, n, generator=generator) < 0.1).double()
        found.append(float(estimated_optimum(drawn, 0.1).mean()))
    assert found == sorted(found) and found[0] < 0.5 * exact
    assert found[-1] == pytest.approx(exact, abs=0.01)
    assert float(estimated_optimum(torch.zeros(1, 8), 0.01)) == 0  # nothing right was seen


def test_the_objective_is_reward_less_distance():
    assert objective(0.8, 2.0, 0.1) == pytest.approx(0.6)


@pytest.mark.parametrize("beta", [0.02, 0.3, 2.0])
def test_the_best_policy_is_as_far_from_the_reference_as_it_is_better(beta):
    """J* − E_ref[r] = β KL(π_ref ‖ π*), by which it is told whether a share of J* says anything."""
    best = beta * torch.log((P_REFERENCE * (REWARDS / beta).exp()).sum())
    log_best = P_REFERENCE.log() + (REWARDS - best) / beta
    distance = (P_REFERENCE * (P_REFERENCE.log() - log_best)).sum()
    assert float(best - (P_REFERENCE * REWARDS).sum()) == pytest.approx(float(beta * distance), rel=1e-9)


@pytest.mark.parametrize(
    ("before", "after", "optimum", "said"),
    [
        (0.285, 0.768, 0.852, "90.1% of it"),
        (0.2, 0.1, 0.4, "25.0% of it"),
        (0.0, -0.03, 0.0, "hardly above what the reference has"),  # a reward that is always 0
        (0.0, -0.03, 0.0004, "hardly above what the reference has"),
        (0.5, 0.47, 0.5, "hardly above what the reference has"),  # answers that are all worth the same
        (0.0, -0.03, 0.1, "a value is below 0"),
        (-5.0, -2.0, -1.0, "a value is below 0"),
    ],
)
def test_a_share_of_the_optimum_is_said_where_it_means_something(before, after, optimum, said):
    found = share_of_optimum(before, after, optimum, beta=0.02)
    assert said in found and found.startswith("no share of it: ") == ("%" not in found)
