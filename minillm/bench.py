"""Benchmarks against the usual tools, both sides in one process: `python -m minillm bench generate|train|data`.

Each subcommand is one function that first checks that both sides compute the same, then times them in turns
and prints medians with the versions and threads they were taken with.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from minillm import UserError, config, data, distributed, generate, huggingface
from minillm.model import Transformer

VOCABULARY = {"tiny": 2048, "26m": 4096}  # of the presets' random models; all others GPT-2's 50,257
REPEATS = 7


def medians(sides: dict[str, Callable[[], object]], repeats: int = REPEATS) -> dict[str, float]:
    """Median seconds of each side, called in turns, so that a slow moment of the machine meets all of them."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, run in sides.items():
            begin = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(taken) for name, taken in times.items()}


def random_model(preset: str) -> Transformer:
    """A model with weights from N(0, 0.1²): wide enough that a wrong computation shows in the chosen tokens."""
    model = Transformer(config.preset(preset, vocab_size=VOCABULARY.get(preset, 50_257)))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def transformers_twin(model: Transformer):
    """The same weights in transformers' own implementation of the architecture."""
    try:
        import transformers
    except ImportError:
        raise UserError('the benchmark needs transformers: pip install -e ".[bench]"') from None
    written = huggingface.to_hf(model.config) | {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    settings = transformers.AutoConfig.for_model(**written)
    twin = transformers.AutoModelForCausalLM.from_config(settings).eval()
    twin.load_state_dict(huggingface.weights_of(model), strict=False)
    twin.tie_weights()
    return twin, f"transformers {transformers.__version__}"


def bench_generate(preset: str = "tiny", new_tokens: int = 64, prompt_tokens: int = 32) -> None:
    """Tokens a second of greedy generation, batch 1, with cache, beside transformers' `generate`."""
    model = random_model(preset)
    twin, version = transformers_twin(model)
    prompt = list(range(1, prompt_tokens + 1))
    asked = {"attention_mask": torch.ones(1, prompt_tokens, dtype=torch.long), "do_sample": False}
    limits = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "pad_token_id": 0}

    def ours() -> list[int]:
        return generate.generate(model, [prompt], new_tokens)[0].tokens

    def theirs() -> list[int]:
        return twin.generate(torch.tensor([prompt]), **asked, **limits)[0, prompt_tokens:].tolist()

    if ours() != theirs():
        raise UserError("the two sides do not choose the same tokens, so their speed does not compare")
    print(f"{preset}: {model.config.n_parameters():,} parameters, float32, torch {torch.__version__}, {version}")
    print(f"greedy, batch 1, {prompt_tokens} + {new_tokens} tokens; the same {new_tokens} chosen by both")
    print("threads   minillm tok/s   transformers tok/s   ratio")
    before = torch.get_num_threads()
    for threads in sorted({1, before}):
        torch.set_num_threads(threads)
        taken = medians({"ours": ours, "theirs": theirs})
        speed = {name: new_tokens / seconds for name, seconds in taken.items()}
        ratio = taken["theirs"] / taken["ours"]
        print(f"{threads:7d}   {speed['ours']:13.1f}   {speed['theirs']:18.1f}   {ratio:5.2f}", flush=True)
    torch.set_num_threads(before)


