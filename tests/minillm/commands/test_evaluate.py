import copy

import numpy as np
import pytest
import torch

from minillm.checkpoint import huggingface


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


def test_a_loss_that_is_no_number_is_refused(home, call, tmp_path):
    """Each weight is finite, and their products are not."""
    model = copy.deepcopy(home.model)
    with torch.no_grad():
        model.norm.weight.fill_(3e38)
    home.tokenizer.save(tmp_path)
    huggingface.save_model(model, tmp_path)
    status, _, said = call("eval", "--model", str(tmp_path), "--data", "text.txt")
    assert status == 2 and "its loss is" in said.splitlines()[-1] and "weights are damaged" in said
