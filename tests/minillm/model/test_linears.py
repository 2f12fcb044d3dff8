"""What a GPU would be asked for, on tensors without numbers; what comes out is compared in test_ops.py."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from minillm.model import linears

VIEWS = ("aten.t.default", "prim.device.default")


class Calls(TorchDispatchMode):
    """Notes the names of the ops that are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names += [] if str(func) in VIEWS else [str(func)]
        return func(*args, **(kwargs or {}))


def test_gradients_of_weights_end_in_fp32_without_a_cast():
    with FakeTensorMode():
        dy, x = (torch.empty(64, n, device="cuda", dtype=torch.bfloat16) for n in (32, 16))
        with Calls() as calls:
            product = linears._product(dy.t(), x, torch.float32)
    assert (product.shape, product.dtype) == ((32, 16), torch.float32)
    assert calls.names == ["aten.mm.dtype"]


def test_gradients_of_the_input_are_added_by_the_products():
    grads, weights = [torch.ones(4, n) for n in (2, 3, 5)], [torch.ones(n, 6) for n in (2, 3, 5)]
    with Calls() as calls:
        found = linears._input_gradient(grads, weights)
    assert calls.names == ["aten.mm.default", "aten.addmm_.default", "aten.addmm_.default"]
    assert torch.equal(found, torch.full((4, 6), 10.0))


@pytest.mark.parametrize(
    ("own", "product"), [("bfloat16", "bfloat16"), ("bfloat16", "float16"), ("bfloat16", "float32")]
)
def test_backward_keeps_no_cast_that_is_as_wide_as_the_weight(own, product):
    weight, kept = torch.ones(4, 6, dtype=getattr(torch, own)), []
    x = torch.ones(2, 6, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()), lambda _: None):
        linears.Products.apply(x, getattr(torch, product), weight, None)
    assert weight.data_ptr() in kept


def test_compiled_the_sum_is_one_op():
    torch.library.opcheck(
        linears._input_gradient_op, ([torch.ones(4, 2), torch.ones(4, 3)], [torch.ones(2, 6), torch.ones(3, 6)])
    )
    graphs = []

    def backend(graph, inputs):
        graphs.append(str(graph.code))
        return graph.forward

    weights = [torch.randn(n, 6, requires_grad=True) for n in (2, 3)]

    def step(x):
        outs = linears.Products.apply(x, torch.float32, weights[0], None, weights[1], None)
        return sum(y.sum() for y in outs)

    from torch._dynamo.backends.common import aot_autograd

    x = torch.randn(4, 6, requires_grad=True)
    torch.compile(step, fullgraph=True, backend=aot_autograd(fw_compiler=backend, bw_compiler=backend))(x).backward()
    assert "minillm.input_gradient" in graphs[-1] and "addmm" not in graphs[-1]
    assert torch.allclose(x.grad, sum(w.sum(0) for w in weights).expand(4, 6), atol=1e-6)
