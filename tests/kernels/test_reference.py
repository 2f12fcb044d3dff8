"""The specification itself: formulas worked out by hand or by another route, and gradients by gradcheck."""

import math

import pytest
import torch

from kernels import reference
from tests.kernels.check import error

torch.manual_seed(0)


def test_an_error_is_measured_where_the_tensors_are(monkeypatch):
    """Thousands of comparisons: on the host each would wait for copies and for one core."""
    monkeypatch.setattr(torch.Tensor, "cpu", lambda *_: pytest.fail("copied to the host"))
    x = torch.tensor([3.0, 4.0])
    assert error(1.5 * x, x.double()) == 0.5 and error(x, 0 * x) == 5.0
    assert math.isnan(error(x * math.nan, x)) and error(x / 0, x) == math.inf


def test_rms_norm_by_hand():
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    out = reference.rms_norm(x, torch.tensor([1.0, 2.0]), eps=0.5)
    root = math.sqrt(12.5 + 0.5)
    torch.testing.assert_close(out, torch.tensor([[3 / root, 8 / root], [0.0, 0.0]]))


def test_rope_is_a_rotation_in_the_complex_plane():
    """(x[i] + j x[i + D/2]) e^(j angle), written with complex numbers instead of sines."""
    q, k = torch.randn(2, 5, 4, 8), torch.randn(2, 5, 2, 8)
    angle = torch.randn(5, 4)
    for x, out in zip((q, k), reference.rope(q, k, angle.cos(), angle.sin()), strict=True):
        turned = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones(5, 4), angle)[None, :, None]
        torch.testing.assert_close(out, torch.cat([turned.real, turned.imag], dim=-1))


def test_rope_scores_depend_on_distance_alone():
    q, k = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16)
    frequency = 10000 ** (-torch.arange(8) / 8)

    def score(i, j):
        tables = [(p * frequency).view(1, 8) for p in (i, j)]
        a, _ = reference.rope(q, k, tables[0].cos(), tables[0].sin())
        _, b = reference.rope(q, k, tables[1].cos(), tables[1].sin())
        return (a * b).sum()

    torch.testing.assert_close(score(3, 1), score(40, 38), atol=1e-4, rtol=1e-4)


def slow_attention(q, k, v, causal, window, documents, softcap):
    """One query, one head, one key at a time."""
    batch, q_len, heads, size = q.shape
    k_len, group = k.shape[1], heads // k.shape[2]
    out, lse = torch.zeros_like(q), torch.zeros(batch, heads, q_len)
    for b in range(batch):
        for h in range(heads):
            for row in range(q_len):
                i = row + k_len - q_len
                scores = {}
                for j in range(k_len):
                    if causal and j > i:
                        continue
                    if window is not None and abs(i - j) >= window:
                        continue
                    if documents is not None and documents[b, i] != documents[b, j]:
                        continue
                    s = float(q[b, row, h] @ k[b, j, h // group]) / math.sqrt(size)
                    scores[j] = s if softcap is None else softcap * math.tanh(s / softcap)
                total = sum(math.exp(s) for s in scores.values())
                lse[b, h, row] = math.log(total) if scores else -math.inf
                for j, s in scores.items():
                    out[b, row, h] += math.exp(s) / total * v[b, j, h // group]
    return out, lse


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("q_len", "k_len"), [(6, 6), (1, 6), (3, 6)])
def test_attention_against_loops(causal, window, packed, q_len, k_len):
    q, k, v = torch.randn(2, q_len, 4, 8), torch.randn(2, k_len, 2, 8), torch.randn(2, k_len, 2, 8)
    documents = torch.tensor([[0, 0, 1, 1, 1, 1], [0, 1, 1, 2, 2, 2]]) if packed else None
    for softcap in (None, 1.5):
        options = dict(causal=causal, window=window, softcap=softcap)
        spans = None if documents is None else reference.document_spans(documents)
        out, lse = reference.attention(q, k, v, spans=spans, **options)
        slow, slow_lse = slow_attention(q, k, v, documents=documents, **options)
        torch.testing.assert_close(out, slow, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(lse, slow_lse, atol=1e-5, rtol=1e-4)


def test_document_spans_by_hand():
    spans = reference.document_spans(torch.tensor([[0, 0, 3, 3, 3, 9], [1, 2, 2, 2, 2, 2]]))
    assert spans[0].tolist() == [[0, 2], [0, 2], [2, 5], [2, 5], [2, 5], [5, 6]]
    assert spans[1].tolist() == [[0, 1], [1, 6], [1, 6], [1, 6], [1, 6], [1, 6]]


def test_a_query_that_sees_nothing_gives_zeros_and_no_nan():
    q, k, v = (torch.randn(1, 3, 1, 4, requires_grad=True) for _ in range(3))
    out, lse = reference.attention(q, k, v, causal=False, window=0)
    assert (lse == -math.inf).all()
    out.sum().backward()
    assert (out == 0).all() and all((x.grad == 0).all() for x in (q, k, v))


def test_linear_cross_entropy_by_hand():
    x, weight = torch.randn(5, 3), torch.randn(7, 3)
    targets, mask = torch.tensor([0, 6, 2, 2, 1]), torch.tensor([True, False, True, True, True])
    expected = 0.0
    for row in range(5):
        logits = [2.0 * math.tanh(float(x[row] @ w) / 2.0) for w in weight]
        if mask[row]:
            expected -= math.log(math.exp(logits[targets[row]]) / sum(map(math.exp, logits)))
    out = reference.linear_cross_entropy(x, weight, targets, mask, softcap=2.0)
    torch.testing.assert_close(out.item(), expected, atol=1e-4, rtol=1e-5)


def test_gradients_by_finite_differences():
    def double(*shape):
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    check = torch.autograd.gradcheck
    assert check(lambda x, w: reference.rms_norm(x, w, 1e-5), (double(3, 4), double(4)))
    assert check(reference.swiglu, (double(3, 4), double(3, 4)))
    angle = torch.randn(3, 2, dtype=torch.float64)
    assert check(lambda q, k: reference.rope(q, k, angle.cos(), angle.sin()), (double(1, 3, 2, 4), double(1, 3, 1, 4)))
    qkv = (double(1, 3, 2, 4), double(1, 4, 1, 4), double(1, 4, 1, 4))
    assert check(lambda q, k, v: reference.attention(q, k, v, window=3, softcap=2.0)[0], qkv)
    targets, mask = torch.tensor([1, 0, 4]), torch.tensor([True, True, False])
    assert check(lambda x, w: reference.linear_cross_entropy(x, w, targets, mask, 3.0), (double(3, 4), double(5, 4)))
