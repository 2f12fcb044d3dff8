"""Teach a model by rewards: it answers each prompt several times, and learns from which answers were better.

    python train_grpo.py                                   newest checkpoint of out/sft, the bundled world's requests
    python train_grpo.py --data sums.jsonl --reward number --out out/sums
    python train_grpo.py --data mine.jsonl --reward "0.8*mine.py:reward,0.2*length:300" --loss dapo --out out/mine
    torchrun --nproc_per_node 8 train_grpo.py --data gsm8k.jsonl --reward number --init_from Qwen2.5-0.5B-Instruct \\
        --lr 1e-6

Data: rows with a prompt and whatever the reward needs to know of it (an answer, wishes …). A step draws a group of
answers to each of --batch_size prompts, judges them, and moves the policy towards those that beat their group. Run the
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
from minillm.alignment import judging, reference
from minillm.alignment.alarms import Idle, distance_alarm
from minillm.alignment.grpo.advantages import (
    OF_TOKENS,
    SCALED,
    group_advantages,
    has_spread,
    overlong_penalty,
    token_advantages,
)
from minillm.alignment.grpo.options import GroupConfig
from minillm.alignment.judging import Judge, Judged
from minillm.alignment.log_probs import Policy
from minillm.alignment.optimum import objective, share_of_optimum
from minillm.alignment.options import REQUESTS, read_prompts
from minillm.alignment.policy_loss import ClipCounts, Experience, PolicyLoss, Watched
from minillm.alignment.replay import Replay
from minillm.alignment.rewards import Rewards
from minillm.base import bundled_files
from minillm.base.command_line import parse
from minillm.base.options import option
from minillm.checkpoint.train_state import fingerprint
from minillm.datasets.prompts import PromptRows
from minillm.datasets.questions import CHECKS
from minillm.distributed.hosts import once_a_host
from minillm.distributed.lockstep import most_of_ranks
from minillm.distributed.parallelize import gradients_synced, marked_last, parallelize
from minillm.evaluation import answers
from minillm.evaluation.task_scores import TaskScores, tasks_to_ask
from minillm.model.transformer import Transformer
from minillm.tokenizer.tokenizer import Tokenizer
from minillm.training import sharding, starting_model
from minillm.training.config import summary
from minillm.training.optim import optimizers_of
from minillm.training.run import Run, begin, run_training
from minillm.training.step import TrainState

FAR = 50.0  # nats an answer
RESAMPLED = 1 << 40  # data positions from there on, which no run comes to, hold the prompts of --resample
RIGHT_OR_WRONG = (*CHECKS, "check")  # rewards that are 1 for the right answer of a row, and 0 for others


@dataclass(frozen=True)
class Config(GroupConfig):
    data: str = option(REQUESTS, "prompt file(s), separated by commas: .jsonl .json .csv", group="run")
    out: str = option("out/grpo", "the run's folder: checkpoints, metrics.jsonl, curve.png", group="run")
    steps: int = option(
        220, "rollouts of the whole run, each followed by --updates", at_least=1, group="length and batch"
    )
    micro_batch_size: int | None = option(
        2,
        "most prompts whose answers go through one forward pass: few suit a CPU's caches; none: 32",
        at_least=1,
        group="length and batch",
    )
    lr: float | None = option(
        None, "peak learning rate; none: an eighth of what pretraining takes", at_least=0, group="optimizer"
    )
    save_every: int = option(
        50, "rollouts between checkpoints; the last is always saved", at_least=0, group="validation and checkpoints"
    )


def main() -> int:
    training_config, ranks, finish_kernel_check = begin(parse(Config, __doc__))

    # the model to start from, its tokenizer, and the reward
    training_config, start = starting_model.find_start(training_config, ranks, lr_scale=1 / 8)
    tokenizer = start.tokenizer
    if bundled_files.is_used(training_config.data):
        once_a_host(ranks, bundled.build)
    device = sharding.loading_device(training_config, ranks)
    judged_by = (training_config.reward_time_s, device, training_config.template, training_config.room)
    rewards = Rewards(training_config.reward, tokenizer, *judged_by)
    rewards.shard(training_config, ranks)

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
        **(reference.fingerprints(training_config, start) if training_config.beta else {}),
        "reward": rewards.fingerprint,
        **replay.fingerprints,
    }
    what_next = f"python -m minillm chat --model {shlex.quote(training_config.out)}"
    turns = start.turns(prompts.counts["turns"])  # so that `chat` knows how many it may show
    run = Run(training_config, ranks, fingerprints, tokenizer=tokenizer, next_command=what_next, **turns)
    if run.finished:
        return run.print_finished()
    run.print("\n".join([summary(training_config), prompts.summary(), *rewards.remarks()]))
    if held_out_prompts:
        run.print(f"held out: {held_out_prompts.summary()}")

    # the model: resumed, or started from another; and the one that it stays near
    finish_kernel_check()
    model = run.make_model(start.model_config, start.init)
    near = reference.make_reference(training_config, start, model, ranks) if training_config.beta else None
    drawing = training_config.rollout(tokenizer)
    judge = Judge(model, rewards, near, drawing, training_config.rows_at_once, run.autocast)
    loss = training_config.policy_loss()
    tools = Tools(prompts, held_out_prompts, training_config.eval_prompt_rows, judge, loss, replay, tasks)

    # measure, train, measure again
    def measure() -> dict:
        how = dict(template=training_config.template, log=run.print)
        exact = answers.exact_match(model, tokenizer, questions, **how)
        return {"exact": exact, **held_out_reward(tools), **distance_to_optimum(training_config, tools, tokenizer)}

    asked = {"exact": fingerprint(questions), **training_config.asked(held_out_prompts)}
    asked |= dict.fromkeys(("objective", "optimum"), training_config.optimum_of)
    before = run.baseline("before.json", measure, asked)
    status = train(training_config, run, model, tools, before)
    if status == 0:
        conclude(run, before, measure())
    return status


class Tools(NamedTuple):
    """What a run trains with besides its model."""

    prompts: PromptRows
    held_out: PromptRows | None
    n_held_out: int
    judge: Judge
    loss: PolicyLoss
    replay: Replay
    tasks: TaskScores


def train(training_config: Config, run: Run, model: Transformer, tools: Tools, before: dict) -> int:
    """Train to the last step, or to a signal; returns the script's exit status."""
    optimizers = optimizers_of(training_config, model)
    state = run.start(TrainState(model, optimizers, run.ranks, run.dtype))
    policy = parallelize(Policy(model, training_config.compile), run.ranks, compile=False)
    rows_at_once = training_config.rows_at_once
    idle = Idle(run, training_config.no_spread_steps)
    drift = distance_alarm(run, FAR, "lower --lr, or raise --beta")

    for step in run.steps(state):  # sets the learning rate; after the step saves what is due, stops at a signal
        # answers to this step's prompts, judged; of use are groups in which some answers are better than others
        positions = np.concatenate(run.micro_batches(step))
        judged = ask(tools, positions, step)
        rows, is_useful = experience(training_config, run, judged)
        parts, n_useful = rows.split(rows_at_once), is_useful.sum()
        for _ in range(training_config.resample):  # other prompts in place of those that are not
            positions = positions[~is_useful] + RESAMPLED
            if not most_of_ranks(model, len(positions)):
                break
            rows, is_useful = experience(training_config, run, ask(tools, positions, step))
            parts, n_useful = parts + rows.split(rows_at_once), n_useful + is_useful.sum()

        # learn from them: the first pass over them notes log π_old, with which later ones have a ratio
        n = sum(tools.loss.count(part.batch.mask) for part in parts)  # answers or tokens
        n, n_useful = run.ranks.sum(n, n_useful)
        # a rank without any makes a pass that teaches nothing, since the others wait for its gradient; over shards it
        # makes as many passes as any other
        n_passes = most_of_ranks(model, max(1, len(parts)))
        parts += [judged.experience(judged.rewards).silent()] * (n_passes - len(parts))
        clip_counts = []
        instructions = tools.replay.batch(step, run)
        for _ in range(training_config.updates if n else 0):
            tools.replay.learn(run, policy, state, instructions, n)
            watched = [Watched(tools.loss, part) for part in parts]
            for rows, last in marked_last(watched):
                with gradients_synced(policy, last), run.autocast():
                    loss = policy(rows.experience.batch, rows, training_config.temperature)
                state.backward(loss, n)  # of the mean over all of the step, of all micro-batches and ranks
            state.update(training_config.grad_clip)
            parts = [rows.experience for rows in watched]
            clip_counts += [rows.clip_counts for rows in watched]
        if not n:
            state.skip()
        row = log_rollout(training_config, run, state, judged, clip_counts, before)
        drift.look_at(row.get("kl", 0.0))
        is_cut = training_config.overlong == "mask" and row["cut_share"] == 1
        idle.count(n_useful if n else 0, Idle.CUT if is_cut or n_useful else Idle.EQUAL)
        if tools.held_out and training_config.eval_every and run.due(step, training_config.eval_every):
            run.report(step, lambda: held_out_reward(tools), of="held-out prompts")
        tools.tasks.watch(run, model, step)
    return run.status


