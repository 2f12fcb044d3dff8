import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from minillm.generation import completion
from minillm.generation.sampling import Sampling

ROOT = Path(__file__).parents[3]


def continuation(home, text, n, **sampling):
    ids = [home.tokenizer.bos_id, *home.tokenizer.encode(text)]
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
