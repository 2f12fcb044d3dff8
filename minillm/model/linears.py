"""Several linear layers of one input x: the gradients of x are summed by the matrix products that compute them.

For y_i = x W_iᵀ + b_i the gradients are ∂x = Σ ∂y_i W_i, ∂W_i = ∂y_iᵀ x and ∂b_i = Σ_n ∂y_i. Plain autograd has each
product write a ∂x of its own and then reads them all again to add them: for q, k and v that moves 9 N C numbers, where
5 N C suffice if each product adds to the sum so far. And under autocast it writes ∂W first in 16 bits and then again in
fp32, where the product can write fp32 directly.
"""

import torch
from torch import Tensor


def product_dtype(x: Tensor) -> torch.dtype:
    """What a matrix product rounds x to: autocast's dtype inside autocast, else x's own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class Products(torch.autograd.Function):
    """x Wᵀ + b of one x (N, C) for each W (K, C) and b (K,) or None, in `dtype`: apply(x, dtype, W, b, W, b, …)."""

    @staticmethod
    def forward(ctx, x, dtype, *weights_and_biases):
        weights, biases = weights_and_biases[::2], weights_and_biases[1::2]
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (x, *weights_and_biases)]
        x = x.to(dtype)
        kept, outputs = [], []
        for weight, bias in zip(weights, biases, strict=True):
            cast = weight.to(dtype)
            kept.append(weight if weight.itemsize <= cast.itemsize else cast)  # for the backward pass: the narrower
            if bias is None:
                outputs.append(x @ cast.t())  # (N, K)
            else:
                outputs.append(torch.addmm(bias.to(dtype), x, cast.t()))
        ctx.save_for_backward(x, *kept)
        return tuple(outputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        x, *weights = ctx.saved_tensors
        x_dtype, *dtypes = ctx.dtypes  # of x, and of W, b, W, b, …
        x_needed, _, *needed = ctx.needs_input_grad

        dx = None
        if x_needed:
            weights = [weight.to(x.dtype) for weight in weights]
            summed = _input_gradient_op if torch.compiler.is_compiling() else _input_gradient
            dx = summed(list(grads), weights).to(x_dtype)  # (N, C)

        parameter_grads = []  # of W, b, W, b, …
        for i, dy in enumerate(grads):  # (N, K)
            dw = db = None
            if needed[2 * i]:
                dw = _product(dy.t(), x, dtypes[2 * i])  # (K, C)
            if needed[2 * i + 1]:
                wide = torch.promote_types(dy.dtype, torch.float32)
                db = dy.sum(0, dtype=wide).to(dtypes[2 * i + 1])  # (K,)
            parameter_grads += [dw, db]
        return dx, None, *parameter_grads


def _input_gradient(grads: list[Tensor], weights: list[Tensor]) -> Tensor:
    """Σ dy W, (N, C): each product adds to the sum of those before it."""
    dx = grads[0] @ weights[0]
    for dy, w in zip(grads[1:], weights[1:], strict=True):
        dx.addmm_(dy, w)
    return dx


# torch.compile would turn `addmm_` into an out-of-place `addmm`, which copies the sum first: an op hides it.
_input_gradient_op = torch.library.custom_op("minillm::input_gradient", _input_gradient, mutates_args=())
_input_gradient_op.register_fake(lambda grads, weights: grads[0].new_empty(len(grads[0]), weights[0].shape[1]))


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a b in `dtype`; on a GPU, products of 16-bit matrices are written in fp32 without rounding in between."""
    if a.is_cuda and a.dtype != dtype == torch.float32:
        return torch.mm(a, b, out_dtype=dtype)
    return (a @ b).to(dtype)
