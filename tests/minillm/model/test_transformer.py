import dataclasses
import math

import pytest
import torch
from torch import nn

from minillm.base.errors import UserError
from minillm.model import ops
from minillm.model.kv_cache import KVCache, TreeCache
from minillm.model.transformer import Transformer, of_tokens, positions_within
from tests.minillm.model_options import BASE, OPTIONS, build, tokens_of


@pytest.mark.parametrize("name", OPTIONS)
def test_no_token_sees_the_future(name):
    model, tokens = build(**OPTIONS[name]), tokens_of(1, 20)
    changed = tokens.clone()
    changed[0, 12:] = (changed[0, 12:] + 1) % 50
    a, b = model(tokens), model(changed)
    torch.testing.assert_close(a[:, :12], b[:, :12], atol=0, rtol=0)
    assert (a[:, 12:] - b[:, 12:]).abs().min(dim=-1).values.max() > 0


@pytest.mark.parametrize("name", OPTIONS)
def test_a_cache_gives_the_logits_of_the_whole_sequence(name):
    model, tokens = build(**OPTIONS[name]), tokens_of(2, 24)
    whole = model(tokens)
    cache = KVCache(model.config, 2, 24)
    parts = [model(tokens[:, a:b], cache=cache) for a, b in ((0, 10), (10, 11), (11, 18), (18, 19), (19, 24))]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", OPTIONS)
