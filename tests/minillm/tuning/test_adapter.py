import pytest
import torch

from minillm.base.errors import UserError
from minillm.generation.completion import generate
from minillm.generation.sampling import GREEDY
from minillm.model import quant
from minillm.tuning.adapter import active_adapter, attach, merge, merged, remove_adapter, set_adapter, unmerge
from minillm.tuning.options import TuningConfig
from tests.minillm.tuning import tiny

METHODS = {
    "lora": TuningConfig("lora"),
    "lora-head": TuningConfig("lora", target_modules="q_proj,embed_tokens,lm_head"),
    "lora-full": TuningConfig("lora", modules_to_save="lm_head,norm"),
    "dora": TuningConfig("dora", target_modules="up_proj,o_proj,embed_tokens"),
    "ia3": TuningConfig("ia3", target_modules="q_proj,v_proj,down_proj"),
    "adapter": TuningConfig("adapter"),
    "freeze": TuningConfig("freeze", train_layers="last:1,head,norms"),
}
MERGED = [name for name in METHODS if name != "adapter"]
each_method = pytest.mark.parametrize("method", METHODS)


def tuned(method: str, tie: bool = True, **shape):
    model = tiny.base(tie, bias=True, **shape)
    adapter = attach(model, METHODS[method])
    tiny.shake(adapter.parameters())
    return model


@each_method
def test_training_begins_at_the_base_and_ends_elsewhere_by_the_seed_alone(method):
    model = tiny.base()
    before = model(tiny.IDS)
    adapter = attach(model, METHODS[method], seed=7)
    torch.testing.assert_close(model(tiny.IDS), before, atol=1e-6, rtol=0)
    again, other = (attach(tiny.base(), METHODS[method], seed=seed).parameters() for seed in (7, 8))
    assert all(torch.equal(p, again[name]) for name, p in adapter.parameters().items())
    drawn = any(not torch.equal(p, other[name]) for name, p in adapter.parameters().items())
    assert drawn == (method not in ("ia3", "freeze"))
    model(tiny.IDS, tiny.TARGETS).backward()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained == set(adapter.parameters())
    with torch.no_grad():
        for parameter in adapter.parameters().values():
            parameter -= 0.01 * parameter.grad
    assert (model(tiny.IDS) - before).abs().max() > 1e-4


def test_several_adapters_over_one_base_and_none():
    model = tiny.base(tie=True)
    before, weights = model(tiny.IDS), {name: p.clone() for name, p in model.named_parameters()}
    outputs = {}
    for method in METHODS:
        tiny.shake(attach(model, METHODS[method], name=method).parameters())
        outputs[method] = model(tiny.IDS)
    assert len({float(y.detach().sum()) for y in outputs.values()}) == len(METHODS)
    for method in (*METHODS, None, *reversed(METHODS)):
        set_adapter(model, method)
        assert torch.equal(model(tiny.IDS), outputs.get(method, before))
    set_adapter(model, None)
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters()) and tiny.is_plain(model)
    with pytest.raises(UserError, match=r"'mine': no such adapter; there are lora, "):
        set_adapter(model, "mine")
    with pytest.raises(UserError, match="'lora' is there already"):
        attach(model, METHODS["lora"], name="lora")
    remove_adapter(model, "lora")
    attach(model, METHODS["lora"], name="lora")


@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("method", MERGED)
def test_merged_computes_the_same_as_a_plain_model_and_unmerging_loses_nothing(method, tie, tmp_path):
    model = tuned(method, tie)
    before = model(tiny.IDS)
    merge(model)
    assert tiny.is_plain(model)
    torch.testing.assert_close(model(tiny.IDS), before, atol=2e-6, rtol=0)
    other = tiny.theirs(tiny.write(model, tmp_path / "merged"))  # with its head of its own, if it has one now
    torch.testing.assert_close(other(tiny.IDS).logits, before, atol=1e-5, rtol=0)
    with pytest.raises(UserError, match="merged already"):
        merge(model)
    unmerge(model)
    assert torch.equal(model(tiny.IDS), before) and model.config.tie_embeddings == tie
    with pytest.raises(UserError, match="no adapter is merged"):
        unmerge(model)


@pytest.mark.parametrize("method", MERGED)
def test_merged_for_good_nothing_is_kept(method):
    model = tuned(method)
    before = model(tiny.IDS)
    merge(model, keep=False)
    torch.testing.assert_close(model(tiny.IDS), before, atol=2e-6, rtol=0)
    assert tiny.is_plain(model) and not model.adapters and active_adapter(model) is None
    with pytest.raises(UserError, match="no adapter is active"):
        merge(model)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("method", ["lora", "dora", "ia3"])
