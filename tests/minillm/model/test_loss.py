import pytest
import torch

from kernels import reference
from minillm.model.loss import CHUNK_ELEMENTS, linear_cross_entropy


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("masked", ["none", "some", "all", "ignored", "weighted"])
@pytest.mark.parametrize("z_loss", [None, 0.0, 0.1])
@pytest.mark.parametrize("n", [1, 40, 64])
def test_chunks_give_the_references_loss_and_gradients(monkeypatch, softcap, masked, z_loss, n):
    monkeypatch.setitem(CHUNK_ELEMENTS, "cpu", 16 * 50)  # chunks of 16 rows
    generator = torch.Generator().manual_seed(n)
    targets = torch.randint(0, 50, (n,), generator=generator)
    masks = {"some": torch.arange(n) % 3 > 0, "all": torch.zeros(n, dtype=torch.bool), "weighted": torch.arange(n) / 9}
    mask = masks.get(masked)
    if masked == "ignored":
        targets[::3] = -100
    results = []
    for function in (reference.linear_cross_entropy, linear_cross_entropy):
        generator.manual_seed(7)
        x = torch.randn(n, 12, generator=generator, requires_grad=True)
        weight = torch.randn(50, 12, generator=generator, requires_grad=True)
        loss = function(x, weight, targets, mask, softcap, z_loss)
        loss, penalty = (loss, torch.zeros(())) if z_loss is None else loss
        assert not penalty.requires_grad
        (loss * 0.3).backward()
        results.append((loss.detach(), penalty, x.grad, weight.grad))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_frozen_weights_and_inputs_get_no_gradient():
    x, weight = torch.randn(5, 4, requires_grad=True), torch.randn(9, 4)
    linear_cross_entropy(x, weight, torch.zeros(5, dtype=torch.long)).backward()
    assert x.grad is not None and weight.grad is None
    x, weight = torch.randn(5, 4), torch.randn(9, 4, requires_grad=True)
    linear_cross_entropy(x, weight, torch.zeros(5, dtype=torch.long)).backward()
    assert x.grad is None and weight.grad is not None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_mean_is_a_weight_for_each_row(dtype):
    """1 / 2²⁰ is nothing in fp16, times a probability: the gradients must survive it."""
    x, weight = (
        torch.randn(40, 12, dtype=dtype, requires_grad=True),
        torch.randn(50, 12, dtype=dtype, requires_grad=True),
    )
    targets, scale = torch.randint(0, 50, (40,)), 2.0**-20
    whole = linear_cross_entropy(x, weight, targets)
    mean = linear_cross_entropy(x, weight, targets, torch.full((40,), scale)) / scale
    torch.testing.assert_close(
        torch.autograd.grad(mean, (x, weight)), torch.autograd.grad(whole, (x, weight)), atol=1e-3, rtol=1e-3
    )


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("function", [linear_cross_entropy, reference.linear_cross_entropy])
def test_the_z_loss_is_palms_formula(monkeypatch, function, softcap):
    """Σ m (−log p + ζ log² Z) and its gradients, written out in fp64; beside it the second term alone."""
    monkeypatch.setitem(CHUNK_ELEMENTS, "cpu", 16 * 50)  # chunks of 16 rows
    x = torch.randn(40, 12, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(50, 12, dtype=torch.float64, requires_grad=True)
    targets, m = torch.randint(0, 50, (40,)), torch.rand(40)
    z = x @ weight.T if softcap is None else softcap * torch.tanh(x @ weight.T / softcap)
    log_z = z.exp().sum(-1).log()
    added = 1e-2 * (m * log_z**2).sum()
    exact = (m * (log_z - z[torch.arange(40), targets])).sum() + added
    expected = torch.autograd.grad(exact, (x, weight))
    loss, penalty = function(x, weight, targets, m, softcap, 1e-2)
    close = dict(rtol=1e-5, atol=1e-5, check_dtype=False)  # the softmax is in fp32
    torch.testing.assert_close((loss, penalty), (exact, added), **close)
    torch.testing.assert_close(torch.autograd.grad(loss, (x, weight)), expected, **close)


def test_under_autocast_it_is_as_exact_as_torch():
    """Error against fp32 no larger than twice that of autocast's own linear and cross_entropy."""
    x, weight = torch.randn(64, 32), torch.randn(100, 32)
    targets = torch.randint(0, 100, (64,))

    def gradients(function, dtype):
        a, w = x.clone().requires_grad_(), weight.clone().requires_grad_()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = function(a, w)
        loss.backward()
        assert a.grad.dtype == w.grad.dtype == torch.float32
        return loss.detach(), a.grad, w.grad

    def ours(a, w):
        return linear_cross_entropy(a, w, targets)

    def torchs(a, w):
        return torch.nn.functional.cross_entropy((a @ w.T).float(), targets, reduction="sum")

    exact, rough = gradients(torchs, torch.float32), gradients(torchs, torch.bfloat16)
    for e, r, o in zip(exact, rough, gradients(ours, torch.bfloat16), strict=True):
        assert (o - e).norm() <= 2 * (r - e).norm() + 1e-3 * e.norm()


@pytest.mark.parametrize("z_loss", [None, 0.1])
@pytest.mark.parametrize("masked", [False, True])
def test_compiled_whole_it_is_the_same(masked, z_loss):
    mask = torch.arange(40) % 2 == 0 if masked else None
    targets = torch.randint(0, 50, (40,))
    targets[::5] = -100
    x, weight = torch.randn(40, 12, requires_grad=True), torch.randn(50, 12, requires_grad=True)
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    loss = compiled(x, weight, targets, mask, None, z_loss)
    expected = reference.linear_cross_entropy(x, weight, targets, mask, None, z_loss)
    if z_loss is not None:
        (loss, penalty), (expected, exact) = loss, expected
        torch.testing.assert_close(penalty, exact)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(
        torch.autograd.grad(loss, (x, weight)), torch.autograd.grad(expected, (x, weight)), atol=1e-5, rtol=1e-5
    )
