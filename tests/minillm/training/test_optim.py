import math
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import load_file, save_file

from minillm.base.errors import UserError
from minillm.base.options import option
from minillm.model import ops
from minillm.model.config import ModelConfig
from minillm.model.transformer import Transformer
from minillm.training import optim, starting_model
from minillm.training.optim import AdamW, Muon, build_optimizers, orthogonalize
from train_sft import Config as Sft

CONFIG = ModelConfig(vocab_size=50, dim=32, n_layers=2, n_heads=4, n_kv_heads=2, qkv_bias=True)


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 12, 40), (2, 40, 12)])
def test_orthogonalize_keeps_the_singular_vectors_and_levels_the_values(shape):
    """Against the singular value decomposition: O(U S Vᵀ) has the same U and V, and values near 1."""
    g = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, s, vh = torch.linalg.svd(g, full_matrices=False)
    inner = u.mT @ orthogonalize(g) @ vh.mT  # diagonal exactly if the singular vectors are kept
    values = inner.diagonal(dim1=1, dim2=2)
    assert (inner - torch.diag_embed(values)).abs().max() < 1e-3
    strong = s / s.norm(dim=1, keepdim=True) > 0.05
    assert values[strong].min() > 0.6 and values.max() < 1.3


def test_muon_step_by_hand():
    """Two steps of the formula in the class's docstring, written out."""
    w = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
    p = torch.nn.Parameter(w.clone())
    muon, momentum = Muon([p], lr=0.1, momentum=0.9, weight_decay=0.5), torch.zeros_like(w)
    for step in range(2):
        grad = torch.randn(6, 4, generator=torch.Generator().manual_seed(2 + step))
        p.grad = grad.clone()
        muon.step()
        momentum = 0.9 * momentum + grad
        update = orthogonalize((grad + 0.9 * momentum)[None])[0]
        w = w * (1 - 0.1 * 0.5) - 0.1 * 0.2 * math.sqrt(6) * update
        torch.testing.assert_close(p.detach(), w)
        assert torch.equal(p.grad, grad)  # the gradient is not written to


def test_muon_update_has_adamws_size():
    """The root mean square of one update is about 0.2 lr, whatever the shape (arXiv:2502.16982)."""
    for shape in ((64, 64), (32, 128), (128, 32)):
        p = torch.nn.Parameter(torch.zeros(shape))
        p.grad = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        Muon([p], lr=1.0).step()
        assert 0.15 < p.detach().square().mean().sqrt() < 0.25


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_every_parameter_is_in_exactly_one_group_and_only_matrices_decay(kind):
    model = Transformer(CONFIG)
    optimizers = build_optimizers(model, kind, lr=1e-3, weight_decay=0.1)
    seen = [(p, g["weight_decay"]) for o in optimizers for g in o.param_groups for p in g["params"]]
    assert len(seen) == len({id(p) for p, _ in seen}) == len(list(model.parameters()))
    assert all(decay == (0.1 if p.dim() >= 2 else 0.0) for p, decay in seen)
    muon = {id(p) for o in optimizers if isinstance(o, Muon) for g in o.param_groups for p in g["params"]}
    names = {n for n, p in model.named_parameters() if id(p) in muon}
    hidden = {n for n, p in model.named_parameters() if n.startswith("layers.") and p.dim() == 2}
    assert names == (hidden if kind == "muon" else set())


def test_each_parameter_has_a_count_of_steps_of_its_own(tmp_path):
    """By our kernel too: torch may go on counting where it stopped, a file holds each, and they may differ."""
    start = [torch.randn(4, 3, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]

    def train(way):
        params = [torch.nn.Parameter(w.clone()) for w in start]
        ops.select(way[0])
        optimizer = AdamW([dict(params=params, weight_decay=0.1)], lr=0.1, betas=(0.9, 0.95))
        for step, implementation in enumerate(way):
            ops.select(implementation)
            for p, w in zip(params, start, strict=True):
                p.grad = w * (step + 1)
            params[2].grad = None if step == 0 else params[2].grad  # joins later
            optimizer.step()
        save_file({str(i): optimizer.state[p]["step"] for i, p in enumerate(params)}, tmp_path / "steps")
        assert {k: v.item() for k, v in load_file(tmp_path / "steps").items()} == {"0": 4, "1": 4, "2": 3}
        return params

    try:
        for mine, theirs in zip(train(["triton"] * 3 + ["torch"]), train(["torch"] * 4), strict=True):
            assert torch.allclose(mine, theirs, atol=1e-6)
    finally:
        ops.select("auto")


def test_nothing_to_train_is_said():
    model = Transformer(CONFIG).requires_grad_(False)
    with pytest.raises(UserError, match="nothing to train"):
        build_optimizers(model, "adamw", lr=1e-3, weight_decay=0.1)


def test_an_optimizer_without_a_known_learning_rate_is_refused_by_name_and_builds_with_a_given_one(monkeypatch):
    monkeypatch.setitem(optim.OPTIMIZERS, "sgd", optim.Choice(torch.optim.SGD))
    monkeypatch.setitem(optim.OPTIMIZERS, "half", optim.Choice(torch.optim.SGD, lr=0.5))

    @dataclass(frozen=True)
    class Config(Sft):  # --optimizer as it is declared where the table has these entries from the start
        optimizer: str | None = option(None, "an optimizer", tuple(optim.OPTIMIZERS))

    refusal = "--optimizer {}: no learning rate is known for it with --tune {}; give one by --lr"
    for kind, tune in (("sgd", "full"), ("sgd", "lora"), ("half", "lora")):
        with pytest.raises(UserError, match=refusal.format(kind, tune)):
            starting_model.choose_optimizer(Config(optimizer=kind, tune=tune), 64)
        assert starting_model.choose_optimizer(Config(optimizer=kind, tune=tune, lr=0.5), 64).lr == 0.5
    assert starting_model.choose_optimizer(Config(optimizer="half"), 64).lr == 0.5 / 8
    (built,) = build_optimizers(Transformer(CONFIG), "sgd", lr=0.5, weight_decay=0.1)
    assert [group["weight_decay"] for group in built.param_groups] == [0.1, 0.0]
    with pytest.raises(UserError, match="--optimizer sgdm: choose one of muon, adamw, sgd"):
        build_optimizers(Transformer(CONFIG), "sgdm", lr=0.5, weight_decay=0.1)
