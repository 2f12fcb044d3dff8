"""The reference policy: the model that a run started from, frozen, to which the trained one stays near.

Where an adapter is trained, the reference is the base that lies under it: switching the adapter off costs no memory.
Otherwise it is a second model, read again from the folder of --init_from. A method that asks for log-probabilities of
texts that never change, as DPO does, needs the reference only once: `precomputed_sums` keeps one number an answer.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from minillm.alignment.log_probs import answer_log_probs
from minillm.base.errors import UserError
from minillm.base.files import write_file
from minillm.checkpoint import huggingface
from minillm.checkpoint.train_state import fingerprint, read_state
from minillm.datasets.batch import Batch
from minillm.distributed.ranks import Ranks
from minillm.distributed.shards import settle
from minillm.model.transformer import Transformer
from minillm.training import sharding, starting_model
from minillm.training.run import Run
from minillm.tuning import folders
from minillm.tuning.adapter import active_adapter, switched_off


class Reference:
    """The reference policy of a model in training."""

    def __init__(self, model: Transformer, frozen: Transformer | None = None):
        """frozen: the reference; None: `model` without its adapter."""
        if frozen is None and not is_base(model):
            raise ValueError("the reference is the base of an adapter, and this model has none that leaves its base")
        self.model = model
        self.frozen = frozen

    def settle(self) -> None:
        """Give up what the last passes have left whole of a model that is dealt out, until the next."""
        if self.frozen is not None:
            settle(self.frozen)

    def log_probs(self, batch: Batch, temperature: float = 1.0) -> Tensor:
        """log π_r of each answer token: (B, T) fp32, as `answer_log_probs` gives it."""
        if self.frozen is not None:
            return answer_log_probs(self.frozen, batch, temperature=temperature)
        with switched_off(self.model):
            return answer_log_probs(self.model, batch, temperature=temperature)


def is_base(model: Transformer) -> bool:
    """Whether the model without its adapter is what it started from."""
    adapter = active_adapter(model)
    return adapter is not None and adapter.leaves_base


def make_reference(training_config, start: starting_model.Start, model: Transformer, ranks: Ranks) -> Reference:
    """The reference of `model`, which started from --init_from; dealt out over the ranks if the model is.

    Raises `UserError` if the folder of --init_from is gone, or another now.
    """
    adapter = active_adapter(model)
    if adapter is not None and adapter.base_sha256 not in (None, folders.base_sha256(start.init)):
        raise UserError(
            f"--init_from {training_config.init_from}: is not the base of the adapter in training ("
            f"{adapter.base_folder}), so its log-probabilities are no reference; start from that base"
        )
    if is_base(model):
        return Reference(model)
    if starting_model.init_is_gone(training_config):
        raise UserError(
            f"--init_from {training_config.init_from}: is gone, and it is the reference that the policy is kept near; "
            "bring it back"
        )
    if sharding.is_divided(training_config):
        frozen = sharding.made_in_shards(training_config, start.model_config, start.init, ranks)
    else:
        how = dict(device=ranks.device, dtype=torch.float32)
        frozen = huggingface.load_model(start.init, config=start.model_config, **how)
    frozen.requires_grad_(False)
    return Reference(model, frozen.eval())


def fingerprints(training_config, start: starting_model.Start) -> dict[str, str]:
    """What must not change of the reference while a run goes on."""
    if starting_model.init_is_gone(training_config):  # what the run's own checkpoint has noted of it
        return {"reference": read_state(start.init).get("fingerprints", {}).get("reference")}
    return {"reference": folders.base_sha256(start.init)}


# ---- once for all answers of a data set


def precomputed_sums(run: Run, rows, n_samples: int, reference: Callable[[], Reference], *facts: object) -> np.ndarray:
    """s_r = Σ_t log π_r(y_t) of every answer, (n answers,) fp32 by its number; NaN for those that are not computed.

    rows: `PreferenceRows`; those at the first `n_samples` data positions are read. They come from a file in the run's
    folder, whose name is a fingerprint of all that they depend on: the answers' tokens, and `facts`, such as the
    reference's own fingerprint. If it is not there they are computed with `reference()`, the ranks sharing the work.
    """
    n_samples = min(n_samples, rows.rows_per_epoch)
    answers = rows.answers_fingerprint
    order = rows.fingerprint if n_samples < rows.rows_per_epoch else ""  # which answers the first ones are
    name = fingerprint(answers, order, n_samples, rows.seed if order else 0, str(run.dtype), *facts)
    path = Path(run.folder) / f"reference-{name[:16]}.npy"

    # every rank takes the file, or none does: what one cannot read all compute again
    sums = _read(path, rows.n_answers)
    if run.ranks.max(sums is None):
        begun = time.monotonic()
        sums = _compute(run, rows, n_samples, reference())
        took = time.monotonic() - begun
        run.print(f"answers to {n_samples:,} prompts by the reference policy: {took:.1f} s, kept in {path}")
        if run.ranks.main:
            write_file(path, lambda scratch: _write(scratch, sums))
        run.ranks.barrier()
    return sums


def _compute(run: Run, rows, n_samples: int, reference: Reference) -> np.ndarray:
    """The sums, computed: each rank has its share of the samples, all get all."""
    size = run.training_config.micro_batch_size
    sums = np.zeros(rows.n_answers)
    counts = np.zeros(rows.n_answers)
    shared = run.ranks.share(-(-n_samples // size))
    hidden = not (run.ranks.main and sys.stderr.isatty())
    for number, is_own in tqdm(shared, "reference", disable=hidden, leave=False, unit="batch"):
        begin = number * size
        answers = rows.batch(np.arange(begin, min(begin + size, n_samples)))
        with run.autocast():
            log_probs = reference.log_probs(answers.batch.to(run.device))  # (N, T)
        if is_own:
            sums[answers.number] = log_probs.sum(1).cpu().numpy()
            counts[answers.number] = 1
    sums = np.array(run.ranks.sum(*sums.tolist()))
    counts = np.array(run.ranks.sum(*counts.tolist()))
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan).astype(np.float32)


def _read(path: Path, n_answers: int) -> np.ndarray | None:
    """The file's numbers, if they are one an answer."""
    try:
        sums = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return sums if sums.shape == (n_answers,) and sums.dtype == np.float32 else None


def _write(scratch: Path, sums: np.ndarray) -> None:
    with scratch.open("wb") as file:
        np.save(file, sums)
