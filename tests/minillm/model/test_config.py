import math
from dataclasses import dataclass, fields

import pytest

from minillm.base.errors import UserError
from minillm.base.options import option, parse
from minillm.model.config import PRESETS, ModelConfig, RopeScaling, parse_rope_scaling, preset
from minillm.model.size import flops_per_token, n_parameters
from minillm.model.transformer import Transformer
from minillm.training.config import TrainingConfig


@dataclass(frozen=True)
class Options:
    steps: int = option(10, "steps")
    lr: float = option(1e-3, "rate")
    name: str | None = option(None, "a name")
    shape: str = option("cosine", "shape", ("cosine", "wsd"))
    compile: bool = option(False, "compile, 100 % of it")
    window: int | None = option(None, "tokens")


def test_defaults_then_file_then_command_line(tmp_path):
    file = tmp_path / "a.toml"
    file.write_text('steps = 20\nlr = 5\nname = "file"\n', encoding="utf-8-sig")  # as Windows' Notepad saves it
    assert parse(Options, "", []) == Options()
    read = parse(Options, "", ["--config", str(file), "--steps", "30"])
    assert (read.steps, read.lr, read.name) == (30, 5.0, "file") and isinstance(read.lr, float)


def test_values_by_type():
    read = parse(Options, "", ["--steps", "1e3", "--compile", "--window", "7", "--name", "none"])
    assert read == Options(steps=1000, compile=True, window=7, name=None)
    assert parse(Options, "", ["--compile", "false", "--window=none"]) == Options()


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--stps", "3"], "did you mean --steps"),
        (["--steps", "3.5"], "--steps 3.5: expected a whole number"),
        (["--steps", "many"], "whole number"),
        (["--lr", "fast"], "--lr fast: expected a number"),
        (["--compile", "maybe"], "true or false"),
        (["--shape", "round"], "choose one of cosine, wsd"),
        (["--name", ""], "--name '': expected text"),
        (["--steps"], "expected one argument"),
        (["stray"], "stray"),
        (["--config", "/nonexistent.toml"], "--config /nonexistent.toml: No such file or directory; give a file of"),
    ],
)
def test_bad_command_lines_say_what_is_wrong(argv, said):
    with pytest.raises(UserError, match=said):
        parse(Options, "", argv)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"step = 3", "step: no such option; did you mean --steps"),
        (b"[train]\nsteps = 3", r"\[train\]: sections and dotted names are not used"),
        (b"lr = 1\nsteps: 3", r"no TOML: .*line 2.*; give a file of lines NAME = VALUE"),
        (b"name = '\xff'", "no TOML: .*utf-8"),
        (b"steps = 'many'", "--steps many: expected a whole number"),
        (b"steps = [3]", r"--steps \[3\]: expected a whole number"),
        (b"steps = true", "--steps True: expected a whole number"),
        (b"lr = false", "--lr False: expected a number"),
        (b"name = true", "--name True: expected text"),
        (b"name = ''", "--name '': expected text"),
        (b"name = ['a', 'b']", r"--name \['a', 'b'\]: expected text \(several go into one, with commas between\)"),
        (b"name = {a = 1}", "--name {'a': 1}: expected text"),
        (b"compile = []", r"--compile \[\]: expected true or false"),
        (b"shape = ['wsd']", r"--shape \['wsd'\]: choose one of cosine, wsd"),
        (b"shape = 'round'", "--shape round: choose one of cosine, wsd"),
    ],
)
def test_what_is_wrong_in_a_file_is_named_with_it(tmp_path, text, said):
    file = tmp_path / "a.toml"
    file.write_bytes(text)
    with pytest.raises(UserError, match=f"{file}: {said}"):
        parse(Options, "", ["--config", str(file)])


def test_help_shows_every_option_with_its_default(capsys):
    with pytest.raises(SystemExit) as ended:
        parse(TrainingConfig, "what it does", ["--help"])
    shown = capsys.readouterr().out
    assert ended.value.code == 0
    for f in fields(TrainingConfig):
        assert f"--{f.name} " in shown and f.metadata["help"].split()[0] in shown


