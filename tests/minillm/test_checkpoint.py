"""Checkpoints: exact round trips, and strict reading of what may be broken or hostile."""

import json
import os
import pickle
import random
import resource
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from minillm import UserError, checkpoint, files, optim, run


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: place.read() for name, place in checkpoint.find_weights(folder).items()}


class Words:
    """Stands in for a tokenizer: all that a checkpoint asks of it."""

    def save(self, folder: Path, template: str | None = None) -> None:
        (folder / "tokenizer.model").write_bytes(b"words")


def small_model(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.ModuleDict({"layers": nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)), "head": nn.Linear(4, 3)})


def train(model: nn.Module, optimizers: list, steps: range) -> None:
    for step in steps:
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
        model["head"](model["layers"](x).tanh()).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def adamw(model):
    return [torch.optim.AdamW(model.parameters(), lr=0.01, betas=(0.8, 0.9), amsgrad=True)]


def fused(model):
    return optim.build_optimizers(model, "adamw", lr=0.01, weight_decay=0.1)


def muon(model):
    return optim.build_optimizers(model, "muon", lr=0.01, weight_decay=0.1)


def torch_muon(model):
    matrices = [p for p in model.parameters() if p.dim() == 2]
    return [torch.optim.Muon(matrices), torch.optim.AdamW([p for p in model.parameters() if p.dim() < 2])]


def save(home: Path, step: int, model: nn.Module, optimizers: list, **state) -> Path:
    return checkpoint.save(
        home,
        step,
        write_model=lambda folder: save_file(model.state_dict(), folder / "model.safetensors"),
        tokenizer=Words(),
        state=state,
        optimizers=optimizers,
        named_parameters=dict(model.named_parameters()),
    )


def refused(work) -> str:
    with pytest.raises(UserError) as caught:
        work()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- round trips


