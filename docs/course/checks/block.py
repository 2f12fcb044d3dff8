"""Whether the exercises of lesson 4 are solved."""

import torch


def drawn():
    torch.manual_seed(0)
    shapes = ((5, 16), (16,), (5, 16))
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def test_the_norm_is_torchs(answers):
    x, weight, _ = drawn()
    wanted = torch.nn.functional.rms_norm(x, (16,), weight, eps=1e-2)
    torch.testing.assert_close(answers.rms_norm(x, weight, 1e-2), wanted)


def test_its_gradient_is_that_of_autograd(answers):
    x, weight, dy = drawn()
    y = torch.nn.functional.rms_norm(x, (16,), weight, eps=1e-2)
    wanted = torch.autograd.grad(y, (x, weight), dy)
    with torch.no_grad():
        torch.testing.assert_close(answers.rms_norm_backward(dy, x, weight, 1e-2), wanted)


def test_predictions(answers, experiment):
    torch.manual_seed(0)
    stream = torch.zeros(100_000)
    for _ in range(16):
        stream += torch.randn(100_000)
    grown = min({"stays": 1, "as √n": 4, "as n": 16}.items(), key=lambda name: abs(name[1] - float(stream.std())))
    assert grown[0] == answers.GROWTH
    x = torch.randn(3, 64, dtype=torch.float64)
    ratio = float((torch.nn.functional.rms_norm(10 * x, (64,)) / torch.nn.functional.rms_norm(x, (64,))).mean())
    assert {"stays": 1.0, "× 10": 10.0, "× √10": 10**0.5}[answers.AFTER_NORM] == round(ratio, 3)
