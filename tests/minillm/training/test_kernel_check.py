"""A GPU whose kernels are right is asked once, one whose are not goes on with torch's ops."""

import contextlib
import fcntl
import json
import os
import subprocess
import sys
import time

import pytest
import torch

import train_pretrain
import train_sft
from kernels import reference
from minillm.commands.model_options import ModelOptions, load_model
from minillm.distributed.ranks import Ranks
from minillm.model import ops
from minillm.training import kernel_check
from tests.kernels.check import DEVICE, trying


@pytest.fixture(autouse=True)
def select_auto_again():
    yield
    ops.select("auto")


@pytest.fixture
def short(monkeypatch):
    """On a CPU a few tokens have to do."""
    if DEVICE == "cpu":
        monkeypatch.setattr(kernel_check, "LENGTHS", (20, 12))
    large = {"STACK": 1, "BLOCK": 256, "STEP": 128, "num_warps": 4, "num_stages": 1}
    with trying("newton_schulz", large) if DEVICE == "cpu" else contextlib.nullcontext():
        yield


@pytest.mark.slow
def test_the_kernels_are_found_right(short):
    assert kernel_check.compare(torch.device(DEVICE), "triton") == []


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_they_are_found_right_in_other_dtypes(dtype, short):
    assert kernel_check.compare(torch.device(DEVICE), "triton", dtype=dtype) == []


@pytest.mark.slow
def test_a_wrong_kernel_is_found(monkeypatch, short):
    ops.select("triton")  # imports the kernels
    right = ops._triton.swiglu.swiglu
    monkeypatch.setattr(ops._triton.swiglu, "swiglu", lambda gate, up: 1.1 * right(gate, up))
    problems = kernel_check.compare(torch.device(DEVICE), "triton")
    assert any("gradient of layers.0.mlp.down_proj.weight is off by" in line for line in problems)
    assert ops.selected() == "triton"


@pytest.mark.slow
def test_a_cap_that_the_loss_forgets_is_found(monkeypatch, short):
    ops.select("triton")
    right = ops._triton.linear_cross_entropy.linear_cross_entropy
    monkeypatch.setattr(ops._triton.linear_cross_entropy, "linear_cross_entropy", lambda *given: right(*given[:4]))
    problems = kernel_check.compare(torch.device(DEVICE), "triton")
    assert any("cap: gradient of lm_head.weight is off by" in line for line in problems)
    assert all(line.startswith("QK-norm, window and cap: ") for line in problems)


def test_products_with_a_quantized_base_are_found_right(monkeypatch, short):
    monkeypatch.setattr(kernel_check, "MODELS", {})
    assert kernel_check.compare(torch.device(DEVICE), "triton", quantized=True) == []


@pytest.mark.parametrize("rows", [1, 300])
def test_a_wrong_product_is_found_where_a_base_is_quantized(rows, monkeypatch, short):
    monkeypatch.setattr(kernel_check, "MODELS", {})
    right = reference.quant_matmul
    ops.select("triton")
    monkeypatch.setattr(
        ops._triton.quant_matmul, "quant_matmul", lambda x, weight: right(x, weight) * (1.1 if len(x) == rows else 1.0)
    )
    problems = kernel_check.compare(torch.device(DEVICE), "triton", quantized=True)
    assert [line.partition(" is off by")[0] for line in problems] == [
        f"{bits} bits: {what} of {rows} rows{kind}"
        for bits in (8, 4)
        for kind in ("", ", fp32")
        for what in ("product", "gradient")
    ]
    assert kernel_check.compare(torch.device(DEVICE), "triton") == []


BEGUN = "comparing on cuda:1\n"
CRASH = """Traceback (most recent call last):
torch.AcceleratorError: CUDA error: an illegal memory access was encountered
Compile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.
"""
BUSY = "torch.AcceleratorError: CUDA error: all CUDA-capable devices are busy or unavailable"
FULL = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 MiB."