@pytest.mark.parametrize(
    "change",
    [
        {},
        dict(tie_embeddings=False),
        dict(qk_norm=True),
        dict(qkv_bias=True, n_kv_heads=2),
        dict(positions="learned", head_dim=24),
    ],
)
def test_the_parameter_count_is_that_of_the_module(change):
    config = ModelConfig(**{**dict(vocab_size=99, dim=48, n_layers=3, n_heads=4, max_seq_len=40), **change})
    model = Transformer(config)
    assert n_parameters(config) == sum(p.numel() for p in model.parameters())


def test_counting_neither_takes_memory_nor_builds_what_cannot_be():
    config = ModelConfig(vocab_size=99, dim=48, n_layers=1 << 24)
    with pytest.raises(UserError, match="n_layers is 16,777,216: choose at most 2,048"):
        n_parameters(config)
    assert n_parameters(preset("8b", vocab_size=1 << 24)) > 1 << 36


def test_flops_by_formula_are_those_that_torch_counts():
    """torch counts the matrix products of one forward and backward pass (attention in full, as ours)."""
    from torch.utils.flop_counter import FlopCounterMode

    from minillm.model import ops

    config = ModelConfig(vocab_size=512, dim=64, n_layers=2, n_heads=4, ffn_dim=128, max_seq_len=64)
    model = Transformer(config)
    model.init_weights()
    import torch

    tokens = torch.zeros(2, 64, dtype=torch.long)
    ops.select("reference")  # plain products: fused attention recomputes, which is no work of the model's
    try:
        with FlopCounterMode(display=False) as counter:
            model(tokens, tokens).backward()
    finally:
        ops.select("auto")
    norms = (2 * config.n_layers + 1) * config.dim * 6  # counted by 6 N, but no matrix product
    assert counter.get_total_flops() / 128 == flops_per_token(config, 64) - norms


def test_presets_have_the_sizes_of_their_names():
    sizes = {name: n_parameters(preset(name, vocab_size=32000)) / 1e6 for name in PRESETS}
    known = {"26m": 26, "124m": 124, "350m": 350, "1b": 1100, "3b": 3000, "8b": 8000}
    vocab = {"26m": 6400, "124m": 50304, "350m": 50304, "1b": 32000, "3b": 128256, "8b": 128256}
    for name, millions in known.items():
        size = n_parameters(preset(name, vocab_size=vocab[name])) / 1e6
        assert abs(size / millions - 1) < 0.1, (name, size)
    assert set(sizes) == {"tiny", *known}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dict(n_heads=0), "n_heads is 0"),
        (dict(n_heads=6, n_kv_heads=4), "no multiple"),
        (dict(head_dim=7), "even"),
        (dict(dropout=1.0), "dropout"),
        (dict(positions="none"), "positions"),
        (dict(dim=10**30), f"dim is {10**30}: it must lie from 1 to 16,777,216; "),
        (dict(max_seq_len=1 << 25), "max_seq_len is 33554432"),
        (dict(window=0), "window is 0"),
        (dict(window=10**30), "window is 1000"),
        (dict(softcap=0.0), "softcap is 0"),
        (dict(softcap=math.inf), "softcap is inf: it must be above 0 and finite"),
        (dict(rope_theta=0.0), "rope_theta is 0"),
        (dict(rope_theta=math.nan), "rope_theta is nan"),
        (dict(norm_eps=math.inf), "norm_eps is inf"),
    ],
)
def test_impossible_shapes_are_refused(change, said):
    with pytest.raises(UserError, match=said):
        ModelConfig(**{**dict(vocab_size=10, dim=48), **change})


@pytest.mark.parametrize("text", ["yarn:inf", "linear:nan", "llama3:0.5", "yarn:", "ntk:2"])
def test_what_stretches_no_positions_is_refused(text):
    with pytest.raises(UserError, match=f"--rope_scaling {text}: expected linear:F, yarn:F or llama3:F"):
        parse_rope_scaling(text, 64)
    assert parse_rope_scaling("yarn:1", 64) == RopeScaling("yarn", 1.0, 64)


def test_unknown_preset():
    with pytest.raises(UserError, match="tiny"):
        preset("huge", vocab_size=10)
