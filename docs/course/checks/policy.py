"""Whether the exercises of lesson 13 are solved."""

import math

import pytest
import torch


def test_best_policy_of_two_answers_by_hand(answers):
    # r/β = ln 3 for the second answer: it becomes three times as likely, next to the first
    log_ref = torch.tensor([0.5, 0.5]).log()
    log_p, best = answers.best_policy(log_ref, torch.tensor([0.0, 0.5 * math.log(3)]), beta=0.5)
    torch.testing.assert_close(log_p.exp(), torch.tensor([0.25, 0.75]))
    assert best == pytest.approx(0.5 * math.log(0.5 * 1 + 0.5 * 3))


def test_no_other_policy_is_better(answers, experiment):
    log_ref, rewards = experiment.question(seed=1)
    log_p, best = answers.best_policy(log_ref, rewards, experiment.BETA)
    assert experiment.objective(log_p, log_ref, rewards) == pytest.approx(best, abs=1e-5)
    generator = torch.Generator().manual_seed(0)
    for size in (0.01, 0.1, 1.0):
        other = (log_p + size * torch.randn(len(log_p), generator=generator)).log_softmax(0)
        assert experiment.objective(other, log_ref, rewards) < best


def test_a_small_beta_does_not_overflow(answers):
    log_p, best = answers.best_policy(torch.tensor([0.9, 0.1]).log(), torch.tensor([0.2, 0.9]), beta=0.001)
    torch.testing.assert_close(log_p.exp(), torch.tensor([0.0, 1.0]))
    assert best == pytest.approx(0.9 + 0.001 * math.log(0.1), abs=1e-5)


def test_predictions_of_beta(answers, experiment):
    log_ref, rewards = experiment.question()
    tilted = [(log_ref + rewards / beta).log_softmax(0) for beta in (0.2, 0.4)]
    reward = [float((log_p.exp() * rewards).sum()) for log_p in tilted]
    kl = [float((log_p.exp() * (log_p - log_ref)).sum()) for log_p in tilted]
    for (before, after), given in ((reward, answers.REWARD_OF_THE_BEST), (kl, answers.KL_OF_THE_BEST)):
        assert given == ("falls" if after < before else "rises")


def test_predictions_of_a_constant(answers, experiment):
    rewards = torch.tensor([0.1, 0.4, 0.2, 0.9])
    drawn = torch.tensor([0, 3, 3, 1])

    def gradient(kind: str, constant: float) -> torch.Tensor:
        logits = torch.tensor([1.0, 0.0, 0.5, -1.0], requires_grad=True)
        advantages = experiment.advantages_of((rewards + constant)[drawn], kind)
        (-advantages * logits.log_softmax(0)[drawn]).sum().backward()
        return logits.grad

    for kind, given in (("none", answers.WITHOUT_BASELINE), ("grpo", answers.WITH_GRPO)):
        is_same = torch.allclose(gradient(kind, 0.0), gradient(kind, 10.0), atol=1e-4)
        assert given == ("stays" if is_same else "changes")
