"""Lesson 13: four ways to learn from rewards, each against the best that any policy can do.

    python docs/course/policy.py

There are 64 answers to one question, so the policy is a table, and its optimum is known exactly.
"""

import lesson
import torch
from torch import Tensor

from minillm.alignment.grpo.advantages import group_advantages
from minillm.alignment.policy_loss import Experience, PolicyLoss
from minillm.datasets import Batch

N_ANSWERS = 64
BETA = 0.2  # the price of a nat between the policy and its reference
GROUP = 32  # answers that are drawn in a step

# name → what makes advantages of the rewards, and how many updates are made of the same answers
METHODS = {
    "REINFORCE, no baseline": ("none", 1),
    "rewards less their mean": ("dr_grpo", 1),
    "GRPO": ("grpo", 1),
    "PPO's clip, 4 updates": ("grpo", 4),
}


def question(seed: int = 0) -> tuple[Tensor, Tensor]:
    """What the reference gives each answer, log π_ref, and what each is worth, r in [0, 1]: (A,) each."""
    generator = torch.Generator().manual_seed(seed)
    log_ref = torch.randn(N_ANSWERS, generator=generator).mul(1.5).log_softmax(0)
    return log_ref, torch.rand(N_ANSWERS, generator=generator)


def objective(log_p: Tensor, log_ref: Tensor, rewards: Tensor) -> float:
    """J = E[r] − β KL(π ‖ π_ref), exact: a sum over all answers."""
    return float((log_p.exp() * (rewards - BETA * (log_p - log_ref))).sum())


def optimum(log_ref: Tensor, rewards: Tensor) -> float:
    """J* = β log E_ref[e^{r/β}]."""
    return float(BETA * torch.logsumexp(log_ref + rewards / BETA, 0))


def advantages_of(earned: Tensor, kind: str) -> Tensor:
    """How much better than expected each answer of the group was: (G,) from (G,)."""
    if kind == "none":
        return earned  # every answer is "better than 0"
    return group_advantages(earned[None], kind)[0]


def train(kind: str, n_updates: int, n_steps: int, log_ref: Tensor, rewards: Tensor, seed: int) -> list[float]:
    """J after each step. kind, n_updates: of `METHODS`."""
    logits = log_ref.clone().requires_grad_()  # the policy begins as the reference
    optimizer = torch.optim.Adam([logits], lr=0.03)
    policy_loss = PolicyLoss("grpo", clip_low=0.2, clip_high=0.2, max_new_tokens=1)
    generator = torch.Generator().manual_seed(seed)
    reached = []
    for _ in range(n_steps):
        # draw a group of answers, and see what each earns: its reward, less the price of the distance
        old = logits.detach().log_softmax(0)  # (A,)
        drawn = torch.multinomial(old.exp(), GROUP, replacement=True, generator=generator)  # (G,)
        earned = (rewards - BETA * (old - log_ref))[drawn]  # (G,)

        # an answer is a row of one token; all that the loss knows of it is its advantage and its probability then
        mask = torch.ones(GROUP, 1, dtype=torch.bool)
        batch = Batch(drawn[:, None], drawn[:, None], mask)
        before = old[drawn][:, None]  # (G, 1)
        experience = Experience(batch, advantages_of(earned, kind), sampler=before, old=before)
        for _ in range(n_updates):
            optimizer.zero_grad()
            log_p = logits.log_softmax(0)[drawn][:, None]  # (G, 1)
            (policy_loss(log_p, experience) / policy_loss.count(mask)).backward()
            optimizer.step()
        reached.append(objective(logits.detach().log_softmax(0), log_ref, rewards))
    return reached


def main() -> None:
    chosen = lesson.options(__doc__, with_corpus=False)
    n_steps, n_seeds = (40, 1) if chosen.quick else (400, 5)
    log_ref, rewards = question()
    start, best = objective(log_ref, log_ref, rewards), optimum(log_ref, rewards)
    print(f"J of the reference {start:.3f}, J* {best:.3f}, the highest reward {rewards.max():.3f}")

    # how much of the way from the reference to the optimum each method goes
    print(f"{'':26} {'after a tenth':>14} {'half':>8} {'all steps':>10}")
    for name, (kind, n_updates) in METHODS.items():
        runs = [train(kind, n_updates, n_steps, log_ref, rewards, seed) for seed in range(n_seeds)]
        of_way = (torch.tensor(runs).mean(0) - start) / (best - start)  # (steps,)
        tenth, half, end = (float(of_way[n_steps * share // 10 - 1]) for share in (1, 5, 10))
        print(f"{name:26} {tenth:14.1%} {half:8.1%} {end:10.1%}")


if __name__ == "__main__":
    lesson.run(main)
