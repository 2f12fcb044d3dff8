"""The optimizers' cases: one step of AdamW on all parameters of a model of 1.1 billion, one of Muon on its matrices.

Work: for AdamW 28 bytes an element (reads parameter, gradient and two moments, writes all but the gradient); for Muon
the operations of five Newton–Schulz iterations on an m × n matrix, m ≤ n, as plain products: 4·m²·n + 2·m³ each.
"""

import functools
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from kernels import reference
from kernels.bench.case import Place, Side, Update

LAYERS, WIDTH, KEYS, FEED_FORWARD, VOCABULARY = 22, 2048, 256, 5632, 32000  # 32 query and 4 key heads of 64
ADAM = dict(lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
MUON = dict(momentum=0.95, steps=5, coefficients=(3.4445, -4.775, 2.0315))
LR, DECAY = 1e-3, 0.1


def layer_shapes(place: Place) -> list[tuple[int, int]]:
    """Of a layer's matrices: queries, keys, values, output; gate, up, down."""
    full = (WIDTH, KEYS, FEED_FORWARD)
    c, k, f = place.choose(full, full, (32, 16, 80))
    return [(c, c), (k, c), (k, c), (c, c), (f, c), (f, c), (c, f)]


def fitting_layers(place: Place, bytes_each: int) -> int:
    """How many of the model's layers fit into three quarters of the free memory, at so many bytes an element."""
    layers = place.choose(LAYERS, 4, 1)
    if place.device.type != "cuda":
        return layers
    free_bytes, _ = torch.cuda.mem_get_info(place.device)
    bytes_outside = bytes_each * 2 * VOCABULARY * WIDTH  # embedding and output
    bytes_a_layer = bytes_each * sum(math.prod(shape) for shape in layer_shapes(place))
    return max(1, min(layers, int((0.75 * free_bytes - bytes_outside) / bytes_a_layer)))


def adamw(place: Place) -> Iterator[Update]:
    layers = fitting_layers(place, 24)
    c = layer_shapes(place)[0][0]
    vocabulary = place.choose(VOCABULARY, VOCABULARY, 100)
    of_a_layer = [*layer_shapes(place), (c,), (c,)]  # its matrices and two norms
    shapes = layers * of_a_layer + [(vocabulary, c), (vocabulary, c), (c,)]
    elements = sum(math.prod(shape) for shape in shapes)

    def make() -> dict[str, list[Tensor]]:
        names = {"params": 0.02, "grads": 1e-3, "exp_avgs": 1e-3, "exp_avg_sqs": 1e-3}
        tensors = {
            name: [place.draw(*shape, seed=i, dtype=torch.float32, scale=scale) for shape in shapes]
            for i, (name, scale) in enumerate(names.items())
        }
        for x in tensors["exp_avg_sqs"]:
            x.square_()
        return tensors

    def ours() -> Callable:
        from kernels.optimizers.adamw import adamw

        return lambda tensors: functools.partial(adamw, *tensors.values(), step=1, **ADAM)

    def torchs(**how: bool) -> Callable:
        def bind(tensors: dict[str, list[Tensor]]) -> Callable[[], object]:
            optimizer = torch.optim.AdamW(tensors["params"], **ADAM, **how)
            for p, g, m, v in zip(*tensors.values(), strict=True):
                p.grad = g
                step = torch.zeros((), device=p.device if how.get("fused") else "cpu")
                optimizer.state[p] = {"step": step, "exp_avg": m, "exp_avg_sq": v}
            return optimizer.step

        return bind

    def expected(tensors: dict[str, list[Tensor]]) -> list[Tensor]:
        return [reference.adamw(*each, step=1, **ADAM)[0] for each in zip(*tensors.values(), strict=True)]

    sides = {
        "ours": Side(ours), "torch, fused": Side(lambda: torchs(fused=True)),
        "torch, foreach": Side(lambda: torchs(foreach=True)),
    }  # fmt: skip
    name = f"{elements:,} fp32 parameters"
    yield Update("adamw", name, "GB/s", {"step": 28 * elements}, make, expected, sides, limit=1e-5)


def muon(place: Place) -> Iterator[Update]:
    layers = fitting_layers(place, 16)
    shapes = layers * layer_shapes(place)
    short = [(min(shape), max(shape)) for shape in shapes]
    operations = MUON["steps"] * sum(4 * m * m * n + 2 * m**3 for m, n in short)

    def make() -> dict[str, list[Tensor]]:
        names = {"params": 0.02, "grads": 1e-3, "momentum": 1e-3}
        return {
            name: [place.draw(*shape, seed=i, dtype=torch.float32, scale=scale) for shape in shapes]
            for i, (name, scale) in enumerate(names.items())
        }

    def ours() -> Callable:
        from kernels.optimizers.muon import muon

        def bind(tensors: dict[str, list[Tensor]]) -> Callable[[], None]:
            groups: dict[torch.Size, list[tuple[Tensor, ...]]] = {}
            for each in zip(*tensors.values(), strict=True):
                groups.setdefault(each[0].shape, []).append(each)
            lists = {shape: [list(part) for part in zip(*members, strict=True)] for shape, members in groups.items()}

            def step() -> None:
                for shape, three in lists.items():
                    muon(*three, rate=rate(shape), decay=LR * DECAY, **MUON)

            return step

        return bind

    def in_fp32() -> Callable:
        from kernels.optimizers.newton_schulz import newton_schulz

        def step(tensors: dict[str, list[Tensor]]) -> None:
            for p, new in zip(tensors["params"], stepped(tensors, newton_schulz), strict=True):
                p.copy_(new)

        return lambda tensors: functools.partial(step, tensors)

    def torchs(tensors: dict[str, list[Tensor]]) -> Callable[[], object]:
        options = dict(momentum=MUON["momentum"], ns_coefficients=MUON["coefficients"], ns_steps=MUON["steps"])
        optimizer = torch.optim.Muon(
            tensors["params"], lr=LR, weight_decay=DECAY, adjust_lr_fn="match_rms_adamw", **options
        )
        for p, g, m in zip(*tensors.values(), strict=True):
            p.grad = g
            optimizer.state[p]["momentum_buffer"] = (1 - MUON["momentum"]) * m  # theirs is a mean, ours a sum
        return optimizer.step

    # Without a GPU only the iteration is checked, in fp32: Triton's interpreter computes wrongly with bf16.
    sides = {"ours": Side(in_fp32 if place.size == "small" else ours), "torch.optim.Muon": Side(lambda: torchs)}
    elements = sum(map(math.prod, shapes))
    limit = 0.05  # both compute in bf16, whose rounding five iterations amplify
    name = f"{len(shapes)} matrices, {elements:,} elements"
    right = functools.partial(stepped, orthogonalize=reference.newton_schulz)
    yield Update("muon", name, "TFLOP/s", {"step": operations}, make, right, sides, limit, few=7)


def stepped(tensors: dict[str, list[Tensor]], orthogonalize: Callable) -> list[Tensor]:
    """What one step of Muon makes of the parameters."""
    found = []
    for p, g, m in zip(*tensors.values(), strict=True):
        ahead = g + MUON["momentum"] * (g + MUON["momentum"] * m)
        update = orthogonalize(ahead[None], MUON["steps"], MUON["coefficients"])[0]
        found.append(p - LR * DECAY * p - rate(p.shape) * update)
    return found


def rate(shape: torch.Size) -> float:
    """How far a step goes, such that its root mean square is that of AdamW's (Liu et al. 2025, arXiv:2502.16982)."""
    return LR * 0.2 * math.sqrt(max(shape))
