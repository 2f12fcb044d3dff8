"""Ranks with copies of the same matrices orthogonalize each some of them, and take the step that each would alone."""

import dataclasses
import os
from pathlib import Path

import pytest
import torch

from minillm.distributed.parallelize import gradients_synced, marked_last, parallelize
from minillm.distributed.ranks import Ranks
from minillm.model import ops
from minillm.model.config import PRESETS, ModelConfig
from minillm.model.transformer import Transformer
from minillm.training import optim, starting_model
from minillm.training.optim import Muon, build_optimizers, pays_to_share
from minillm.training.step import TrainState
from tests import launch
from tests.forked_ranks import on_ranks
from tests.minillm.training.test_sharding import ROWS, SHAPE, UNTIED, batch_of, options

CPU = torch.device("cpu")
STEPS = 3
BAD_STEP = 1
LORA = options(tune="lora", lora_rank=2)


def learn(rank: int, world: int, shape: ModelConfig, asked, implementation: str = "auto", **launched) -> dict:
    """Some steps of two micro-batches each, one of them bad: what training changes, and how much this rank computed.

    implementation: of the update. launched: what torchrun says of the machine.
    """
    os.environ.update(LOCAL_RANK=str(rank), **launched)
    optim.OPERATIONS_A_BYTE["cpu"] = 0  # share whatever the sizes
    torch.manual_seed(0)
    ranks = Ranks(rank, world, CPU)
    model = Transformer(shape)
    model.init_weights(1)
    if asked.tune != "full":
        model = starting_model.make_model(asked, shape, Path(asked.init_from), None, ranks)
    optimizers = build_optimizers(model, "muon", lr=3e-3, weight_decay=0.1)
    parallel_model = parallelize(model, ranks, compile=False)
    state = TrainState(model, optimizers, ranks, torch.float32)
    counts = counted(optim)
    for step in range(STEPS):
        batches = [batch_of(p, step) for p in ranks.micro_batches(step, ROWS, ROWS // world // 2)]
        (n_targets,) = ranks.sum(sum(batch.n_targets() for batch in batches))
        for batch, last in marked_last(batches):
            with gradients_synced(parallel_model, last):
                loss = parallel_model(batch.x, batch.y, mask=batch.mask, documents=batch.documents)
                if step == BAD_STEP and rank == world - 1:
                    loss = loss * float("inf")
                state.backward(loss, n_targets)
        ops.select(implementation)
        state.update(0.9)
        ops.select("auto")
    (muon,) = [optimizer for optimizer in optimizers if isinstance(optimizer, Muon)]
    momentum = [muon.state[p]["momentum_buffer"] for group in muon.param_groups for p in group["params"]]
    weights = [p.detach() for p in model.parameters()]
    return {"weights": weights, "momentum": momentum, "count": sum(counts), "matrices": len(momentum)}


def counted(module) -> list[int]:
    """How many matrices `_orthogonalized` gets from now on, call by call."""
    counts = []
    plain = module._orthogonalized

    def counting(updates, norms):
        counts.append(len(updates))
        return plain(updates, norms)

    module._orthogonalized = counting
    return counts


def learn_each(rank: int, world: int, cases: list[tuple]) -> list[tuple[dict, dict]]:
    """Each case with the ranks on one machine, then with each on a machine of its own, which shares nothing."""
    found = []
    for case in cases:
        together = learn(rank, world, *case, LOCAL_WORLD_SIZE=str(world))
        alone = learn(rank, world, *case, LOCAL_WORLD_SIZE="1")
        found.append((together, alone))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_each_rank_orthogonalizes_a_part_and_the_weights_are_bit_for_bit_those_of_all(tmp_path, world):
    base = tmp_path / "base"
    save_base(base)
    small = dataclasses.replace(UNTIED, n_layers=1)
    cases = [(SHAPE, options()), (UNTIED, options()), (SHAPE, dataclasses.replace(LORA, init_from=str(base)))]
    cases.append((small, options(), "triton"))
    of_ranks = on_ranks(world, tmp_path / "ranks", learn_each, world, cases)
    for of_case in zip(*of_ranks, strict=True):
        n_updates = (STEPS - 1) * of_case[0][0]["matrices"]
        counts = [together["count"] for together, _ in of_case]
        assert sum(counts) == n_updates and max(counts) < 0.7 * n_updates
        assert all(alone["count"] == n_updates for _, alone in of_case)
        for together, alone in of_case:
            for name in ("weights", "momentum"):
                of_first = of_case[0][0][name]
                for mine, its, theirs in zip(together[name], alone[name], of_first, strict=True):
                    assert torch.equal(mine, its) and torch.equal(mine, theirs)


def save_base(folder: Path) -> None:
    """A model to begin an adapter with."""
    from minillm.checkpoint import huggingface

    model = Transformer(SHAPE)
    model.init_weights(1)
    folder.mkdir()
    huggingface.save_model(model, folder)


def test_small_matrices_stay_with_all_ranks():
    """By sizes alone. On a CPU the factors of an adapter; on a GPU also the matrices of a tiny model."""

    def shapes(preset: str, device: str) -> list[torch.Tensor]:
        dim, hidden = (PRESETS[preset][name] for name in ("dim", "ffn_dim"))
        return [Sized(shape, device) for shape in [(dim, dim)] * 2 + [(hidden, dim)] * 3]

    class Sized:
        """The size of a matrix and where it is."""

        def __init__(self, shape: tuple[int, int], device: str):
            self.shape = torch.Size(shape)
            self.device = torch.device(device)
            self.is_cuda = device == "cuda"

        def numel(self) -> int:
            return self.shape.numel()

    assert pays_to_share(shapes("tiny", "cpu"))
    assert not pays_to_share([Sized((128, 8), "cpu"), Sized((8, 128), "cpu")])
    assert not pays_to_share(shapes("tiny", "cuda"))
    assert pays_to_share(shapes("124m", "cuda")) and pays_to_share(shapes("1b", "cuda"))
    assert not pays_to_share([Sized((4096, 16), "cuda"), Sized((16, 4096), "cuda")])
    assert not pays_to_share(shapes("124m", "mps"))  # for which nothing was measured or calculated


@pytest.mark.slow
def test_a_run_that_shares_is_resumed_bit_for_bit_also_where_it_was_not_shared_before(tmp_path):
    """Momentum is whole on every rank, so a checkpoint does not tell who orthogonalized what."""
    launch.write_corpus(tmp_path / "data")

    def train(out: str, steps: int, n_here: int) -> dict[str, bytes]:
        options = f"--data {tmp_path / 'data'} --out {tmp_path / out} {launch.SMALL} --dim 128 --ffn_dim 128"
        options += f" --steps {steps} --schedule constant --save_every 4"
        environment = {"LOCAL_WORLD_SIZE": str(n_here)}
        launch.finish("pretrain", options, tmp_path / f"{out}-{steps}", ranks=2, environment=environment)
        return launch.tensors(tmp_path / out, steps)

    straight = train("straight", 8, n_here=2)
    assert train("alone", 8, n_here=1) == straight
    train("resumed", 4, n_here=1)
    assert train("resumed", 8, n_here=2) == straight
