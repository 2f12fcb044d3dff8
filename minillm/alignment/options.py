"""The options that all scripts of alignment have, beside those of training and tuning."""

from dataclasses import dataclass
from typing import ClassVar

from data import bundled
from minillm.base.options import option
from minillm.datasets.prompts import PromptRows
from minillm.tokenizer.chat_template import TEMPLATES
from minillm.tokenizer.measure import check_round_trip
from minillm.tokenizer.tokenizer import Tokenizer
from minillm.training.config import TrainingConfig
from minillm.tuning.options import TuningConfig


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
        "held-out instructions to answer before and after; none: the bundled ones, if bundled data is used",
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
        """The file of held-out instructions, if there is one."""
        is_bundled = self.data.startswith(f"{bundled.FOLDER}/")
        return self.eval_data or (f"{bundled.FOLDER}/sft_heldout.jsonl" if is_bundled else None)

    def problems(self) -> list[str]:
        problems = super().problems()
        if self.room < 1:
            problems.append(
                f"--seq_len {self.seq_len}: a row needs at least 1 position beside the virtual tokens of --n_virtual "
                f"{self.n_virtual}; raise it"
            )
        return problems


@dataclass(frozen=True)
class ReplayConfig(AlignmentConfig):
    """What train_ppo.py and train_grpo.py share: instructions that are learned beside the rewards (replay.py)."""

    USUAL_SFT_WEIGHT: ClassVar[float]  # it depends on the size of the policy's loss

    sft_weight: float | None = option(
        None,
        "weight of the loss of instructions, so that they are not forgotten; none: a usual one where there are some, "
        "else 0",
        at_least=0,
        group="loss",
    )
    sft_data: str | None = option(
        None, "their file(s), as of train_sft.py; none: the bundled ones, if bundled data is used", group="data"
    )
    sft_rows: int = option(8, "rows of them a step, over all ranks", at_least=1, group="loss")

    @property
    def replayed_data(self) -> str | None:
        is_bundled = self.data.startswith(f"{bundled.FOLDER}/")
        return self.sft_data or (f"{bundled.FOLDER}/sft_train.jsonl" if is_bundled else None)

    @property
    def replay_is_asked(self) -> bool:
        """Whether it is by the user's own wish that instructions are learned beside."""
        return self.sft_weight is not None

    @property
    def replayed_rows(self) -> int:
        return self.sft_rows

    @property
    def replay_share(self) -> float:
        """--sft_weight, decided."""
        if self.sft_weight is not None:
            return self.sft_weight
        return self.USUAL_SFT_WEIGHT if self.replayed_data else 0.0

    def problems(self) -> list[str]:
        problems = super().problems()
        if self.sft_weight and self.replayed_data is None:
            problems.append(f"--sft_weight {self.sft_weight:g}: give the instructions by --sft_data, or 0")
        if self.sft_data is not None and self.sft_weight == 0:
            problems.append(f"--sft_data {self.sft_data}: is not learned with --sft_weight 0; leave one of them out")
        return problems


def read_prompts(training_config, paths: list[str], tokenizer: Tokenizer) -> PromptRows:
    """Prompt files, with room for an answer of --max_new_tokens after each prompt."""
    rows = PromptRows(
        paths,
        tokenizer,
        training_config.room,
        seed=training_config.seed,
        template=training_config.template,
        room=training_config.max_new_tokens,
        on_bad_line=training_config.on_bad_line,
        encoding=training_config.encoding,
    )
    check_round_trip(tokenizer, rows.first_texts, ", ".join(paths), training_config.allow_lossy)
    return rows
