"""The Hopper kernels without a Hopper GPU: their source runs in a model of Gluon, against the specification."""

import pytest
import torch

from kernels import attention_sm90, attention_sm90_backward, attention_sm90_tiles, launch
from kernels.bench_attention import _Apart
from kernels import reference
from tests.kernels import gluon_model
from tests.kernels.check import DEVICE, compare, draw, error, layouts, poisoned, run  # noqa: F401
from tests.kernels.test_attention import inputs, spans_of

MODULES = (attention_sm90, attention_sm90_backward, attention_sm90_tiles)


@pytest.fixture
def model(monkeypatch):
    gluon_model.install(monkeypatch, MODULES, launch)


def ours(q, k, v, spans=None):
    return _Apart.apply(q, k, v, spans, attention_sm90.forward, attention_sm90_backward.backward)


def check(tensors, grad, spans=None):
    compare(lambda *t: ours(*t, spans), lambda *t: reference.attention(*t, spans=spans)[0], tensors, [grad])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("length", [128, 129, 200, 256, 447])
@pytest.mark.parametrize("size", [64, 128])
def test_lengths(size, length, dtype, model, poisoned):  # noqa: F811
    check(*inputs(1, length, length, 2, 2, size, dtype))
