"""The step of one row that torch.compile makes gives what the model gives, whatever the lengths of text and cache."""

import gc
import shutil
import sysconfig
from pathlib import Path

import pytest
import torch

from minillm.base.errors import UserError
from minillm.generation import compiled_step, completion
from minillm.generation.batching import Engine, EngineOptions
from minillm.generation.compiled_step import CompiledStep
from minillm.generation.recorded_step import next_logits
from minillm.generation.requests import Request
from minillm.model import packed
from minillm.model.quant import quantize_base, quantize_for_generation
from minillm.model.transformer import Transformer
from minillm.tuning.virtual_tokens import attach_virtual
from tests.minillm.generation.test_completion import OPTIONS, build, prompt

HEADER = Path(sysconfig.get_path("include"), "Python.h")
pytestmark = pytest.mark.skipif(
    not (shutil.which("g++") and HEADER.exists()), reason="torch.compile needs a C++ compiler and Python's headers"
)
MORE = {
    "as many keys as queries": dict(n_kv_heads=4),
    "multi-query, learned": dict(n_kv_heads=1, positions="learned"),
    "short window, biases": dict(window=5, qkv_bias=True, qk_norm=True),
}


@pytest.fixture
def traced(monkeypatch):
    """Let torch.compile trace the step and compute it as it stands, in a second, where writing C++ takes ten."""
    monkeypatch.setattr(compiled_step, "BACKEND", "aot_eager")


def logits_of(model: Transformer, step, max_len: int = 40, n_new: int = 12) -> torch.Tensor:
    """Logits (n, V) after each of n tokens behind a prompt of two."""
    with torch.inference_mode():
        cache, _ = completion.prefill(model, [prompt(2)], max_len)
        logits = [step(cache, torch.tensor([token])) for token in prompt(n_new, seed=1)]
    assert cache.lengths.tolist() == cache.host_lengths.tolist() == [2 + n_new]
    return torch.cat(logits)


def assert_right(model: Transformer, atol: float = 1e-5, **lengths: int) -> None:
    """The compiled step's logits are those of the model."""
    expected = logits_of(model, lambda cache, tokens: next_logits(model, cache, tokens), **lengths)
    torch.testing.assert_close(logits_of(model, CompiledStep(model), **lengths), expected, atol=atol, rtol=0)


@pytest.mark.parametrize("name", OPTIONS | MORE)
def test_the_step_gives_the_model_s_logits(name, traced):
    assert_right(build(**(OPTIONS | MORE)[name]))


@pytest.mark.parametrize("name", ["qk_norm", "short window, biases"])
def test_the_step_in_c(name):
    assert_right(build(**(OPTIONS | MORE)[name]))


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_of_packed_weights(bits, request):
    if bits != 8:
        request.getfixturevalue("traced")
    if not packed.can_pack(bits):
        pytest.skip("torch lacks these products here")
    model = build(tie_embeddings=False)
    quantize_for_generation(model, bits)
    weights = dict(model.named_parameters())
    assert_right(
        model, atol=0.05 if bits < 16 else 1e-5
    )  # an input at the edge of two steps may be rounded to the other
    assert dict(model.named_parameters()).keys() == weights.keys()
    assert type(model.layers[0].mlp.down_proj.matrix) is packed.MATRICES[bits]


def test_of_a_quantized_base(traced):
    model = build()
    quantize_base(model, 8)
    assert_right(model)


def test_one_compilation_serves_all_lengths_and_only_its_own_model(traced):
    first, second = build(), build(seed=2, window=5)
    steps = {model: CompiledStep(model) for model in (first, second)}
    with torch.compiler.set_stance("fail_on_recompile"):
        for model in (first, second, first):
            for lengths in (dict(), dict(max_len=96, n_new=90)):
                expected = logits_of(
                    model, lambda cache, tokens, model=model: next_logits(model, cache, tokens), **lengths
                )
                torch.testing.assert_close(logits_of(model, steps[model], **lengths), expected, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="holds 13 tokens, 14 were given"):
        logits_of(first, steps[first], max_len=13)
    with pytest.raises(UserError, match="97 tokens are more than the model's max_seq_len 96"):
        logits_of(first, steps[first], max_len=100, n_new=95)


def test_generate_stream_and_the_engine_take_it_for_one_row():
    model = build()
    requests = [Request(prompt(9), 20), Request(prompt(5, seed=3), 20)]
    plain = [answer.tokens for answer in completion.generate(model, [request.prompt for request in requests], 20)]
    calls = []
    step = CompiledStep(model)

    def counted(cache, tokens):
        calls.append(len(tokens))
        return step(cache, tokens)

    model.compiled_step = counted
    assert completion.generate(model, [requests[0].prompt], 20)[0].tokens == plain[0]
    assert calls == [1] * 19  # the first token is that of the prompt's pass
    calls.clear()

    engine = Engine(model, EngineOptions(slots=4, context=64))
    engine.start()  # another thread than the one that compiled
    tickets = [engine.submit(request) for request in requests]
    answers = [[event.id for event in ticket.events() if hasattr(event, "id")] for ticket in tickets]
    engine.close()
    assert answers == plain
    calls.clear()
    assert [a.tokens for a in completion.generate(model, [request.prompt for request in requests], 20)] == plain
    assert not calls


def test_virtual_tokens_stand_before_the_text(traced):
    model = build()
    attach_virtual(model, "prompt", 3)
    (plain,) = completion.generate(model, [prompt(9)], 20)
    model.compiled_step = CompiledStep(model)
    (compiled,) = completion.generate(model, [prompt(9)], 20)
    assert compiled == plain


def test_products_are_forgotten_with_the_step(traced):
    gc.collect()
    before = len(compiled_step._products)
    step = CompiledStep(build())
    assert len(compiled_step._products) == before + 15  # seven layers in each of two blocks, and the head
    del step
    torch._dynamo.reset()
    gc.collect()
    assert len(compiled_step._products) == before


def test_what_cannot_be_compiled_is_refused(monkeypatch):
    with pytest.raises(UserError, match=r"--compile: is for float32 on a CPU, and the model is torch.bfloat16 on cpu"):
        CompiledStep(build().bfloat16())
    with monkeypatch.context() as patched:
        patched.setattr(compiled_step, "_Row", lambda *_: 1 / 0)
        with pytest.raises(UserError, match=r"--compile: torch.compile failed \(.*\); leave --compile out") as refused:
            CompiledStep(build())
        assert "\n" not in str(refused.value)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(UserError, match=r"needs a C.. compiler, and there is none"):
        CompiledStep(build())


def test_a_compiler_that_fails_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    compiler = tmp_path / "g++"
    compiler.write_text("#!/bin/sh\necho no headers >&2\nexit 1\n")
    compiler.chmod(0o755)
    with (
        torch._inductor.config.patch({"cpp.cxx": (str(compiler),)}),
        pytest.raises(UserError, match=r"torch\.compile failed"),
    ):
        CompiledStep(build())
