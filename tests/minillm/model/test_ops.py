"""The whole model through our kernels (interpreted where there is no GPU) against the model through torch's ops."""

import shutil
import sysconfig

import pytest
import torch

from kernels import reference
from kernels.shared import proxy_fence
from minillm.base.errors import UserError
from minillm.model import one_token, ops
from minillm.model.kv_cache import KVCache
from minillm.training import optim
from tests.kernels.check import DEVICE, draw, error
from tests.minillm.model_options import OPTIONS, build, tokens_of

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


@pytest.mark.parametrize("frozen", [(), (1,), (0, 1, 2)])
@pytest.mark.parametrize("trained_input", [True, False])
def test_products_of_one_input_have_the_gradients_of_each_alone(frozen, trained_input):
    layers = [torch.nn.Linear(24, n, bias=n > 1, device=DEVICE) for n in (8, 40, 1)]
    for number in frozen:
        layers[number].requires_grad_(False)
    x = draw(2, 5, 24).requires_grad_(trained_input)
    factors = [draw(5, 2, n, seed=n).transpose(0, 1) for n in (8, 40, 1)]  # gradients in another order in memory
    leaves = [t for t in (x, *(p for m in layers for p in m.parameters())) if t.requires_grad]
    found = []
    for implementation in ("triton", "torch"):
        ops.select(implementation)
        outs = ops.linears(x, *layers)
        loss = sum((y * f).sum() for y, f in zip(outs, factors, strict=True))
        found.append([*outs, *(torch.autograd.grad(loss, leaves) if leaves else ())])
    assert len(found[0]) == 3 + len(leaves)
    assert all(error(a, b) < 1e-6 for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_of_one_input_round_less_than_torchs(dtype):
    layers = [torch.nn.Linear(64, 32, bias=n == 1, device=DEVICE) for n in range(3)]
    x = draw(1, 512, 64).to(dtype).requires_grad_()
    leaves = [x, *(p for m in layers for p in m.parameters())]

    def gradients(implementation, enabled):
        ops.select(implementation)
        given = x if enabled else x.float()
        with torch.autocast(DEVICE, dtype, enabled=enabled):
            outs = ops.linears(given, *layers)
        assert all(y.dtype == (dtype if enabled else torch.float32) for y in outs)
        return torch.autograd.grad(sum(y.float().square().sum() for y in outs), leaves)

    exact, ours, torchs = gradients("torch", False), gradients("triton", True), gradients("torch", True)
    assert [g.dtype for g in ours] == [leaf.dtype for leaf in leaves]
    assert error(ours[0], exact[0]) < error(torchs[0], exact[0])
    assert all(error(a, c) <= 1.01 * error(b, c) for a, b, c in zip(ours[1:], torchs[1:], exact[1:], strict=True))


def test_products_of_one_input_are_no_views_and_are_differentiated_once():
    ops.select("triton")
    layer, x = torch.nn.Linear(8, 4, bias=False, device=DEVICE), draw(3, 8).requires_grad_()
    ops.linears(x, layer)[0].mul_(2).sum().backward()
    assert torch.allclose(x.grad, 2 * layer.weight.sum(0).expand(3, 8))
    (grad,) = torch.autograd.grad(ops.linears(x, layer)[0].square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_layers_that_are_more_than_products_are_called():
    ops.select("triton")
    x, calls = draw(3, 8).requires_grad_(), []
    hooks = ("forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook")
    for name in hooks:
        layer = torch.nn.Linear(8, 4, bias=False, device=DEVICE)
        getattr(layer, f"register_{name}")(lambda *_, name=name: calls.append(name))
        ops.linears(x, layer)[0].sum().backward()
    assert calls == list(hooks)
    normed = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(8, 4, device=DEVICE))
    for layer in (normed, torch.nn.Sequential(normed)):
        assert torch.equal(ops.linears(x, layer)[0], layer(x))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("width", [7, 64, 77])
@torch.no_grad()
def test_a_product_by_blocks_is_the_product(width, bias, monkeypatch):
    """Of one token; several rows and matrices that are not contiguous go the usual way, and hooks are called."""
    calls = []
    by_blocks = one_token.linear_by_blocks
    monkeypatch.setattr(one_token, "LARGE_MATRIX", 0)
    monkeypatch.setattr(one_token, "linear_by_blocks", lambda *args: calls.append(args) or by_blocks(*args))
    layer = torch.nn.Linear(40, width, bias=bias)
    for x, n_calls in ((draw(1, 1, 40), 1), (draw(2, 1, 40), 1), (draw(1, 3, 40), 1)):
        assert error(ops.linear(x, layer), layer(x)) < 1e-6
        assert len(calls) == n_calls
    layer.weight.data = layer.weight.data.t().contiguous().t()
    assert error(ops.linear(draw(1, 1, 40), layer), layer(draw(1, 1, 40))) < 1e-6
    layer.register_forward_hook(lambda module, args, out: 2 * out)
    assert error(ops.linear(draw(1, 1, 40), layer), layer(draw(1, 1, 40))) < 1e-6
    assert len(calls) == 1


@pytest.mark.parametrize("queries", [5, 3])
def test_attention_of_fewer_keys_than_queries_is_the_reference(queries):
    """The last query stands at the last key, and the first see none."""
    q, k, v = draw(1, queries, 2, 16), draw(1, 3, 2, 16, seed=1), draw(1, 3, 2, 16, seed=2)
    expected = reference.attention(q.double(), k.double(), v.double())[0]
    for implementation in ("torch", "triton"):
        ops.select(implementation)
        assert error(ops.attention(q, k, v), expected) < 1e-6


@torch.no_grad()
def test_a_cache_with_padding_through_kernels():
    model, tokens = build(window=9).to(DEVICE), tokens_of(2, 12).to(DEVICE)
    results = []
    for implementation in ("triton", "torch"):
        ops.select(implementation)
        cache = KVCache(model.config, 2, 33, device=DEVICE)
        parts = [model(tokens, cache=cache)[:, :5]]
        cache.shorten([5, 12])
        parts += [model(tokens[:, :n], cache=cache) for n in (2, 1)]
        parts.append(model(tokens_of(2, 17, seed=1).to(DEVICE), cache=cache))  # more than the kernel for a cache takes
        results.append(torch.cat(parts, dim=1))
    ours, torchs = results
    assert error(ours, torchs) < 1e-5


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
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    with pytest.raises(UserError, match=f"implementation triton: .*apt install {lacking}.*--impl torch"):
        ops.select("triton")


def test_a_gpu_too_old_for_the_kernels_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    monkeypatch.setattr(ops, "_triton", None)
    why = "compute capability 8.0 or more, and this one has 7.5"
    assert why in ops.describe(torch.device("cuda"))
    ops._import_kernels()
    monkeypatch.setattr(ops._triton.launch, "INTERPRETED", False)
    with pytest.raises(UserError, match=f"implementation triton: .*{why}.*--impl torch"):
        ops.select("triton")


def test_heads_too_large_for_the_kernels_are_left_to_torch():
    model = build(head_dim=320).to(DEVICE)
    ours, torchs = (loss_and_gradients(model, name) for name in ("triton", "torch"))
    for a, b in zip(ours, torchs, strict=True):
        assert error(a, b) < 2e-5


@pytest.mark.parametrize(("capability", "old", "taken"), [((10, 0), True, False), ((10, 0), False, True),
                                                          ((9, 0), True, True), ((12, 0), True, True)])  # fmt: skip
def test_datacenter_blackwell_needs_a_triton_that_fences_copies(capability, old, taken, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(proxy_fence, "LEFT_OUT_BY_TRITON", old)
    monkeypatch.setattr(ops, "_triton", ops._triton if taken else None)
    assert ("Triton 3.7.1" in ops._lacking()) == (not taken)
    assert ("Triton 3.7.1" in ops.describe(torch.device("cuda"))) == (not taken)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("n_rows", [4, 7])
def test_products_of_many_rows_by_onednn_are_those_of_the_layer(n_rows, bias, monkeypatch):
    monkeypatch.setattr(one_token, "MANY_ROWS", 4)
    monkeypatch.setattr(one_token, "MANY_PRODUCTS", 1)
    called = []
    monkeypatch.setattr(one_token.F, "linear", lambda *arguments: called.append(arguments))
    layer = torch.nn.Linear(24, 10, bias=bias)
    x = torch.randn(n_rows, 1, 24, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        (y,) = ops.linears(x, layer)
        expected = x.double() @ layer.weight.double().T + (layer.bias.double() if bias else 0)
        torch.testing.assert_close(y.double(), expected, atol=1e-6, rtol=1e-5)
    assert not called


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("n_queries", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_over_rows_of_different_lengths_is_that_of_each_row(window, n_queries, dtype):
    """Both forms in which the rows' ends are given, with groups of heads; keys beyond an end are as large as any."""
    ends = torch.tensor([4, 9, 2, 7])
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(4, n_queries, 6, 8, generator=generator).to(dtype)
    k, v = (torch.randn(4, 9, 2, 8, generator=generator).to(dtype) for _ in "kv")
    rows = []
    for row, end in enumerate(ends.tolist()):
        inputs = (x[row : row + 1].double() for x in (q, k[:, :end], v[:, :end]))
        rows.append(reference.attention(*inputs, causal=True, window=window)[0])
    seen = ops.visible_keys(ends, n_queries, 9, window, dtype)
    assert seen.shape == (4, 1, n_queries, 9) and seen.dtype == dtype
    with torch.inference_mode():
        for form in (ends, seen):
            out = ops.cached_attention(q, k, v, form, window=window)
            assert error(out.double(), torch.cat(rows)) < (1e-5 if dtype == torch.float32 else 0.02)
