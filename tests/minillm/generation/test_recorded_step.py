"""The step that a GPU records and replays, run as it stands: it gives what the model gives.

Its kernels, under Triton's interpreter here, are tested by themselves in tests/kernels.
"""

import contextlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernels.attention import decode
from minillm.generation import completion
from minillm.generation.recorded_step import RecordedStep, next_logits
from minillm.generation.sampling import GREEDY, Sampling
from minillm.model import ops
from minillm.tuning.adapter import attach
from minillm.tuning.options import TuningConfig
from tests.minillm.generation.test_completion import OPTIONS, build, prompt

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MORE = {
    "multi-query": dict(n_kv_heads=1),
    "wide heads": dict(head_dim=20, qk_norm=True),
    "qwen2, short window": dict(qkv_bias=True, window=2, tie_embeddings=False),
    "learned, normed": dict(positions="learned", qk_norm=True),
}


@pytest.fixture(params=["torch", "kernel"])
def attention(request, monkeypatch):
    """Decode attention by torch, and by our own kernel."""
    if request.param == "kernel":

        def ours(q, k, v, ends, *, window):
            return decode.decode_attention(q, k, v, end=ends, window=window)

        monkeypatch.setattr(ops, "visible_keys", lambda ends, *_: ends)  # not the mask that torch takes on a CPU
        monkeypatch.setattr(ops, "cached_attention", ours)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", OPTIONS | MORE)
@torch.no_grad()
def test_the_step_gives_the_model_s_logits(name, padded, attention):
    model = build(**(OPTIONS | MORE)[name]).to(DEVICE)
    prompts = [prompt(9), prompt(4 if padded else 9, seed=1)]
    more = torch.tensor(prompt(8, seed=2), device=DEVICE).view(2, 4)
    cache, _ = completion.prefill(model, prompts, 13)
    twin, _ = completion.prefill(model, prompts, 13)
    recorded, steps = RecordedStep(model, cache), []
    for i in range(4):
        steps.append(recorded.step(more[:, i]).clone())
        torch.testing.assert_close(steps[-1], next_logits(model, twin, more[:, i]), atol=1e-5, rtol=0)
        assert cache.lengths.tolist() == cache.host_lengths.tolist() == twin.lengths.tolist()
    for row in range(2):
        tokens = torch.tensor([prompts[row] + more[row].tolist()], device=DEVICE)
        whole = model(tokens)[0, len(prompts[row]) :]
        torch.testing.assert_close(torch.stack([s[row] for s in steps]), whole, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="holds 13 tokens, 14 were given"):
        recorded.step(more[:, 0])


@torch.no_grad()
def test_rows_that_went_and_tokens_read_by_others_are_noticed():
    model = build(window=7).to(DEVICE)
    prompts = [prompt(9), prompt(4, seed=1), prompt(6, seed=2)]
    more = torch.tensor(prompt(12, seed=3), device=DEVICE).view(3, 4)
    cache, _ = completion.prefill(model, prompts, 17)
    recorded = RecordedStep(model, cache)
    recorded.step(more[:, 0])
    cache.keep(torch.tensor([1, 2], device=DEVICE))
    recorded.step(more[1:, 1])
    model.hidden(more[1:, 2:3], cache=cache)
    last = recorded.step(more[1:, 3])
    for row in (1, 2):
        alone = model(torch.tensor([prompts[row] + more[row].tolist()], device=DEVICE))[0, -1]
        torch.testing.assert_close(last[row - 1], alone, atol=1e-5, rtol=0)


class Recorder(TorchDispatchMode):
    """A CUDA graph for the CPU: the same operations again, with the same arguments, results at the same addresses."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        for function, args, kwargs, result in self.calls:
            again = function(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor):
                    old.copy_(new)


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Gives a function that lets a RecordedStep record on a CPU, and a list of errors that recording meets first."""
    errors, cache = [], None

    @contextlib.contextmanager
    def record(graph, capture_error_mode):
        if errors:
            raise errors.pop()
        lengths = cache.lengths.clone()
        with graph:
            yield
        cache.lengths.copy_(lengths)  # a GPU records without computing

    def started(model, on):
        nonlocal cache
        cache, recorded = on, RecordedStep(model, on)
        recorded.records = True
        return recorded

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recorder)
    monkeypatch.setattr(torch.cuda, "graph", record)
    return started, errors


@pytest.mark.parametrize("name", ["plain", "window", "learned", "qk_norm"])
@torch.no_grad()
def test_a_recording_of_the_step_serves_every_step(name, attention, as_on_a_gpu):
    start, _ = as_on_a_gpu
    model = build(**OPTIONS[name])
    prompts = [prompt(9), prompt(4, seed=1)]
    (cache, _), (twin, _) = (completion.prefill(model, prompts, 17) for _ in range(2))
    recorded, graphs = start(model, cache), []
    for token in range(8):
        tokens = torch.tensor([token, token + 20])
        torch.testing.assert_close(recorded.step(tokens), next_logits(model, twin, tokens), atol=1e-5, rtol=0)
        assert cache.lengths.tolist() == cache.host_lengths.tolist() == twin.lengths.tolist()
        graphs.append(recorded.graph)
    assert graphs[0] is None and graphs[1].calls and all(graph is graphs[1] for graph in graphs[1:])


