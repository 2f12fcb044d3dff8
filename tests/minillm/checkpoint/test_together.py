"""Checkpoints that several ranks write: the bytes of one process whatever the layout; failures are told to all."""

import json
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from minillm.base import files
from minillm.base.errors import UserError
from minillm.checkpoint import huggingface, run_folder, tensor_writer, together, train_state
from minillm.checkpoint.together import SharedSave, Source, owners_of, tensors_to_write
from minillm.distributed import shards
from minillm.distributed.ranks import Ranks
from minillm.distributed.shards import Cut
from minillm.model.config import ModelConfig
from minillm.model.transformer import Transformer
from minillm.tuning import peft_format
from minillm.tuning.adapter import attach
from minillm.tuning.options import TuningConfig
from tests.forked_ranks import on_ranks

CPU = torch.device("cpu")
ALONE = Ranks(0, 1, CPU)
CONFIG = ModelConfig(vocab_size=515, dim=64, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=128, max_seq_len=16)
ROWS, COLUMNS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), ("o_proj", "down_proj")
LIMIT = 150_000  # bytes in one file, so that there are several
LAYOUTS = {"alone": 1, "copies": 3, "rows": 2, "uneven rows": 3, "replicas": 4, "slices": 4}  # name: ranks


# ---- a model under each layout, and its optimizer in a state that any rank can compute


def numbers(name: str, parameter: nn.Parameter, key: str) -> torch.Tensor:
    """The whole tensor that a parameter or a moment of it is to hold."""
    seed = sum((name + key).encode())
    return torch.randn(shards.whole_shape(parameter), generator=torch.Generator().manual_seed(seed))


def laid_out(layout: str) -> Transformer:
    """The model of this layout on this rank; its weights are zeros."""
    model = Transformer(CONFIG)
    for parameter in model.parameters():
        parameter.data.zero_()
    if layout in ("alone", "copies"):
        return model
    from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
    from torch.distributed.fsdp import fully_shard

    world = dist.get_world_size()
    if layout == "replicas":
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    elif layout == "slices":  # tensor parallelism over neighbours, FSDP over the others
        mesh = DeviceMesh("cpu", torch.tensor([[0, 2], [1, 3]]), mesh_dim_names=("tensor", "shard"))["shard"]
    else:
        mesh = init_device_mesh("cpu", (world,))
    cuts = {}
    for name, module in model.named_modules():
        kind = name.rpartition(".")[2]
        if layout == "slices" and kind in ROWS + COLUMNS:
            cut = Cut(0 if kind in ROWS else 1, dist.get_rank() % 2, 2)
            module.weight = nn.Parameter(module.weight.chunk(2, cut.dim)[cut.index].clone())
            cuts[f"{name}.weight"] = cut
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for name, parameter in model.named_parameters():
        if layout == "slices":
            shards.mark_cut(parameter, cuts.get(name, Cut(None, dist.get_rank() % 2, 2)))
    return model


