"""Make preference pairs of a model's own answers: to each prompt the one with the highest reward, and the lowest.

Preferences over what others have said teach little about one's own mistakes. So a model answers each prompt --n times,
a reward judges, and train_dpo.py learns from the pairs: a round of online DPO (Guo et al. 2024, arXiv:2402.04792).

    python -m minillm pairs --data data/bundled/requests_train.jsonl --reward data/world/reader.py:reward --out p.jsonl
    python train_dpo.py --data p.jsonl
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from minillm.alignment.rewards import Rewards
from minillm.alignment.rollouts import RolloutConfig, roll_out
from minillm.base.errors import UserError
from minillm.base.files import check_file, refuse_link, write_file
from minillm.base.options import option
from minillm.base.printing import log_line
from minillm.commands.model_options import ModelOptions, TemplateOptions, load_model, template_of
from minillm.datasets.prompts import Prompt, PromptRows
from minillm.evaluation.checks import row_check
from minillm.generation.load import Loaded
from minillm.training.config import listed_files
from minillm.tuning.virtual_tokens import context_of


@dataclass(frozen=True, kw_only=True)
class Config(ModelOptions, TemplateOptions):
    data: str = option(help="prompt file(s), separated by commas, as of train_grpo.py", group="pairs")
    reward: str = option(help="what judges the answers, as of train_grpo.py --reward", group="pairs")
    out: str = option(help="the preference file to write (.jsonl)", group="pairs")
    n: int = option(4, "answers to each prompt", at_least=2, group="pairs")
    prompts: int | None = option(None, "how many prompts to ask; none: all", at_least=1, group="pairs")
    temperature: float = option(1.0, "at which they are drawn", above=0, group="pairs")
    max_new_tokens: int = option(128, "most tokens of an answer, its end included", at_least=1, group="pairs")
    prompts_at_once: int = option(64, "prompts that are answered together", at_least=1, group="pairs")
    seed: int = option(0, "of the answers", at_least=0, group="pairs")
    encoding: str = option("utf-8", "of the files: gb18030, big5, utf-16 …", group="pairs")
    on_bad_line: str = option("error", "what to do with a line that cannot be read", ("error", "skip"), group="pairs")


def run(config: Config) -> None:
    out = Path(config.out)
    refuse_link(out)
    check_file(out)
    loaded = load_model(config)
    template = template_of(config, loaded.folder)
    context = context_of(loaded.model)
    if config.max_new_tokens >= context:
        raise UserError(
            f"--max_new_tokens {config.max_new_tokens}: the model's context has {context} tokens, of which a prompt "
            f"needs some; give at most {context - 1}"
        )
    rows = PromptRows(
        listed_files(config.data),
        loaded.tokenizer,
        context,
        seed=config.seed,
        template=template,
        room=config.max_new_tokens,
        check_row=row_check(config.reward),
        on_bad_line=config.on_bad_line,
        encoding=config.encoding,
    )
    log_line(rows.summary())
    n_asked = min(config.prompts or rows.rows_per_epoch, rows.rows_per_epoch)
    pairs, stop = _as_many_as_come(own_pairs(config, loaded, template, rows, np.arange(n_asked)))
    if stop is not None:  # what took hours is kept, under a name that is not taken for the whole
        if pairs:
            part = out.with_name(f"{out.stem}.part{out.suffix}")
            _write(part, pairs)
            log_line(f"{part}: the {len(pairs):,} pairs made before it stopped; {out} is as it was")
        raise stop
    if not pairs:
        raise UserError(
            f"{config.data}: to none of {n_asked:,} prompts two of {config.n} answers ended and had different rewards, "
            "so none is better than another; raise --n or --max_new_tokens, or ask other prompts"
        )
    _write(out, pairs)
    rest = n_asked - len(pairs)
    log_line(f"{out}: {len(pairs):,} pairs; to {rest:,} prompts all answers that ended had the same reward")


def _as_many_as_come(pairs: Iterator[dict]) -> tuple[list[dict], BaseException | None]:
    """The pairs, and what stopped them before their end: Ctrl-C, a fault of the reward, or no memory."""
    made = []
    try:
        for its in pairs:
            made.append(its)
    except (Exception, KeyboardInterrupt) as problem:
        return made, problem
    return made, None


def _write(path: Path, pairs: list[dict]) -> None:
    """Write a preference file."""

    def write(scratch: Path) -> None:
        with scratch.open("w", encoding="utf-8", newline="\n") as file:
            for its in pairs:
                file.write(json.dumps(its, ensure_ascii=False) + "\n")

    write_file(path, write)


def own_pairs(config: Config, loaded: Loaded, template: str, rows: PromptRows, positions: np.ndarray) -> Iterator[dict]:
    """A preference row for each prompt at these data positions to which some answers are better than others."""
    model, tokenizer, _ = loaded
    device = model.norm.weight.device
    longest = rows.counts["longest"] + config.max_new_tokens  # tokens, of a prompt and its answer
    how = dict(device=device, template=template, longest=longest, remedy="--max_new_tokens")
    rewards = Rewards(config.reward, tokenizer, **how)
    rollout = RolloutConfig(
        config.n,
        config.max_new_tokens,
        config.temperature,
        tuple(tokenizer.stop_ids(template)),
        tokenizer.pad_id,
        config.seed,
    )
    for begin in tqdm(range(0, len(positions), config.prompts_at_once), desc="answering", disable=None):
        numbers = positions[begin : begin + config.prompts_at_once]
        prompts = rows.rows(numbers)
        rolled = roll_out(model, [prompt.ids for prompt in prompts], numbers.tolist(), 0, rollout)
        values = rewards(rolled, prompts).view(-1, config.n).tolist()  # (P, n)
        texts = [tokenizer.decode(answer) for answer in rolled.answers]
        ended = rolled.ended.tolist()
        for index, prompt in enumerate(prompts):
            of_prompt = range(index * config.n, (index + 1) * config.n)
            # an answer that was cut has no end, which would be written into a preference file
            kept = [(value, texts[i]) for value, i in zip(values[index], of_prompt, strict=True) if ended[i]]
            yield from pair(prompt, kept)


def pair(prompt: Prompt, answers: list[tuple[float, str]]) -> Iterator[dict]:
    """The best and the worst answer as a row, unless they are equally good; of equal ones the first that was drawn."""
    said = [(reward, text) for reward, text in answers if text.strip()]
    if not said:
        return
    best = max(said, key=lambda answer: answer[0])
    worst = min(said, key=lambda answer: answer[0])
    if best[0] > worst[0]:
        talk = [dict(message) for message in prompt.messages]
        yield {
            "prompt": talk[0]["content"] if len(talk) == 1 else talk,
            "chosen": best[1],
            "rejected": worst[1],
            "chosen_reward": best[0],
            "rejected_reward": worst[0],
            **({"family": prompt.row["family"]} if "family" in prompt.row else {}),
        }
