"""What a policy can do with texts that it has never been trained on: before, while and after it is trained."""

import math
from pathlib import Path

import numpy as np
import torch

from minillm.alignment.log_probs import answer_log_probs
from minillm.alignment.options import AlignmentConfig
from minillm.alignment.rollouts import RolloutConfig, roll_out
from minillm.base import bundled_files
from minillm.checkpoint.train_state import fingerprint
from minillm.datasets.preferences import PreferenceRows
from minillm.datasets.prompts import Prompt, PromptRows
from minillm.distributed.ranks import Ranks
from minillm.evaluation import answers
from minillm.evaluation.checks import RewardFunction
from minillm.model.transformer import Transformer
from minillm.tokenizer.tokenizer import Tokenizer
from minillm.training.run import Run
from minillm.tuning.adapter import merged

N_REQUESTS = 400  # requests that are answered at temperature 1
LONGEST_STORY = 128  # tokens of an answer to one, which takes half a row at most
ANY_LENGTH = 1 << 30  # tokens
ALL_WISHES = 1 - 1e-6  # the reward of an answer that fulfils all of them
FALL = 1.0  # nats by which the chosen answers may become less likely before it is said
NEWEST = 0.1  # share of the newest step in that mean


class HeldOut:
    """Held-out preferences, instructions and, of the bundled world, requests whose fulfilment is checked."""

    def __init__(
        self,
        training_config: AlignmentConfig,
        tokenizer: Tokenizer,
        pairs: PreferenceRows | None,
        true_reward: RewardFunction,
    ):
        """pairs: None where there are none; they may be single answers with labels. true_reward: of the requests."""
        self.training_config, self.tokenizer, self.pairs = training_config, tokenizer, pairs
        self.true_reward = true_reward
        self.u_chosen: float | None = None  # of training pairs, a running mean over about 1 / NEWEST steps
        self.warned = False
        self.questions = training_config.held_out_questions()

        # the requests that fit into a row together with their answers
        self.longest_story = max(1, min(LONGEST_STORY, training_config.room // 2))
        longest_request = training_config.room - self.longest_story
        all_requests = self._read_requests()
        self.requests = [prompt for prompt in all_requests if len(prompt.ids) <= longest_request]
        self.n_too_long = len(all_requests) - len(self.requests)

    def _read_requests(self) -> list[Prompt]:
        """The first held-out requests of the bundled world; none with other data."""
        path = Path(bundled_files.FOLDER) / "requests_heldout.jsonl"
        if not bundled_files.is_used(self.training_config.data) or not path.exists():
            return []
        rows = PromptRows(path, self.tokenizer, ANY_LENGTH, template=self.training_config.template)
        return rows.rows(np.arange(min(N_REQUESTS, rows.rows_per_epoch)))

    def summary(self) -> list[str]:
        """What is held out, and what of it is not asked, in lines."""
        lines = []
        if self.pairs is not None:
            lines.append(f"held out: {self.pairs.summary()}")
        if self.n_too_long:
            seq_len, n_requests = self.training_config.seq_len, self.n_too_long + len(self.requests)
            lines.append(
                f"held-out requests: {self.n_too_long:,} of {n_requests:,} skipped, since with an answer of "
                f"{self.longest_story} tokens they are longer than --seq_len {seq_len}"
            )
        return lines

    @property
    def asked(self) -> dict[str, str]:
        """Of what `examine` finds by asking a fingerprint of what it asks, as `Run.once` takes it."""
        requests = [prompt.ids for prompt in self.requests]
        return {"exact": fingerprint(self.questions), "requests": fingerprint(requests, self.longest_story)}

    # ---- before and after

    @torch.no_grad()
    def examine(self, model: Transformer, run: Run) -> dict:
        """All that can be said of a model, as values for JSON; one process does it.

        "exact": family → (exact greedy answers, questions). "requests": (fulfilled at temperature 1, requests).
        "sums": s of each answer of the held-out preferences; "pairs": their fingerprint.
        """
        found = {"exact": {}, "requests": [0, 0], "sums": [], "pairs": None}
        template = self.training_config.template
        with merged(model):
            how = dict(template=template, log=run.print)
            found["exact"] = answers.exact_match(model, self.tokenizer, self.questions, **how)
            if self.requests:
                found["requests"] = [self._fulfilled(model), len(self.requests)]
        if self.pairs is not None:
            found["sums"] = self._sums(model, run, Ranks(0, 1, run.device)).tolist()
            found["pairs"] = self.pairs.answers_fingerprint
        return found

    def recall(self, run: Run, before: dict) -> dict:
        """What `examine` found when the run began, less what is of other pairs than now.

        before: what `Run.once` gives of it, {} if it is lost.
        """
        if self.pairs is None or before.get("pairs") == self.pairs.answers_fingerprint:
            return before
        run.print("--eval_pairs: these were not looked at when the run began, so how they have moved is not known")
        return {name: value for name, value in before.items() if name != "sums"}

    def _fulfilled(self, model: Transformer) -> int:
        """How many requests the model fulfils in every wish, answering each once at temperature 1."""
        rollout = RolloutConfig(
            group_size=1,
            max_new_tokens=self.longest_story,
            temperature=1.0,
            stop_ids=tuple(self.tokenizer.stop_ids(self.training_config.template)),
            pad_id=self.tokenizer.pad_id,
            seed=self.training_config.seed,
        )
        prompts = [prompt.ids for prompt in self.requests]
        rolled = roll_out(model, prompts, [prompt.number for prompt in self.requests], 0, rollout)
        texts = [self.tokenizer.decode(tokens) for tokens in rolled.answers]
        questions = [prompt.text for prompt in self.requests]
        rewards = self.true_reward(questions, texts, [prompt.row for prompt in self.requests])
        return sum(value >= ALL_WISHES for value in rewards)

    def _sums(self, model: Transformer, run: Run, ranks: Ranks) -> np.ndarray:
        """s of the answers that are this rank's share among `ranks`, (n answers,) fp64, zeros elsewhere."""
        sums = np.zeros(self.pairs.n_answers)
        size = run.training_config.micro_batch_size
        for number, is_own in ranks.share(-(-self.pairs.rows_per_epoch // size)):
            begin = number * size
            batch = self.pairs.batch(np.arange(begin, min(begin + size, self.pairs.rows_per_epoch)))
            with run.autocast():
                log_probs = answer_log_probs(model, batch.batch.to(run.device))  # (N, T)
            if is_own:
                sums[batch.number] = log_probs.sum(1).cpu().numpy()
        return sums

    def conclude(self, run: Run, before: dict, after: dict) -> None:
        """Print what changed, and record it. before: of `recall`; after: of `examine`."""
        facts = {}
        if after["exact"]:
            n_right, n_questions = answers.total(after["exact"])
            facts["exact_match"] = n_right / n_questions
            for line in answers.exact_lines(before.get("exact", {}), after["exact"]):
                run.print(line)
        if after["sums"]:
            known = np.array(before["sums"]) if "sums" in before else None
            self._conclude_pairs(run, known, np.array(after["sums"]))
        met, n = after["requests"]
        if n:
            share_before = "not measured"
            if before.get("requests", [0, 0])[1]:
                facts["heldout_before"] = before["requests"][0] / before["requests"][1]
                share_before = f"{facts['heldout_before']:.1%}"
            facts["heldout_after"] = met / n
            run.print(f"held-out requests fulfilled at temperature 1: {share_before} → {met / n:.1%}   ({met}/{n})")
        if facts:
            run.record(run.training_config.steps, **facts)

    def _conclude_pairs(self, run: Run, before: np.ndarray | None, after: np.ndarray) -> None:
        """How many held-out pairs are right by log-probability, by kind of fault, and how far these have moved."""
        pairs = self.pairs
        if not pairs.has_labels:
            scores_before = {} if before is None else self._right_by_kind(before)
            run.print("held-out pairs whose chosen answer is likelier, before → after:")
            for line in answers.before_and_after(scores_before, self._right_by_kind(after)):
                run.print(line)
        if before is not None:
            scores = self.pair_scores(after, before)
            listed = ", ".join(f"{name} {score:.4f}" for name, score in scores.items())
            run.print(f"held-out pairs, beside the model before: {listed}")

    def _right_by_kind(self, sums: np.ndarray) -> dict[str, tuple[int, int]]:
        """kind of fault → (pairs with s_w > s_l, pairs)."""
        right = sums[self.pairs.better] > sums[self.pairs.worse]
        scores = {}
        for code, kind in enumerate(self.pairs.kinds):
            of_kind = self.pairs.kind == code
            if of_kind.any():
                scores[kind or "all"] = int(right[of_kind].sum()), int(of_kind.sum())
        return scores

    # ---- meanwhile

    def pair_scores(self, sums: np.ndarray, before: np.ndarray | None) -> dict[str, float]:
        """val_accuracy (u_w > u_l, the model before being the reference), val_plain_accuracy (s_w > s_l), and how much
        likelier chosen and rejected answers have become, in nats. before: None where the model before is not known,
        and then nothing is compared with it.
        """
        if before is None:
            is_right = sums[self.pairs.better] > sums[self.pairs.worse]
            return {} if self.pairs.has_labels else {"val_plain_accuracy": is_right.mean()}
        u = sums - before
        if self.pairs.has_labels:
            return {"val_u_chosen": u[self.pairs.label].mean(), "val_u_rejected": u[~self.pairs.label].mean()}
        better, worse = self.pairs.better, self.pairs.worse
        return {
            "val_accuracy": (u[better] > u[worse]).mean(),
            "val_plain_accuracy": (sums[better] > sums[worse]).mean(),
            "val_u_chosen": u[better].mean(),
            "val_u_rejected": u[worse].mean(),
        }

    def watch(self, run: Run, model: Transformer, step: int, before: dict) -> None:
        """Report on held-out pairs when it is due; the ranks share the work. before: of `recall`."""
        if self.pairs is None or not run.due(step, run.training_config.eval_every):
            return
        known = np.array(before["sums"]) if "sums" in before else None

        def measure() -> dict[str, float]:
            sums = np.array(run.ranks.sum_of_rows(*self._sums(model, run, run.ranks).tolist()))
            return {name: float(value) for name, value in self.pair_scores(sums, known).items()}

        scores = run.report(step, measure, of="held-out pairs")
        self._warn_of_fall(run, scores.get("val_u_chosen", math.nan))

    def follow(self, run: Run, u_chosen: float) -> None:
        """Take note of a step's mean u_w in nats, and warn if it stays low."""
        before = u_chosen if self.u_chosen is None else self.u_chosen
        self.u_chosen = (1 - NEWEST) * before + NEWEST * u_chosen
        self._warn_of_fall(run, self.u_chosen)

    def _warn_of_fall(self, run: Run, u_chosen: float) -> None:
        """Say once that the chosen answers become less likely, too. u_chosen: nats, on average."""
        if not self.warned and not math.isnan(u_chosen) and u_chosen < -FALL:
            self.warned = True
            run.print(
                f"step {run.step}: the chosen answers have become less likely by {-u_chosen:.1f} nats on average; "
                "answers to other questions suffer first: raise --sft_weight, or lower --lr or --epochs"
            )