def filled(layout: str) -> tuple[Transformer, torch.optim.Optimizer]:
    """The model and its optimizer with all their numbers."""
    model = laid_out(layout)
    optimizer = torch.optim.AdamW(model.parameters())
    for name, parameter in model.named_parameters():
        shards.fill(parameter, numbers(name, parameter, "weight"))
        place = shards.place_of(parameter)
        moments = {key: numbers(name, parameter, key)[place].clone() for key in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": torch.tensor(3.0), **moments}
    return model, optimizer


def save(home: Path, layout: str, ranks: Ranks, in_background: bool = False) -> Path:
    """Write the checkpoint of step 3, with what is trained as a model beside it, too."""
    model, optimizer = filled(layout)
    parts = huggingface.weights_to_write(model)

    def write_beside(folder: Path) -> None:
        tensor_writer.write_index(folder, [each.file for each in parts])
        huggingface.write_config(CONFIG, folder, {}, torch.float32)

    checkpoint = train_state.Checkpoint(
        model=parts,
        write_beside=write_beside,
        state={"time_s": 1.0},
        optimizers=[optimizer],
        named_parameters=dict(model.named_parameters()),
        beside={"value": dict(model.named_parameters())},
    )
    under_way = train_state.save(home, 3, ranks, checkpoint, in_background)
    if in_background:
        with torch.no_grad():
            for parameter in model.parameters():  # training goes on
                shards.local(parameter).fill_(-1.0)
    under_way.finish()
    return under_way.path


def n_bytes_read() -> int:
    """What this process has read of files so far, as the system counts; 0 where it does not."""
    counters = Path("/proc/self/io")
    return int(counters.read_text().split()[1]) if counters.exists() else 0


def restore(folder: Path, layout: str) -> int:
    """Go on from a checkpoint, compare all numbers, and return how many bytes were read for model and optimizer."""
    model = laid_out(layout)
    optimizer = torch.optim.AdamW(model.parameters())
    named = dict(model.named_parameters())
    before = n_bytes_read()
    huggingface.fill_model(model, folder)
    weights = {name: shards.local(parameter).clone() for name, parameter in named.items()}
    train_state.restore_optimizers(folder, [optimizer], named)
    read = n_bytes_read() - before
    train_state.restore_beside(folder, {"value": named})
    for name, parameter in named.items():
        place, state = shards.place_of(parameter), optimizer.state[parameter]
        assert state["step"] == 3 and torch.equal(weights[name], shards.local(parameter))
        for key, tensor in {"weight": parameter, **state}.items():
            if key != "step":
                assert torch.equal(shards.local(tensor), numbers(name, parameter, key)[place]), (name, key)
    return read


def _one_layout(rank: int, layout: str, home: str, alone: str) -> tuple[str, str, int]:
    tensor_writer.MOST_BYTES = LIMIT
    ranks = Ranks(rank, LAYOUTS[layout], CPU)
    at_once = save(Path(home) / "at once", layout, ranks)
    later = save(Path(home) / "later", layout, ranks, in_background=True)
    assert run_folder.newest_checkpoint(Path(home) / "later", ranks=ranks) == later
    read = restore(Path(alone), layout)
    return (at_once / files.MANIFEST).read_text(), (later / files.MANIFEST).read_text(), read


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A checkpoint of one process, in several files."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(tensor_writer, "MOST_BYTES", LIMIT)
        return save(tmp_path_factory.mktemp("alone"), "alone", ALONE)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "alone"])
def test_every_layout_writes_the_bytes_of_one_process_and_reads_its_part_of_them(layout, alone, tmp_path):
    expected = (alone / files.MANIFEST).read_text()
    found = on_ranks(LAYOUTS[layout], tmp_path, _one_layout, layout, str(tmp_path), str(alone))
    for at_once, later, _ in found:
        assert at_once == expected and later == expected
    assert {path.name for path in (tmp_path / "at once").iterdir()} == {"step-00000003"}

    # each rank reads its own numbers, and headers, config.json and train_state.json
    sizes = {name: entry["size"] for name, entry in json.loads(expected)["files"].items()}
    read_by_ranks = [name for name in sizes if name.endswith(".safetensors") and "value" not in name]
    of_tensors = sum(sizes[name] for name in read_by_ranks)
    others = sizes["resume/train_state.json"] + 12_000 * len(read_by_ranks) + 20_000
    parts = {"copies": 1, "rows": 2, "uneven rows": 3, "replicas": 2, "slices": 2}[layout]  # slices: at least
    assert max(read for *_, read in found) < 1.02 * of_tensors / parts + others
    assert others < of_tensors / 6


def test_one_process_reads_what_it_wrote_as_a_hugging_face_folder(alone):
    AutoModelForCausalLM = pytest.importorskip("transformers").AutoModelForCausalLM
    names = {path.name for path in alone.iterdir()}
    assert "model-00001-of-00003.safetensors" in names and "model.safetensors.index.json" in names
    assert files.verify_folder(alone) == []
    model = filled("alone")[0]
    for loaded in (huggingface.load_model(alone), AutoModelForCausalLM.from_pretrained(alone)):
        tokens = torch.arange(12)[None]
        logits = getattr(loaded(tokens), "logits", loaded(tokens))
        torch.testing.assert_close(logits, model(tokens), atol=1e-4, rtol=1e-4)
    loaded = huggingface.load_model(alone)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(model.parameters(), loaded.parameters(), strict=True))


