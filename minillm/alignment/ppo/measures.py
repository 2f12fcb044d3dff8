"""What a PPO run measures besides its steps: held-out answers, those of the reference, and whether it goes astray."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from minillm.alignment import judging
from minillm.alignment.alarms import Alarm, distance_alarm
from minillm.alignment.judging import Judge
from minillm.alignment.ppo.options import PpoConfig
from minillm.alignment.replay import Replay
from minillm.alignment.rewards import Rewards
from minillm.base.errors import UserError
from minillm.datasets.prompts import PromptRows
from minillm.evaluation.task_scores import TaskScores
from minillm.training.run import Run

SMALLEST_SPREAD = 1e-6  # of the scores of a reward model that tells anything apart
MANY_CUT = 0.5  # share of answers that never ended from which on it is said


class Tools(NamedTuple):
    """What a run trains with besides its models."""

    prompts: PromptRows
    held_out: PromptRows | None
    judge: Judge  # by the reward that is learned from
    true_reward: Rewards | None  # which is recorded beside it
    replay: Replay  # instructions that are learned beside
    tasks: TaskScores  # benchmarks that are asked now and then


def held_out_reward(training_config: PpoConfig, tools: Tools) -> dict[str, float]:
    """One answer to each held-out prompt, at --temperature: its mean reward, true and learned, and the share that is
    all that was wanted.
    """
    if tools.held_out is None:
        return {}
    positions = np.arange(min(training_config.eval_prompt_rows, tools.held_out.rows_per_epoch))
    prompts = tools.held_out.rows(positions)
    one_each = dataclasses.replace(tools.judge.rollout, group_size=1)
    judged = tools.judge.answers(prompts, positions.tolist(), 0, one_each)
    row = judging.means(judged.sums())
    found = {"heldout_learned": row["reward"], "heldout_kl": row["kl"], "heldout_cut": row["cut_share"]}
    if tools.true_reward is not None:
        true = tools.true_reward(judged.rolled, prompts)
        found |= {"heldout": float(true.mean()), "heldout_best": float((true >= judging.BEST).float().mean())}
    return found


def measure_reference(training_config: PpoConfig, tools: Tools) -> dict[str, float]:
    """Of answers by the reference, which the policy still is: the reward's mean and spread, and J* after scaling."""
    n = min(training_config.reference_prompts, tools.prompts.rows_per_epoch)
    many = dataclasses.replace(tools.judge.rollout, group_size=training_config.reference_answers)
    judged = tools.judge.answers(tools.prompts.rows(np.arange(n)), list(range(n)), 0, many)
    rewards = judged.rewards
    found = {"reward_mean": 0.0, "reward_std": 1.0}
    if training_config.normalize_reward and tools.judge.rewards is not tools.true_reward:
        # values that begin as scores know their zero; a shift of the reward alone would be an error in all of them
        mean = 0.0 if training_config.values_are_scores else float(rewards.mean())
        std = float(rewards.std())
        if std < SMALLEST_SPREAD:
            raise UserError(
                f"--reward_model {training_config.reward_model}: gives all {len(rewards):,} answers of the reference "
                f"the same score, {float(rewards.mean()):g}, so there is nothing to learn from; train it again, or "
                "raise --temperature if the answers are all the same"
            )
        found = {"reward_mean": mean, "reward_std": std}
    if training_config.beta:
        scaled = judged._replace(rewards=(rewards - found["reward_mean"]) / found["reward_std"])
        found["optimum"] = judging.optimum_of(scaled, training_config.reference_answers, training_config.beta)
    return found


def measure_first(training_config: PpoConfig, tools: Tools, measure: Callable[[], dict]) -> dict:
    """What the reference's answers are worth, and then, in the scale that follows from it, what `measure` finds."""
    found = measure_reference(training_config, tools)
    use_scale(tools, found["reward_mean"], found["reward_std"])
    return {**measure(), **found}


def scale_reward(run: Run, tools: Tools, before: dict) -> None:
    """Let the learned reward have the scale that was measured before the first step."""
    if "reward_std" not in before:
        raise UserError(
            f"{run.folder}/before.json: is gone, and with it the scale of the rewards that the run began with; bring "
            "it back, or begin anew in another folder"
        )
    mean, std = before["reward_mean"], before["reward_std"]
    use_scale(tools, mean, std)
    if run.training_config.normalize_reward and tools.judge.rewards is not tools.true_reward:
        scaled = "spread 1" if run.training_config.values_are_scores else "mean 0 and spread 1"
        run.print(f"learned reward of the reference's answers: spread {std:.3f}; scaled to {scaled}")


def use_scale(tools: Tools, mean: float, std: float) -> None:
    """Let the learned reward, if there is one, be (r − mean) / std from here on."""
    if tools.judge.rewards is not tools.true_reward:
        tools.judge.rewards.mean, tools.judge.rewards.std = mean, std


def alarms(training_config: PpoConfig, run: Run) -> tuple[Alarm, Alarm]:
    """What says that a run goes astray: of its KL, and of the share of answers that were cut."""
    remedy = "raise --beta, set a --target_kl, or lower --lr"
    cut = f"did not end within --max_new_tokens {training_config.max_new_tokens}; raise it, or --missing_eos_penalty"
    drift = distance_alarm(run, training_config.kl_warning, remedy)
    return drift, Alarm(run, MANY_CUT, f"{{value:.0%}} of the answers {cut}")