class PlainDecoder(nn.Module):
    """The same architecture as one would first write it in PyTorch: what a training step is measured against.

    Rotary tables made once, torch's own SDPA, rms_norm and cross_entropy; no chunks, no fusion by hand.
    """

    def __init__(self, ours: Transformer):
        super().__init__()
        self.ours = ours  # its weights, so that both sides compute the same numbers

    def forward(self, tokens, targets):
        model, c = self.ours, self.ours.config
        x = model.embed_tokens(tokens)
        cos, sin = (torch.cat((t, t), -1)[: tokens.shape[1]] for t in (model.cos, model.sin))
        for layer in model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            h = F.rms_norm(x, (c.dim,), layer.input_layernorm.weight, c.norm_eps)
            shape = (*tokens.shape, -1, c.head_dim)
            q, k, v = (p(h).view(shape).transpose(1, 2) for p in (attention.q_proj, attention.k_proj, attention.v_proj))
            q, k = (
                t * cos + torch.cat((-t[..., c.head_dim // 2 :], t[..., : c.head_dim // 2]), -1) * sin for t in (q, k)
            )
            h = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=c.n_heads != c.n_kv_heads)
            x = x + attention.o_proj(h.transpose(1, 2).reshape(*tokens.shape, -1))
            h = F.rms_norm(x, (c.dim,), layer.post_attention_layernorm.weight, c.norm_eps)
            x = x + mlp.down_proj(F.silu(mlp.gate_proj(h)) * mlp.up_proj(h))
        logits = model.lm_head(F.rms_norm(x, (c.dim,), model.norm.weight, c.norm_eps))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")


def bench_train(preset: str = "tiny", rows: int = 8, seq_len: int = 256) -> None:
    """Tokens a second of a training step (forward, backward, clipping, AdamW), fp32, beside plain PyTorch and GPT-2."""
    distributed.start("cpu")  # as the scripts do it
    model = Transformer(config.preset(preset, vocab_size=VOCABULARY.get(preset, 50_257)))
    model.init_weights()
    tokens = torch.randint(0, model.config.vocab_size, (rows, seq_len + 1), generator=torch.Generator().manual_seed(0))
    x, y = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    sides: dict[str, Callable] = {"minillm": model, "plain PyTorch": PlainDecoder(model)}
    losses = [side(x, y).item() for side in sides.values()]
    if abs(losses[0] / losses[1] - 1) > 1e-5:
        raise UserError(f"the two sides compute other losses ({losses}), so their speed does not compare")
    gpt2, version = _gpt2_like(model)
    sides[f"GPT-2, {sum(p.numel() for p in gpt2.parameters()):,}"] = lambda x, y: gpt2(x, labels=x).loss

    def step(side) -> Callable[[], None]:
        module = gpt2 if side not in (model, sides["plain PyTorch"]) else model
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, fused=True)

        def run() -> None:
            side(x, y).backward()
            torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        run()
        return run

    steps = {name: step(side) for name, side in sides.items()}
    print(f"{preset}: {model.config.n_parameters():,} parameters, float32, torch {torch.__version__}, {version}")
    print(f"one training step of {rows} × {seq_len} tokens, {torch.get_num_threads()} thread(s), medians of {REPEATS}")
    taken = medians(steps)
    for name, seconds in taken.items():
        print(f"  {name:<22}{rows * seq_len / seconds:12,.0f} tok/s   {taken['plain PyTorch'] / seconds:5.2f} × plain")


def _gpt2_like(model: Transformer):
    """transformers' GPT-2 of about the same number of parameters, and of the same width, heads and vocabulary."""
    try:
        import transformers
    except ImportError:
        raise UserError('the benchmark needs transformers: pip install -e ".[bench]"') from None
    c = model.config
    layers = max(1, round((c.n_parameters() - c.vocab_size * c.dim) / (12 * c.dim**2)))
    sizes = dict(n_embd=c.dim, n_layer=layers, n_head=c.n_heads, vocab_size=c.vocab_size, n_positions=c.max_seq_len)
    off = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False, bos_token_id=None, eos_token_id=None)
    settings = transformers.GPT2Config(**sizes, **off, attn_implementation="sdpa")
    return transformers.GPT2LMHeadModel(settings), f"transformers {transformers.__version__}"


def bench_data(tokens: int = 100_000_000, seq_len: int = 1024, rows: int = 32) -> None:
    """Tokens a second that one core reads from token bins in training order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokens.bin"
        np.random.default_rng(0).integers(0, 50_000, tokens, dtype=np.uint16).tofile(path)
        bins = data.TokenBins(path, "train", dtype="uint16", vocab_size=50_000)
        windows = data.TokenWindows([(bins, 1.0)], seq_len, seed=0)
        position = 0

        def read() -> None:
            nonlocal position
            for _ in range(50):
                windows.batch(np.arange(position, position + rows))
                position += rows

        taken = medians({"read": read})["read"]
    torch.set_num_threads(threads)
    print(f"{tokens:,} tokens of uint16, batches of {rows} × {seq_len}, one core, median of {REPEATS}")
    print(f"  {50 * rows * seq_len / taken / 1e6:,.0f} million tokens/s, X and Y as int64")
