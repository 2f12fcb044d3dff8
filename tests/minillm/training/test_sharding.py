"""A model shared out over ranks learns as on one: losses and norms agree to rounding, whatever the layout.

Weights are not compared: where a gradient is nearly 0, AdamW turns its rounding into a full step.
"""

import contextlib
import dataclasses
import functools
import os
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor

import train_dpo
import train_grpo
import train_ppo
import train_sft
from minillm.base.errors import UserError
from minillm.checkpoint import huggingface
from minillm.checkpoint.together import SharedSave
from minillm.datasets.batch import Batch
from minillm.distributed import parallelize as parallelism
from minillm.distributed import shards
from minillm.distributed.layout import Layout, RowPart, choose_shard
from minillm.distributed.parallelize import gradients_synced, marked_last, parallelize
from minillm.distributed.ranks import Ranks
from minillm.distributed.rows import check_shape
from minillm.evaluation.validation import shared_loss
from minillm.generation.completion import generate
from minillm.generation.sampling import GREEDY
from minillm.model import memory
from minillm.model.config import ModelConfig
from minillm.model.size import n_parameters
from minillm.model.transformer import Transformer
from minillm.training import sharding, starting_model
from minillm.training.optim import Muon, build_optimizers
from minillm.training.step import TrainState
from minillm.tuning import peft_format
from minillm.tuning.adapter import active_adapter, switched_off
from tests.forked_ranks import on_ranks
from train_pretrain import Config

CPU = torch.device("cpu")
SHAPE = ModelConfig(
    vocab_size=515, dim=64, n_layers=3, n_heads=4, n_kv_heads=2, ffn_dim=96, max_seq_len=64, qk_norm=True
)
ROWS, LENGTH, STEPS = 12, 24, 3


def options(**changed) -> Config:
    """The options that decide how a model is made and shared out."""
    return Config(**{"shard": "1", "dtype": "float32", "seed": 3, **changed})


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