def experience(training_config: Config, run: Run, judged: Judged) -> tuple[Experience, np.ndarray]:
    """What there is to learn from answers, by their advantages, and in which groups some are better, (P,) bool.

    Groups whose answers all have the same advantage are left out, since they teach nothing. With --kl_place reward the
    KL penalty is part of the reward, and hardly any group is left out: where all answers are equally good, the penalty
    still moves the policy towards the reference.
    """
    group_size = training_config.group_size
    batch = judged.rolled.batch
    rewards = judged.rewards  # (N,)

    # answers that were cut: they may cost something, or not be learned from
    if training_config.overlong == "penalty":
        most, cushion = training_config.max_new_tokens, training_config.overlong_cushion
        rewards = rewards + overlong_penalty(judged.lengths(), most, cushion)
    if training_config.overlong == "mask":
        batch = batch._replace(mask=batch.mask & judged.rolled.ended[:, None])
    groups = rewards.view(-1, group_size)  # (P, G)

    # each token has an advantage of its own
    if training_config.loss in OF_TOKENS:
        if training_config.loss == "reinforce_baseline":
            rewards = (groups - groups.mean(1, keepdim=True)).flatten()
        kl = torch.zeros_like(judged.rolled.log_probs) if judged.kl is None else judged.kl
        price = training_config.beta if training_config.kl_place == "reward" else 0.0
        advantages = token_advantages(rewards, kl, batch.mask, price, run.ranks)  # (N, T)
        baseline_of_batch = training_config.loss == "reinforce"  # then answers to other prompts are compared, too
        is_useful = has_spread(groups.view(1, -1)).expand(len(groups)) if baseline_of_batch else has_spread(groups)
        return judged.experience(advantages, batch), is_useful.cpu().numpy()

    # or each answer, among its group
    priced = groups
    if training_config.kl_place == "reward" and judged.kl is not None:
        priced = (rewards - training_config.beta * judged.kl.sum(1)).view(-1, group_size)
    advantages = group_advantages(priced, training_config.loss, scale_by=groups)  # (P, G)
    learned = has_spread(groups if training_config.loss in SCALED else priced)  # (P,)
    rows = learned.repeat_interleave(group_size)  # (N,)
    return judged.experience(advantages.flatten(), batch).rows(rows), has_spread(groups).cpu().numpy()