def test_a_small_model_is_one_file_as_a_model_folder_is(tmp_path):
    folder = save(tmp_path, "alone", ALONE)
    (tmp_path / "model").mkdir()
    huggingface.save_model(filled("alone")[0], tmp_path / "model")
    assert (folder / "model.safetensors").read_bytes() == (tmp_path / "model" / "model.safetensors").read_bytes()
    assert not (folder / "model.safetensors.index.json").exists()


@pytest.mark.parametrize(
    ("sizes", "owners"),
    [([5, 1], [0, 0]), ([5, 5, 1], [0, 1, 2]), ([9, 5, 5, 5], [0, 1, 2, 1]), ([], []), ([6, 0, 5], [0, 1, 1])],
)
def test_files_are_dealt_to_whoever_has_least_unless_all_fit_into_one(sizes, owners, monkeypatch):
    monkeypatch.setattr(tensor_writer, "MOST_BYTES", 10)
    assert owners_of(sizes, 3) == owners


# ---- what goes wrong on one rank


def _one_fails(rank: int, home: str, where: str) -> str:
    """A save in which rank 1 cannot write, or rank 0 its small files; what each rank is told."""
    tensor_writer.MOST_BYTES = 1_000
    ranks = Ranks(rank, 2, CPU)
    sources = {f"t{i}": Source.of(torch.full((200,), float(i))) for i in range(5)}
    parts = tensors_to_write("model", sources, tensor_writer.MOST_BYTES)

    def write_rest(folder: Path) -> None:
        if where == "rest":
            raise UserError("tokenizer.model: no such file")

    def full(path: Path, entry: dict) -> None:
        raise OSError(28, "No space left on device")

    def broken(*arguments) -> None:
        raise ValueError("a bug")

    if where == "full" and rank == 1:
        together.tensor_writer.check_written = full
    if where == "bug" and rank == 1:
        together.tensor_writer.write_file = broken
    with pytest.raises(UserError) as refusal:
        SharedSave(Path(home) / "step-00000001", ranks, parts, write_rest, in_background=where == "bug").finish()
    return str(refusal.value)


@pytest.mark.parametrize(
    ("where", "words"),
    [("full", "No space left"), ("rest", "tokenizer.model: no such file"), ("bug", "ValueError: a bug")],
)
def test_what_goes_wrong_on_one_rank_is_told_on_all_and_leaves_nothing(where, words, tmp_path):
    told = on_ranks(2, tmp_path / "told", _one_fails, str(tmp_path / "run"), where)
    assert told[0] == told[1] and words in told[0]
    assert list((tmp_path / "run").iterdir()) == []


def test_a_folder_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file; choose another --out"):
        SharedSave(tmp_path / "file" / "step-00000001", ALONE, [], lambda folder: None)


# ---- verified by all ranks


def _verify(rank: int, home: str) -> tuple[str, list[str], list[str]]:
    """What a rank finds to go on from, what it says, and the files that it has hashed of the newest checkpoint."""
    hashed, said, sha256 = [], [], files.sha256
    files.sha256 = lambda file: hashed.append(file) or sha256(file)
    found = run_folder.newest_checkpoint(home, said.append, Ranks(rank, 2, CPU))
    of_newest = [file.relative_to(file.parents[1]).as_posix() for file in hashed if "step-00000002" in str(file)]
    return found.name, said, of_newest