class Gpu:
    """What `KernelCheck` sees of a GPU, and how often it asked a process."""

    def __init__(self, monkeypatch, folder):
        ops._import_kernels()
        self.asked, self.lines = 0, []
        self.answer = subprocess.CompletedProcess([], 0, BEGUN, "")
        monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
        monkeypatch.setattr(ops, "fused", lambda x: ops.selected() == "auto")
        monkeypatch.setattr(torch, "empty", lambda *_, **__: None)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
        monkeypatch.setattr(subprocess, "Popen", self.start)

    def start(self, command, **_):
        assert command[1:4] == ["-m", "minillm.training.kernel_check", "1"]
        self.dtype, *self.named = command[4:]
        self.asked, self.killed = self.asked + 1, False
        return self

    returncode = property(lambda self: self.answer.returncode)

    def communicate(self, timeout):
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer.stdout, self.answer.stderr

    def kill(self):
        self.killed = True

    def check(self, base_bits: int | None = None, **how) -> str:
        kernel_check.KernelCheck(Ranks(0, 1, torch.device("cuda", 1)), self.lines.append, base_bits, **how).settle()
        return ops.selected()


def test_right_kernels_are_asked_about_once(monkeypatch, tmp_path):
    gpu = Gpu(monkeypatch, tmp_path)
    assert gpu.check() == gpu.check() == "auto" and gpu.asked == 1
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "another GPU")
    assert gpu.check() == "auto" and gpu.asked == 2


def test_a_quantized_base_is_asked_about_by_itself(monkeypatch, tmp_path):
    gpu = Gpu(monkeypatch, tmp_path)
    for bits in (None, 16):
        gpu.check(bits)
        assert gpu.asked == 1 and gpu.named == []
    for bits in (8, 4):
        assert gpu.check(bits) == "auto"
        assert gpu.asked == 2 and gpu.named == ["quantized"]


def test_another_dtype_and_tuned_settings_are_asked_about_anew(monkeypatch, tmp_path):
    gpu = Gpu(monkeypatch, tmp_path)
    for n_asked, dtype in enumerate((torch.bfloat16, torch.float16, torch.float32), 1):
        for _ in range(2):
            assert gpu.check(dtype=dtype) == "auto" and gpu.asked == n_asked
        assert gpu.dtype == str(dtype).removeprefix("torch.")
    ops.tuned_file().write_text('{"a GPU": {"adamw": {"CHUNK": 4096}}}')
    assert gpu.check() == "auto" and gpu.asked == 4


@pytest.mark.parametrize(("said", "why"), [("", BUSY), (BEGUN, FULL)])
@pytest.mark.parametrize("problems", [[], ["loss is off by 3e-1", "and more"], RuntimeError("CUDA error: no\n memory")])
def test_where_a_second_process_has_no_room_the_run_itself_compares(problems, said, why, monkeypatch, tmp_path):
    def compare(device, quantized, dtype):
        assert dtype == torch.bfloat16
        assert device == torch.device("cuda", 1) and quantized
        if isinstance(problems, Exception):
            raise problems
        return problems

    gpu = Gpu(monkeypatch, tmp_path)
    gpu.answer = subprocess.CompletedProcess([], 1, said, f"Traceback\n{why}\nFor debugging consider …\n")
    monkeypatch.setattr(kernel_check, "compare", compare)
    assert gpu.check(base_bits=4) == ("torch" if problems else "auto")
    assert gpu.lines[1] == f"ops: no second process can compare them ({why}); comparing in this one"
    words = (
        "not be compared (CUDA error: no memory)" if isinstance(problems, Exception) else "not right on this GPU (loss"
    )
    assert words in gpu.lines[-1] if problems else len(gpu.lines) == 2
    ops.select("auto")
    gpu.check(base_bits=4)
    assert gpu.asked == (2 if problems else 1)  # what holds is remembered


def test_a_process_that_is_not_let_onto_a_gpu_says_nothing_but_why():
    """So one that said something has begun."""
    command = [sys.executable, "-m", "minillm.training.kernel_check", "0", "bfloat16"]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=env, cwd=kernel_check.ROOT, capture_output=True, text=True, timeout=50)
    assert done.returncode == 1 and done.stdout == "" and "Error: " in done.stderr


class Asked(Exception):
    """Ends a command where it asks, and says about which base."""


