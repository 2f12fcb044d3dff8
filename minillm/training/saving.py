"""What a run puts into a checkpoint's folder, when, and the check before the first step that it will be able to."""

import contextlib
import json
import os
from pathlib import Path

import torch

from minillm.base import files
from minillm.base.errors import UserError
from minillm.base.options import write_toml
from minillm.checkpoint import architectures, huggingface, run_folder, tensor_writer, train_state
from minillm.checkpoint.together import SharedSave
from minillm.distributed.ranks import Ranks
from minillm.tokenizer.tokenizer import Tokenizer
from minillm.training import starting_model
from minillm.training.config import TrainingConfig, for_later
from minillm.training.step import TrainState
from minillm.tuning import peft_format
from minillm.tuning.adapter import active_adapter


class Saver:
    """Saves a run's checkpoints, one at a time: at once, or with --save_in_background while training goes on."""

    def __init__(self, ranks: Ranks, training_config: TrainingConfig, tokenizer: Tokenizer | None):
        self.ranks, self.training_config, self.tokenizer = ranks, training_config, tokenizer
        self.folder = Path(training_config.out)
        self.under_way: SharedSave | None = None
        self.keeps_older = False  # when the one under way is whole

    def save(self, state: TrainState, step: int, described: dict, keeps_older: bool) -> None:
        """Begin a checkpoint of `step`, on all ranks; if it is not for the background, finish it.

        described: values for JSON. keeps_older: delete no older one. Raises `UserError` on every rank if weights are
        not finite, since no later step could repair them, and as `finish` does.
        """
        if not state.is_finite():
            self.rescue()
            raise UserError(
                f"step {step}: weights are not finite any more, so they are not saved; lower --lr, and "
                f"{run_folder.earlier_start(self.folder)}"
            )
        self.finish()
        parts, write_beside_model = _model_to_write(state.model, self.tokenizer)

        def write_beside(folder: Path) -> None:
            write_beside_model(folder)
            _write_beside(folder, self.training_config, self.tokenizer)

        self.under_way = train_state.save(
            self.folder,
            step,
            self.ranks,
            train_state.Checkpoint(
                model=parts,
                write_beside=write_beside,
                state=described,
                optimizers=state.all_optimizers(),
                named_parameters=state.all_parameters(),
                beside=state.trained_beside(),
            ),
            in_background=self.training_config.save_in_background,
        )
        self.keeps_older = keeps_older
        if not self.training_config.save_in_background:
            self.finish()

    @property
    def is_writing(self) -> bool:
        """Whether this rank still writes in the background."""
        return self.under_way is not None and not self.under_way.is_written

    def finish(self) -> None:
        """Wait for the checkpoint under way, if there is one, then delete all but the newest --keep_last.

        All ranks call this together. Raises `UserError` on all of them if it could not be written.
        """
        if self.under_way is None:
            return
        under_way, self.under_way = self.under_way, None
        under_way.finish()
        if self.ranks.main and not self.keeps_older:
            run_folder.prune(self.folder, self.training_config.keep_last, was_read_back=True)

    def rescue(self) -> None:
        """Finish the checkpoint under way, on all ranks, before the run ends by another error; one here is left out."""
        with contextlib.suppress(UserError):
            self.finish()

    def abandon(self) -> None:
        """Leave nothing of the checkpoint under way: the folder around it has been deleted."""
        if self.under_way is not None:
            self.under_way.abandon()
            self.under_way = None


def _model_to_write(model: torch.nn.Module, tokenizer: Tokenizer | None):
    """(the files of the weights, or of the adapter alone; a function that writes what belongs to them into a folder)"""
    adapter = active_adapter(model)
    if adapter:
        parts = peft_format.adapter_to_write(adapter, in_checkpoint=True)
        return parts, lambda folder: peft_format.write_beside_adapter(adapter, folder)
    parts = huggingface.weights_to_write(model)

    def write_beside(folder: Path) -> None:
        special_ids = tokenizer.special_ids if tokenizer else {}
        tensor_writer.write_index(folder, [each.file for each in parts])
        huggingface.write_config(model.config, folder, special_ids, model.embed_tokens.weight.dtype)

    return parts, write_beside


def _write_beside(folder: Path, training_config: TrainingConfig, tokenizer: Tokenizer | None) -> None:
    """Write the tokenizer with the prompt format of this training, and the run's options."""
    write_toml(for_later(training_config), folder / "resume" / "options.toml")
    if tokenizer is not None:
        tokenizer.save(folder, template=getattr(training_config, "template", None))


def check(
    state: TrainState, run: Path, training_config: TrainingConfig, tokenizer: Tokenizer | None, described: dict
) -> None:
    """Refuse what a save would fail by: a damaged file beside the tokenizer, a value without JSON, no room.

    described: what a checkpoint will record of the run. Raises `UserError`.
    """
    # all that is no tensor is written once, into a folder that goes again
    with files.writing(run / "probe") as probe:
        (probe / "resume").mkdir(parents=True)
        _write_beside(probe, training_config, tokenizer)
        json.dumps(described)
        adapter = active_adapter(state.model)
        json.dumps(peft_format.describe(adapter) if adapter else architectures.to_hf(state.model.config))

    ranks = state.ranks if state.outer is None else state.outer.ranks  # all of the run's, not a worker alone

    # the disk holds the checkpoints that are kept at once: weights and two moments in fp32 for each trained parameter
    models = [state.model, *(other.model for other in state.beside.values())]
    weights = 4 * sum(starting_model.n_trained(model) for model in models)
    n_copies = 3
    if state.outer is not None:
        n_copies = 2 + 2 * ranks.world  # weights, outer momentum, and two moments of each worker
    largest_tensor = 4 * max(p.numel() for model in models for p in model.parameters())
    largest_file = min((n_copies - 1) * weights, max(tensor_writer.MOST_BYTES, largest_tensor))
    already_there = len(run_folder.step_folders(run))
    copies = max(1, (training_config.keep_last or 1) + 1 - already_there)
    files.check_writable(run, copies * n_copies * weights, largest_file)
    if training_config.save_in_background:
        _check_host_memory(n_copies * weights, ranks.world)


def _check_host_memory(n_bytes: int, world: int) -> None:
    """Raise `UserError` if a machine cannot hold its share of a checkpoint of so many bytes, divided by all ranks."""
    share = n_bytes
    if n_bytes > tensor_writer.MOST_BYTES:
        share = n_bytes * int(os.environ.get("LOCAL_WORLD_SIZE", world)) // world
    memory = files.memory_bytes()
    if share > memory:
        raise UserError(
            f"--save_in_background true: a machine keeps a copy of {share:,} bytes while it is written, but has "
            f"{memory:,} bytes of memory; leave that option out"
        )


def memory_remedy(training_config: TrainingConfig) -> str:
    """What lowers the memory of a step, as far as it is not done already."""
    size = training_config.micro_batch_size
    remedies = [f"halve --micro_batch_size ({size})"] if size and size > 1 else []
    if not training_config.checkpoint_activations:
        remedies.append("set --checkpoint_activations true")
    return "to train, " + ", ".join([*remedies, "lower --seq_len, or choose a smaller model"])