@pytest.mark.parametrize("damaged", [None, "a", "b", "c"])
def test_a_checkpoint_is_verified_by_all_ranks_a_part_each(damaged, tmp_path):
    for step in (1, 2):
        fill = {name: bytes([step] * size) for name, size in (("a", 300), ("b", 200), ("c", 100), ("d", 50))}
        files.write_folder(
            tmp_path / f"step-0000000{step}", lambda to, fill=fill: [(to / n).write_bytes(d) for n, d in fill.items()]
        )
    if damaged:
        path = tmp_path / "step-00000002" / damaged
        path.write_bytes(path.read_bytes()[:-1] + b"x")
    found = on_ranks(2, tmp_path / "told", _verify, str(tmp_path))
    (first, said, of_first), (second, silent, of_second) = found
    assert first == second == ("step-00000001" if damaged else "step-00000002")
    assert silent == [] and len(said) == bool(damaged)
    assert all(f"{damaged} differs from its checksum" in line for line in said)
    names = [name.rpartition("/")[2] for name in (*of_first, *of_second)]
    assert sorted(names) == ["a", "b", "c", "d"] and len(of_first) == len(of_second) == 2


# ---- in the background


def test_in_the_background_a_copy_is_written_and_the_folder_comes_in_the_end(tmp_path):
    tensor, may_write = torch.zeros(10), threading.Event()
    parts = tensors_to_write("model", {"x": Source.of(tensor)}, None)
    path = tmp_path / "step-00000001"
    under_way = SharedSave(path, ALONE, parts, lambda folder: may_write.wait(), in_background=True)
    tensor.fill_(1.0)
    assert not under_way.is_written and not path.exists()
    may_write.set()
    under_way.finish()
    assert under_way.is_written and files.verify_folder(path) == []
    assert huggingface.tensor_files.load_tensors(path / "model.safetensors")["x"].sum() == 0


def test_one_that_is_abandoned_leaves_nothing(tmp_path):
    parts = tensors_to_write("model", {"x": Source.of(torch.zeros(10))}, None)
    under_way = SharedSave(tmp_path / "step-00000001", ALONE, parts, lambda folder: None, in_background=True)
    under_way.abandon()
    assert list(tmp_path.iterdir()) == []


def _sees_late(rank: int, home: str) -> str:
    """Rank 1's disk shows what rank 0 wrote only after a second, or never."""
    path = Path(home)
    if rank == 0 and path.name == "late":
        timer = threading.Timer(1.0, path.mkdir)
        timer.start()
    try:
        files.wait_for(path, seconds=5.0 if path.name == "late" else 0.3)
    except UserError as problem:
        return str(problem)
    return ""


@pytest.mark.parametrize("name", ["late", "never"])
def test_a_folder_of_another_machine_is_waited_for(name, tmp_path):
    said = _sees_late(0, str(tmp_path / name))
    assert said == "" if name == "late" else "must lie on a disk that all machines share" in said


# ---- adapters


ADAPTERS = {
    "lora": {"tune": "lora"},
    "prefix": {"tune": "prefix", "n_virtual": 2},
    "prefix, encoded": {"tune": "prefix", "n_virtual": 3, "encoder": "mlp"},
}


def _save_adapter(rank: int, world: int, kind: str, home: str) -> dict[str, bytes]:
    """The bytes of an adapter's tensors, as `world` ranks write them that share it out."""
    torch.manual_seed(0)
    model = Transformer(CONFIG)
    model.init_weights(0)
    adapter = attach(model, TuningConfig(**ADAPTERS[kind]), seed=1)
    with torch.no_grad():
        for parameter in adapter.parameters().values():
            parameter.copy_(torch.randn(parameter.shape))
    if world > 1:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
    path = Path(home) / f"step-0000000{world}"
    parts = peft_format.adapter_to_write(adapter, in_checkpoint=True)
    SharedSave(path, Ranks(rank, world, CPU), parts, lambda folder: None).finish()
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*.safetensors")}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapter_that_is_shared_out_is_written_whole(kind, tmp_path):
    alone = _save_adapter(0, 1, kind, str(tmp_path))
    for found in on_ranks(3, tmp_path, _save_adapter, 3, kind, str(tmp_path)):
        assert found == alone
    assert len(alone) == (1 if kind == "lora" else 2)
