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
from minillm.generation.decoder import Decoder
from minillm.generation.decoder_cuda import GraphDecoder
from minillm.generation.sampling import GREEDY, Sampling
from minillm.model import ops
from tests.minillm.generation.test_completion import build, prompt
from tests.minillm.model_options import OPTIONS

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

        def ours(q, k, v, begin, end, window):
            return decode.decode_attention(q, k, v, begin=begin, end=end, window=window)

        monkeypatch.setattr(ops, "decode_attention", ours)


@pytest.mark.parametrize("padded, joined", [(False, True), (True, False)])
@pytest.mark.parametrize("name", OPTIONS | MORE)
@torch.no_grad()
def test_the_step_gives_the_model_s_logits(name, padded, joined, attention):
    model = build(**(OPTIONS | MORE)[name]).to(DEVICE)
    prompts = [prompt(9), prompt(4 if padded else 9, seed=1)]
    more = torch.tensor(prompt(8, seed=2), device=DEVICE).view(2, 4)
    cache, _ = completion.prefill(model, prompts, 4)
    twin, _ = completion.prefill(model, prompts, 4)
    decoder, lean = GraphDecoder(model, cache, joined), Decoder(model, twin)
    steps = []
    for i in range(4):
        steps.append(decoder.step(more[:, i]).clone())
        torch.testing.assert_close(steps[-1], lean.step(more[:, i]), atol=1e-5, rtol=0)
        assert cache.length == twin.length
    for row in range(2):
        tokens = torch.tensor([prompts[row] + more[row].tolist()], device=DEVICE)
        whole = model(tokens)[0, len(prompts[row]) :]
        torch.testing.assert_close(torch.stack([s[row] for s in steps]), whole, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="holds 13 tokens and is full"):
        decoder.step(more[:, 0])


@torch.no_grad()
def test_rows_that_went_and_tokens_read_by_others_are_noticed():
    model = build(window=7).to(DEVICE)
    prompts = [prompt(9), prompt(4, seed=1), prompt(6, seed=2)]
    more = torch.tensor(prompt(12, seed=3), device=DEVICE).view(3, 4)
    cache, _ = completion.prefill(model, prompts, 8)
    decoder = GraphDecoder(model, cache)
    decoder.step(more[:, 0])
    cache.keep(torch.tensor([1, 2], device=DEVICE))
    decoder.step(more[1:, 1])
    model.hidden(more[1:, 2:3], cache=cache)
    last = decoder.step(more[1:, 3])
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


@pytest.mark.parametrize("name", ["plain", "window", "learned"])
@torch.no_grad()
def test_a_record_of_the_step_serves_every_step(name, attention):
    model = build(**OPTIONS[name])
    prompts = [prompt(9), prompt(4, seed=1)]
    (cache, _), (twin, _) = (completion.prefill(model, prompts, 8) for _ in range(2))
    decoder, lean = GraphDecoder(model, cache), Decoder(model, twin)
    decoder._set_clock()
    start, recorder = decoder.clock.clone(), Recorder()
    with recorder:
        logits = decoder._compute()
    decoder.clock.copy_(start)
    for token in range(8):
        tokens = torch.tensor([token, token + 20])
        decoder.tokens.copy_(tokens)
        recorder.replay()
        torch.testing.assert_close(logits, lean.step(tokens), atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_recording_that_failed_is_made_anew(monkeypatch):
    """Memory ends while the second step is recorded, and is there again at the third."""
    failures = [torch.OutOfMemoryError("CUDA out of memory")]

    @contextlib.contextmanager
    def record(graph, capture_error_mode):
        if failures:
            raise failures.pop()
        start = decoder.clock.clone()
        with graph:
            yield
        decoder.clock.copy_(start)  # a GPU records without computing

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recorder)
    monkeypatch.setattr(torch.cuda, "graph", record)
    model = build()
    (cache, _), (twin, _) = (completion.prefill(model, [prompt(9)], 8) for _ in range(2))
    decoder, lean = GraphDecoder(model, cache), Decoder(model, twin)
    tokens = torch.tensor([[3], [7], [5]])
    torch.testing.assert_close(decoder.step(tokens[0]), lean.step(tokens[0]), atol=1e-5, rtol=0)
    decoder.warm = True  # as after a GPU's first step
    with pytest.raises(torch.OutOfMemoryError):
        decoder.step(tokens[1])
    for token in tokens[1:]:
        torch.testing.assert_close(decoder.step(token), lean.step(token), atol=1e-5, rtol=0)
    assert decoder.graph.calls


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=1.0, repetition_penalty=1.2, seed=3)])
def test_generation_by_it_says_the_same(sampling, monkeypatch):
    """Rows end by a stop id and by their context; others go on, in a smaller cache."""
    model = build(max_seq_len=40).to(DEVICE)
    prompts, steps = [prompt(n, seed=n) for n in (12, 3, 37, 20, 1)], []
    ops.select("torch")
    try:
        plain = completion.generate(model, prompts, 30, sampling=sampling, stop_ids=[5, 6, 7])
        assert {c.reason for c in plain} == {"context", "length", "stop"}
        monkeypatch.setattr(completion, "_decoder", lambda model, cache: steps.append(1) or GraphDecoder(model, cache))
        assert completion.generate(model, prompts, 30, sampling=sampling, stop_ids=[5, 6, 7]) == plain
        assert steps
    finally:
        ops.select("auto")


@torch.inference_mode()
def test_it_is_what_our_kernels_are_used_through(monkeypatch):
    model = build().to(DEVICE)
    cache, _ = completion.prefill(model, [prompt(9)], 8)
    monkeypatch.setattr(ops, "fused", lambda x: True)
    assert isinstance(completion._decoder(model, cache), GraphDecoder)
    monkeypatch.setattr(ops, "fused", lambda x: False)
    assert isinstance(completion._decoder(model, cache), Decoder)


@pytest.mark.gpu
@torch.inference_mode()
def test_a_replay_is_the_step():
    """Each length and batch as the step gives it when it is not recorded."""
    model = build().to("cuda")
    for prompts in ([prompt(9)], [prompt(9), prompt(4, seed=1)]):
        caches = [completion.prefill(model, prompts, 20)[0] for _ in range(2)]
        recorded, run = (GraphDecoder(model, cache) for cache in caches)
        run._capture = lambda: None
        for token in range(20):
            tokens = torch.full((len(prompts),), token, device="cuda")
            assert torch.equal(recorded.step(tokens), run.step(tokens))
        assert recorded.graph is not None and run.graph is None