def test_a_quantized_base_is_multiplied_out_by_merging_and_comes_back(method, bits):
    model = tiny.base(bias=True)
    quant.quantize_base(model, bits)
    tiny.shake(attach(model, METHODS[method]).parameters())
    before = model(tiny.IDS)
    merge(model)
    assert tiny.is_plain(model)
    torch.testing.assert_close(model(tiny.IDS), before, atol=2e-6, rtol=0)
    unmerge(model)
    assert torch.equal(model(tiny.IDS), before)


def test_what_no_plain_weight_can_hold_is_not_merged():
    with pytest.raises(UserError, match="--tune adapter adds what no plain weight can hold"):
        merge(tuned("adapter"))
    with pytest.raises(UserError, match="no adapter is active"):
        merge(tiny.base())


@each_method
def test_generation_step_by_step_and_merged_for_a_while(method):
    model = tuned(method).eval()
    ids = tiny.IDS[0, :5].tolist()
    slow = generate(model, [ids], 10, sampling=GREEDY)[0].tokens
    with merged(model):
        assert tiny.is_plain(model) == (method != "adapter")
        fast = generate(model, [ids], 10, sampling=GREEDY)[0].tokens
    follow = list(ids)
    for _ in range(10):
        follow.append(int(model(torch.tensor([follow]))[0, -1].argmax()))
    assert slow == fast == follow[5:]


def test_dropout_and_recomputed_activations():
    results = []
    for checkpointed in (False, True):
        model = tiny.base()
        adapter = attach(model, TuningConfig("lora", lora_dropout=0.5))
        tiny.shake(adapter.parameters())
        model.checkpoint_activations = checkpointed
        torch.manual_seed(0)
        loss = model(tiny.IDS, tiny.TARGETS)
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in adapter.parameters().values())])
        assert model(tiny.IDS, tiny.TARGETS) != model(tiny.IDS, tiny.TARGETS)
        model.eval()
        assert model(tiny.IDS, tiny.TARGETS) == model(tiny.IDS, tiny.TARGETS)
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("method", ["lora-head", "dora"])
def test_compiled(method):
    results = []
    for compiled in (False, True):
        model = tuned(method, n_layers=1)
        loss = (torch.compile(model, backend="aot_eager") if compiled else model)(tiny.IDS, tiny.TARGETS)
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in active_adapter(model).parameters().values())])
    torch.testing.assert_close(*results, atol=1e-4, rtol=1e-4)


@each_method
def test_documents_packed_into_a_row_do_not_see_each_other(method):
    documents = torch.tensor([0] * 9 + [1] * 11).expand(2, -1).int()
    model = tuned(method)
    alone = [model(tiny.IDS[:, part], tiny.TARGETS[:, part]) for part in (slice(9), slice(9, 20))]
    torch.testing.assert_close(model(tiny.IDS, tiny.TARGETS, documents=documents), sum(alone), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(
    ("text", "trained"),
    [
        ("last:1", "layers.1"),
        ("first:2", "layers.0,layers.1"),
        ("0, norms", "layers.0,layers.1.input_layernorm,layers.1.post_attention_layernorm,norm"),
        ("head", "embed_tokens,lm_head"),  # one weight
    ],
)
def test_which_layers_are_trained(text, trained):
    model = tiny.base(tie=True)
    adapter = attach(model, TuningConfig("freeze", train_layers=text), keep_base=False)
    assert set(adapter.parts) == set(trained.split(","))
    assert (model.lm_head.weight is model.embed_tokens.weight) and model.config.tie_embeddings


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (TuningConfig("lora", target_modules="q_prj"), ["--target_modules q_prj", "did you mean q_proj?"]),
        (TuningConfig("lora", target_modules="xyz"), ["choose from", "gate_proj"]),
        (TuningConfig("lora", target_modules="q_proj,"), ["no such module"]),
        (TuningConfig("lora", modules_to_save="lm_hed"), ["--modules_to_save lm_hed", "did you mean lm_head?"]),
        (TuningConfig("lora", modules_to_save="q_proj"), ["q_proj is a target module, too"]),
        (TuningConfig("lora", modules_to_save="mlp"), ["is a target module, too"]),
        (TuningConfig("ia3", target_modules="lm_head"), ["--target_modules lm_head"]),
        (TuningConfig("freeze", train_layers="last:3"), ["'last:3'", "N from 1 to 2"]),
        (TuningConfig("freeze", train_layers="2"), ["'2'", "0 to 1"]),
        (TuningConfig("freeze", train_layers="heads"), ["'heads'", "embed, head, norms"]),
    ],
)
def test_unknown_modules_and_layers_are_refused(options, words):
    with pytest.raises(UserError) as problem:
        attach(tiny.base(), options)
    assert all(word in str(problem.value) for word in words), problem.value
