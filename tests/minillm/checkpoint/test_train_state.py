"""Checkpoints: exact round trips, through kills and full disks, and what is refused on resuming."""

import json
import os
import random
import re
import resource
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from minillm.base import files
from minillm.base.errors import UserError
from minillm.checkpoint import run_folder, tensor_files, train_state
from minillm.checkpoint.together import Source, tensors_to_write
from minillm.distributed.ranks import Ranks
from minillm.training import optim

ALONE = Ranks(0, 1, torch.device("cpu"))


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: place.read() for name, place in tensor_files.find_weights(folder).items()}


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
    checkpoint = train_state.Checkpoint(
        model=tensors_to_write("model", {name: Source.of(p) for name, p in model.named_parameters()}, limit=None),
        write_beside=lambda folder: (folder / "tokenizer.model").write_bytes(b"words"),
        state=state,
        optimizers=optimizers,
        named_parameters=dict(model.named_parameters()),
    )
    under_way = train_state.save(home, step, ALONE, checkpoint)
    under_way.finish()
    return under_way.path


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
    train_state.restore_optimizers(folder, restored, names)
    train(resumed, restored, range(5, 10))
    for (name, ours), theirs in zip(resumed.state_dict().items(), straight.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name
    sources, described = train_state.flatten_optimizers(restored, names)
    wanted, same = train_state.flatten_optimizers(optimizers, dict(straight.named_parameters()))
    assert described == same and sources.keys() == wanted.keys()
    tensors = {name: source.values for name, source in sources.items()}
    wanted = {name: source.values for name, source in wanted.items()}
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
    state = train_state.read_state(folder)
    assert state["step"] == 60 and state["time_s"] == 2.0 and state["config"] == {"lr": 0.01}


def test_an_optimizer_that_has_not_stepped_and_options_of_now(tmp_path):
    model = small_model(0)
    folder = save(tmp_path, 0, model, adamw(model))
    optimizers = [torch.optim.AdamW(model.parameters(), lr=0.5, weight_decay=0.3)]
    train_state.restore_optimizers(folder, optimizers, dict(model.named_parameters()))
    assert not optimizers[0].state
    train(model, optimizers, range(1))
    folder = save(tmp_path, 1, model, optimizers)
    other = [torch.optim.AdamW(model.parameters(), lr=0.125, weight_decay=0.25)]
    train_state.restore_optimizers(folder, other, dict(model.named_parameters()))
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
            run_folder.clean_stale(tmp_path)
            newest = run_folder.newest_checkpoint(tmp_path)
            step = run_folder.step_of(newest) if newest else 0
            while True:
                model.weight.data.fill_(step)
                save(tmp_path, step, model, optimizers, note=step)
                os.write(writer, b".")
                run_folder.prune(tmp_path, 2)
                step += 1
        os.close(writer)
        assert os.read(reader, 1) == os.read(reader, 1) == b"."  # one that was there again, and the next
        time.sleep(rng.uniform(0, 0.15))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(reader)
        run_folder.clean_stale(tmp_path)
        newest = run_folder.newest_checkpoint(tmp_path, log=pytest.fail)
        step = run_folder.step_of(newest)
        assert step >= last and train_state.read_state(newest)["note"] == step
        assert all((tensor == step).all() for name, tensor in read_weights(newest).items() if name == "weight")
        last = step
    assert last >= 10  # each process came at least one further


@pytest.mark.parametrize("large", ["model", "optimizer"])
def test_a_full_disk_names_the_checkpoint(tmp_path, large):
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
            small = train_state.Checkpoint([], lambda folder: None, {}, steps, dict(big.named_parameters()))
            text = refused(lambda: train_state.save(tmp_path, 2, ALONE, small).finish())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "step-00000002" in text and "File too large" in text
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert files.verify_folder(tmp_path / "step-00000001") == []


# ---- refusals on resuming


def test_an_optimizer_of_another_set_up_is_refused_in_one_line_by_its_option(tmp_path):
    model = small_model(0)
    optimizers = adamw(model)
    train(model, optimizers, range(2))
    folder = save(tmp_path, 2, model, optimizers)
    names = dict(model.named_parameters())
    other = muon(model)
    text = refused(lambda: train_state.restore_optimizers(folder, other, names))
    assert "--optimizer: adamw in the checkpoint, muon now (layers.0.weight and 1 more); give what it" in text
    assert not any(optimizer.state for optimizer in other)
    fewer = [torch.optim.AdamW(model["head"].parameters())]
    text = refused(lambda: train_state.restore_optimizers(folder, fewer, names))
    assert re.search(r"not trained any more \([\w.]+ and 3 more\)", text)
    more = {**names, "new.weight": nn.Parameter(torch.ones(2))}
    text = refused(lambda: train_state.restore_optimizers(folder, [torch.optim.AdamW(more.values())], more))
    assert "not trained before (new.weight); " in text


def test_optimizer_tensors_missing_extra_and_misshaped_are_all_named(tmp_path):
    model = small_model(0)
    optimizers = adamw(model)
    train(model, optimizers, range(2))
    folder = save(tmp_path, 2, model, optimizers)
    file = folder / "resume" / "optimizer.safetensors"
    tensors = tensor_files.load_tensors(file)
    del tensors["head.bias/exp_avg"]
    tensors["more"] = torch.ones(1)
    tensors["head.weight/exp_avg_sq"] = torch.ones(4, 3)
    save_file(tensors, file)
    fresh = adamw(model)
    text = refused(lambda: train_state.restore_optimizers(folder, fresh, dict(model.named_parameters())))
    assert "head.bias/exp_avg is missing" in text and "more is not expected" in text
    assert "head.weight/exp_avg_sq is (4, 3), expected (3, 4)" in text and str(file) in text
    assert not fresh[0].state


def test_a_folder_without_training_state_says_what_to_do(tmp_path):
    assert "--init_from" in refused(lambda: train_state.read_state(tmp_path))
    (tmp_path / "resume").mkdir()
    for text in ("{", "[]", "{}"):
        (tmp_path / "resume" / "train_state.json").write_text(text)
        assert "train_state.json: damaged" in refused(lambda: train_state.read_state(tmp_path))
    (tmp_path / "resume" / "train_state.json").write_text('{"format": 2}')
    assert "format 2" in refused(lambda: train_state.read_state(tmp_path))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"batch_size": 320}, "data: 700 samples were read, and the next is number 2,241: 1,540 are left out"),
        ({"batch_size": 50}, "data: 700 samples were read, and the next is number 351: 350 are read again"),
        ({"batch_size": 50, "seed": 1}, "data: another order begins; some of what was read comes again"),
        ({"seq_len": 64}, "data: another order begins"),
        ({"batch_size": 50, "pack": "best_fit"}, "data: another order begins"),
    ],
)
def test_what_an_allowed_change_does_to_the_data_is_said(changes, words):
    config = {"batch_size": 100, "seed": 0, "seq_len": 128}
    saved = {"step": 7, "fingerprints": {train_state.ORDER: "a"}, "config": config}
    now = {"fingerprints": {train_state.ORDER: "b"}, "config": config | changes}
    lines = train_state.compare_fingerprints(saved, now, allow_data_change=True)
    assert any(line.startswith(words) for line in lines)


