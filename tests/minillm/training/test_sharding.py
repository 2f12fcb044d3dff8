"""A model shared out over ranks learns as on one: losses and norms agree to rounding, whatever the layout.

Weights are not compared: where a gradient is nearly 0, AdamW turns its rounding into a full step.
"""

import contextlib
import dataclasses
from types import SimpleNamespace

import pytest
import torch

from minillm.datasets.batch import Batch
from minillm.distributed.parallelize import gradients_synced, marked_last, parallelize
from minillm.distributed.ranks import Ranks
from minillm.evaluation.validation import shared_loss
from minillm.generation.completion import generate
from minillm.generation.sampling import GREEDY
from minillm.model.config import ModelConfig
from minillm.training import sharding, starting_model
from minillm.training.optim import build_optimizers
from minillm.training.step import TrainState
from tests.forked_ranks import on_ranks

CPU = torch.device("cpu")
SHAPE = ModelConfig(
    vocab_size=515, dim=64, n_layers=3, n_heads=4, n_kv_heads=2, ffn_dim=96, max_seq_len=64, qk_norm=True
)
ROWS, LENGTH, STEPS = 12, 24, 3


def options(**changed) -> SimpleNamespace:
    """The options that decide how a model is made and shared out."""
    values = dict(
        shard="1", tensor_parallel=1, context_parallel=1, tune="full", base_bits=None, dtype="float32", compile=False
    )
    return SimpleNamespace(**values | dict(checkpoint_activations=False, seed=3) | changed)


def batch_of(positions, step: int) -> Batch:
    """Rows at some data positions of a step, of three documents each, and a mask that leaves unequal counts."""
    rows = []
    for position in positions:
        draw = torch.Generator().manual_seed(100 * step + int(position))
        rows.append(torch.randint(515, (LENGTH + 1,), generator=draw))
    tokens = torch.stack(rows)
    documents = (torch.arange(LENGTH) * 3 // LENGTH).int().expand(len(rows), -1).contiguous()
    mask = tokens[:, 1:] % 5 > 0
    return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), mask, documents)


def learn(rank: int, world: int, shape: ModelConfig, asked: SimpleNamespace, kind: str = "adamw") -> dict:
    """Some steps of two micro-batches each; the losses, norms and what else is compared."""
    torch.manual_seed(0)
    layout = sharding.asked_layout(asked)
    ranks = Ranks(rank, world, CPU, layout.row_ranks)
    model = starting_model.make_model(asked, shape, None, None, ranks)
    # each rank continues other prompts, to other lengths
    prompts = [[1, 5 + number, 9] for number in range(12)][ranks.data_rank :: ranks.data_world]
    written = generate(model, prompts, 3 + 2 * ranks.data_rank, sampling=GREEDY)
    found = {"losses": [], "norms": [], "held_out": []}
    optimizers = build_optimizers(model, kind, lr=3e-3, weight_decay=0.1)
    parallel_model = parallelize(model, ranks, asked.compile)
    state = TrainState(model, optimizers, ranks, getattr(torch, asked.dtype))
    for step in range(STEPS):
        micro = ranks.micro_batches(step, ROWS, ROWS // ranks.data_world // 2 or 1)
        batches = [batch_of(positions, step).part(*ranks.place_in_row) for positions in micro]
        (n_targets,) = ranks.sum(sum(batch.n_targets() for batch in batches))
        for batch, last in marked_last(batches):
            with gradients_synced(parallel_model, last):
                with torch.autocast("cpu", torch.bfloat16, enabled=asked.dtype == "bfloat16"):
                    loss = parallel_model(batch.x, batch.y, mask=batch.mask, documents=batch.documents)
                state.backward(loss, n_targets)
        found["norms"].append(state.update(0.9))
        found["losses"].append(state.loss)
        held_out = [batch_of([position], step=99) for position in range(5)]
        found["held_out"].append(shared_loss(model, held_out, ranks, contextlib.nullcontext())[0])
    of_ranks = ranks.exchange([completion.tokens[:3] for completion in written])
    found["texts"] = sorted(text for texts in of_ranks[:: ranks.row_ranks] for text in texts)
    return found


def check(found: list[dict], alone: dict) -> None:
    for of_rank in found:
        assert of_rank == found[0]  # what a rank decides by
    assert found[0]["losses"] == pytest.approx(alone["losses"], abs=2e-6)
    assert found[0]["norms"] == pytest.approx(alone["norms"], rel=3e-6)
    assert found[0]["held_out"] == pytest.approx(alone["held_out"], rel=3e-5)
    assert found[0]["texts"] == alone["texts"]
    assert len(set(alone["losses"])) == STEPS and all(norm > 0.9 for norm in alone["norms"])  # clipped


def learn_each(rank: int, world: int, cases: list[tuple]) -> list[dict]:
    """`learn` for several cases, in one start of the ranks."""
    return [learn(rank, world, *case) for case in cases]


def check_each(folder, world: int, cases: list[tuple]) -> None:
    """Each case (shape, options, optimizer) on so many ranks against the same on one."""
    of_ranks = on_ranks(world, folder, learn_each, world, cases)
    for case, found in zip(cases, zip(*of_ranks, strict=True), strict=True):
        shape, _, kind = case
        check(list(found), learn(0, 1, shape, options(), kind))


UNTIED = dataclasses.replace(SHAPE, tie_embeddings=False, qkv_bias=True)


@pytest.mark.slow
@pytest.mark.parametrize(("world", "shard"), [(2, 2), (3, 3), (4, 2), (2, 1)])
def test_shards_learn_as_one_rank(tmp_path, world, shard):
    asked = options(shard=str(shard))
    check_each(tmp_path, world, [(SHAPE, asked, "muon"), (SHAPE, asked, "adamw"), (UNTIED, asked, "muon")])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world", "layout"),
    [
        (2, dict(tensor_parallel=2)),
        (2, dict(context_parallel=2)),
        (4, dict(shard="2", tensor_parallel=2)),
        (4, dict(shard="2", context_parallel=2)),
        (4, dict(tensor_parallel=2, context_parallel=2)),
        (4, dict(tensor_parallel=2)),
        (4, dict(context_parallel=2)),
    ],
)
def test_shared_rows_are_learned_as_one_rank_does(tmp_path, world, layout):
    asked = options(**layout)
    check_each(tmp_path, world, [(SHAPE, asked, "muon"), (UNTIED, asked, "muon")])
