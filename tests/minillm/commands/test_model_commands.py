import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from minillm.commands import chat as chat_command
from minillm.generation import completion, load
from minillm.generation.sampling import Sampling

ROOT = Path(__file__).parents[3]


def continuation(home, text, n, **sampling):
    ids = [home.tokenizer.eos_id, *home.tokenizer.encode(text)]
    sampling = Sampling(**sampling)
    return completion.generate(home.model, [ids], n, sampling=sampling, stop_ids=[home.tokenizer.eos_id])[0].tokens


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
    assert call("generate", "--prompt", "-", *asked[3:], typed="Tom\n")[1] == out
    status, _, err = call("generate", "--prompt", "-", typed=b"Tom\xff")
    assert status == 2 and "surrogate" in err and err.count("\n") == 1


@pytest.mark.parametrize("with_manifest", [True, False])
def test_weights_that_may_not_be_read_are_not_called_damaged(home, call, monkeypatch, tmp_path, with_manifest):
    folder = shutil.copytree(home.path / "out" / "sft" / "step-00000003", tmp_path / "step-00000003")
    if not with_manifest:
        (folder / "manifest.json").unlink()
    opened = Path.open

    def refuse(path, *arguments, **options):  # root may read whatever its rights are
        if path.name == "model.safetensors":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return opened(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", refuse)
    status, _, err = call("generate", "--prompt", "Tom", "--model", str(tmp_path / "step-00000003"))
    assert status == 2 and err == f"error: {folder}/model.safetensors: Permission denied; fix its permissions (chmod)\n"


def test_generate_says_when_the_context_is_full(call):
    status, _, err = call("generate", "--prompt", "Tom", "--max_new_tokens", "500", "--temperature", "0")
    assert status == 0 and "context of 64 tokens is full" in err
    status, _, err = call("generate", "--prompt", "Tom " * 200)
    assert status == 2 and "leave no room" in err and err.count("\n") == 1


def test_chat_answers_remembers_and_forgets(home, call, monkeypatch):
    prompts = []
    stream = completion.stream

    def noted(model, tokenizer, ids, *args, **options):
        prompts.append(ids)
        return stream(model, tokenizer, ids, *args, **options)

    monkeypatch.setattr(completion, "stream", noted)
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


def test_chat_shows_single_questions_to_a_model_that_was_taught_so(call, monkeypatch):
    """Or as many as --turns says, whatever it was taught."""
    monkeypatch.setattr(chat_command, "trained_with", lambda folder: {"turns": 1})
    shown = []

    def noted(model, tokenizer, ids, *args, **options):
        shown.append(tokenizer.decode(ids))
        yield "Yes."
        return SimpleNamespace(reason="stop")

    monkeypatch.setattr(completion, "stream", noted)
    for options, last in (([], "Ann"), (["--turns", "2"], "AnnMia"), (["--turns", "9"], "AnnMiaTom")):
        shown.clear()
        status, out, _ = call("chat", "--system", "S.", *options, typed="Tom?\nMia?\nAnn?\n\n")
        assert status == 0 and ("taught single questions" in out) == (not options)
        assert all("S." in text for text in shown)
        asked = ["".join(name for name in ("Ann", "Mia", "Tom") if f"{name}?" in text) for text in shown]
        assert asked == ["Tom", "MiaTom" if options else "Mia", last]


def test_chat_goes_on_after_a_line_that_is_too_long(call, monkeypatch):
    """And remembers what was said before it."""
    shown, stream = [], completion.stream

    def noted(model, tokenizer, ids, *args, **options):
        shown.append(ids)
        return stream(model, tokenizer, ids, *args, **options)

    monkeypatch.setattr(completion, "stream", noted)
    options = ["--max_new_tokens", "2", "--temperature", "0"]
    status, out, _ = call("chat", *options, typed="Who?\n" + "Tom " * 200 + "\nMia?\n")
    assert status == 0 and out.count("> ") == 4 and out.count("tokens fill the context of 64") == 1
    with_it = list(shown)
    shown.clear()
    call("chat", *options, typed="Who?\nMia?\n")
    assert with_it == shown and len(shown) == 2 and len(shown[1]) > len(shown[0])


def test_chat_goes_on_after_a_line_that_is_not_utf_8(call):
    status, out, _ = call("chat", "--max_new_tokens", "2", typed=b"Who?\n\xff\xfe?\nTom?\n")
    assert status == 0 and out.count("> ") == 4 and out.count("is not UTF-8") == 1


def numbers(out: str, *names: str) -> list[float]:
    lines = {line[2:18].strip(): line[18:].split()[0] for line in out.splitlines()[1:]}
    return [float(lines[name].replace(",", "")) for name in names]


def test_eval_scores_bins_and_the_text_they_hold_alike(home, call):
    status, of_bins, _ = call("eval", "--data", "bins", "--seq_len", "16")
    assert status == 0
    loss, perplexity, bits, floor = numbers(of_bins, "loss", "perplexity", "bits per byte", "floor")
    assert perplexity == pytest.approx(np.exp(loss), rel=1e-3)
    size = sum(len(text.encode()) for text in home.texts)
    assert floor == pytest.approx(270 / size, abs=1e-4) and bits > floor
    for name in ("text.txt", "texts.jsonl"):
        assert numbers(call("eval", "--data", name, "--seq_len", "16")[1], "loss", "bits per byte") == [loss, bits]


def test_eval_counts_answers(call):
    status, out, _ = call("eval", "--data", "questions.jsonl", "--max_new_tokens", "4")
    assert status == 0
    assert [line.split()[0] for line in out.splitlines()[2:]] == ["a", "b", "total"]
    assert "(0/3)" in out.splitlines()[-1]


def test_without_a_model_the_next_step_is_named(call, tmp_path, monkeypatch):
    monkeypatch.setattr(load, "DEFAULT_RUNS", (str(tmp_path / "a"), str(tmp_path / "b")))
    status, _, err = call("chat")
    assert status == 2 and "train_pretrain.py" in err
