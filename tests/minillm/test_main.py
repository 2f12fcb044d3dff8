import io
import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from minillm import __main__ as commands
from minillm import config, files, generate, huggingface, run
from minillm.model import Transformer
from minillm.tokenizer import Tokenizer
from minillm.vocab import train_tokenizer

ROOT = Path(__file__).parents[2]
TEXTS = [f"Who has the {thing}? Tom has the {thing}. 谁有{thing}？" for thing in ("ball", "cat", "apple")]


class Home(NamedTuple):
    path: Path
    model: Transformer
    tokenizer: Tokenizer


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Home:
    """A folder with a model of random weights in out/sft, its token bins, a text and questions."""
    home = tmp_path_factory.mktemp("home")
    step = home / "out" / "sft" / "step-00000003"
    tokenizer = train_tokenizer(TEXTS * 30, 400, home / "tokenizer")
    shape = config.ModelConfig(vocab_size=400, dim=32, n_layers=2, n_heads=4, n_kv_heads=2, max_seq_len=64)
    model = Transformer(shape)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)

    def fill(folder):
        huggingface.save_model(model, folder)
        tokenizer.save(folder)

    files.write_folder(step, fill)
    (home / "text.txt").write_text("\n\n".join(TEXTS), encoding="utf-8")
    (home / "texts.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS), encoding="utf-8")
    rows = [{"instruction": t, "output": "Tom", "family": f} for f, t in zip("aba", TEXTS, strict=True)]
    (home / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    bins = home / "bins"
    tokenizer.save(bins)
    ids = np.array([t for text in TEXTS for t in (*tokenizer.encode(text), 2)], dtype=np.uint16)
    meta = {"format": 1, "dtype": "uint16", "vocab_size": 400, "tokenizer_sha256": tokenizer.sha256, "eos_id": 2}
    meta["files"] = {"train": [], "val": [{"name": "val-00000.bin", "tokens": len(ids), "documents": 3}]}
    ids.tofile(bins / "val-00000.bin")
    np.save(bins / "val_bits.npy", np.array([80.0, 90.0, 100.0]))
    (bins / "meta.json").write_text(json.dumps(meta))
    return Home(home, model, tokenizer)


@pytest.fixture
def call(home, monkeypatch, capsys):
    """Runs a command line in that folder: (status, stdout, stderr)."""

    def call(*arguments: str, typed: str = ""):
        monkeypatch.chdir(home.path)
        monkeypatch.setattr(sys, "argv", ["minillm", *arguments])
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        status = run.run_script(commands.main)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


def continuation(home, text, n, **sampling):
    ids = [home.tokenizer.eos_id, *home.tokenizer.encode(text)]
    sampling = generate.Sampling(**sampling)
    return generate.generate(home.model, [ids], n, sampling=sampling, stop_ids=[home.tokenizer.eos_id])[0].tokens


def test_generate_prints_the_continuation_alone(home):
    model = str(home.path / "out" / "sft")
    command = [
        sys.executable,
        "-m",
        "minillm",
        "generate",
        "--model",
        model,
        "--prompt",
        "Tom has",
        "--temperature",
        "0",
    ]
    done = subprocess.run([*command, "--max_new_tokens", "12"], cwd=ROOT, capture_output=True, check=True)
    expected = home.tokenizer.decode(continuation(home, "Tom has", 12, temperature=0.0))
    assert done.stdout.decode() == expected + "\n"
    assert done.stderr == b""


def test_generate_takes_the_default_run_a_step_folder_and_standard_input(home, call):
    asked = ["generate", "--prompt", "Tom", "--max_new_tokens", "9", "--seed", "3", "--top_k", "20"]
    status, out, _ = call(*asked)
    assert status == 0 and out == home.tokenizer.decode(continuation(home, "Tom", 9, seed=3, top_k=20)) + "\n"
    assert call(*asked, "--model", "out/sft/step-00000003")[1] == out
    assert call("generate", "--prompt", "-", *asked[3:], typed="Tom")[1] == out


def test_generate_says_when_the_context_is_full(call):
    status, _, err = call("generate", "--prompt", "Tom", "--max_new_tokens", "500", "--temperature", "0")
    assert status == 0 and "context of 64 tokens is full" in err
    status, _, err = call("generate", "--prompt", "Tom " * 200)
    assert status == 2 and "leave no room" in err and err.count("\n") == 1


def test_chat_answers_remembers_and_forgets(home, call, monkeypatch):
    prompts = []
    stream = generate.stream

    def noted(model, tokenizer, ids, *args, **options):
        prompts.append(ids)
        return stream(model, tokenizer, ids, *args, **options)

    monkeypatch.setattr(generate, "stream", noted)
    options = ["--max_new_tokens", "5", "--temperature", "0"]
    status, out, _ = call("chat", *options, typed="Who?\nTom?\n/new\nWho?\n\n")
    assert status == 0 and out.startswith("out/sft/step-00000003")
    first, second, third = prompts
    chat = home.tokenizer.encode_chat
    assert first == third == chat([{"role": "user", "content": "Who?"}], add_generation_prompt=True)[0]
    assert second[: len(first)] == first and len(second) > len(first)
    prompts.clear()
    _, out, _ = call("chat", "--system", "Tom.", *options, typed="Who has the ball?\n" * 6)
    assert "earlier messages forgotten" in out
    system = chat([{"role": "system", "content": "Tom."}])[0]
    assert all(ids[: len(system)] == system and len(ids) <= 32 for ids in prompts)


def numbers(out: str, *names: str) -> list[float]:
    lines = {line[2:18].strip(): line[18:].split()[0] for line in out.splitlines()[1:]}
    return [float(lines[name].replace(",", "")) for name in names]


def test_eval_scores_bins_and_the_text_they_hold_alike(call):
    status, of_bins, _ = call("eval", "--data", "bins", "--seq_len", "16")
    assert status == 0
    loss, perplexity, bits, floor = numbers(of_bins, "loss", "perplexity", "bits per byte", "floor")
    assert perplexity == pytest.approx(np.exp(loss), rel=1e-3)
    size = sum(len(text.encode()) for text in TEXTS)
    assert floor == pytest.approx(270 / size, abs=1e-4) and bits > floor
    for name in ("text.txt", "texts.jsonl"):
        assert numbers(call("eval", "--data", name, "--seq_len", "16")[1], "loss", "bits per byte") == [loss, bits]


def test_eval_counts_answers(call):
    status, out, _ = call("eval", "--data", "questions.jsonl", "--max_new_tokens", "4")
    assert status == 0
    assert [line.split()[0] for line in out.splitlines()[2:]] == ["a", "b", "total"]
    assert "(0/3)" in out.splitlines()[-1]


def test_info_counts_parameters_and_memory(home, call):
    _, out, _ = call("info", "--preset", "124m")
    assert "123,551,232" in out and "1.98 GB of state" in out  # 16 bytes a parameter
    _, out, _ = call("info", "--model", "out/sft")
    assert f"{home.model.config.n_parameters():,}" in out


def test_activations_are_what_the_backward_pass_keeps():
    """The formula against the bytes that autograd really keeps, for a shape where the loss hardly counts."""
    shape = config.ModelConfig(vocab_size=16, dim=128, n_layers=4, n_heads=4, n_kv_heads=2, max_seq_len=256)
    model, kept = Transformer(shape), {}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(torch.zeros(2, 256, dtype=torch.long), torch.zeros(2, 256, dtype=torch.long))
    assert loss.requires_grad
    estimate, least = commands.activations(shape, 2, 256, 4)
    assert sum(kept.values()) == pytest.approx(estimate, rel=0.1)
    assert least < estimate / 3


def test_plot_writes_beside_the_run(home, call):
    folder = home.path / "out" / "plotted"
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0, "time_s": 1}\n')
    assert call("plot", "out/plotted")[1] == "out/plotted/curve.png\n"
    assert call("plot", "out/plotted", "out/plotted/metrics.jsonl")[1] == "curves.png\n"
    assert (folder / "curve.png").stat().st_size > 1000 and (home.path / "curves.png").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["generate"], "--prompt"),
        (["generate", "--prompt", "x", "--modle", "y"], "--modle"),
        (["generate", "--prompt", "x", "--model", "nowhere"], "nowhere: no such folder"),
        (["generate", "--prompt", "x", "--top_p", "2"], "top_p 2.0: must be 0 to 1"),
        (["generate", "--prompt", "x", "--max_new_tokens", "0"], "must be at least 1"),
        (["generate", "--prompt", "x", "--device", "abacus"], "abacus"),
        (["eval", "--data", "nothing.txt"], "nothing.txt: no such file"),
        (["eval", "--data", "text.txt", "--seq_len", "65"], "--seq_len 65"),
        (["eval", "--data", "text.txt", "--seq_len", "0"], "--seq_len 0"),
        (["plot", "out"], "metrics.jsonl: no such file"),
        (["info"], "either --preset NAME or --model DIR"),
        (["dance"], "dance"),
        ([], "COMMAND"),
    ],
)
def test_a_user_s_mistake_is_one_line_and_status_2(call, arguments, message):
    status, _, err = call(*arguments)
    assert status == 2 and err.startswith("error: ") and message in err and err.count("\n") == 1


def test_without_a_model_the_next_step_is_named(call, tmp_path, monkeypatch):
    monkeypatch.setattr(commands, "DEFAULT_RUNS", (str(tmp_path / "a"), str(tmp_path / "b")))
    status, _, err = call("chat")
    assert status == 2 and "train_pretrain.py" in err
