"""Continue a text; prints the continuation alone, as it comes."""

import sys
from dataclasses import dataclass

from minillm.base.options import option, part
from minillm.commands.model_options import ModelOptions, OutputOptions, load_model, print_stream, tell
from minillm.generation import completion
from minillm.generation.sampling import Sampling
from minillm.tuning.virtual_tokens import context_of


@dataclass(frozen=True, kw_only=True)
class Config(ModelOptions, Sampling, OutputOptions):
    prompt: str = option(
        help="the text to continue; -: standard input less a last newline", may_be_blank=True, group="text"
    )
    stop: tuple[str, ...] = option((), "end before any of these texts", may_be_blank=True, group="text")
    max_new_tokens: int = option(200, "at most this many new tokens", at_least=1, group="text")

    def problems(self) -> list[str]:
        if "" in self.stop:
            return ["--stop '': every text begins with it, so none would be printed; give a text, or leave it out"]
        return []


def run(config: Config) -> None:
    prompt = config.prompt
    if prompt == "-":
        sys.stdin.reconfigure(errors="surrogateescape")  # so that the tokenizer reports what is not UTF-8
        prompt = sys.stdin.read().removesuffix("\n")  # `echo` ends in a newline
    model, tokenizer, _ = load_model(config)
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
        tell(f"(stopped: the model's context of {context_of(model)} tokens is full)")