def ask(*_, base_bits, **how):
    raise Asked(base_bits)


@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("script", [train_pretrain, train_sft])
def test_training_on_a_quantized_base_asks_about_it(script, bits, monkeypatch):
    monkeypatch.setattr(kernel_check, "KernelCheck", ask)
    quantized = ["--tune", "lora", "--base_bits", str(bits)] if bits else []
    monkeypatch.setattr(sys, "argv", ["train", "--device", "cpu", *quantized])
    with pytest.raises(Asked, match=str(bits)):
        script.main()


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_an_adapter_on_a_quantized_base_asks_about_it(bits, monkeypatch, tmp_path):
    monkeypatch.setattr(kernel_check, "KernelCheck", ask)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2}')
    (tmp_path / "minillm_base.json").write_text(json.dumps({"bits": bits}))
    with pytest.raises(Asked, match=str(bits)):
        load_model(ModelOptions(model=str(tmp_path), device="cpu"))


def test_a_model_of_its_own_has_no_quantized_base(monkeypatch, tmp_path):
    monkeypatch.setattr(kernel_check, "KernelCheck", ask)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(Asked, match="None"):
        load_model(ModelOptions(model=str(tmp_path), device="cpu"))


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (
            subprocess.CompletedProcess([], 1, BEGUN, "a warning\nloss is off by 3e-1\n"),
            "not right on this GPU (loss is",
        ),
        (
            subprocess.CompletedProcess([], 1, BEGUN, CRASH),
            "not right on this GPU (torch.AcceleratorError: CUDA error: an illegal memory access",
        ),
        (subprocess.CompletedProcess([], -9, BEGUN, ""), "not right on this GPU (no words)"),
        (subprocess.TimeoutExpired("a process", 300), "could not be compared (Command 'a process' timed out after 300"),
    ],
)
def test_wrong_failing_and_hanging_kernels_are_left_for_torchs(answer, words, monkeypatch, tmp_path):
    gpu = Gpu(monkeypatch, tmp_path)
    gpu.answer = answer
    assert gpu.check() == "torch" and gpu.killed == isinstance(answer, Exception)
    assert words in gpu.lines[-1] and "using torch's" in gpu.lines[-1]
    assert gpu.check() == "torch" and gpu.asked == 1  # chosen now, not asked again
    ops.select("auto")
    assert gpu.check() == "torch" and gpu.asked == 2  # and not remembered


def test_the_process_runs_beside_its_caller_and_ends_with_it(tmp_path):
    begun, path = tmp_path / "begun", tmp_path / "a process"
    body = f"f = open({str(begun)!r}, 'w'); fcntl.flock(f, fcntl.LOCK_EX); f.write('x'); f.flush(); time.sleep(60)"
    path.write_text(f"#!{sys.executable}\nimport fcntl, time\n{body}")
    path.chmod(0o755)
    script = f"""
import os, sys, time, torch
from minillm.distributed.ranks import Ranks
from minillm.model import ops
from minillm.training import kernel_check
ops._import_kernels()
ops.fused = lambda x: True
torch.empty = lambda *_, **__: None
torch.cuda.get_device_name = lambda _: "a GPU"
sys.executable = {str(path)!r}
kernel_check.KernelCheck(Ranks(0, 1, torch.device("cuda", 1)))
while not (os.path.exists({str(begun)!r}) and os.path.getsize({str(begun)!r})):
    time.sleep(0.01)
sys.exit("the data are not there")
"""
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", script], env=env, cwd=kernel_check.ROOT, capture_output=True, text=True, timeout=50
    )
    assert done.stderr == "the data are not there\n"
    with begun.open() as file:
        for _ in range(100):  # the lock goes with the process
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            time.sleep(0.1)
    raise AssertionError("it lives on")


def test_nothing_is_asked_where_no_kernels_run(monkeypatch, tmp_path):
    gpu = Gpu(monkeypatch, tmp_path)
    kernel_check.KernelCheck(Ranks(0, 1, torch.device("cpu")), gpu.lines.append).settle()
    ops.select("torch")
    gpu.check()
    assert gpu.asked == 0 and not gpu.lines
