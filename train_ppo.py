"""Let a model learn from rewards by proximal policy optimisation (PPO): policy, reference, reward and value model.

    python train_ppo.py                                    newest checkpoint of out/sft, reward model of out/reward
    python train_ppo.py --tune lora --out out/ppo-lora     all four over one base, in the memory of one model
    python train_ppo.py --reward_model none --out out/ppo-true      learn from the world's true reward instead
    torchrun --nproc_per_node 8 train_ppo.py --data my.jsonl --init_from out/my-sft --reward_model out/my-reward

Data: rows with a prompt, and what a reward function may need to know of it. Each step samples answers, has them judged,
and moves the policy towards those that turned out better than the value model expected. See docs/en/ppo.md. Run the
same command again to go on where it stopped.
"""

import dataclasses
import math
import shlex
import signal
import sys
from dataclasses import dataclass
from typing import NamedTuple

if __name__ == "__main__":  # while the imports below take their time, Ctrl-C ends the process without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import numpy as np
import torch

from data import bundled
from minillm.alignment import judging, reference, token_rewards
from minillm.alignment.judging import Judge, Judged
from minillm.alignment.log_probs import Policy
from minillm.alignment.optimum import objective
from minillm.alignment.options import REQUESTS, read_prompts
from minillm.alignment.ppo.measures import Tools, alarms, held_out_reward, measure_first, scale_reward
from minillm.alignment.ppo.options import PpoConfig
from minillm.alignment.ppo.roles import Roles, cast_roles, reward_fingerprint
from minillm.alignment.ppo.updates import ClippedLoss, Experience, UpdateStats, minibatches
from minillm.alignment.replay import Replay
from minillm.alignment.reward_model import load_reward_model
from minillm.alignment.rewards import LearnedReward, Rewards
from minillm.alignment.value import start_in_unit, value_loss
from minillm.base import bundled_files
from minillm.base.command_line import parse
from minillm.base.options import option
from minillm.checkpoint.train_state import fingerprint
from minillm.datasets.prompts import Prompt
from minillm.distributed.hosts import once_a_host
from minillm.distributed.parallelize import gradients_synced, marked_last, parallelize
from minillm.distributed.ranks import Ranks
from minillm.evaluation import answers
from minillm.evaluation.task_scores import tasks_to_ask
from minillm.model.transformer import Transformer
from minillm.tokenizer.tokenizer import Tokenizer
from minillm.training import sharding, starting_model
from minillm.training.config import summary
from minillm.training.optim import build_optimizers
from minillm.training.run import Run, begin, run_training
from minillm.training.schedule import Schedule, lr_at, set_lr
from minillm.training.step import TrainState

ADAM_EPS = 1e-5  # as in the code of Schulman et al. 2017 (Huang et al. 2022, "37 details", number 3)


@dataclass(frozen=True)
class Config(PpoConfig):
    data: str = option(
        REQUESTS,
        "prompt file(s), separated by commas: .jsonl .json .csv",
        group="run",
    )
    out: str = option("out/ppo", "the run's folder: checkpoints, metrics.jsonl, curve.png", group="run")
    steps: int = option(150, "rollouts of --batch_size prompts each", at_least=1, group="length and batch")
    lr: float | None = option(
        None,
        "peak learning rate of the policy; none: 3/40 of what pretraining takes, 1/10 of what suits the adapter",
        at_least=0,
        group="optimizer",
    )
    schedule: str = option("wsd", "shape of the learning rate", ("cosine", "wsd", "constant"), group="optimizer")
    decay_share: float = option(
        1.0,
        "share of all steps in which wsd decays",
        at_least=0,
        at_most=1,
        only_with=("schedule", ("wsd",)),
        group="optimizer",
    )


