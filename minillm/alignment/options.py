"""The options that all scripts of alignment have, beside those of training and tuning."""

from dataclasses import dataclass
from typing import ClassVar

from minillm.alignment.rollouts import RolloutConfig
from minillm.base import bundled_files
from minillm.base.options import option, unused
from minillm.checkpoint.train_state import fingerprint
from minillm.datasets.preferences import PreferenceRows
from minillm.datasets.prompts import PromptRows
from minillm.datasets.questions import read_questions_of
from minillm.evaluation.checks import row_check
from minillm.evaluation.task_scores import TaskOptions
from minillm.tokenizer.chat_template import TEMPLATES
from minillm.tokenizer.measure import check_round_trip
from minillm.tokenizer.tokenizer import Tokenizer
from minillm.training.config import TrainingConfig, listed_files
from minillm.training.optim import OPTIMIZERS
from minillm.tuning.options import TuningConfig

REQUESTS = f"{bundled_files.FOLDER}/requests_train.jsonl"


@dataclass(frozen=True)
class AlignmentConfig(TuningConfig, TrainingConfig):
    """What train_reward.py, train_dpo.py, train_ppo.py and train_grpo.py share; each adds its own, such as beta."""

    init_from: str = option("out/sft", "model folder or run to start from", group="run")
    seq_len: int = option(256, "most tokens of a prompt and its answer", at_least=1, group="length and batch")
    template: str = option(
        "auto",
        "prompt format; auto: the model folder's own, else chat if there are role pieces",
        TEMPLATES,
        group="data",
    )
    encoding: str = option("utf-8", "of the files: gb18030, big5, utf-16 …", group="data")
    on_bad_line: str = option("error", "what to do with a line that cannot be read", ("error", "skip"), group="data")
    allow_lossy: bool = option(
        False, "take a tokenizer that loses more than 0.1 % of the characters of the texts", group="data"
    )
    eval_data: str | None = option(
        None,
        "held-out instructions to answer before and after, file(s) as of train_sft.py; none: the bundled ones, if "
        "bundled data is used",
        group="data",
    )
    eval_rows: int = option(800, "how many of them to answer", at_least=1, group="data")

    @property
    def room(self) -> int:
        """Tokens of text that a row holds: --seq_len without the virtual tokens that stand before it."""
        return self.seq_len - self.virtual_positions

    @property
    def has_own_reference(self) -> bool:
        """Whether the reference is a model of its own, for want of an adapter under which the base lies."""
        return self.tune in ("full", "freeze")

    @property
    def held_out(self) -> str | None:
        """The file(s) of held-out instructions, if there are any."""
        is_bundled = bundled_files.is_used(self.data)
        return self.eval_data or (f"{bundled_files.FOLDER}/sft_heldout.jsonl" if is_bundled else None)

    def held_out_questions(self) -> list[dict]:
        """The first --eval_rows held-out instructions, as `read_questions` gives them; none without a file."""
        paths = listed_files(self.held_out, "eval_data") if self.held_out else []
        return read_questions_of(paths, self.eval_rows, on_bad_line=self.on_bad_line, encoding=self.encoding)

    def problems(self) -> list[str]:
        problems = super().problems()
        if self.room < 1:
            problems.append(
                f"--seq_len {self.seq_len}: a row needs at least 1 position beside the virtual tokens of --n_virtual "
                f"{self.n_virtual}; raise it"
            )
        problems += unused(self, ("eval_tokens",), "a validation split of tokens")
        if self.held_out is None:
            problems += unused(self, ("eval_rows",), "--eval_data")
        return problems


@dataclass(frozen=True)
class ReplayConfig(TaskOptions, AlignmentConfig):
    """What train_dpo.py, train_ppo.py and train_grpo.py share: benchmarks, and instructions that are learned beside.

    See `replay.py` for these.
    """

    USUAL_REPLAY_WEIGHT: ClassVar[float]  # it depends on the size of the policy's loss
    USUAL_REPLAY_ROWS: ClassVar[int] = 8

    replay_data: str | None = option(
        None,
        "instructions learned beside so that they are not forgotten, file(s) as of train_sft.py; none: nothing, but "
        "the bundled ones beside bundled requests",
        group="data",
    )
    replay_weight: float | None = option(
        None, "weight of their loss; none: a usual one where there are some, else 0", at_least=0, group="loss"
    )
    replay_rows: int | None = option(
        None, "rows of them a step, over all ranks; none: 8, with train_dpo.py 16", at_least=1, group="loss"
    )

    @property
    def replayed_data(self) -> str | None:
        """The instructions' file(s), if there are any."""
        if self.replay_data is None and bundled_files.is_used(self.data.split(",")[0], "requests"):
            return f"{bundled_files.FOLDER}/sft_train.jsonl"
        return self.replay_data

    @property
    def replayed_weight(self) -> float:
        """--replay_weight, decided."""
        if self.replay_weight is not None:
            return self.replay_weight
        return self.USUAL_REPLAY_WEIGHT if self.replayed_data else 0.0

    @property
    def replayed_rows(self) -> int:
        """--replay_rows, decided."""
        return self.replay_rows or self.USUAL_REPLAY_ROWS

    def problems(self) -> list[str]:
        problems = super().problems()
        given = {"replay_data": self.replay_data, "replay_weight": self.replay_weight, "replay_rows": self.replay_rows}
        for name, value in given.items():
            if value and self.replayed_data is None:
                problems.append(f"--{name} {value}: give the instructions by --replay_data")
            elif value and not self.replayed_weight:
                problems.append(f"--{name} {value}: is not learned with --replay_weight 0; leave one of them out")
        return problems


