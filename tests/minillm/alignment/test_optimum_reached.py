"""Methods against the optimum: answers of one token can be enumerated, so the best policy is known exactly.

π*(y|x) ∝ π_ref(y|x) e^{r(x, y)/β}, worth J* = β log E_ref[e^{r/β}]. DPO on pairs drawn from the same reward, PPO and
GRPO each have to arrive there from samples alone.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from minillm.alignment import token_rewards
from minillm.alignment.grpo.advantages import group_advantages
from minillm.alignment.log_probs import loss_through_log_probs
from minillm.alignment.policy_loss import Experience, PolicyLoss, clipped_loss
from minillm.alignment.rollouts import RolloutConfig, roll_out
from minillm.alignment.value import make_value_model, value_loss
from minillm.datasets.batch import Batch
from minillm.model.config import ModelConfig
from minillm.model.transformer import Transformer
from minillm.tuning.options import TuningConfig

PROMPTS = [[1, 2, 3], [4, 5, 6], [7, 0, 2], [3, 3, 5]]
N_ANSWERS = 8  # the vocabulary: an answer is one token
BETA = 0.25


def new_model(seed: int = 0, spread: float = 8.0) -> Transformer:
    """A model whose predictions differ from prompt to prompt and, the more by `spread`, are far from uniform."""
    config = ModelConfig(vocab_size=N_ANSWERS, dim=16, n_layers=1, n_heads=2, n_kv_heads=1, ffn_dim=32, max_seq_len=8)
    model = Transformer(config)
    model.init_weights(seed)
    with torch.no_grad():
        model.lm_head.weight.mul_(spread)
    return model


def true_rewards() -> Tensor:
    """(prompts, answers), in [0, 1]."""
    return torch.rand(len(PROMPTS), N_ANSWERS, generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def all_log_probs(model: Transformer) -> Tensor:
    """log π of every answer to every prompt, (prompts, answers) fp64."""
    return torch.log_softmax(model(torch.tensor(PROMPTS))[:, -1].double(), -1)


def check_arrived(model: Transformer, reference: Tensor, rewards: Tensor) -> None:
    """Within 1 % of J*, which is far above where it began. (J* − J is β KL(π ‖ π*): here below 0.02 nats.)"""
    rewards = rewards.double()
    best_log_probs = torch.log_softmax(reference + rewards / BETA, -1)  # π*
    best = BETA * torch.logsumexp(reference + rewards / BETA, -1)  # J* of each prompt
    log_probs = all_log_probs(model)

    def objective(log_probs: Tensor) -> Tensor:
        return (log_probs.exp() * (rewards - BETA * (log_probs - reference))).sum(-1)

    assert torch.allclose(objective(best_log_probs), best)
    reached, start = objective(log_probs).mean(), objective(reference).mean()
    assert start < 0.75 * best.mean()
    assert reached > 0.99 * best.mean()
    distance = (log_probs.exp() * (log_probs - best_log_probs)).sum(-1).mean()
    assert float(best.mean() - reached) == pytest.approx(BETA * float(distance), abs=1e-9)


def adamw(model: torch.nn.Module, lr: float, steps: int):
    """An optimizer, and a rate that falls to 0 in a straight line."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    return optimizer, torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, steps)


