"""How ops are called: past the dispatcher where only autograd sees them, by it where anything else has to."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from kernels.attention.attention import attention
from kernels.attention.decode import decode_attention
from kernels.linear_cross_entropy import linear_cross_entropy
from kernels.optimizers.newton_schulz import symmetric_product
from kernels.quant_matmul import quant_matmul
from kernels.rms_norm import add_rms_norm, rms_norm
from kernels.rope import rope
from kernels.shared import launch
from kernels.swiglu import swiglu
from tests.kernels.check import DEVICE, draw
from tests.kernels.test_quant_matmul import weight


def angles():
    return draw(8, 8, seed=8), draw(8, 8, seed=9)


# name: function, shapes of its differentiable inputs, library ops that it and its gradient call
OPS = {
    "rms_norm": (lambda x, w: rms_norm(x, w, 0.1), [(4, 32), (32,)], ["rms_norm", "rms_norm_backward"]),
    "add_rms_norm": (
        lambda x, d, w: add_rms_norm(x, d, w, 0.1), [(4, 32), (4, 32), (32,)], ["rms_norm", "rms_norm_backward"],
    ),
    "swiglu": (swiglu, [(4, 32), (4, 32)], ["swiglu", "swiglu_backward"]),
    "rope": (lambda q, k: rope(q, k, *angles()), [(1, 8, 4, 16), (1, 8, 2, 16)], ["rope", "rope"]),
    "rope with norms": (
        lambda q, k, v, w: rope(q, k, *angles(), v, w), [(1, 8, 4, 16), (1, 8, 2, 16), (16,), (16,)],
        ["rope", "rope_norm_backward"],
    ),
    "attention": (
        lambda q, k, v: attention(q, k, v, return_lse=True), [(1, 8, 4, 16), (1, 8, 2, 16), (1, 8, 2, 16)],
        ["attention", "attention_backward"],
    ),
    "linear_cross_entropy": (
        lambda x, w: linear_cross_entropy(x, w, torch.arange(4, device=DEVICE)), [(4, 32), (8, 32)],
        ["linear_cross_entropy", "linear_cross_entropy_backward"],
    ),
    "quant_matmul": (
        lambda x: quant_matmul(x, weight(8, 16, 64)), [(4, 64)],
        ["quant_matmul", "quant_matmul_backward"],
    ),
}  # fmt: skip
ONCE = [name for name in OPS if name not in ("rope", "quant_matmul")]


def inputs(name):
    return [draw(*shape, seed=seed).requires_grad_() for seed, shape in enumerate(OPS[name][1])]


def results(function, *tensors):
    """Outputs and gradients."""
    outputs = function(*tensors)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return *outputs, *torch.autograd.grad([x.square().sum() for x in outputs], tensors)


class Seen(TorchDispatchMode):
    """Notes which ops of the library are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "minillm":
            self.names.append(function._opname)
        return function(*args, **(kwargs or {}))


@pytest.fixture
def no_library(monkeypatch):
    """Calls of library ops fail."""

    def fail(self, *arguments):
        raise AssertionError("the dispatcher was called")

    monkeypatch.setattr(torch.library.CustomOpDef, "__call__", fail)


@pytest.mark.parametrize("name", OPS)
def test_the_library_and_the_short_way_give_the_same_bits(name, request):
    function, _, names = OPS[name]
    with Seen() as seen:
        by_library = results(function, *inputs(name))
    assert seen.names == names
    request.getfixturevalue("no_library")
    for a, b in zip(results(function, *inputs(name)), by_library, strict=True):
        assert torch.equal(a, b) and a.requires_grad == b.requires_grad
    with torch.no_grad():
        plain = function(*inputs(name))
    for a, b in zip(plain if isinstance(plain, tuple) else [plain], by_library, strict=False):
        assert torch.equal(a, b) and a.grad_fn is None


def test_ops_without_a_gradient_take_the_short_way(no_library):
    assert symmetric_product(draw(1, 4, 8)).shape == (1, 4, 4)
    assert decode_attention(draw(1, 1, 2, 16), draw(1, 8, 2, 16), draw(1, 8, 2, 16)).shape == (1, 1, 2, 16)