@pytest.mark.parametrize("build", [adamw, fused, muon, torch_muon])
def test_ten_steps_are_five_and_five_after_a_checkpoint_bit_for_bit(tmp_path, build):
    straight = small_model(0)
    optimizers = build(straight)
    train(straight, optimizers, range(5))
    folder = save(tmp_path, 5, straight, optimizers, time_s=1.5)
    train(straight, optimizers, range(5, 10))

    resumed = small_model(1)
    resumed.load_state_dict(read_weights(folder))
    restored = build(resumed)
    for optimizer in restored:  # the order of parameters is nothing to rely on
        for group in optimizer.param_groups:
            group["params"].reverse()
    names = dict(reversed(list(resumed.named_parameters())))
    checkpoint.restore_optimizers(folder, restored, names)
    train(resumed, restored, range(5, 10))
    for (name, ours), theirs in zip(resumed.state_dict().items(), straight.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name
    tensors, described = checkpoint.flatten_optimizers(restored, names)
    wanted, same = checkpoint.flatten_optimizers(optimizers, dict(straight.named_parameters()))
    assert described == same and tensors.keys() == wanted.keys()
    assert all(
        torch.equal(tensors[name], wanted[name]) and tensors[name].dtype == wanted[name].dtype for name in tensors
    )
    if build is not torch_muon:
        assert all(tensors[name] == 10 for name in tensors if name.endswith("/step"))


def test_a_checkpoint_is_a_model_folder_with_what_resuming_needs_apart(tmp_path):
    model = small_model(0)
    folder = save(tmp_path, 60, model, adamw(model), time_s=2.0, config={"lr": 0.01})
    assert folder == tmp_path / "step-00000060" and files.verify_folder(folder) == []
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    assert names == [
        "manifest.json",
        "model.safetensors",
        "resume/optimizer.safetensors",
        "resume/train_state.json",
        "tokenizer.model",
    ]
    state = checkpoint.read_state(folder)
    assert state["step"] == 60 and state["time_s"] == 2.0 and state["config"] == {"lr": 0.01}


def test_an_optimizer_that_has_not_stepped_and_options_of_now(tmp_path):
    model = small_model(0)
    folder = save(tmp_path, 0, model, adamw(model))
    optimizers = [torch.optim.AdamW(model.parameters(), lr=0.5, weight_decay=0.3)]
    checkpoint.restore_optimizers(folder, optimizers, dict(model.named_parameters()))
    assert not optimizers[0].state
    train(model, optimizers, range(1))
    folder = save(tmp_path, 1, model, optimizers)
    other = [torch.optim.AdamW(model.parameters(), lr=0.125, weight_decay=0.25)]
    checkpoint.restore_optimizers(folder, other, dict(model.named_parameters()))
    assert other[0].param_groups[0]["lr"] == 0.125 and other[0].param_groups[0]["weight_decay"] == 0.25


def test_what_is_read_lies_in_memory_of_its_own_aligned_as_torch_aligns(tmp_path):
    save_file({"a": torch.ones(3), "b": torch.ones(64), "c": torch.tensor(2)}, tmp_path / "model.safetensors")
    held = read_weights(tmp_path)
    assert all(tensor.data_ptr() % 64 == 0 for tensor in held.values())
    (tmp_path / "model.safetensors").write_bytes(b"\0" * 300)
    assert held["b"].sum() == 64 and held["c"].shape == () and held["c"].dtype == torch.int64


def test_killed_at_ten_random_moments_of_a_loop_that_saves(tmp_path):
    model = nn.Linear(50, 40)
    optimizers = muon(model)
    rng, last = random.Random(1), 0
    for _ in range(10):
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            run.clean_stale(tmp_path)
            newest = run.newest_checkpoint(tmp_path)
            step = run.step_of(newest) if newest else 0
            while True:
                model.weight.data.fill_(step)
                save(tmp_path, step, model, optimizers, note=step)
                os.write(writer, b".")
                run.prune(tmp_path, 2)
                step += 1
        os.close(writer)
        assert os.read(reader, 1) == b"."
        time.sleep(rng.uniform(0, 0.15))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(reader)
        run.clean_stale(tmp_path)
        newest = run.newest_checkpoint(tmp_path, log=pytest.fail)
        step = run.step_of(newest)
        assert step >= last and checkpoint.read_state(newest)["note"] == step
        assert all((tensor == step).all() for name, tensor in read_weights(newest).items() if name == "weight")
        last = step
    assert last > 5


@pytest.mark.parametrize("large", ["model", "optimizer"])
def test_a_full_disk_inside_safetensors_names_the_checkpoint(tmp_path, large):
    model = small_model(0)
    optimizers = adamw(model)
    save(tmp_path, 1, model, optimizers)
    big = nn.Linear(100, 100)
    steps = adamw(big)
    big(torch.ones(1, 100)).sum().backward()
    steps[0].step()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, before[1]))
    try:
        if large == "model":
            text = refused(lambda: save(tmp_path, 2, big, []))
        else:
            text = refused(lambda: checkpoint.save(
                tmp_path, 2, write_model=lambda f: None, tokenizer=None, state={}, optimizers=steps,
                named_parameters=dict(big.named_parameters()),
            ))  # fmt: skip
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "step-00000002" in text and "File too large" in text
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert files.verify_folder(tmp_path / "step-00000001") == []


# ---- refusals on resuming


def test_an_optimizer_of_another_set_up_is_refused_with_the_whole_list(tmp_path):
    model = small_model(0)
    optimizers = adamw(model)
    train(model, optimizers, range(2))
    folder = save(tmp_path, 2, model, optimizers)
    names = dict(model.named_parameters())
    other = muon(model)
    text = refused(lambda: checkpoint.restore_optimizers(folder, other, names))
    assert "layers.0.weight was trained by AdamW, now by Muon" in text and "layers.1.weight" in text
    assert not any(optimizer.state for optimizer in other)
    fewer = [torch.optim.AdamW(model["head"].parameters())]
    text = refused(lambda: checkpoint.restore_optimizers(folder, fewer, names))
    assert text.count("is not trained any more") == 4
    more = {**names, "new.weight": nn.Parameter(torch.ones(2))}
    text = refused(lambda: checkpoint.restore_optimizers(folder, [torch.optim.AdamW(more.values())], more))
    assert "new.weight was trained by nothing, now by AdamW" in text