def test_padding_changes_nothing(name):
    model, tokens = build(**OPTIONS[name]), tokens_of(2, 12)
    padded = torch.cat([torch.cat([tokens[:1, :5], torch.full((1, 7), 3)], dim=1), tokens[1:]])
    cache = KVCache(model.config, 2, 14)
    logits = model(padded, cache=cache)
    torch.testing.assert_close(logits[0, :5], model(tokens[:1, :5])[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(logits[1], model(tokens[1:])[0], atol=1e-5, rtol=0)
    cache.shorten([5, 12])
    step = model(tokens_of(2, 1, seed=4), cache=cache)
    alone = model(torch.cat([tokens[:1, :5], tokens_of(2, 1, seed=4)[:1]], dim=1))
    torch.testing.assert_close(step[0, 0], alone[0, -1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("recordable", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
@torch.no_grad()
def test_a_text_takes_a_row_while_the_others_go_on(name, recordable):
    """Row 1 leaves; a new prompt is read into its place, three tokens at a time, between steps of the other rows."""
    model, tokens = build(**OPTIONS[name]), tokens_of(4, 20)
    cache = KVCache(model.config, 3, 20)
    cache.recordable = recordable
    said = [[], [], [], []]  # logits of each text's tokens

    def read(part, texts, lengths):
        first = [sum(len(logits) for logits in said[text]) for text in texts]
        new = torch.stack(
            [tokens[text, begin : begin + n] for text, begin, n in zip(texts, first, lengths, strict=True)]
        )
        for text, logits in zip(texts, model(new, cache=part), strict=True):
            said[text].append(logits)

    for row, length in enumerate((9, 4, 6)):
        read(cache.rows(row, row + 1), [row], [length])
    assert cache.lengths.tolist() == cache.host_lengths.tolist() == [9, 4, 6]
    read(cache, [0, 1, 2], [1, 1, 1])
    read(cache, [0, 1, 2], [3, 3, 3])  # several tokens at once, of rows that differ in length
    cache.free(1)
    read(cache.rows(1, 2), [3], [3])
    read(cache, [0, 3, 2], [1, 1, 1])
    read(cache.rows(1, 2), [3], [3])
    read(cache, [0, 3, 2], [1, 1, 1])
    assert cache.lengths.tolist() == cache.host_lengths.tolist() == [15, 8, 12]
    whole = model(tokens)
    for text, logits in enumerate(said):
        got = torch.cat(logits)
        torch.testing.assert_close(got, whole[text, : len(got)], atol=1e-5, rtol=0)


@pytest.fixture(params=["auto", "reference"])
def implementation(request):
    ops.select(request.param)
    yield
    ops.select("auto")


@pytest.mark.parametrize("lengths", [[0, 0], [5, 5], [5, 3]])
@pytest.mark.parametrize("name", OPTIONS)
@torch.no_grad()
def test_chosen_tokens_have_the_states_they_have_among_all(name, lengths, implementation):
    model, tokens = build(**OPTIONS[name]), tokens_of(2, 17)
    caches = [KVCache(model.config, 2, 17) for _ in range(2)]
    for cache in caches if any(lengths) else ():
        model(tokens[:, :5], cache=cache)
        cache.shorten(lengths)
    chosen = torch.tensor([[0, 11, 7], [3, 4, 0]])
    all_states, states = (
        model.hidden(tokens[:, 5:], cache=cache, chosen=which)
        for cache, which in zip(caches, (None, chosen), strict=True)
    )
    torch.testing.assert_close(states, of_tokens(all_states, chosen), atol=1e-5, rtol=0)


@pytest.mark.parametrize("n_before", [0, 4])
@pytest.mark.parametrize("name", OPTIONS)
@torch.no_grad()
def test_branches_of_a_tree_do_not_see_each_other(name, n_before, implementation):
    """The trees a b c d / a b e f g h / a i, which fills the context up to its last position, and a b c d e f g h."""
    model, ids = build(max_seq_len=10, **OPTIONS[name]), tokens_of(2, 9, seed=7)
    before = tokens_of(1, n_before).expand(2, -1)
    cache = TreeCache(model.config, 2, n_before + 9)
    if n_before:
        model(before, cache=cache)
    ways = [[[0, 1, 2, 3], [0, 1, 4, 5, 6, 7], [0, 8]], [[0, 1, 2, 3, 4, 5]]]
    depths = torch.tensor([[0, 1, 2, 3, 2, 3, 4, 5, 1], [0, 1, 2, 3, 4, 5, 0, 0, 0]])
    ends = torch.tensor([[9, 8, 4, 4, 8, 8, 8, 8, 9], [9] * 9])
    cache.branch(depths, ends)
    chosen = torch.tensor([[8, 3, 7, 2], [5, 0, 3, 3]])
    logits = model.logits(model.hidden(ids, cache=cache, chosen=chosen))
    for row, of_row in enumerate(ways):
        for number, place in enumerate(chosen[row].tolist()):
            way = next(way for way in of_row if place in way)
            alone = torch.cat((before[row], ids[row, way[: way.index(place) + 1]]))[None]
            torch.testing.assert_close(logits[row, number], model(alone)[0, -1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", OPTIONS)
def test_documents_of_a_row_do_not_see_each_other(name):
    model, tokens = build(**OPTIONS[name]), tokens_of(1, 20)
    documents = torch.tensor([[0] * 6 + [1] * 9 + [4] * 5], dtype=torch.int32)
    together = model(tokens, documents=documents)
    alone = [model(tokens[:, a:b]) for a, b in ((0, 6), (6, 15), (15, 20))]
    torch.testing.assert_close(together, torch.cat(alone, dim=1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", OPTIONS)
def test_reference_and_torch_ops_agree(name):
    model, tokens = build(**OPTIONS[name]), tokens_of(2, 20)
    mask = torch.arange(20).expand(2, 20) % 3 > 0
    results = []
    for implementation in ("reference", "torch"):
        ops.select(implementation)
        model.zero_grad()
        loss = model(tokens, tokens.roll(-1, 1), mask=mask)
        loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
    ops.select("auto")
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=2e-4)


def test_loss_is_the_sum_of_nats_over_unmasked_targets():
    model, tokens = build(softcap=3.0), tokens_of(2, 9)
    targets, mask = tokens_of(2, 9, seed=2), torch.rand(2, 9) > 0.4
    logits = model(tokens)
    by_hand = -sum(logits[b, t].softmax(-1)[targets[b, t]].log() for b in range(2) for t in range(9) if mask[b, t])
    torch.testing.assert_close(model(tokens, targets, mask=mask), by_hand, atol=1e-4, rtol=1e-5)
    nothing = model(tokens, targets, mask=torch.zeros(2, 9, dtype=torch.bool))
    nothing.backward()
    assert nothing == 0 and all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_positions_restart_with_each_document():
    documents = torch.tensor([[0, 0, 0, 2, 2, 5], [1, 2, 2, 2, 2, 2]])
    assert positions_within(documents).tolist() == [[0, 1, 2, 0, 1, 0], [0, 0, 1, 2, 3, 4]]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("name", OPTIONS)
def test_layers_share_the_mask_of_documents(name, dtype):
    """Each would else keep T × T numbers a row for its backward pass."""
    length = 48
    documents = (torch.arange(length) // 16).expand(2, -1).int()
    kept = {}  # address → bytes

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    model, tokens = build(**OPTIONS[name] | {"n_layers": 5}), tokens_of(2, length)
    rounded = torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), rounded:
        loss = model(tokens, tokens, documents=documents)
    loss.backward()
    n_bytes = 2 * length * length * (dtype or torch.float32).itemsize
    assert list(kept.values()).count(n_bytes) == 1


def test_learned_positions_are_the_first_formula_of_gpt():
    """h0 = U W_e + W_p and p = softmax(h_n W_eᵀ) (Radford et al. 2018, equations 2): checked with no layers' effect."""
    model = build(positions="learned")
    with torch.no_grad():
        for layer in model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    tokens = tokens_of(1, 7)
    h0 = model.embed_tokens.weight[tokens] + model.embed_positions.weight[:7]
    normed = h0 / (h0.square().mean(-1, keepdim=True) + BASE.norm_eps).sqrt() * model.norm.weight
    torch.testing.assert_close(model(tokens), normed @ model.embed_tokens.weight.T, atol=1e-4, rtol=1e-4)


def test_initial_weights_depend_on_the_seed_alone_and_have_the_stated_spread():
    config = dataclasses.replace(BASE, dim=128, ffn_dim=512, vocab_size=1000)
    models = [Transformer(config) for _ in range(3)]
    for model, seed in zip(models, (5, 5, 6), strict=True):
        torch.manual_seed(model.embed_tokens.weight.numel() + seed)
        model.init_weights(seed)
    a, b, c = (m.state_dict() for m in models)
    assert all(torch.equal(a[k], b[k]) for k in a) and not torch.equal(
        a["embed_tokens.weight"], c["embed_tokens.weight"]
    )
    assert abs(a["layers.0.mlp.up_proj.weight"].std() / 0.02 - 1) < 0.02
    assert abs(a["layers.1.mlp.down_proj.weight"].std() / (0.02 / math.sqrt(4)) - 1) < 0.02
    assert (a["norm.weight"] == 1).all()


class Gained(Transformer):
    """A model with a parameter of each kind that a reader may add: of one dimension, of two, and drawn at random."""

    def __init__(self, config):
        super().__init__(config)
        self.gain = nn.Parameter(torch.zeros(3))
        self.table = nn.Parameter(torch.full((2, 2), 0.5))
        self.drawn = nn.Conv1d(4, 4, 3)


def test_what_is_neither_a_linear_layer_nor_an_embedding_starts_as_its_module_made_it():
    models = [Gained(BASE) for _ in range(2)]
    with torch.device("meta"):
        models.append(Gained(BASE).to_empty(device="cpu"))
    with torch.no_grad():
        models[1].gain += 1  # trained, before it is begun anew
        models[1].norm.weight += 1
    plain = Transformer(BASE)
    for number, model in enumerate([*models, plain]):
        torch.manual_seed(number)
        model.init_weights(5)
    states = [dict(model.named_parameters()) for model in models]
    assert (states[0]["gain"] == 0).all() and (states[0]["table"] == 0.5).all()
    assert all(torch.equal(states[0][name], other[name]) for other in states[1:] for name in states[0])
    assert all(torch.equal(value, states[0][name]) for name, value in plain.named_parameters())


def test_first_loss_is_that_of_a_uniform_guess():
    model = Transformer(dataclasses.replace(BASE, vocab_size=1000, tie_embeddings=False))
    model.init_weights(0)
    tokens = torch.randint(0, 1000, (4, 60))
    assert abs(model(tokens, tokens).item() / 240 - math.log(1000)) < 0.05


def test_activation_checkpointing_changes_no_gradient():
    tokens, grads = tokens_of(2, 16), []
    for on in (False, True):
        model = build(dropout=0.3).train()
        model.checkpoint_activations = on
        torch.manual_seed(3)
        model(tokens, tokens).backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_compiled_whole_and_equal():
    model, tokens = build(qk_norm=True), tokens_of(2, 16)
    documents = torch.tensor([[0] * 6 + [1] * 10] * 2, dtype=torch.int32)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for how in ({}, {"z_loss": 0.0}, {"z_loss": 0.01}):
        a, b = (called(tokens, tokens, documents=documents, **how) for called in (model, compiled))
        torch.testing.assert_close(a, b)


def test_too_long_a_sequence_is_refused():
    with pytest.raises(UserError, match="65 tokens are more than the model's max_seq_len 64"):
        build()(tokens_of(1, 65))
    cache = KVCache(BASE, 1, 64)
    with pytest.raises(UserError, match="66 tokens"):
        model = build()
        model(tokens_of(1, 64), cache=cache)
        model(tokens_of(1, 2), cache=cache)


def test_a_row_of_documents_may_be_longer_than_the_context_but_no_document():
    model = build()
    row = tokens_of(1, 80)
    documents = (torch.arange(80) >= 30).int()[None]
    alone = torch.cat((model(row[:, :30]), model(row[:, 30:])), 1)
    torch.testing.assert_close(model(row, documents=documents), alone, atol=1e-5, rtol=0)
    with pytest.raises(UserError, match="70 tokens are more than the model's max_seq_len 64"):
        model(row, documents=(torch.arange(80) >= 10).int()[None])


def test_a_full_cache_is_refused():
    with pytest.raises(ValueError, match="holds 4 tokens, 5"):
        build()(tokens_of(1, 5), cache=KVCache(BASE, 1, 4))