def test_fingerprints(tmp_path):
    marks = {"tokenizer": "a", "data": "b", "order": "c", "architecture": "d"}
    config = {"lr": 0.1, "betas": (0.9, 0.95), "resume": "auto", "steps": 10, "seed": 0, "lora_rank": 8}
    saved = json.loads(json.dumps({"step": 7, "fingerprints": marks, "config": config, "threads": 2, "world": 1}))

    def compare(allow=False, config=config, **changed):
        now = {"fingerprints": {**marks, **changed}, "config": config, "threads": 2, "world": 1}
        return train_state.compare_fingerprints(saved, now, allow, "out/x/step-00000007", free={"lr", "steps"})

    assert compare() == []
    text = refused(lambda: compare(data="x"))
    assert (
        text.startswith("out/x/step-00000007 was made with another data: choose")
        and "another data" in text
        and "--allow_data_change" in text
        and "--out" in text
    )
    lines = compare(True, data="x", order="y")
    assert len(lines) == 3 and "another order begins" in lines[2]
    for name in ("tokenizer", "architecture"):
        text = refused(lambda name=name: compare(True, **{name: "x"}))
        assert name in text and "--allow_data_change" not in text
    text = refused(lambda: compare(data="x", tokenizer="y", architecture="z"))
    assert all(name in text for name in ("data", "tokenizer", "architecture"))

    # the content of data counts, and says no more of data that are others anyway
    content = f"{train_state.CONTENT}data"
    saved["fingerprints"][content] = "w"
    assert refused(lambda: compare(**{content: "x"})).startswith(
        "out/x/step-00000007 was made with another content of the data: choose"
    )
    assert len(compare(True, **{content: "x"})) == 2 and "another order begins" in compare(True, **{content: "x"})[1]
    assert "with another data: choose" in refused(lambda: compare(**{content: "x", "data": "y"}))
    del saved["fingerprints"][content]

    other = {"tuning": "x", "batch size, sequence length or seed": "y"}
    text = refused(lambda: compare(config={**config, "lora_rank": 4, "seed": 1, "steps": 20}, **other))
    assert "another batch size/sequence length/seed and another tuning (--seed: 0 in the checkpoint, 1 now; " in text
    assert "--lora_rank: 8 in the checkpoint, 4 now): choose" in text and "steps" not in text
    assert compare(config={**config, "lr": 0.2, "resume": "x"}) == ["--lr: 0.1 in the checkpoint, 0.2 now"]
    (line,) = compare(config={**config, "lr": None})
    assert line == "--lr: 0.1 in the checkpoint, none now"  # as it is typed
    lines = train_state.compare_fingerprints(saved, {"fingerprints": marks, "threads": 4, "world": 2})
    assert len(lines) == 2 and "threads: 2 in the checkpoint, 4 now" in lines[0] and "ranks" in lines[1]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(step=-1), "step is -1: must be at least 0"),
        (dict(step=True), "step is True, not a whole number"),
        (dict(step=2.0), "step is 2.0, not a whole number"),
        (dict(format=9), "format 9, but this version reads 1"),
        (dict(optimizer=[]), r"optimizer is \[\], not an object of names and objects"),
        (dict(optimizer={"w": {"kind": 3, "keys": []}}), "optimizer: w: damaged: kind is 3, not a text"),
        (dict(config={"init_from": ["x"]}), r"config: damaged: init_from is \['x'\], not a text"),
        (dict(fingerprints={"data": 1}), "not an object of names and texts"),
        (dict(time_s="1"), "time_s is '1', not a number"),
    ],
    ids=range(9),
)
def test_each_value_of_the_state_is_of_its_kind(tmp_path, change, words):
    (tmp_path / "resume").mkdir()
    state = {"format": 1, "step": 2, "config": None, "optimizer": {"w": {"kind": "AdamW", "keys": ["step"]}}}
    (tmp_path / "resume" / "train_state.json").write_text(json.dumps(state))
    assert train_state.read_state(tmp_path)["step"] == 2 and "config" not in train_state.read_state(tmp_path)
    (tmp_path / "resume" / "train_state.json").write_text(json.dumps(state | change))
    assert re.search(words, refused(lambda: train_state.read_state(tmp_path)))