def test_optimizer_tensors_missing_extra_and_misshaped_are_all_named(tmp_path):
    model = small_model(0)
    optimizers = adamw(model)
    train(model, optimizers, range(2))
    folder = save(tmp_path, 2, model, optimizers)
    file = folder / "resume" / "optimizer.safetensors"
    tensors = checkpoint.load_tensors(file)
    del tensors["head.bias/exp_avg"]
    tensors["more"] = torch.ones(1)
    tensors["head.weight/exp_avg_sq"] = torch.ones(4, 3)
    save_file(tensors, file)
    fresh = adamw(model)
    text = refused(lambda: checkpoint.restore_optimizers(folder, fresh, dict(model.named_parameters())))
    assert "head.bias/exp_avg is missing" in text and "more is not expected" in text
    assert "head.weight/exp_avg_sq is (4, 3), expected (3, 4)" in text and str(file) in text
    assert not fresh[0].state


def test_a_folder_without_training_state_says_what_to_do(tmp_path):
    assert "--init_from" in refused(lambda: checkpoint.read_state(tmp_path))
    (tmp_path / "resume").mkdir()
    for text in ("{", "[]", "{}"):
        (tmp_path / "resume" / "train_state.json").write_text(text)
        assert "train_state.json: not a training state" in refused(lambda: checkpoint.read_state(tmp_path))
    (tmp_path / "resume" / "train_state.json").write_text('{"format": 2}')
    assert "format 2" in refused(lambda: checkpoint.read_state(tmp_path))


def test_fingerprints(tmp_path):
    marks = {"tokenizer": "a", "data": "b", "order": "c", "architecture": "d"}
    config = {"lr": 0.1, "betas": (0.9, 0.95), "resume": "auto", "steps": 10, "seed": 0, "lora_rank": 8}
    saved = json.loads(json.dumps({"step": 7, "fingerprints": marks, "config": config, "threads": 2, "world": 1}))

    def compare(allow=False, config=config, **changed):
        now = {"fingerprints": {**marks, **changed}, "config": config, "threads": 2, "world": 1}
        return checkpoint.compare_fingerprints(saved, now, allow, "out/x/step-00000007")

    assert compare() == []
    text = refused(lambda: compare(data="x"))
    assert (
        text.startswith("out/x/step-00000007 was made with another data: choose")
        and "another data" in text
        and "--allow_data_change" in text
        and "--out" in text
    )
    assert len(compare(True, data="x", order="y")) == 2
    for name in ("tokenizer", "architecture"):
        text = refused(lambda name=name: compare(True, **{name: "x"}))
        assert name in text and "--allow_data_change" not in text
    text = refused(lambda: compare(data="x", tokenizer="y", architecture="z"))
    assert all(name in text for name in ("data", "tokenizer", "architecture"))
    other = {"tuning": "x", "batch size, sequence length or seed": "y"}
    text = refused(lambda: compare(config={**config, "lora_rank": 4, "seed": 1, "steps": 20}, **other))
    assert "another batch size/sequence length/seed and another tuning (--seed: 0 in the checkpoint, 1 now; " in text
    assert "--lora_rank: 8 in the checkpoint, 4 now): choose" in text and "steps" not in text
    assert compare(config={**config, "lr": 0.2, "resume": "x"}) == ["--lr: 0.1 in the checkpoint, 0.2 now"]
    lines = checkpoint.compare_fingerprints(saved, {"fingerprints": marks, "threads": 4, "world": 2})
    assert len(lines) == 2 and "threads: 2 in the checkpoint, 4 now" in lines[0] and "ranks" in lines[1]


