import copy
import json

import numpy as np
import pytest
import torch

from minillm.checkpoint import huggingface
from minillm.evaluation import benchmark_scores
from minillm.evaluation.benchmarks import BENCHMARKS
from tests.minillm.evaluation.benchmark_rows import HUB, WORKED, write_all, write_rows


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


@pytest.mark.parametrize("name", ["bins", "texts.jsonl"])
def test_eval_says_that_there_are_more_documents_than_it_scores(home, call, name):
    whole = call("eval", "--data", name, "--seq_len", "16")[1]
    part = call("eval", "--data", name, "--seq_len", "16", "--max_tokens", "20")[1]
    assert "the first of more (--max_tokens)" in part and "of more" not in whole
    assert numbers(part, "documents") < numbers(whole, "documents")


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


# ---- benchmarks


def test_eval_asks_benchmarks_and_goes_on_from_what_is_known(home, call, monkeypatch):
    write_all(home.path / "data" / "eval")
    asked = ["eval", "--tasks", "all", "--out", "scores/all.json"]
    status, out, _ = call(*asked)
    assert status == 0 and "longest input   64 tokens; the context is 64" in out
    assert "gsm8k: left out: --seq_len 64: an answer may have 256 tokens" in out
    results = json.loads((home.path / "scores" / "all.json").read_text())
    assert results["n-samples"]["arc_easy"] == {"original": 3, "effective": 3}
    assert set(results["groups"]) == {"mmlu", "cmmlu", "ceval-valid"}

    # the second time nothing is computed
    monkeypatch.setattr(benchmark_scores, "loglikelihoods", None)
    assert call(*asked)[:2] == (0, out)
    assert json.loads((home.path / "scores" / "all.json").read_text()) == results


def test_all_benchmarks_with_examples_leaves_out_those_that_have_too_few(home, call):
    write_all(home.path / "rows")
    given = ["eval", "--tasks", "all", "--task_data", "rows", "--limit", "1", "--seq_len", "64"]
    status, out, _ = call(*given, "--shots", "2")
    assert status == 0 and "piqa: 2 examples in files of the split train, too few for --shots 2" in out
    asked = {line.split()[0]: line.split()[1] for line in out[out.index("  task ") :].splitlines()[1:]}
    assert asked["lambada_openai"] == asked["arc_easy"] == asked["mmlu"] == "2" and "piqa" not in asked


def test_all_benchmarks_leaves_out_one_with_a_choice_longer_than_the_input(home, call):
    """One such choice refuses its benchmark before anything is computed, and the others are asked."""
    question, several = HUB["piqa"][1], HUB["arc_easy"][1]
    write_rows(home.path / "long" / "piqa" / "valid.jsonl", [{**question[0], "sol2": "the ball " * 40}, question[1]])
    write_rows(home.path / "long" / "arc_easy" / "test.jsonl", several)
    given = ["eval", "--task_data", "long", "--tasks"]
    status, out, _ = call(*given, "all")
    assert status == 0 and out.splitlines()[-1].split()[0] == "arc_easy"
    (line,) = (line for line in out.splitlines() if "piqa: left out" in line)
    assert "a continuation of " in line and "longer than --seq_len 64; raise it" in line
    for named in ("piqa", "arc_easy,piqa"):
        status, out, said = call(*given, named)
        assert status == 2 and "piqa: a continuation of " in said and "  task " not in out


def test_benchmarks_without_files_are_named(home, call):
    write_rows(home.path / "few" / "piqa" / "valid.jsonl", HUB["piqa"][1])
    status, out, _ = call("eval", "--tasks", "all", "--task_data", "few", "--limit", "1")
    assert status == 0 and out.count("put it there from https://") == len(BENCHMARKS) - 1
    assert out.splitlines()[-1].split()[:5] == ["piqa", "0", "1", "0", "acc_norm"]
    for split in ("train", "test"):
        write_rows(home.path / "few" / "gsm8k" / f"{split}.jsonl", WORKED)
        write_rows(home.path / "words" / "gsm8k" / f"{split}.jsonl", WORKED)
    refused = {
        "--tasks all --task_data words": "words holds only benchmarks for which 64 tokens are too few",
        "--tasks all --task_data words --out words.json": "words holds only benchmarks",
        "--tasks all --task_data words --shots 9": "holds no benchmark",
        "--tasks piqa --task_data few --out few": "--out few: is a folder; give the name of a file",
        "--tasks gsm8k --task_data few": "gsm8k: --seq_len 64: an answer may have 256 tokens",
        "--tasks piqa,hellaswag --task_data few": "hellaswag: no file of the split",
        "--tasks hellaswg": "did you mean hellaswag?",
        "--tasks all --task_data nowhere": "holds no benchmark",
        "--tasks piqa --data text.txt": "the files of --tasks are in --task_data",
        "--data text.txt --shots 5": "is about benchmarks; give --tasks",
        "--tasks piqa --task_data few --seq_len 65": "must be 1 to the model's context, 64",
        "--tasks piqa --task_data few --seq_len 2": "piqa: a continuation of ",
        "--tasks piqa --max_tokens 5": "say --limit",
        "--tasks piqa --template simple": "--template simple: is about texts or questions in --data",
        "--tasks piqa --max_new_tokens 9": "--max_new_tokens 9: is about texts or questions",
        "--data text.txt --task_data few": "is about benchmarks; give --tasks",
    }
    for words, message in refused.items():
        status, _, said = call("eval", *words.split())
        assert status == 2 and message in said, words
