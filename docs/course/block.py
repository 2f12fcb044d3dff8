"""Lesson 4: the block, and what each of its parts is for.

    python docs/course/block.py

Trains the same small model several times, each time with one part taken away, and compares what they have learned.
"""

import lesson
import numpy as np
import torch
from torch import Tensor, nn

from minillm.datasets import TokenBins, TokenWindows
from minillm.model import Transformer, preset
from minillm.training import build_optimizers

STEPS = 120
LR = 4e-3


class Silent(nn.Module):
    """A part that adds nothing to the residual stream."""

    def forward(self, x: Tensor, *_) -> Tensor:
        return torch.zeros_like(x)


class NoNorm(nn.Module):
    """In place of a norm: x as it is."""

    def forward(self, x: Tensor) -> Tensor:
        return x

    def add_and_norm(self, x: Tensor, delta: Tensor | None) -> tuple[Tensor, Tensor]:
        x = x if delta is None else x + delta
        return x, x


def without_residual(norm: nn.Module) -> None:
    """What a part computes takes the place of the stream, and is not added to it."""

    def add_and_norm(x: Tensor, delta: Tensor | None) -> tuple[Tensor, Tensor]:
        x = x if delta is None else delta
        return x, norm(x)

    norm.add_and_norm = add_and_norm


def build(vocab_size: int, part: str, n_layers: int) -> Transformer:
    """A small model without a part; "": the whole."""
    model = Transformer(preset("tiny", vocab_size=vocab_size, n_layers=n_layers))
    model.init_weights(seed=0)
    for layer in model.layers:
        if part == "attention":
            layer.self_attn = Silent()
        if part == "feed-forward network":
            layer.mlp = Silent()
        if part == "norms":
            layer.input_layernorm = layer.post_attention_layernorm = NoNorm()
    if part == "residual stream":
        for module in model.modules():
            if hasattr(module, "add_and_norm"):
                without_residual(module)
    return model


def train(model: Transformer, windows: TokenWindows, steps: int) -> float:
    """Train with AdamW; returns the norm of the first gradient of the first layer's matrices."""
    (optimizer,) = build_optimizers(model, "adamw", lr=LR, weight_decay=0.1)
    first = None
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = LR * min(1, (step + 1) / 10) * min(1, 2 * (steps - step) / steps)
        batch = windows.batch(np.arange(16 * step, 16 * step + 16))
        loss = model(batch.x, batch.y, mask=batch.mask) / batch.n_targets()
        loss.backward()
        grads = [p.grad for p in model.layers[0].parameters() if p.grad is not None and p.dim() == 2]
        first = first or float(torch.stack([grad.norm() for grad in grads]).norm())
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return first


@torch.no_grad()
def bits_per_byte(model: Transformer, windows: TokenWindows, bytes_a_token: float) -> float:
    """On 64 windows of the validation split."""
    batch = windows.batch(np.arange(64))
    nats = float(model(batch.x, batch.y, mask=batch.mask)) / batch.n_targets()
    return lesson.bits_per_byte(nats, bytes_a_token)


def main() -> None:
    chosen = lesson.options(__doc__)
    bins = TokenBins(chosen.data, "train")
    windows, val = (
        TokenWindows([(TokenBins(chosen.data, split), 1.0)], seq_len=64, seed=0) for split in ("train", "val")
    )
    val_bins = TokenBins(chosen.data, "val")
    bytes_a_token = val_bins.document_bytes.sum() / (val_bins.n_tokens - val_bins.n_documents)  # without each bos
    steps, n_layers = (5, 2) if chosen.quick else (STEPS, 4)

    print(f"{'without':22} bits per byte   first gradient of layer 0   parameters")
    for part in ("", "attention", "feed-forward network", "norms", "residual stream"):
        model = build(bins.vocab_size, part, n_layers)
        n_parameters = sum(p.numel() for p in model.parameters())
        gradient = train(model, windows, steps)
        score = bits_per_byte(model, val, bytes_a_token)
        print(f"{part or '(nothing: the whole)':22} {score:13.3f} {gradient:27.1e} {n_parameters:12,}", flush=True)


if __name__ == "__main__":
    lesson.run(main)