# ---- reading what may be anything


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("protocol", [0, 2, 3, 4, 5, "zip", "old torch"])
def test_a_pickle_in_disguise_is_refused_and_not_run(tmp_path, protocol):
    file, struck = tmp_path / "model.safetensors", tmp_path / "struck"
    if protocol == "zip":
        torch.save(Bomb(struck), file)
    elif protocol == "old torch":
        torch.save(Bomb(struck), file, _use_new_zipfile_serialization=False)
    else:
        file.write_bytes(pickle.dumps(Bomb(struck), protocol=protocol))
    text = refused(lambda: read_weights(tmp_path))
    assert str(file) in text and ("a pickle" in text or protocol == 0)
    assert not struck.exists()


def raw(path: Path, header, body: bytes, length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + body)


TWO = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "body", "length"),
    [
        ({"a": {**TWO, "shape": [3]}}, b"\0" * 8, None),  # shape and bytes disagree
        ({"a": TWO}, b"\0" * 7, None),  # truncated
        ({"a": TWO}, b"\0" * 9, None),  # more than the header tells
        ({"a": TWO, "b": TWO}, b"\0" * 8, None),  # two tensors over the same bytes
        ({"a": {**TWO, "data_offsets": [8, 0]}}, b"\0" * 8, None),
        ({"a": {**TWO, "shape": [1 << 62, 8]}}, b"\0" * 8, None),
        ({"a": {**TWO, "dtype": "F33"}}, b"\0" * 8, None),
        ({"a": TWO}, b"\0" * 8, 1 << 60),  # header longer than the file
        (b'{"a": {"dtype": "F32"', b"", None),
        (b'{"a": %s, "a": %s}' % ((json.dumps(TWO).encode(),) * 2), b"\0" * 8, None),  # twice in one header
        (b"\xff\xfe", b"", None),
        (b"", b"", None),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path, header, body, length):
    raw(tmp_path / "model.safetensors", header, body, length)
    text = refused(lambda: read_weights(tmp_path))
    assert str(tmp_path / "model.safetensors") in text
    raw(tmp_path / "model.safetensors", {"a": TWO}, b"\0" * 8)
    assert [(name, tensor.tolist()) for name, tensor in read_weights(tmp_path).items()] == [("a", [0.0, 0.0])]


def test_every_truncation_of_a_file_is_refused(tmp_path):
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(2), "b": torch.ones(3, dtype=torch.bfloat16)}, file)
    whole = file.read_bytes()
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        refused(lambda: checkpoint.load_tensors(file))