@pytest.mark.parametrize("name", OPS)
def test_only_gradients_that_are_needed(name):
    function, shapes, _ = OPS[name]
    for needed in range(len(shapes)):
        tensors = [x if i == needed else x.detach() for i, x in enumerate(inputs(name))]
        outputs = function(*tensors)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        sum(x.square().sum() for x in outputs if x.requires_grad).backward()
        assert [x.grad is not None for x in tensors] == [i == needed for i in range(len(shapes))]


@pytest.mark.parametrize("name", ONCE)
@pytest.mark.parametrize("squared", [False, True])
def test_a_second_derivative_is_refused(name, squared):
    tensors = inputs(name)
    outputs = OPS[name][0](*tensors)
    loss = sum(x.square().sum() if squared else x.sum() for x in (outputs if isinstance(outputs, tuple) else [outputs]))
    with pytest.raises(RuntimeError, match=r"no autograd formula|no second derivative"):
        first = torch.autograd.grad(loss, tensors, create_graph=True)
        sum(x.square().sum() + (0 * y).sum() for x, y in zip(first, tensors, strict=True)).backward()


def test_a_rotation_has_a_second_derivative():
    """Lengths stay: the gradient of ‖rotated q‖² is 2 q, and of its squared norm 8 q."""
    q, k = draw(1, 8, 4, 16).requires_grad_(), draw(1, 8, 2, 16)
    turn = angles()[0]
    rotated, _ = rope(q, k, turn.cos(), turn.sin())
    (first,) = torch.autograd.grad(rotated.square().sum(), q, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), q)
    assert torch.allclose(first, 2 * q, atol=1e-5) and torch.allclose(second, 8 * q, atol=1e-4)


@pytest.mark.parametrize("name", ["rms_norm", "add_rms_norm", "swiglu", "attention"])
def test_shapes_alone(name):
    """Fake tensors and those of the meta device: nothing is launched."""
    function, shapes, _ = OPS[name]
    real = [tuple(x.shape) for x in results(function, *inputs(name))]
    with FakeTensorMode():
        fake = results(function, *(torch.empty(*shape, device=DEVICE, requires_grad=True) for shape in shapes))
        assert [tuple(x.shape) for x in fake] == real
    meta = results(function, *(torch.empty(*shape, device="meta", requires_grad=True) for shape in shapes))
    assert [tuple(x.shape) for x in meta] == real and all(x.is_meta for x in meta)


def test_a_traced_graph_holds_the_library_ops():
    gate, up = draw(4, 32), draw(4, 32, seed=1)
    graph = make_fx(lambda a, b: swiglu(a, b))(gate, up)
    assert any("minillm.swiglu" in str(node.target) for node in graph.graph.nodes)
    assert torch.equal(graph(gate, up), swiglu(gate, up))


def test_transforms_of_functions():
    gate, up = draw(3, 4, 32), draw(3, 4, 32, seed=1)
    assert torch.equal(torch.func.vmap(swiglu)(gate, up), swiglu(gate, up))


def test_activation_checkpointing(no_library):
    gate, up = inputs("swiglu")

    def twice(a, b):
        return swiglu(swiglu(a, b), b)

    plain = torch.autograd.grad(twice(gate, up).sum(), (gate, up))
    again = torch.autograd.grad(checkpoint(twice, gate, up, use_reentrant=False).sum(), (gate, up))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_tensors_of_other_classes_go_by_the_library():
    class Other(torch.Tensor):
        pass

    assert launch.watched([draw(2).as_subclass(Other)])
    assert not launch.watched([draw(2), torch.nn.Parameter(draw(2))])


@pytest.mark.parametrize(("index", "changes"), [(0, []), (1, [torch.device("cuda", 1)])])
def test_a_kernel_is_started_where_its_tensors_are(index, changes, monkeypatch):
    changed, started = [], []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda device: changed.append(device) or nullcontext())
    kernel = {(3,): lambda *arguments, **settings: started.append(settings)}
    launch.run(kernel, (3,), SimpleNamespace(device=torch.device("cuda", index)), BLOCK=8)
    assert changed == changes and started == [{"BLOCK": 8}]


@pytest.mark.parametrize("n", [1, 2, 3, 63, 64, 65, 100000])
def test_sizes_of_blocks(n):
    power = launch.next_power_of_2(n)
    assert power >= n > power // 2 and power & (power - 1) == 0
    assert [launch.cdiv(n, 64), launch.cdiv(0, 64)] == [(n + 63) // 64, 0]