@dataclass(frozen=True)
class RewardedConfig(ReplayConfig):
    """What train_ppo.py and train_grpo.py share: how answers are drawn, and on which prompts they are measured."""

    batch_size: int = option(16, "prompts of a rollout, over all ranks", at_least=1, group="length and batch")
    optimizer: str | None = option("adamw", "adamw, or muon for matrices", tuple(OPTIMIZERS), group="optimizer")
    weight_decay: float | None = option(0.0, "weight decay, on matrices only", at_least=0, group="optimizer")
    eval_every: int = option(
        0,
        "rollouts between measurements on held-out prompts; 0: only at the ends",
        at_least=0,
        group="validation and checkpoints",
    )
    group_size: int = option(8, "answers to each prompt", at_least=1, group="rollouts")
    temperature: float = option(1.0, "at which answers are drawn and learned", above=0, group="rollouts")
    max_new_tokens: int = option(128, "most tokens of an answer, its end included", at_least=1, group="rollouts")
    reward_time_s: float = option(60.0, "most seconds of one call of --reward", above=0, group="reward")
    eval_prompts: str | None = option(
        None, "held-out prompts, judged before and after; none: the bundled ones, if bundled data is used", group="data"
    )
    eval_prompt_rows: int = option(600, "how many of them", at_least=1, group="data")

    @property
    def held_out_prompts(self) -> str | None:
        """The file of held-out prompts, if there is one."""
        if self.eval_prompts is None and bundled_files.is_file(self.data, "requests_train.jsonl"):
            return f"{bundled_files.FOLDER}/requests_heldout.jsonl"
        return self.eval_prompts

    @property
    def drawing(self) -> tuple[float, int]:
        """What answers depend on besides model, prompt and seed."""
        return self.temperature, self.max_new_tokens

    def asked(self, prompts: PromptRows | None) -> dict[str, str]:
        """Of each value that is measured on held-out prompts a fingerprint of these, as `Run.once` takes it."""
        if prompts is None:
            return {}
        these = fingerprint(prompts.fingerprint, min(self.eval_prompt_rows, prompts.rows_per_epoch), self.drawing)
        return dict.fromkeys((f"heldout{kind}" for kind in ("", "_best", "_learned", "_kl", "_cut")), these)

    @property
    def rows_at_once(self) -> int:
        """Answers of a forward pass: those to --micro_batch_size prompts."""
        return self.micro_batch_size * self.group_size

    def rollout(self, tokenizer: Tokenizer) -> RolloutConfig:
        """How answers are drawn."""
        return RolloutConfig(
            group_size=self.group_size,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            stop_ids=tuple(tokenizer.stop_ids(self.template)),
            pad_id=tokenizer.pad_id,
            seed=self.seed,
        )

    def problems(self) -> list[str]:
        problems = super().problems()
        if self.dropout or self.lora_dropout:
            name = "dropout" if self.dropout else "lora_dropout"
            problems.append(f"--{name}: must be 0, since answers are drawn without and probabilities compared")
        if self.max_new_tokens >= self.room:
            problems.append(
                f"--max_new_tokens {self.max_new_tokens}: leaves no room for a prompt in --seq_len {self.seq_len}"
            )
        if self.held_out_prompts is None:
            problems += unused(self, ("eval_prompt_rows",), "--eval_prompts")
            if self.eval_tasks is None:
                problems += unused(self, ("eval_every",), "--eval_prompts or --eval_tasks")
        return problems


# ---- the files that the options name


def read_prompts(training_config: RewardedConfig, data: str, tokenizer: Tokenizer) -> PromptRows:
    """Prompt files, with room for an answer of --max_new_tokens after each prompt; data: separated by commas."""
    paths = listed_files(data)
    rows = PromptRows(
        paths,
        tokenizer,
        training_config.room,
        seed=training_config.seed,
        template=training_config.template,
        room=training_config.max_new_tokens,
        check_row=row_check(training_config.reward) if training_config.reward else None,
        on_bad_line=training_config.on_bad_line,
        encoding=training_config.encoding,
    )
    check_round_trip(tokenizer, rows.first_texts, ", ".join(paths), training_config.allow_lossy)
    return rows


def read_preferences(
    training_config: AlignmentConfig, data: str, tokenizer: Tokenizer, *, room: int, label_noise: float
) -> PreferenceRows:
    """Preference files as pairs of answers, or as single ones with labels; data: separated by commas.

    room: most tokens of a prompt and an answer. label_noise: share of pairs whose answers change places.
    """
    paths = listed_files(data)
    rows = PreferenceRows(
        paths,
        tokenizer,
        room,
        seed=training_config.seed,
        template=training_config.template,
        label_noise=label_noise,
        on_bad_line=training_config.on_bad_line,
        encoding=training_config.encoding,
    )
    check_round_trip(tokenizer, rows.first_texts, ", ".join(paths), training_config.allow_lossy)
    return rows