def shards(folder: Path, weight_map: dict, **files: dict) -> None:
    for name, tensors in files.items():
        save_file(tensors, folder / f"{name}.safetensors")
    (folder / checkpoint.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_shards_are_read_one_tensor_at_a_time(tmp_path):
    places = {"x": "one.safetensors", "y": "two.safetensors", "z": "one.safetensors"}
    shards(tmp_path, places, one={"x": torch.ones(1), "z": torch.ones(2)}, two={"y": torch.ones(3)})
    assert {name: len(tensor) for name, tensor in read_weights(tmp_path).items()} == {"x": 1, "y": 3, "z": 2}


def test_all_that_is_wrong_with_shards_is_listed_before_anything_is_read(tmp_path):
    places = {"x": "one.safetensors", "gone": "one.safetensors", "y": "two.safetensors", "w": "three.safetensors"}
    shards(tmp_path, places, one={"x": torch.ones(1), "y": torch.ones(1)}, two={"y": torch.ones(3)})
    text = refused(lambda: read_weights(tmp_path))
    for part in (
        "gone is missing from one.safetensors",
        "y in one.safetensors is not in the index",
        "y is in one.safetensors and in two.safetensors",
        "three.safetensors: no such file",
    ):
        assert part in text


@pytest.mark.parametrize(
    "place",
    ["../secret.safetensors", "/etc/secret.safetensors", "a/../../secret.safetensors", "..", "", "x.bin", 5, None],
)
def test_an_index_that_leaves_the_folder_is_refused(tmp_path, place):
    inside = tmp_path / "model"
    inside.mkdir()
    save_file({"x": torch.ones(1)}, tmp_path / "secret.safetensors")
    shards(inside, {"x": place})
    text = refused(lambda: read_weights(inside))
    assert "refused" in text and checkpoint.INDEX in text


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": "s", "a": "t"}}', ""])
def test_an_index_that_is_none_is_refused(tmp_path, text):
    (tmp_path / checkpoint.INDEX).write_text(text)
    assert checkpoint.INDEX in refused(lambda: read_weights(tmp_path))


@pytest.mark.parametrize("length", [640, 896, 1152, 1408, 19280])  # in bytes: what pickles and zips begin by
def test_a_header_as_long_as_a_pickle_begins_is_read(tmp_path, length):
    file = tmp_path / "model.safetensors"
    save_file({"x": torch.arange(3.0)}, file)
    data = file.read_bytes()
    n = int.from_bytes(data[:8], "little")
    file.write_bytes(length.to_bytes(8, "little") + data[8 : 8 + n].ljust(length) + data[8 + n :])
    assert torch.equal(checkpoint.load_tensors(file)["x"], torch.arange(3.0))


def test_a_folder_without_weights_names_the_pickle_beside(tmp_path):
    assert "no such file" in refused(lambda: read_weights(tmp_path))
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    assert "pytorch_model.bin, a pickle" in refused(lambda: read_weights(tmp_path))
    (tmp_path / "model.safetensors").mkdir()
    refused(lambda: read_weights(tmp_path))
    refused(lambda: read_weights(tmp_path / "nowhere"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_nan_is_named_by_tensor(dtype):
    tensor = torch.tensor([[1.0, float("nan")], [2.0, float("nan")]]).to(dtype)
    text = refused(lambda: checkpoint.check_finite("layers.3.w", tensor, "out/x"))
    assert "out/x: layers.3.w holds 2 of 4" in text
    checkpoint.check_finite("layers.3.w", torch.ones(4).to(dtype), "out/x")
    checkpoint.check_finite("ids", torch.ones(4, dtype=torch.int64), "out/x")


def test_tensors_that_do_not_match_are_all_listed():
    expected = {"a": torch.Size([2, 3]), "b": (4,), "c": (5,)}
    text = refused(lambda: checkpoint.match_tensors(expected, {"a": (3, 2), "b": (4,), "d": (1,)}, "m"))
    assert text == "m: does not fit the model: c is missing; d is not expected; a is (3, 2), expected (2, 3)"
    checkpoint.match_tensors(expected, dict(expected), "m")


@pytest.mark.parametrize("dtype", checkpoint.DTYPES.values(), ids=checkpoint.DTYPES)
def test_safetensors_reads_what_is_written_tensor_by_tensor_and_we_read_it_in_pieces(dtype, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "PIECE", 7)
    given = {"b": torch.arange(24).view(2, 3, 4), "a": torch.tensor(3), "empty": torch.zeros(0, 4)}
    given = {name: tensor.to(dtype) for name, tensor in given.items()}
    shapes = {name: tensor.shape for name, tensor in given.items()}
    checkpoint.write_tensors(tmp_path / "model.safetensors", shapes, dtype, lambda name: given[name])
    theirs = load_file(tmp_path / "model.safetensors")
    for name, place in checkpoint.find_weights(tmp_path).items():
        assert place.shape == given[name].shape and place.dtype == theirs[name].dtype == dtype
        assert torch.equal(place.read().float(), given[name].float())
        assert torch.equal(theirs[name].float(), given[name].float())
        assert torch.equal(place.read(torch.float32), given[name].to(torch.float32))


def test_a_file_that_shrinks_after_its_header_was_read_is_named(tmp_path):
    save_file({"x": torch.ones(100)}, tmp_path / "model.safetensors")
    places = checkpoint.find_weights(tmp_path)
    data = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[:-8])
    assert "ends before its tensors do" in refused(lambda: places["x"].read())
