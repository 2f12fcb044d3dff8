"""Lesson 15: what a model costs, before it is trained.

    python docs/course/scaling.py

Counts the operations and the bytes of a small model as it trains, and compares them with the formulas that the planner
uses for large ones.
"""

import lesson
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from minillm.commands import plan
from minillm.model import Transformer, preset
from minillm.model.layouts import Layout, Work
from minillm.model.memory import gpu_memory
from minillm.model.size import flops_per_token, n_parameters
from minillm.training import build_optimizers


def trained_once(model: Transformer, tokens: torch.Tensor) -> tuple[int, int]:
    """Operations of a forward and a backward pass, and bytes that weights, gradients and AdamW's moments take then.

    tokens: (B, T + 1) int64.
    """
    (optimizer,) = build_optimizers(model, "adamw", lr=1e-3, weight_decay=0.1)
    # attention as plain matrix products, since the counter does not know the op that is quick on a CPU
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(tokens[:, :-1], tokens[:, 1:]).backward()
    optimizer.step()
    moments = [value for state in optimizer.state.values() for value in state.values() if value.numel() > 1]
    held = [*model.parameters(), *(parameter.grad for parameter in model.parameters()), *moments]
    return counter.get_total_flops(), sum(tensor.numel() * tensor.element_size() for tensor in held)


def best_plan(name: str, n_gpus: int, n_tokens: int) -> plan.Plan | None:
    """The quickest layout of a preset that fits H100s of 80 GB; None: there is none. n_tokens: of a step."""
    shape = preset(name, vocab_size=32000)
    step = plan.Step(shape, shape.max_seq_len, n_tokens // shape.max_seq_len, muon=False)
    gpu = plan.gpu_of(plan.Config(preset=name))
    plans = step.plans(n_gpus, gpu, plan.EFFICIENCY)
    return min((one for one in plans if one.n_bytes <= 0.9 * gpu.memory), key=lambda one: one.order, default=None)


def main() -> None:
    chosen = lesson.options(__doc__, with_corpus=False)

    # a small model: what is counted, and what the formulas say
    shape = preset("tiny", vocab_size=2048)
    model = Transformer(shape)
    model.init_weights(seed=0)
    n, length = n_parameters(shape), 64 if chosen.quick else 512
    tokens = torch.randint(shape.vocab_size, (2, length + 1), generator=torch.Generator().manual_seed(0))
    n_flops, n_bytes = trained_once(model, tokens)
    a_token = n_flops / (2 * length)
    print(f"{n:,} parameters, rows of {length} tokens")
    both = flops_per_token(shape, length)
    formulas = f"6 N = {6 * n / 1e6:.2f} M, with attention {both / 1e6:.2f} M"
    print(f"operations a token: {a_token / 1e6:.2f} M counted; {formulas}")
    print(f"bytes a parameter: {n_bytes / n:.1f} counted")

    # models that nobody here can train: on one GPU, and on 64
    print("\nmodel     parameters  GB of 16 N  on one H100   on 64: layout       GB   days for 20 N tokens")
    for name in ("124m", "1b", "8b", "70b"):
        shape = preset(name, vocab_size=32000)
        n = n_parameters(shape)
        alone = gpu_memory(shape, Work(Layout(), 1, shape.max_seq_len, shape.max_seq_len, recompute=True))
        fits = "fits" if sum(alone.values()) <= 72e9 else "no room"
        cells = "none fits"
        if best := best_plan(name, 64, 1 << 22):
            layout = best.work.layout
            days = 20 * n / (1 << 22) * best.seconds["step"] / 86400
            sizes = f"{layout.replicate} × {layout.shard} × {layout.cp} × {layout.tp}"
            cells = f"{sizes:16} {best.n_bytes / 1e9:5.1f} {days:10.2f}"
        print(f"{name:6} {n / 1e9:11.2f} G {16 * n / 1e9:11.1f}  {fits:12}  {cells}")


if __name__ == "__main__":
    lesson.run(main)