def ask(tools: Tools, positions: np.ndarray, step: int) -> Judged:
    """The policy's answers to the prompts at these data positions, judged.

    Where passes need all ranks, each answers as many prompts as any other: repeated ones, which are left out again.
    """
    n_asked = most_of_ranks(tools.judge.model, len(positions))
    asked = np.resize(positions, n_asked)  # without any: position 0
    judged = tools.judge.answers(tools.prompts.rows(asked), asked.tolist(), step)
    return judged.first(len(positions) * tools.judge.rollout.group_size)


def log_rollout(
    training_config: Config, run: Run, state: TrainState, judged: Judged, clip_counts: list[ClipCounts], before: dict
) -> dict[str, float]:
    """Log a step: how good the answers were, how far from the reference, what the clip held back. Returns its row."""
    sums = judged.step_sums(training_config.group_size)
    sums |= {"updated_tokens": float(sum(s.n_tokens for s in clip_counts))}
    sums |= {"clipped": float(sum(s.clipped_low + s.clipped_high for s in clip_counts))}
    sums = dict(zip(sums, run.ranks.sum(*sums.values()), strict=True))
    run.log_step(state, sums["read"] / run.ranks.row_ranks)

    row = judging.means(sums)
    row["objective"] = objective(row["reward"], row["kl"], training_config.beta)
    row["optimum"] = before.get("optimum")
    if judged.kl is None:  # without a reference nothing is known of it
        del row["kl"]
    row["clip_share"] = sums["clipped"] / max(1.0, sums["updated_tokens"])
    row["zero_std_share"] = sums["no_spread"] / sums["groups"]
    run.record(run.step, **row)
    judging.print_row(run, row, ("reward", "best_share", "kl", "entropy", "length", "zero_std_share", "cut_share"))
    return row


