"""Instructions learned beside rewards or preferences, so that what these do not ask for is not forgotten.

A policy that learns what is wanted on one kind of prompt changes on all others too. Adding the loss of its instruction
tuning to every step holds them in place (PPO-ptx: Ouyang et al. 2022, arXiv:2203.02155, equation 2):

    L = L_policy + w · mean over answer tokens of −log π(y_t)

Kinds of question that are rewarded or compared ("family" in their rows) are left out: there it is said what is wanted,
and the instructions' own answers would pull the policy back.
"""

import numpy as np
from torch import nn

from minillm.alignment.options import ReplayConfig
from minillm.checkpoint.train_state import fingerprint
from minillm.datasets.batch import Batch
from minillm.datasets.instructions import InstructionRows
from minillm.distributed.parallelize import gradients_synced
from minillm.tokenizer.tokenizer import Tokenizer
from minillm.training.config import listed_files
from minillm.training.run import Run
from minillm.training.step import TrainState


class Replay:
    """A few rows of instructions for each step; with a weight of 0 none."""

    def __init__(self, training_config: ReplayConfig, tokenizer: Tokenizer, families: set[str]):
        """families: those that are rewarded or compared. Raises `UserError` for data that cannot be read."""
        self.weight = training_config.replayed_weight
        self.n_rows = training_config.replayed_rows
        self.rows: InstructionRows | None = None
        if not self.weight:
            return
        self.rows = InstructionRows(
            listed_files(training_config.replayed_data),
            tokenizer,
            training_config.room,
            seed=training_config.seed,
            template=training_config.template,
            packing=not training_config.virtual_positions,  # which stand before a row once
            without_families=frozenset(families),
            on_bad_line=training_config.on_bad_line,
            encoding=training_config.encoding,
        )

    @property
    def fingerprints(self) -> dict[str, str]:
        """What must be the same for a run to go on."""
        if self.rows is None:
            return {}
        return {"instructions beside": fingerprint(self.rows.fingerprint, self.weight, self.n_rows)}

    def batch(self, step: int, run: Run) -> Batch | None:
        """This rank's rows of a step, on the host: those of one process, dealt out. None: none are learned."""
        if self.rows is None:
            return None
        end = (step + 1) * self.n_rows
        own = np.arange(step * self.n_rows, end)[run.ranks.data_rank :: run.ranks.data_world]
        rows = self.rows.batch(own if len(own) else np.array([end]), end)  # a row beyond the end is padding
        return rows.with_places()

    def learn(self, run: Run, policy: nn.Module, state: TrainState, batch: Batch | None, n: float) -> None:
        """Add its share to the gradient of an update whose other parts are divided by n. batch: see `batch`."""
        if batch is None:
            return
        (n_tokens,) = run.ranks.sum(float(batch.n_targets()))
        with gradients_synced(policy, last=False), run.autocast():
            loss = policy(batch.to(run.device), lambda log_probs: -log_probs.sum())
        state.backward(loss * (self.weight * n / n_tokens), n)