def main() -> int:
    training_config, ranks, finish_kernel_check = begin(parse(Config, __doc__))

    # the model to start from, and its tokenizer
    given_lr = training_config.lr
    training_config, start = starting_model.find_start(training_config, ranks, lr_scale=3 / 40)
    training_config = with_rates(training_config, given_lr)
    tokenizer = start.tokenizer
    if bundled_files.is_used(training_config.data):
        once_a_host(ranks, bundled.build)

    # what answers are worth: as a model has learned it, and in truth
    reward_model, true_reward = read_rewards(training_config, ranks, tokenizer)

    # prompts to learn from, held-out prompts, and held-out questions of all kinds
    prompts = read_prompts(training_config, training_config.data, tokenizer)
    held_out = training_config.held_out_prompts
    always_the_same = dataclasses.replace(training_config, seed=0)  # which of them are asked, whatever --seed
    held_out_prompts = read_prompts(always_the_same, held_out, tokenizer) if held_out else None
    questions = training_config.held_out_questions()
    replay = Replay(training_config, tokenizer, prompts.families)
    tasks = tasks_to_ask(training_config, tokenizer, start.model_config, ranks)

    # the run: its folder, and the checkpoint to go on from
    fingerprints = {
        **start.fingerprints(training_config, prompts, training_config.group_size),
        **reference.fingerprints(training_config, start),
        "reward": reward_fingerprint(training_config),
        **replay.fingerprints,
    }
    what_next = f"python -m minillm chat --model {shlex.quote(training_config.out)}"
    turns = start.turns(prompts.counts["turns"])  # so that `chat` knows how many it may show
    run = Run(training_config, ranks, fingerprints, tokenizer=tokenizer, next_command=what_next, **turns)
    if run.finished:
        return run.print_finished()
    run.print(f"{summary(training_config)}\n{prompts.summary()}")
    if held_out_prompts:
        run.print(f"held out: {held_out_prompts.summary()}")

    # the four models, and those who judge the policy's answers
    finish_kernel_check()
    policy = run.make_model(start.model_config, start.init)
    roles = cast_roles(training_config, start, policy, reward_model, ranks)
    run.print(roles.describe())
    reward = true_reward
    if reward_model is not None:  # whose scale is measured below
        folder, rows_at_once = training_config.reward_model, training_config.rows_at_once
        reward = LearnedReward(reward_model, folder, rows_at_once=rows_at_once)
    drawing = training_config.rollout(tokenizer)
    judge = Judge(policy, reward, roles.reference, drawing, training_config.rows_at_once, run.autocast)
    tools = Tools(prompts, held_out_prompts, judge, true_reward, replay, tasks)

    # measure, train, measure again
    def measure() -> dict:
        how = dict(template=training_config.template, log=run.print)
        exact = answers.exact_match(policy, tokenizer, questions, **how)
        return {"exact": exact, **held_out_reward(training_config, tools)}

    asked = {"exact": fingerprint(questions), **training_config.asked(held_out_prompts)}
    asked |= {"optimum": fingerprint(training_config.beta, training_config.drawing)}
    before = run.baseline("before.json", lambda: measure_first(training_config, tools, measure), asked)
    scale_reward(run, tools, before)
    status = train(training_config, run, roles, tools, before.get("optimum"))
    if status == 0:
        conclude(run, before, measure())
    return status


def read_rewards(
    training_config: Config, ranks: Ranks, tokenizer: Tokenizer
) -> tuple[Transformer | None, Rewards | None]:
    """The reward model, still whole, and the true reward; None for what there is not."""
    device = sharding.loading_device(training_config, ranks)
    reward_model = None
    if training_config.reward_model is not None:
        how = dict(template=training_config.template, merged=training_config.tune == "full")
        how |= dict(tokenizer=tokenizer, longest=training_config.room)
        reward_model = load_reward_model(training_config.reward_model, device, **how)
    true_reward = None
    if training_config.true_reward is not None:
        judged_by = (training_config.reward_time_s, device, training_config.template, training_config.room)
        true_reward = Rewards(training_config.true_reward, tokenizer, *judged_by)
        true_reward.shard(training_config, ranks)
    return reward_model, true_reward


def with_rates(training_config: Config, given_lr: float | None) -> Config:
    """The options with both learning rates filled in. given_lr: --lr as it was given."""
    lr = training_config.lr
    if given_lr is None and training_config.tune not in ("full", "freeze"):
        lr /= 10
    value_lr = 3 * lr if training_config.value_lr is None else training_config.value_lr
    return dataclasses.replace(training_config, lr=lr, value_lr=value_lr)


