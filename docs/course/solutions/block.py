"""Lesson 4, one way to do it."""

from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See the exercise."""
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight


def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """With r = 1/√(mean x² + eps): y = x r w, and ∂r/∂x_j = −r³ x_j / C."""
    r = (x.square().mean(-1, keepdim=True) + eps).rsqrt()  # (T, 1)
    g = dy * weight  # (T, C)
    dx = r * g - r**3 * x * (g * x).mean(-1, keepdim=True)
    return dx, (dy * x * r).sum(0)


GROWTH = "as √n"  # variances add up
AFTER_NORM = "stays"