@torch.no_grad()
def test_a_recording_that_failed_is_made_anew(as_on_a_gpu):
    """Memory ends while the second step is recorded, and is there again at the third."""
    start, errors = as_on_a_gpu
    model = build()
    (cache, _), (twin, _) = (completion.prefill(model, [prompt(9)], 17) for _ in range(2))
    recorded = start(model, cache)
    tokens = torch.tensor([[3], [7], [5]])
    torch.testing.assert_close(recorded.step(tokens[0]), next_logits(model, twin, tokens[0]), atol=1e-5, rtol=0)
    errors.append(torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(torch.OutOfMemoryError):
        recorded.step(tokens[1])
    for token in tokens[1:]:
        torch.testing.assert_close(recorded.step(token), next_logits(model, twin, token), atol=1e-5, rtol=0)
    assert recorded.graph.calls


@torch.no_grad()
def test_what_cannot_be_recorded_is_computed_as_it_is(as_on_a_gpu):
    """A layer that waits for the device breaks a recording; one with a hook may do what no recording holds."""
    start, errors = as_on_a_gpu
    for hooked in (False, True):
        model, calls = build(), []
        if hooked:
            model.layers[1].mlp.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        else:
            errors.append(RuntimeError("operation not permitted when stream is capturing"))
        (cache, _), (twin, _) = (completion.prefill(model, [prompt(9)], 17) for _ in range(2))
        recorded = start(model, cache)
        for token in torch.tensor([[3], [7], [5]]):
            torch.testing.assert_close(recorded.step(token), next_logits(model, twin, token), atol=1e-5, rtol=0)
        assert recorded.graph is None and not errors and len(calls) == hooked * (2 + 6)


@pytest.mark.parametrize("change", ["adapter", "hook", "weight", "module"])
@torch.no_grad()
def test_what_changes_between_two_steps_is_noticed(change, as_on_a_gpu):
    start, _ = as_on_a_gpu
    model = build()
    (cache, _), (twin, _) = (completion.prefill(model, [prompt(9)], 17) for _ in range(2))
    recorded = start(model, cache)
    attention = model.layers[1].self_attn
    for number in range(6):
        if number == 3 and change == "adapter":
            adapter = attach(model, TuningConfig("lora"))
            for parameter in adapter.parameters().values():
                parameter.fill_(0.3)
        elif number == 3 and change == "hook":
            model.layers[0].mlp.register_forward_hook(lambda module, inputs, output: 0 * output)
        elif number == 3 and change == "weight":
            attention.q_proj.weight.data = 2 * attention.q_proj.weight.data
        elif number == 3:
            attention.q_proj = torch.nn.Linear(32, 32)
        before = recorded.graph
        token = torch.tensor([number])
        torch.testing.assert_close(recorded.step(token), next_logits(model, twin, token), atol=1e-5, rtol=0)
        assert recorded.graph is before or number in (1, 3, 4)
    assert (recorded.graph is None) == (change == "hook")


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=1.0, repetition_penalty=1.2, seed=3)])
def test_generation_by_it_says_the_same(sampling, monkeypatch):
    """Rows end by a stop id and by their context; others go on, in a smaller cache."""
    model = build(max_seq_len=40).to(DEVICE)
    prompts, steps = [prompt(n, seed=n) for n in (12, 3, 37, 20, 1)], []
    ops.select("torch")
    try:
        plain = completion.generate(model, prompts, 30, sampling=sampling, stop_ids=[5, 6, 7])
        assert {c.reason for c in plain} == {"context", "length", "stop"}
        monkeypatch.setattr(completion, "is_recorded", lambda cache: not steps.append(1))
        assert completion.generate(model, prompts, 30, sampling=sampling, stop_ids=[5, 6, 7]) == plain
        assert steps
    finally:
        ops.select("auto")


@torch.inference_mode()
def test_it_is_what_our_kernels_are_used_through(monkeypatch):
    cache, _ = completion.prefill(build().to(DEVICE), [prompt(9)], 8 + 9)
    monkeypatch.setattr(ops, "fused", lambda x: True)
    assert completion.is_recorded(cache)
    monkeypatch.setattr(ops, "fused", lambda x: False)
    assert not completion.is_recorded(cache)


@pytest.mark.gpu
@torch.inference_mode()
def test_a_replay_is_the_step():
    """Each length and batch as the step gives it when it is not recorded."""
    model = build().to("cuda")
    for prompts in ([prompt(9)], [prompt(9), prompt(4, seed=1)]):
        caches = [completion.prefill(model, prompts, 29)[0] for _ in range(2)]
        recorded, run = (RecordedStep(model, cache) for cache in caches)
        run.records = False
        for token in range(20):
            tokens = torch.full((len(prompts),), token, device="cuda")
            assert torch.equal(recorded.step(tokens), run.step(tokens))
        assert recorded.graph is not None and run.graph is None