def train(training_config: Config, run: Run, roles: Roles, tools: Tools, optimum: float | None) -> int:
    """Train to the last step, or to a signal; returns the script's exit status."""
    # optimizers of policy and value model, their state if the run goes on, and both models on all ranks
    if training_config.values_are_scores:  # in the unit of the rewards; a run that goes on reads them anew
        start_in_unit(roles.value, tools.judge.rewards.std)
    value_optimizers = optimizers_of(training_config, roles.value, training_config.value_lr)
    value_state = TrainState(roles.value, value_optimizers, run.ranks, run.dtype)
    optimizers = optimizers_of(training_config, roles.policy, training_config.lr)
    state = run.start(TrainState(roles.policy, optimizers, run.ranks, run.dtype, {"value": value_state}))
    policy = parallelize(Policy(roles.policy, training_config.compile), run.ranks, False)
    value = parallelize(roles.value, run.ranks, training_config.compile)
    learners = Learners(state, value_state, policy, value)
    beta = training_config.beta  # which, without a target, is what the option says now
    if training_config.target_kl is not None:
        beta = run.saved.get("beta", beta)
    controller = token_rewards.AdaptiveKL(beta, training_config.target_kl, training_config.kl_horizon)
    drift, cuts = alarms(training_config, run)

    value_schedule = dataclasses.replace(Schedule.of(training_config), lr=training_config.value_lr)
    for step in run.steps(state):  # sets the learning rate; after the step saves what is due, stops at a signal
        set_lr(value_state.optimizers, lr_at(step - 1, value_schedule))

        # 1. and 2. the policy answers, at the temperature of its losses and from the whole vocabulary, and is judged
        positions = np.concatenate(run.micro_batches(step))
        prompts = tools.prompts.rows(positions)
        judged = tools.judge.answers(prompts, positions.tolist(), step)

        # 3. and 4. from a reward an answer, and its distance from the reference, to an advantage a token
        experience = look_back(training_config, run, roles, judged, controller.beta)

        # 5. some passes over them, as long as the policy stays near the one that gave the answers
        stats = UpdateStats()
        for last_of_pass, rows in minibatches(training_config, run.ranks, step):
            improve(training_config, run, learners, experience.rows(rows), stats, tools.replay)
            if last_of_pass and stats.moved > (training_config.stop_at_kl or math.inf):
                break

        # 6. the price of the distance follows its target
        row = log_rollout(run, state, judged, tools, prompts, stats)
        row |= {"objective": objective(row["reward"], row["kl"], controller.beta), "beta": controller.beta}
        row |= {"optimum": optimum, "explained_variance": experience.explained_variance(run.ranks)}
        run.record(step, **row)
        run.facts["beta"] = controller.update(row["kl"], training_config.batch_size * training_config.group_size)
        drift.look_at(row["kl"])
        cuts.look_at(row["cut_share"])
        if tools.held_out and training_config.eval_every and run.due(step, training_config.eval_every):
            run.report(step, lambda: held_out_reward(training_config, tools), of="held-out prompts")
        tools.tasks.watch(run, roles.policy, step)
    return run.status


class Learners(NamedTuple):
    """Policy and value model in training: their states, and what to call in a loss."""

    policy_state: TrainState
    value_state: TrainState
    policy: torch.nn.Module
    value: torch.nn.Module


def optimizers_of(training_config: Config, model: Transformer, lr: float) -> list[torch.optim.Optimizer]:
    """The optimizers of policy or value model, with a larger ε than elsewhere in AdamW."""
    decay = training_config.weight_decay
    optimizers = build_optimizers(model, training_config.optimizer, lr=lr, weight_decay=decay)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            if "eps" in group:
                group["eps"] = ADAM_EPS
    return optimizers


def look_back(training_config: Config, run: Run, roles: Roles, judged: Judged, beta: float) -> Experience:
    """What answers teach: by the models as they were when these were drawn, and by their rewards."""
    batch = judged.rolled.batch
    mask = batch.mask

    # log π_old, by a pass as in training, and V_old
    log_probs, kl, values = judged.log_probs, judged.kl, []
    with torch.no_grad(), run.autocast():
        for part in batch.split(training_config.rows_at_once):
            values.append(roles.value(part.x))
    values = torch.cat(values)  # (N, T)

    # r_t = −β k_t, and the score at the last token, of which an answer that never ended has less
    missing, penalty = training_config.missing_eos, training_config.missing_eos_penalty
    rewards = token_rewards.lowered_if_cut(judged.rewards, judged.rolled.ended, missing, penalty)
    rewards_of_tokens = token_rewards.token_rewards(rewards, kl, mask, beta)

    # A_t by generalised advantage estimation, and R_t = A_t + V_t, which the value model learns
    gamma, lam = training_config.gamma, training_config.lam
    advantages = token_rewards.advantages(rewards_of_tokens, values, mask, gamma, lam)
    returns = advantages + values

    # A whitened over all tokens of all ranks, so that the size of a step does not depend on the scale of the reward
    moments = run.ranks.sum_of_rows(*token_rewards.moments_of(advantages, mask).tolist())
    advantages = token_rewards.whitened(advantages, mask, torch.tensor(moments, dtype=torch.float64))
    return Experience(batch, log_probs, values, advantages, returns)