def learn(rank: int, world: int, shape: ModelConfig, asked: Config, kind: str = "adamw") -> dict:
    """Some steps of two micro-batches each; the losses, norms and what else is compared."""
    torch.manual_seed(0)
    layout = sharding.asked_layout(asked)
    ranks = Ranks(rank, world, CPU, layout)
    init = Path(asked.init_from) if asked.init_from else None
    model = starting_model.make_model(asked, shape, init, None, ranks)
    # each rank continues other prompts, to other lengths
    prompts = [[1, 5 + number, 9] for number in range(12)][ranks.data_rank :: ranks.data_world]
    written = generate(model, prompts, 3 + 2 * ranks.data_rank, sampling=GREEDY)
    found = {"losses": [], "norms": [], "held_out": []}
    optimizers = build_optimizers(model, kind, lr=3e-3, weight_decay=0.1)
    parallel_model = parallelize(model, ranks, asked.compile)
    state = TrainState(model, optimizers, ranks, getattr(torch, asked.dtype))
    for step in range(STEPS):
        micro = ranks.micro_batches(step, ROWS, ROWS // ranks.data_world // 2 or 1)
        batches = [batch_of(positions, step).part(ranks.row_part) for positions in micro]
        if asked.virtual_positions:  # come before one text a row
            batches = [batch._replace(documents=None) for batch in batches]
        (n_targets,) = ranks.sum(sum(batch.n_targets() for batch in batches))
        for batch, last in marked_last(batches):
            with gradients_synced(parallel_model, last):
                with torch.autocast("cpu", torch.bfloat16, enabled=asked.dtype == "bfloat16"):
                    loss = parallel_model(batch.x, batch.y, mask=batch.mask, documents=batch.documents)
                state.backward(loss, n_targets)
        found["norms"].append(state.update(0.9))
        found["losses"].append(state.loss)
        held_out = [batch_of([position], step=99) for position in range(5)]
        if asked.virtual_positions:
            held_out = [batch._replace(documents=None) for batch in held_out]
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
    assert len(set(alone["losses"])) == STEPS and min(alone["norms"]) > 0


def learn_each(rank: int, world: int, cases: list[tuple]) -> list[dict]:
    """`learn` for several cases, in one start of the ranks."""
    return [learn(rank, world, *case) for case in cases]


def check_each(folder, world: int, cases: list[tuple]) -> None:
    """Each case (shape, options, optimizer) on so many ranks against the same on one."""
    of_ranks = on_ranks(world, folder, learn_each, world, cases)
    alone = dict(shard="1", tensor_parallel=1, context_parallel=1)
    for case, found in zip(cases, zip(*of_ranks, strict=True), strict=True):
        shape, asked, kind = case
        check(list(found), learn(0, 1, shape, dataclasses.replace(asked, **alone), kind))


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
    learned = dataclasses.replace(SHAPE, positions="learned")
    check_each(tmp_path, world, [(SHAPE, asked, "muon"), (UNTIED, asked, "muon"), (learned, asked, "muon")])


WIDE = dataclasses.replace(UNTIED, dim=128, head_dim=32, ffn_dim=128)  # 4 bits: parts of whole blocks of 64 columns
TUNED = [
    dict(tune="lora", lora_rank=2, target_modules="q_proj,embed_tokens"),
    dict(tune="lora", lora_rank=2, base_bits=8),
    dict(tune="dora", lora_rank=2, base_bits=16),
    dict(tune="lora", lora_rank=2, base_bits=4),
    dict(tune="dora", lora_rank=2),
    dict(tune="dora", lora_rank=2, target_modules="q_proj,embed_tokens"),
    dict(tune="ia3"),
    dict(tune="ia3", target_modules="q_proj,o_proj,up_proj"),
    dict(tune="adapter", bottleneck_dim=4),
    dict(tune="freeze", train_layers="0,embed,head"),
    dict(tune="prefix", n_virtual=3),
    dict(tune="prompt", n_virtual=3),
    dict(tune="ptuning", n_virtual=3),
    dict(tune="ptuning", n_virtual=3, encoder="lstm"),
]


@pytest.mark.slow
@pytest.mark.parametrize("tuned", TUNED, ids=lambda tuned: "-".join(map(str, tuned.values())))
def test_few_parameters_are_learned_in_parts_as_on_one_rank(tmp_path, tuned):
    """In shards, by tensor and by context parallelism."""
    shape = WIDE if tuned.get("base_bits") == 4 else UNTIED
    model = Transformer(shape)
    model.init_weights(1)
    (tmp_path / "base").mkdir()
    huggingface.save_model(model, tmp_path / "base")
    layouts = dict(shard="2"), dict(tensor_parallel=2), dict(context_parallel=2)
    asked = [options(init_from=str(tmp_path / "base"), **layout, **tuned) for layout in layouts]
    check_each(tmp_path, 2, [(shape, each, "adamw") for each in asked])


def save_each(rank: int, world: int, asked: list[tuple], out: Path) -> None:
    """Save adapters of known numbers, that were off for a while."""
    for number, (shape, options_of_one) in enumerate(asked):
        ranks = Ranks(rank, world, CPU, sharding.asked_layout(options_of_one))
        model = starting_model.make_model(options_of_one, shape, Path(options_of_one.init_from), None, ranks)
        draw = torch.Generator().manual_seed(7)
        for parameter in model.parameters():
            if parameter.requires_grad:
                shards.fill(parameter, torch.randn(shards.whole_shape(parameter), generator=draw))
        with switched_off(model):
            pass
        adapter = active_adapter(model)
        parts = peft_format.adapter_to_write(adapter, in_checkpoint=True)
        write_rest = functools.partial(peft_format.write_beside_adapter, adapter)
        SharedSave(out / str(number), ranks, parts, write_rest).finish()


@pytest.mark.slow
def test_adapters_in_parts_are_saved_byte_for_byte_as_one_process_saves_them(tmp_path):
    asked = []
    for tuned in TUNED:
        shape = WIDE if tuned.get("base_bits") == 4 else UNTIED
        base = tmp_path / f"base-{shape.dim}"
        if not base.exists():
            model = Transformer(shape)
            model.init_weights(1)
            base.mkdir()
            huggingface.save_model(model, base)
        asked.append((shape, options(init_from=str(base), **tuned)))
    for name in ("alone", "parts"):
        (tmp_path / name).mkdir()
    save_each(0, 1, asked, tmp_path / "alone")
    sliced = [(shape, dataclasses.replace(each, tensor_parallel=2)) for shape, each in asked]
    on_ranks(2, tmp_path / "ranks", save_each, 2, sliced, tmp_path / "parts")
    for number, tuned in enumerate(TUNED):
        written = [
            {file.name: file.read_bytes() for file in (tmp_path / name / str(number)).rglob("*") if file.is_file()}
            for name in ("alone", "parts")
        ]
        assert "adapter_model.safetensors" in written[0]
        assert written[0] == written[1], tuned


@pytest.mark.slow
@pytest.mark.parametrize("more", [dict(context_parallel=2), dict(shard="2", checkpoint_activations=True)])
def test_an_adapter_learns_from_parts_of_rows_and_from_recomputed_layers(tmp_path, more):
    model = Transformer(SHAPE)
    model.init_weights(1)
    (tmp_path / "base").mkdir()
    huggingface.save_model(model, tmp_path / "base")
    asked = options(init_from=str(tmp_path / "base"), tune="lora", lora_rank=2, **more)
    embedding = dataclasses.replace(asked, tune="dora", target_modules="q_proj,embed_tokens")
    cases = [(SHAPE, asked, "adamw"), (SHAPE, embedding, "adamw"), (SHAPE, options(**more), "muon")]
    if "shard" in more:
        virtual = options(init_from=str(tmp_path / "base"), tune="prompt", n_virtual=3, **more)
        cases.append((SHAPE, virtual, "adamw"))
    check_each(tmp_path, 2, cases)


def _in_other_precision(rank: int, layout: dict) -> dict:
    """What two ranks do in bfloat16, compiled, a second time, and in float16 when one of them overflows."""
    found = {"bfloat16": learn(rank, 2, SHAPE, options(dtype="bfloat16", **layout))}
    asked = options(**layout)
    found["plain"] = learn(rank, 2, SHAPE, asked, "muon")
    found["again"] = learn(rank, 2, SHAPE, asked, "muon")
    parallelism.compiled = lambda method: torch.compile(method, backend="aot_eager")
    found["compiled"] = learn(rank, 2, SHAPE, dataclasses.replace(asked, compile=True), "muon")

    # one step in float16 whose gradient is infinite in rank 1's part alone
    parts = sharding.asked_layout(asked)
    ranks = Ranks(rank, 2, CPU, parts)
    model = starting_model.make_model(asked, SHAPE, None, None, ranks)
    state = TrainState(model, build_optimizers(model, "muon", lr=1e-2, weight_decay=0.0), ranks, torch.float16)
    batch = batch_of([ranks.data_rank], 0).part(ranks.row_part)
    state.backward(model(batch.x, batch.y, documents=batch.documents), 2 * batch.x.numel())
    before = [shards.local(p).clone() for p in model.parameters()]
    scale = state.loss_scale.factor
    if rank == 1:
        shards.local(model.layers[0].mlp.up_proj.weight.grad)[0, 0] = torch.inf
    state.update(1.0)
    unchanged = all(torch.equal(old, shards.local(p)) for old, p in zip(before, model.parameters(), strict=True))
    found["overflow"] = (state.applied, unchanged, state.loss_scale.factor / scale)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("layout", [dict(shard="2"), dict(tensor_parallel=2), dict(context_parallel=2)])
def test_parts_in_other_precisions_compiled_and_once_more(tmp_path, layout):
    for found in on_ranks(2, tmp_path, _in_other_precision, layout):
        assert found["again"] == found["plain"]
        for name in ("losses", "norms", "held_out"):  # to rounding: exchanges cut what is compiled into pieces
            assert found["compiled"][name] == pytest.approx(found["plain"][name], rel=1e-6)
        assert found["compiled"] == found["plain"] or "shard" not in layout
        assert found["overflow"] == (False, True, 0.5)
        alone = learn(0, 1, SHAPE, options(dtype="bfloat16"))
        assert found["bfloat16"]["losses"] == pytest.approx(alone["losses"], abs=2e-3)
        assert found["bfloat16"]["norms"] == pytest.approx(alone["norms"], rel=2e-2)


def _experts(rank: int, world: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A stack of 3 matrices after two steps of Muon, and the same matrices stepped one by one."""
    draw = torch.Generator().manual_seed(0)
    stack, *grads = torch.randn(3, 3, 4, 6, generator=draw).unbind(0)
    alone = [nn.Parameter(matrix.clone()) for matrix in stack]
    model = nn.Module()
    model.layers = nn.ModuleList([nn.Module()])
    model.layers[0].experts = nn.Parameter(stack.clone())
    if world > 1:
        fully_shard(model.layers[0], mesh=init_device_mesh("cpu", (world,)))
    together = model.layers[0].experts
    optimizers = build_optimizers(model, "muon", lr=0.1, weight_decay=0.1)
    assert [type(optimizer) for optimizer in optimizers] == [Muon]  # never silently another
    one_by_one = Muon(alone, lr=0.1, weight_decay=0.1)
    for grad in grads:
        together.grad = distribute_tensor(grad, together.device_mesh, together.placements) if world > 1 else grad
        for matrix, own in zip(alone, grad, strict=True):
            matrix.grad = own.clone()
        optimizers[0].step()
        one_by_one.step()
    return shards.full(together).detach(), torch.stack(list(alone)).detach()


@pytest.mark.parametrize("world", [1, 2])
def test_stacked_matrices_are_orthogonalized_one_by_one(tmp_path, world):
    of_ranks = [_experts(0, 1)] if world == 1 else on_ranks(world, tmp_path, _experts, world)
    for together, alone in of_ranks:
        torch.testing.assert_close(together, alone)


@pytest.mark.parametrize(
    ("world", "asked", "message"),
    [
        (2, dict(shard="3"), "--shard 3 .* is 3 ranks to a copy of the model, but there are 2"),
        (4, dict(shard="2", tensor_parallel=4), "is 8 ranks to a copy"),
        (2, dict(shard="two"), "--shard two: choose auto"),
        (2, dict(shard="0"), "--shard 0: choose auto"),
        (4, dict(tensor_parallel=4), "--tensor_parallel 4: does not divide the model's n_kv_heads 2"),
        (2, dict(tensor_parallel=2, tune="lora", base_bits=4), "--base_bits 4: with --tensor_parallel 2 .* 32 of"),
        (
            4,
            dict(context_parallel=4, tune="prefix", n_virtual=3, seq_len=61, max_seq_len=62),
            "--seq_len 61: 4 ranks share a row, padded to 67",
        ),
        (
            4,
            dict(context_parallel=4, seq_len=62, max_seq_len=62),
            "--seq_len 62: 4 ranks share a row, padded to 64",
        ),
    ],
)
def test_what_cannot_be_divided_so_is_refused_by_name(world, asked, message):
    with pytest.raises(UserError, match=message):
        asked = options(**asked)
        shape = dataclasses.replace(SHAPE, max_seq_len=asked.max_seq_len or 128)
        sharding.choose_layout(asked, shape, Ranks(0, world, CPU))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(n_heads=6, n_kv_heads=2, head_dim=16), "--tensor_parallel 4: does not divide the model's n_heads 6"),
        (dict(ffn_dim=90), "the model's ffn_dim 90"),
        (dict(n_kv_heads=1), "the model's n_kv_heads 1"),
    ],
)
def test_shapes_that_ranks_cannot_divide_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        check_shape(Layout(tensor=4), dataclasses.replace(SHAPE, **dict(n_kv_heads=4) | change))


def _choose_by_own_memory(rank: int) -> str:
    """What --shard auto is where rank 0 has room for all, and rank 1, of a machine with two ranks, for little."""
    n_bytes = sum(memory.weights(SHAPE).values()) + sum(memory.optimizer_state(n_parameters(SHAPE)).values())
    room = (2 * n_bytes, 0.6 * n_bytes)[rank]
    os.environ["LOCAL_WORLD_SIZE"] = ("1", "2")[rank]
    sharding.files.memory_bytes = lambda: room * (rank + 1)
    asked = train_sft.Config(shard="auto", seq_len=64)  # whose rows may be short: they need no room for sure
    return sharding.choose_layout(asked, SHAPE, Ranks(rank, 2, CPU)).shard


@pytest.mark.slow
def test_auto_is_the_same_on_ranks_with_unequal_memory(tmp_path):
    assert on_ranks(2, tmp_path, _choose_by_own_memory) == ["2", "2"]


def test_auto_takes_the_ranks_of_a_machine_once_one_has_no_room(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    chosen = [choose_shard(n_bytes, 100, 1, 16) for n_bytes in (100, 101, 400, 401, 801, 1600)]
    assert chosen == [1, 4, 4, 8, 16, 16]
    assert choose_shard(500, 100, 2, 16) == 4  # two ranks share each row, and a part of the state with it
    with pytest.raises(UserError, match=r"16 rank\(s\) have 0.0 each: start at least 17 ranks"):
        choose_shard(1601, 100, 1, 16)


@pytest.mark.parametrize(
    ("config", "changed", "n_trained", "n_read"),
    [
        (Config, {}, 1, 0),
        (train_dpo.Config, {}, 1, 1),
        (train_dpo.Config, dict(loss="orpo"), 1, 0),
        (train_grpo.Config, {}, 1, 1),
        (train_grpo.Config, dict(beta=0.0), 1, 0),
        (train_ppo.Config, {}, 2, 2),
        (train_ppo.Config, dict(reward_model=None), 2, 1),
        (train_ppo.Config, dict(tune="lora"), 1, 1),  # with no optimizer to speak of
    ],
)
def test_auto_has_room_for_all_models_of_a_run(monkeypatch, config, changed, n_trained, n_read):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    monkeypatch.setattr(Ranks, "max", lambda self, number: number)
    asked = config(shard="auto", **changed)
    n_bytes = (n_trained + n_read) * sum(memory.weights(SHAPE).values())
    if asked.tune == "full":
        n_bytes += n_trained * sum(memory.optimizer_state(n_parameters(SHAPE)).values())
    for short, shard in ((0, 1), (1, 2)):
        monkeypatch.setattr(sharding.files, "memory_bytes", lambda short=short: n_bytes - short)
        assert sharding._shard_with_room(asked, SHAPE, Ranks(0, 2, CPU)) == shard


def test_the_parts_of_a_row_are_all_of_it_and_have_equal_work():
    row = torch.arange(20)[None]
    parts = [RowPart(index, context=3, tensor=2) for index in range(6)]
    together = torch.cat([part.of(row) for part in parts], 1)
    assert parts[0].in_order(together)[0].tolist() == [*range(20), 0, 0, 0, 0]
    places = torch.arange(24)[None]
    n_pairs = {int((part.of_context(places) + 1).sum()) for part in parts}  # each query with the keys up to it
    assert len(n_pairs) == 1
    assert RowPart(1, tensor=2).of(row)[0].tolist() == [*range(10, 20)]
    assert RowPart(1, context=2).of(row)[0].tolist() == [*range(5, 15)]
