"""The whole model through our kernels (interpreted where there is no GPU) against the model through torch's ops."""

import shutil
import sysconfig

import pytest
import torch

from minillm import UserError, ops, optim
from minillm.kv_cache import KVCache
from tests.kernels.check import DEVICE, draw, error
from tests.minillm.test_model import OPTIONS, build, tokens_of

DOCUMENTS = torch.tensor([[0] * 6 + [1] * 9 + [4] * 5, [0] * 20], dtype=torch.int32)


@pytest.fixture(autouse=True)
def select_auto_again():
    yield
    ops.select("auto")


def loss_and_gradients(model, implementation, dtype=None, call=None, **inputs):
    ops.select(implementation)
    model.zero_grad()
    tokens = tokens_of(2, 20).to(DEVICE)
    with torch.autocast(DEVICE, dtype or torch.bfloat16, enabled=dtype is not None):
        loss = (model if call is None else call)(tokens, tokens.roll(-1, 1), **inputs)
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters())]


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["whole", "packed"])
def test_the_model_through_kernels_is_the_model(name, documents):
    model = build(**OPTIONS[name]).to(DEVICE)
    inputs = {"mask": (torch.arange(20) % 3 > 0).expand(2, 20).to(DEVICE)}
    inputs |= {} if documents is None else {"documents": documents.to(DEVICE)}
    ours, torchs = (loss_and_gradients(model, name, **inputs) for name in ("triton", "torch"))
    for a, b in zip(ours, torchs, strict=True):
        assert error(a, b) < 2e-5


def test_under_autocast_it_errs_no_more_than_torch():
    model = build(qk_norm=True).to(DEVICE)
    exact = loss_and_gradients(model, "torch")
    ours, torchs = (loss_and_gradients(model, name, torch.bfloat16) for name in ("triton", "torch"))
    for a, b, c in zip(ours, torchs, exact, strict=True):
        assert error(a, c) <= 2 * error(b, c) + 1e-3


def test_with_activation_checkpointing_and_compiled_it_is_the_same():
    model = build().to(DEVICE)
    plain = loss_and_gradients(model, "triton")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for a, b in zip(plain, loss_and_gradients(model, "triton", call=compiled), strict=True):
        assert error(a, b) < 1e-6
    model.checkpoint_activations = True
    model.train()
    for a, b in zip(plain, loss_and_gradients(model, "triton"), strict=True):
        assert error(a, b) < 1e-6


@torch.no_grad()
def test_a_cache_with_padding_through_kernels():
    model, tokens = build(window=9).to(DEVICE), tokens_of(2, 12).to(DEVICE)
    results = []
    for implementation in ("triton", "torch"):
        ops.select(implementation)
        cache = KVCache(model.config, 2, 14, padding=torch.tensor([7, 0]), device=DEVICE)
        results.append(torch.cat([model(tokens, cache=cache), model(tokens[:, :2], cache=cache)], dim=1))
    ours, torchs = results
    assert error(ours[0, 7:], torchs[0, 7:]) < 1e-5 and error(ours[1], torchs[1]) < 1e-5


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_optimizers_through_kernels_step_as_torchs_do_and_share_their_state(kind):
    """Two steps of one, two of the other on its state, against four of torch's."""
    models = {name: build(qkv_bias=True).to(DEVICE) for name in ("torch", "triton")}
    states = {}
    for name, first, second in (("torch", "torch", "torch"), ("triton", "triton", "torch")):
        model, state = models[name], None
        for implementation in (first, second):
            ops.select(implementation)
            optimizers = optim.build_optimizers(model, kind, lr=1e-2, weight_decay=0.1)
            if state is not None:
                for optimizer, saved in zip(optimizers, state, strict=True):
                    optimizer.load_state_dict(saved | {"param_groups": optimizer.state_dict()["param_groups"]})
            for step in range(2):
                for i, p in enumerate(model.parameters()):
                    p.grad = draw(*p.shape, seed=100 * step + i)
                for optimizer in optimizers:
                    optimizer.step()
            state = [optimizer.state_dict() for optimizer in optimizers]
        states[name] = state
    # Newton–Schulz is iterated in bf16 by the kernels: singular values differ by a few thousandths
    limit = 1e-6 if kind == "adamw" else 1e-2
    for a, b in zip(models["triton"].parameters(), models["torch"].parameters(), strict=True):
        assert error(a, b) < limit
    for a, b in zip(states["triton"], states["torch"], strict=True):
        assert a["state"].keys() == b["state"].keys() and all(
            a["state"][i].keys() == b["state"][i].keys() for i in a["state"]
        )


def test_what_is_used_is_said():
    ops.select("triton")
    assert ops.describe(torch.device(DEVICE)).startswith("ops: triton")
    ops.select("torch")
    assert ops.describe(torch.device(DEVICE)).startswith("ops: torch")


def test_without_a_gpu_the_kernels_are_refused(monkeypatch):
    ops.select("triton")
    monkeypatch.setattr(ops._triton.launch, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="no CUDA GPU here"):
        ops.select("triton")


@pytest.mark.parametrize("lacking", ["gcc", "python3-dev"])
def test_where_triton_cannot_build_torch_is_taken_and_the_remedy_said(lacking, monkeypatch, tmp_path):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None if lacking == "gcc" else name)
    monkeypatch.setattr(sysconfig, "get_path", lambda *which: str(tmp_path))
    monkeypatch.setattr(ops, "_triton", None)
    line = ops.describe(torch.device("cuda"))
    assert line.startswith("ops: torch") and f"apt install {lacking}" in line and "\n" not in line
    assert "apt install" not in ops.describe(torch.device("cpu"))
    ops._import_kernels()
    monkeypatch.setattr(ops._triton.launch, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(UserError, match=f"implementation triton: .*apt install {lacking}.*--impl torch"):
        ops.select("triton")