def improve(
    training_config: Config, run: Run, learners: Learners, experience: Experience, stats: UpdateStats, replay: Replay
) -> None:
    """One update of policy and value model, by the mean over the tokens of all ranks' rows."""
    (n_tokens,) = run.ranks.sum(float(experience.batch.mask.sum()))
    replay.learn(run, learners.policy, learners.policy_state, replay.batch(run.step, run), n_tokens)
    parts = experience.split(training_config.rows_at_once)
    for part, last in marked_last(parts):
        mask = part.batch.mask

        # the policy: log π again, and by it the clipped loss
        with gradients_synced(learners.policy, last):
            with run.autocast():
                loss_of = ClippedLoss(part, training_config.clip, stats)
                loss = learners.policy(part.batch, loss_of, training_config.temperature)
            learners.policy_state.backward(loss, n_tokens)

        # the value model: V again, near what it was; no weight c_v, since it has its own optimizer and clipping
        with gradients_synced(learners.value, last):
            with run.autocast():
                values = learners.value(part.batch.x)  # (n, T)
            loss, n_clipped = value_loss(values, part.values, part.returns, mask, training_config.value_clip)
            learners.value_state.backward(loss, n_tokens)
        stats.note(value_loss=loss.detach(), value_clipped=n_clipped)

    learners.policy_state.update(training_config.grad_clip)
    learners.value_state.update(training_config.grad_clip)
    stats.end_update(run.ranks, n_tokens)


def log_rollout(
    run: Run, state: TrainState, judged: Judged, tools: Tools, prompts: list[Prompt], stats: UpdateStats
) -> dict[str, float]:
    """Log the step; returns what to record of it: means over the answers of all ranks."""
    group_size = run.training_config.group_size
    sums = judged.step_sums(group_size)
    if tools.true_reward is not None:
        is_learned = tools.judge.rewards is not tools.true_reward
        true = tools.true_reward(judged.rolled, prompts) if is_learned else judged.rewards
        sums["true_reward"] = float(true.sum())
    sums = dict(zip(sums, run.ranks.sum(*sums.values()), strict=True))
    run.log_step(state, sums["read"] / run.ranks.row_ranks)
    row = judging.means(sums) | stats.shares()
    if group_size > 1:
        row["zero_std_share"] = sums["no_spread"] / sums["groups"]
    if "true_reward" in sums:
        row["true_reward"] = sums["true_reward"] / sums["answers"]
    judging.print_row(run, row, ("reward", "true_reward", "kl", "entropy", "length", "cut_share", "clip_share"))
    return row


def conclude(run: Run, before: dict, after: dict) -> None:
    """Print the result: held-out rewards and exact answers, before and after."""
    names = {"heldout_best": "all as wanted", "heldout": "true reward", "heldout_learned": "reward learned from"}
    row = {
        f"{name}_{when}": scores[name]
        for name in names
        for when, scores in (("before", before), ("after", after))
        if name in scores
    }
    run.record(run.training_config.steps, **row)
    if "heldout_learned" in after:
        run.print("held-out prompts, one answer each at --temperature, before → after:")
        for name, words in names.items():
            if name in after and name in before:
                run.print(f"  {words:<20} {before[name]:z.3f} → {after[name]:z.3f}")
        run.print(f"  KL an answer         {after['heldout_kl']:z.2f} nats")
    for line in answers.exact_lines(before.get("exact", {}), after["exact"]):
        run.print(line)
    run.print_result()


if __name__ == "__main__":
    sys.exit(run_training(main))
