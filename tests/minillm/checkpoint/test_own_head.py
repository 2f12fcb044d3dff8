"""Tied or not is what the weights say: a head of its own in the file counts more than config.json."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from minillm.checkpoint import gguf, huggingface, tensor_files
from minillm.model.config import ModelConfig
from minillm.model.transformer import Transformer
from minillm.tuning import folders

SIZES = dict(vocab_size=48, dim=32, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=16, ffn_dim=64, max_seq_len=32)


@pytest.fixture(params=["another", "the same", "none"])
def folder(request, tmp_path):
    """A folder whose config.json says tied, and the head in its file: (kind, folder, the head that counts)."""
    model = Transformer(ModelConfig(**SIZES, tie_embeddings=True))
    model.init_weights(0)
    huggingface.save_model(model, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    head = weights["model.embed_tokens.weight"].clone()
    if request.param == "another":
        head = head.flip(0).contiguous()
    if request.param != "none":
        save_file(weights | {"lm_head.weight": head}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return request.param, tmp_path, head


def test_a_head_of_its_own_counts_more_than_the_config(folder, tmp_path, capsys):
    kind, path, head = folder
    tensor_files._print_untied.cache_clear()
    model = huggingface.load_model(path)
    untied = kind == "another"
    assert model.config.tie_embeddings == (not untied)
    assert torch.equal(model.lm_head.weight, head)
    assert ("loaded untied" in capsys.readouterr().err) == untied
    tokens = torch.arange(20)[None]  # (1, 20)
    with torch.no_grad():
        logits = model.logits(model.hidden(tokens))
        if untied:  # by hand, from the embedding and the head of the file
            assert torch.allclose(logits, model.hidden(tokens) @ head.T, atol=1e-5)
        else:
            theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
            assert torch.allclose(logits, theirs(tokens).logits, atol=1e-4)
    assert len(folders.base_sha256(path)) == 64  # of an adapter's base

    # what is saved says so, in either format
    again = tmp_path / "again"
    again.mkdir()
    huggingface.save_model(model, again)
    assert json.loads((again / "config.json").read_text())["tie_word_embeddings"] == (not untied)
    assert torch.equal(huggingface.load_model(again).lm_head.weight, head)
    stored = huggingface.open_folder(path)
    gguf.write_file(stored, None, tmp_path / "model.gguf", torch.float32)
    read, _ = gguf.open_file(tmp_path / "model.gguf")
    assert read.config.tie_embeddings == (not untied)


def test_a_gguf_whose_head_is_its_embedding_again_is_tied(tmp_path):
    model = Transformer(ModelConfig(**SIZES, tie_embeddings=False))
    model.init_weights(0)
    for same in (True, False):
        if same:
            model.lm_head.weight.data.copy_(model.embed_tokens.weight.data)
        else:
            model.lm_head.weight.data.mul_(2)
        huggingface.save_model(model, tmp_path)
        path = tmp_path / f"{same}.gguf"
        gguf.write_file(huggingface.open_folder(tmp_path), None, path, torch.float32)
        stored, _ = gguf.open_file(path)
        assert stored.config.tie_embeddings == same
        key = "model.embed_tokens.weight" if same else "lm_head.weight"
        assert torch.equal(stored.read(key, torch.float32), model.lm_head.weight)
