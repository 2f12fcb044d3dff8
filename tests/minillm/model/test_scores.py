"""A model that ends in scores: one number a position, by the states that a language model would make logits of."""

import dataclasses

import pytest
import torch

from minillm.model.config import ModelConfig
from minillm.model.size import n_parameters
from minillm.model.transformer import Transformer
from tests.minillm.model_options import BASE, build, tokens_of


def test_a_score_is_the_product_of_state_and_head():
    model, tokens = build(score_head=True), tokens_of(2, 12)
    scores = model(tokens)
    assert scores.shape == (2, 12) and scores.dtype == torch.float32
    by_hand = torch.einsum("btc,c->bt", model.hidden(tokens).double(), model.score.weight[0].double())
    torch.testing.assert_close(scores.double(), by_hand, atol=1e-5, rtol=0)


def test_scores_see_no_later_token_and_no_other_document():
    model, tokens = build(score_head=True), tokens_of(1, 12)
    changed = tokens.clone()
    changed[0, 8:] = (changed[0, 8:] + 1) % 50
    torch.testing.assert_close(model(changed)[:, :8], model(tokens)[:, :8], atol=1e-6, rtol=0)
    documents = torch.tensor([[0] * 5 + [1] * 7], dtype=torch.int32)
    torch.testing.assert_close(model(tokens, documents=documents)[:, 5:], model(tokens[:, 5:]), atol=1e-5, rtol=0)


def test_scores_stay_in_fp32_where_products_are_in_bf16():
    model, tokens = build(score_head=True), tokens_of(2, 12)
    with torch.autocast("cpu", torch.bfloat16):
        scores = model(tokens)
    assert scores.dtype == torch.float32
    assert not torch.equal(scores, scores.bfloat16().float())


def test_it_has_no_head_of_a_language_model():
    config = dataclasses.replace(BASE, score_head=True)
    assert BASE.tie_embeddings and not config.tie_embeddings
    names = dict(Transformer(config).named_parameters())
    assert "lm_head.weight" not in names and names["score.weight"].shape == (1, BASE.dim)
    assert n_parameters(config) == n_parameters(BASE) + BASE.dim  # whose head was its embedding
    with pytest.raises(ValueError, match="predicts no tokens"):
        build(score_head=True)(tokens_of(1, 4), tokens_of(1, 4))


@pytest.mark.parametrize("tied", [True, False])
def test_a_language_model_is_given_a_head_by_the_seed(tied):
    language_model = build(tie_embeddings=tied)
    tokens = tokens_of(2, 12)
    states = language_model.hidden(tokens)
    heads = []
    for seed in (5, 5, 6):
        model = build(tie_embeddings=tied)
        model.give_score_head(seed)
        torch.testing.assert_close(model.hidden(tokens), states, atol=0, rtol=0)
        assert model.config == ModelConfig(**vars(BASE) | {"score_head": True})
        assert "lm_head.weight" not in dict(model.named_parameters())
        heads.append(model.score.weight.detach())
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])
    assert heads[0].std().item() == pytest.approx(0.02, rel=0.5)


def test_a_new_model_draws_its_head_like_its_other_matrices():
    model = Transformer(dataclasses.replace(BASE, dim=256, head_dim=8, score_head=True))
    model.init_weights(0)
    assert model.score.weight.std().item() == pytest.approx(0.02, rel=0.2)
