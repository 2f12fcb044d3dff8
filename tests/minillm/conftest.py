"""A folder with a small model and all that the commands read, and a way to call them there."""

import io
import json
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from minillm import __main__
from minillm.base import files
from minillm.base.process import run_script
from minillm.checkpoint import huggingface
from minillm.model.config import ModelConfig
from minillm.model.transformer import Transformer
from minillm.tokenizer.tokenizer import Tokenizer
from minillm.tokenizer.train import train_tokenizer

TEXTS = [f"Who has the {thing}? Tom has the {thing}. 谁有{thing}？" for thing in ("ball", "cat", "apple")]


class Home(NamedTuple):
    path: Path
    model: Transformer
    tokenizer: Tokenizer
    texts: list[str]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Home:
    """A folder with a model of random weights in out/sft, its token bins, a text and questions."""
    home = tmp_path_factory.mktemp("home")
    step = home / "out" / "sft" / "step-00000003"
    tokenizer = train_tokenizer(TEXTS * 30, 400, home / "tokenizer")
    shape = ModelConfig(vocab_size=400, dim=32, n_layers=2, n_heads=4, n_kv_heads=2, max_seq_len=64)
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
    ids = np.array([t for text in TEXTS for t in (1, *tokenizer.encode(text), 2)], dtype=np.uint16)
    meta = {"format": 1, "dtype": "uint16", "vocab_size": 400, "tokenizer_sha256": tokenizer.sha256}
    meta |= {"bos_id": 1, "eos_id": 2, "wrap": "bos_eos"}
    meta["files"] = {"train": [], "val": [{"name": "val-00000.bin", "tokens": len(ids), "documents": 3}]}
    ids.tofile(bins / "val-00000.bin")
    np.save(bins / "val_bits.npy", np.array([80.0, 90.0, 100.0]))
    (bins / "meta.json").write_text(json.dumps(meta))
    return Home(home, model, tokenizer, TEXTS)


@pytest.fixture
def call(home, monkeypatch, capsys):
    """Runs a command line in that folder: (status, stdout, stderr)."""

    def call(*arguments: str, typed: str | bytes = ""):
        data = typed if isinstance(typed, bytes) else typed.encode()
        monkeypatch.chdir(home.path)
        monkeypatch.setattr(sys, "argv", ["minillm", *arguments])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), "utf-8"))
        status = run_script(__main__.main)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call
