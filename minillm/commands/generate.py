"""Continue a text; prints the continuation alone, as it comes.

With --best_of N --reward DIR the text is a question to a model that was taught to answer: of N answers the one with the
highest reward is printed.
"""

import sys
from dataclasses import dataclass

from minillm.base.options import option, part
from minillm.base.printing import log_line, print_text
from minillm.commands.best_of import Asking, best_of, load_judge, prompt_of
from minillm.commands.model_options import (
    CompileOptions,
    ModelOptions,
    OutputOptions,
    TemplateOptions,
    load_model,
    prepare_steps,
    print_stream,
    template_of,
)
from minillm.generation import completion
from minillm.generation.load import Loaded
from minillm.generation.sampling import Sampling
from minillm.tuning.virtual_tokens import context_of


@dataclass(frozen=True, kw_only=True)
class Config(ModelOptions, CompileOptions, TemplateOptions, Sampling, OutputOptions):
    prompt: str = option(
        help="the text to continue; -: standard input less a last newline", may_be_blank=True, group="text"
    )
    stop: tuple[str, ...] = option((), "end before any of these texts", may_be_blank=True, group="text")
    max_new_tokens: int = option(200, "at most this many new tokens", at_least=1, group="text")

    best_of: int | None = option(
        None,
        "ask the text as a question so many times; print the answer with the highest --reward",
        at_least=1,
        at_most=1 << 16,
    )
    reward: str | None = option(
        None, "what judges the answers, as of train_grpo.py: a reward model's folder, a function, or a weighted sum"
    )

    def problems(self) -> list[str]:
        problems = []
        if "" in self.stop:
            problems.append(
                "--stop '': every text begins with it, so none would be printed; give a text, or leave it out"
            )
        if (self.best_of is None) != (self.reward is None):
            problems.append("--best_of and --reward: each needs the other; give both, or neither")
        elif self.best_of is None and self.template != "auto":
            problems.append(f"--template {self.template}: is for --best_of; without it the text is continued as it is")
        elif self.best_of is not None and self.compile:
            problems.append("--compile: is for one answer, and --best_of computes several at once; leave one out")
        elif self.best_of is not None and self.temperature == 0:
            problems.append("--temperature 0: all answers would be the same; give --best_of a temperature above 0")
        return problems


def run(config: Config) -> None:
    prompt = config.prompt
    if prompt == "-":
        sys.stdin.reconfigure(errors="surrogateescape")  # so that the tokenizer reports what is not UTF-8
        prompt = sys.stdin.read().removesuffix("\n")  # `echo` ends in a newline
    loaded = load_model(config)
    if config.best_of is not None:
        _print_best(config, loaded, prompt)
        return
    model, tokenizer, _ = loaded
    prepare_steps(config, model)
    stream = completion.stream(
        model,
        tokenizer,
        tokenizer.prompt_ids(prompt),
        config.max_new_tokens,
        sampling=part(config, Sampling),
        stop_ids=tokenizer.end_ids,
        stop_strings=list(config.stop),
    )
    end = print_stream(stream, [], config.raw)
    print()
    if end.reason == "context":
        log_line(f"(stopped: the model's context of {context_of(model)} tokens is full)")


def _print_best(config: Config, loaded: Loaded, question: str) -> None:
    """Print the answer with the highest reward, and beside it the rewards of all."""
    model, tokenizer, folder = loaded
    template = template_of(config, folder)
    asking = Asking(template, config.max_new_tokens, part(config, Sampling), config.stop)
    prompt = prompt_of(question, tokenizer, asking)
    rewards = load_judge(config.reward, prompt, model, tokenizer, asking)
    for line in rewards.remarks():
        log_line(line)
    found = best_of(config.best_of, prompt, model, tokenizer, rewards, asking)
    print_text(found[0].text, config.raw)
    print()
    values = [candidate.reward for candidate in found]
    mean = sum(values) / len(values)
    others = f"their mean {mean:.3f}, the lowest {values[-1]:.3f}"
    log_line(f"(reward {values[0]:.3f}, the highest of {len(values)}; {others})")
    if found[0].reason != "stop":
        log_line(f"(stopped by its length: {found[0].reason})")