def step(optimizer, schedule, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    schedule.step()


def enumerated() -> Batch:
    """Every answer to every prompt, a row each: (prompts × answers, 3)."""
    rows = torch.tensor([[*prompt, answer] for prompt in PROMPTS for answer in range(N_ANSWERS)])
    mask = torch.zeros(len(rows), 3, dtype=torch.bool)
    mask[:, -1] = True
    return Batch(rows[:, :-1], rows[:, 1:], mask)


def test_dpo():
    model, rewards = new_model(), true_rewards()
    reference = all_log_probs(model)

    # how often of a million random pairs of answers i was preferred to j, by P(i ≻ j) = σ(r_i − r_j)
    generator = torch.Generator().manual_seed(0)
    pairs = torch.randint(N_ANSWERS, (len(PROMPTS), 1_000_000, 2), generator=generator)
    first, second = (rewards.gather(1, pairs[..., i]) for i in range(2))
    first_wins = torch.rand(first.shape, generator=generator) < torch.sigmoid(first - second)
    winner = torch.where(first_wins, pairs[..., 0], pairs[..., 1])
    loser = torch.where(first_wins, pairs[..., 1], pairs[..., 0])
    counts = torch.zeros(len(PROMPTS), N_ANSWERS * N_ANSWERS)
    counts.scatter_add_(1, winner * N_ANSWERS + loser, torch.ones(winner.shape))
    shares = (counts / counts.sum()).view(len(PROMPTS), N_ANSWERS, N_ANSWERS)

    def loss_of(log_probs: Tensor) -> Tensor:
        gain = log_probs[:, -1].view(len(PROMPTS), N_ANSWERS) - reference.float()
        return -(shares * F.logsigmoid(BETA * (gain[:, :, None] - gain[:, None, :]))).sum()

    optimizer, schedule = adamw(model, 2e-2, 100)
    batch = enumerated()
    for _ in range(100):
        step(optimizer, schedule, loss_through_log_probs(model, batch, loss_of))
    check_arrived(model, reference, rewards)


def drawn(model: Transformer, number: int, group_size: int):
    """Rollouts of a step, and what each answer is: (its prompt, its token)."""
    config = RolloutConfig(group_size, 1, 1.0, stop_ids=(), pad_id=0, seed=0)
    rollouts = roll_out(model, PROMPTS, range(len(PROMPTS)), number, config)
    answers = torch.tensor([answer for (answer,) in rollouts.answers])
    return rollouts, (rollouts.prompt, answers)


def train_by_ppo(model: Transformer, rewards: Tensor, reference: Tensor, beta: float, n_steps: int, lr: float) -> None:
    value = make_value_model(TuningConfig(), new_model(1), None, seed=0)
    optimizer, schedule = adamw(model, lr, 2 * n_steps)
    value_optimizer, value_schedule = adamw(value, 3 * lr, 2 * n_steps)
    for number in range(n_steps):
        rollouts, chosen = drawn(model, number, group_size=64)
        mask = rollouts.batch.mask
        under_reference = reference[chosen].float()[:, None].expand_as(rollouts.log_probs)
        with torch.no_grad():
            old_values = value(rollouts.batch.x)
        kl = token_rewards.kl_per_token(rollouts.log_probs, under_reference, mask)
        rewards_of_tokens = token_rewards.token_rewards(rewards[chosen], kl, mask, beta)
        advantages = token_rewards.advantages(rewards_of_tokens, old_values, mask)
        returns = advantages + old_values
        advantages = token_rewards.whitened(advantages, mask)

        def loss_of(log_probs: Tensor, old=rollouts.log_probs, advantages=advantages, mask=mask) -> Tensor:
            ratio = (log_probs - old).exp()
            return clipped_loss(ratio, advantages, 0.2, 0.2)[mask].mean()

        for _ in range(2):
            step(optimizer, schedule, loss_through_log_probs(model, rollouts.batch, loss_of))
            loss, _ = value_loss(value(rollouts.batch.x), old_values, returns, mask, 0.2)
            step(value_optimizer, value_schedule, loss / mask.sum())


def test_ppo():
    model, rewards = new_model(), true_rewards()
    reference = all_log_probs(model)
    train_by_ppo(model, rewards, reference, BETA, n_steps=50, lr=2e-2)
    check_arrived(model, reference, rewards)


def train_by_grpo(model: Transformer, rewards: Tensor, reference: Tensor, loss: PolicyLoss) -> None:
    optimizer, schedule = adamw(model, 2e-2, 60)
    for number in range(60):
        rollouts, chosen = drawn(model, number, group_size=64)
        mask = rollouts.batch.mask
        advantages = group_advantages(rewards[chosen].view(len(PROMPTS), -1), loss.kind).flatten()
        under_reference = reference[chosen].float()[:, None].expand_as(rollouts.log_probs)
        experience = Experience(rollouts.batch, advantages, rollouts.log_probs, under_reference)
        total = loss_through_log_probs(model, rollouts.batch, lambda log_probs, e=experience: loss(log_probs, e))
        step(optimizer, schedule, total / loss.count(mask))


def test_grpo_without_the_groups_spread_and_with_the_gradient_of_the_kl():
    model, rewards = new_model(), true_rewards()
    reference = all_log_probs(model)
    train_by_grpo(model, rewards, reference, PolicyLoss("dr_grpo", 0.2, 0.2, 1, beta=BETA, kl="k3_ratio"))
    check_arrived(model, reference, rewards)


def test_grpo_as_published_has_another_optimum():
    """The gradient of k3, without ρ, is that of KL(π_ref ‖ π): at rest r − λ = −β π_ref / π for one λ a prompt."""
    model, rewards = new_model(), true_rewards()
    reference = all_log_probs(model)
    train_by_grpo(model, rewards, reference, PolicyLoss("dr_grpo", 0.2, 0.2, 1, beta=BETA, kl="k3"))
    with pytest.raises(AssertionError):
        check_arrived(model, reference, rewards)

    # π = β π_ref / (λ − r), with λ above every reward, so that π sums to 1: by bisection
    low, high = rewards.double().amax(1, keepdim=True), rewards.double().amax(1, keepdim=True) + 10
    for _ in range(60):
        middle = (low + high) / 2
        total = (BETA * reference.exp() / (middle - rewards)).sum(1, keepdim=True)
        low, high = torch.where(total > 1, middle, low), torch.where(total > 1, high, middle)
    expected = BETA * reference.exp() / (high - rewards)
    assert (all_log_probs(model).exp() - expected).abs().max() < 0.03


def test_ppo_solves_a_bandit_in_a_hundred_steps():
    model = new_model(spread=4.0)  # every answer comes up
    reference = all_log_probs(model)
    rewards = torch.zeros(len(PROMPTS), N_ANSWERS)
    rewards[:, 5] = 1.0
    train_by_ppo(model, rewards, reference, 0.0, n_steps=30, lr=2e-2)
    assert all_log_probs(model)[:, 5].exp().min() > 0.95
