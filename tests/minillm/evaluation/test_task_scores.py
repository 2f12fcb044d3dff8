"""Benchmarks asked while a model is trained: the numbers of `eval`, the same on all ranks, and refused early."""

import math
import re

import pytest
import torch

import train_reward
import train_sft
from minillm.base.command_line import parse
from minillm.base.errors import UserError
from minillm.distributed.ranks import Ranks
from minillm.evaluation.benchmark_files import read_tasks
from minillm.evaluation.benchmark_scores import Done, ask, pooled, values_of
from minillm.evaluation.task_scores import TaskScores, tasks_to_ask
from tests import launch
from tests.minillm.evaluation.benchmark_rows import write_all

ALONE = Ranks(0, 1, torch.device("cpu"))


def configured(eval_tasks: str | None, **options) -> train_sft.Config:
    return train_sft.Config(eval_tasks=eval_tasks, **options)


def test_the_numbers_are_those_of_eval(home, tmp_path):
    folder = write_all(tmp_path / "eval")
    places = ", ".join(f"{folder}/{name}" for name in ("arc_easy", "lambada_openai", "mmlu"))
    tasks = tasks_to_ask(configured(places, eval_limit=2), home.tokenizer, home.model.config, ALONE)
    home.model.train()
    scores = tasks.scores(home.model, ALONE)
    assert home.model.training
    home.model.eval()

    expected = {}
    for name in ("arc_easy", "lambada_openai", "mmlu"):
        of_tasks = []
        for task in read_tasks(name, folder, None, 2):
            asked = ask(home.model, home.tokenizer, task, 64, Done(None, ""))
            of_tasks.append(values_of(task.questions, asked, task.benchmark.metrics))
        for metric, (value, error) in pooled(of_tasks, [2] * len(of_tasks)).items():
            expected[f"{metric}/{name}"] = value
            if not math.isnan(error):
                expected[f"{metric}_stderr/{name}"] = error
    assert scores == pytest.approx(expected)
    assert {"acc/mmlu", "acc_stderr/arc_easy", "perplexity/lambada_openai"} <= set(scores)


def test_dropout_and_the_order_of_asking_do_not_matter(home, tmp_path):
    tasks = tasks_to_ask(configured(f"{write_all(tmp_path / 'eval')}/piqa"), home.tokenizer, home.model.config, ALONE)
    home.model.train()
    home.model.dropout.p = 0.5
    try:
        assert tasks.scores(home.model, ALONE) == tasks.scores(home.model, ALONE)
    finally:
        home.model.dropout.p = 0.0
        home.model.eval()


def test_what_cannot_be_asked_is_refused_before_training(home, tmp_path):
    folder = write_all(tmp_path / "eval")

    def refused(message: str, eval_tasks: str, tokenizer=home.tokenizer, **options) -> None:
        with pytest.raises(UserError, match=message):
            tasks_to_ask(configured(eval_tasks, **options), tokenizer, home.model.config, ALONE)

    refused(r"'arc_hard' is no benchmark; give a folder by one of the names arc_easy, ", f"{folder}/arc_hard")
    refused(r"no file of the split test in nowhere.arc_easy; put it there from https", "nowhere/arc_easy")
    refused(r"arc_easy is given twice", f"{folder}/arc_easy, {write_all(tmp_path / 'other')}/arc_easy")
    refused(r"needs a tokenizer", "arc_easy", tokenizer=None)
    refused(r"--eval_tasks gsm8k: --seq_len 64: an answer may have 256 tokens", f"{folder}/gsm8k")
    with pytest.raises(UserError, match=r"--eval_tasks hellaswag: a continuation of \d+ tokens is longer"):
        TaskScores({"hellaswag": read_tasks("hellaswag", folder, None, None)}, home.tokenizer, 2)
    with pytest.raises(UserError, match="--eval_limit 3: is about benchmarks; give --eval_tasks"):
        configured(None, eval_limit=3)
    assert not tasks_to_ask(configured(None), home.tokenizer, home.model.config, ALONE).tasks


def test_questions_that_are_cut_are_told_of_before_training(home, tmp_path, capsys):
    folder = write_all(tmp_path / "eval")
    tasks_to_ask(configured(f"{folder}/arc_easy,{folder}/mmlu"), home.tokenizer, home.model.config, ALONE)
    (told,) = capsys.readouterr().out.splitlines()  # ARC's are short
    assert re.fullmatch(r"--eval_tasks mmlu: (\d+) of \1 are longer than 64 tokens: cut in front", told)


def asked(run) -> list[dict]:
    return [row for row in launch.rows(run) if any(name.startswith("acc") for name in row)]


def test_a_reward_model_is_asked_nothing():
    with pytest.raises(UserError, match="--eval_tasks: no such option"):
        parse(train_reward.Config, "", ["--eval_tasks", "arc_easy"])


@pytest.mark.slow
@pytest.mark.parametrize("more", ["--shard 2", "--tensor_parallel 2", "--context_parallel 2"])
def test_ranks_share_the_questions(tmp_path, more):
    """One rank, and two that hold parts of the model or of the rows: the same rows of metrics."""
    launch.write_corpus(tmp_path / "data")
    folder = write_all(tmp_path / "eval")
    options = f"--data {tmp_path}/data {launch.SMALL} --n_kv_heads 2 --steps 4 --max_seq_len 128 --eval_every 2"
    options += f" --save_every 2 --optimizer adamw --eval_tasks {folder}/arc_easy,{folder}/hellaswag,{folder}/copa"
    launch.finish("pretrain", f"{options} --out {tmp_path}/one", tmp_path / "log-one")
    launch.finish("pretrain", f"{options} {more} --out {tmp_path}/two", tmp_path / "log-two", ranks=2)
    one, two = asked(tmp_path / "one"), asked(tmp_path / "two")
    assert [row["step"] for row in one] == [2, 4]
    for row, other in zip(one, two, strict=True):
        assert other == pytest.approx(row, abs=1e-6)
    assert launch.losses(tmp_path / "two") == pytest.approx(launch.losses(tmp_path / "one"), abs=1e-5)


@pytest.mark.slow
def test_a_resumed_run_asks_as_one_never_stopped_and_training_stays_the_same(tmp_path):
    launch.write_corpus(tmp_path / "data")
    plain = f"--data {tmp_path}/data {launch.SMALL} --dropout 0.1 --schedule constant --max_seq_len 128 --eval_every 2"
    asking = f"{plain} --eval_tasks {write_all(tmp_path / 'eval')}/arc_easy"
    launch.finish("pretrain", f"{plain} --steps 4 --out {tmp_path}/plain", tmp_path / "log")
    launch.finish("pretrain", f"{asking} --steps 4 --out {tmp_path}/whole", tmp_path / "log")
    for steps in (2, 4):
        launch.finish("pretrain", f"{asking} --steps {steps} --out {tmp_path}/resumed", tmp_path / "log")
    assert asked(tmp_path / "resumed") == asked(tmp_path / "whole")
    assert [row["step"] for row in asked(tmp_path / "whole")] == [2, 4]
    assert launch.losses(tmp_path / "whole") == launch.losses(tmp_path / "plain")
    assert launch.tensors(tmp_path / "whole", 4) == launch.tensors(tmp_path / "plain", 4)
    assert launch.tensors(tmp_path / "resumed", 4) == launch.tensors(tmp_path / "plain", 4)
