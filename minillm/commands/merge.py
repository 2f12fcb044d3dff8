"""Fold an adapter into its base: a plain model folder, for programs that know no adapters."""

import shlex
from dataclasses import dataclass
from pathlib import Path

from minillm.alignment.reward_model import is_reward_model
from minillm.base.options import Options, option
from minillm.checkpoint.run_folder import resolve_checkpoint
from minillm.commands.model_options import learned_texts_only, trained_with
from minillm.tuning import folders


@dataclass(frozen=True)
class Config(Options):
    model: str = option(help="the adapter's base: run or model folder")
    adapter: str = option(help="run or folder that holds the adapter, of minillm or PEFT")
    out: str = option(help="new model folder")


def run(config: Config) -> None:
    print(folders.merge_folder(config.model, config.adapter, config.out))
    print(f"next: {next_command(config)}")


def next_command(config: Config) -> str:
    """The command to try after this one: what comes after the script that trained the adapter."""
    out = shlex.quote(config.out)
    if is_reward_model(Path(config.out)):
        return f"python train_ppo.py --reward_model {out} --init_from {shlex.quote(config.model)}"
    if learned_texts_only(trained_with(resolve_checkpoint(config.adapter))):
        return f"python train_sft.py --init_from {out}"
    return f"python -m minillm chat --model {out}"