def held_out_reward(tools: Tools) -> dict[str, float]:
    """Mean reward of one answer to each held-out prompt, at --temperature, and the share that is all right."""
    if tools.held_out is None:
        return {}
    positions = np.arange(min(tools.n_held_out, tools.held_out.rows_per_epoch))
    one_each = dataclasses.replace(tools.judge.rollout, group_size=1)
    row = judging.means(tools.judge.answers(tools.held_out.rows(positions), positions.tolist(), 0, one_each).sums())
    return {"heldout": row["reward"], "heldout_best": row["best_share"]}


def distance_to_optimum(training_config: Config, tools: Tools, tokenizer: Tokenizer) -> dict[str, float]:
    """E[r] − β KL on the first training prompts, and J*, the most that any policy has there.

    J* is estimated from answers, and where the reward is whether an answer is right, by the probability of that.
    """
    n = min(training_config.optimum_prompts, tools.prompts.rows_per_epoch)
    if not n or not training_config.beta:
        return {}
    many = dataclasses.replace(tools.judge.rollout, group_size=training_config.optimum_answers)
    prompts = tools.prompts.rows(np.arange(n))
    judged = tools.judge.answers(prompts, list(range(n)), 0, many)
    row = judging.means(judged.sums())
    at_least = None
    if training_config.reward in RIGHT_OR_WRONG:
        template, beta = training_config.template, training_config.beta
        at_least = judging.optimum_by_answers(tools.judge, prompts, tokenizer, template, beta)
    best = judging.optimum_of(judged, training_config.optimum_answers, training_config.beta, at_least)
    return {"objective": objective(row["reward"], row["kl"], training_config.beta), "optimum": best}


def shown(scores: dict, name: str, form: str) -> str:
    """A score, as a text; "not measured" where there is none."""
    return format(scores[name], form) if name in scores else "not measured"


def conclude(run: Run, before: dict, after: dict) -> None:
    """Print the result: held-out reward, distance to the optimum and exact answers, before and after.

    before: {} if what was measured when the run began is lost.
    """
    row = {f"{name}_before": before[name] for name in ("heldout", "heldout_best", "objective") if name in before}
    row |= {f"{name}_after": after[name] for name in ("heldout", "heldout_best") if name in after}
    if "objective" in after:  # both estimates of the optimum are too low, if anything
        row |= {"objective": after["objective"], "optimum": max(before.get("optimum", -math.inf), after["optimum"])}
    run.record(run.training_config.steps, **row)
    if "heldout" in after:
        run.print("held-out prompts, one answer each at --temperature, before → after:")
        run.print(f"  reward           {shown(before, 'heldout', 'z.3f')} → {after['heldout']:z.3f}")
        run.print(f"  all as wanted    {shown(before, 'heldout_best', '6.1%')} → {after['heldout_best']:6.1%}")
    if "optimum" in row:
        run.print(f"E[r] − β KL on training prompts, of which {row['optimum']:z.3f} is the most that any policy has:")
        line = f"  {shown(before, 'objective', 'z.3f')} → {after['objective']:z.3f}"
        if "objective" in before:
            beta = run.training_config.beta
            line += f"   ({share_of_optimum(before['objective'], after['objective'], row['optimum'], beta)})"
        run.print(line)
    for line in answers.exact_lines(before.get("exact", {}), after["exact"]):
        run.print(line)
    run.print_result()


if __name__ == "__main__":
    sys.exit(run_training(main))
