"""What a run puts into a checkpoint's folder, and the check before the first step that it will be able to."""

import json
from pathlib import Path

import torch

from minillm.base import files
from minillm.base.options import write_toml
from minillm.checkpoint import huggingface, run_folder
from minillm.tokenizer.tokenizer import Tokenizer
from minillm.training import starting_model
from minillm.training.config import TrainingConfig
from minillm.training.step import TrainState
from minillm.tuning import peft_format
from minillm.tuning.adapter import active_adapter


def write_model(
    model: torch.nn.Module, folder: Path, training_config: TrainingConfig, tokenizer: Tokenizer | None
) -> None:
    """Write weights or the adapter alone, and what lies beside them, into a new folder that has a resume/ folder."""
    adapter = active_adapter(model)
    if adapter:
        peft_format.save_adapter(adapter, folder)
    else:
        huggingface.save_model(model, folder, special_ids=tokenizer.special_ids if tokenizer else None)
    _write_beside(folder, training_config, tokenizer)


def _write_beside(folder: Path, training_config: TrainingConfig, tokenizer: Tokenizer | None) -> None:
    """Write the tokenizer with the prompt format of this training, and the run's options."""
    write_toml(training_config, folder / "resume" / "options.toml")
    if tokenizer is not None:
        tokenizer.save(folder, template=getattr(training_config, "template", None))


def check(
    state: TrainState, run: Path, training_config: TrainingConfig, tokenizer: Tokenizer | None, described: dict
) -> None:
    """Refuse what a save would fail by: a damaged file beside the tokenizer, a value without JSON, a full disk.

    described: what a checkpoint will record of the run. Raises `UserError`.
    """
    # all that is no tensor is written once, into a folder that goes again
    with files.writing(run / "probe") as probe:
        (probe / "resume").mkdir(parents=True)
        _write_beside(probe, training_config, tokenizer)
        json.dumps(described)
        adapter = active_adapter(state.model)
        json.dumps(peft_format.describe(adapter) if adapter else huggingface.to_hf(state.model.config))

    # the disk holds the checkpoints that are kept at once: weights and two moments in fp32 for each trained parameter
    models = [state.model, *(other.model for other in state.beside.values())]
    weights = 4 * sum(starting_model.n_trained(model) for model in models)
    already_there = len(run_folder.step_folders(run))
    copies = max(1, (training_config.keep_last or 1) + 1 - already_there)
    files.check_writable(run, copies * 3 * weights, largest_file=2 * weights)


def memory_remedy(training_config: TrainingConfig) -> str:
    """What lowers the memory of a step, as far as it is not done already."""
    size = training_config.micro_batch_size
    remedies = [f"halve --micro_batch_size ({size})"] if size and size > 1 else []
    if not training_config.checkpoint_activations:
        remedies.append("set --checkpoint_activations true")
    return "to train, " + ", ".join([*remedies, "lower --seq_len, or choose a smaller model"])
