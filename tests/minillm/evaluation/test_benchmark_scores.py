import json
import math

import pytest
import torch

from minillm.evaluation import benchmark_scores
from minillm.evaluation.benchmark_files import Task, read_tasks
from minillm.evaluation.benchmark_scores import Done, ask, n_cut, pooled, results_of, table, values_of
from minillm.evaluation.benchmarks import BENCHMARKS, Question
from minillm.evaluation.loglikelihood import Request, Score, pairs_of
from minillm.evaluation.worked_answers import LONGEST
from minillm.model.quant import quantize_base
from minillm.tuning.adapter import attach, set_adapter
from minillm.tuning.options import TuningConfig
from tests.minillm.evaluation.benchmark_rows import write_all
from tests.minillm.model_options import build
from tests.minillm.tuning.tiny import shake

LONG = Question([Request("c", " a"), Request("c", " bcdefghi")], [1, 8], 1)


def scores(*nats: float) -> list[Score]:
    return [Score(n, False) for n in nats]


def test_acc_takes_the_sum_and_acc_norm_the_mean_per_character():
    given = [scores(-3, -8), scores(-3, -2), scores(-0.5, -8)]
    values = values_of([LONG] * 3, given, ("acc", "acc_norm"))
    assert values["acc"][0] == pytest.approx(1 / 3)
    assert values["acc_norm"][0] == pytest.approx(2 / 3)
    # three values 0, 0, 1: variance 1/3 (n − 1 below), over n
    assert values["acc"][1] == pytest.approx(math.sqrt(1 / 3 / 3))


def test_of_equal_choices_the_first_is_taken():
    assert values_of([LONG], [scores(-2, -2)], ("acc",))["acc"][0] == 0


def test_a_single_question_has_no_standard_error():
    value, error = values_of([LONG], [scores(-2, -1)], ("acc",))["acc"]
    assert value == 1 and math.isnan(error)


def test_last_words_count_if_they_are_greedy():
    word = Question([Request("c", " w")], [1])
    given = [[Score(-1.0, True)], [Score(-3.0, False)]]
    values = values_of([word] * 2, given, ("perplexity", "acc"))
    assert values["acc"][0] == 0.5
    assert values["perplexity"] == pytest.approx((math.exp(2), math.exp(2) * 1.0))


def test_subjects_are_weighted_by_their_questions():
    """Pooled by the formula from all single values: the variances inside each subject."""
    first = values_of([LONG] * 4, [scores(-3, -2)] * 3 + [scores(-1, -2)], ("acc",))
    second = values_of([LONG] * 2, [scores(-1, -2), scores(-3, -2)], ("acc",))
    value, error = pooled([first, second], [4, 2])["acc"]
    assert value == pytest.approx(4 / 6)
    inside = 3 * 0.25**2 + 0.75**2 + 2 * 0.5**2
    assert error == pytest.approx(math.sqrt(inside / (6 - 2) / 6))


def test_answers_in_words_count_by_their_number():
    worked = Question([Request("q", " 1,000 + 2 = 1002\n#### 1,002")], [9])
    texts = [["so #### 1002."], ["it is $1,002"], ["#### 3, or 1002"], ["none"]]
    metrics = BENCHMARKS["gsm8k"].metrics
    values = values_of([worked] * 4, texts, metrics)
    assert [values[metric][0] for metric in metrics] == [0.25, 0.75]
    results = results_of(
        {"gsm8k": [(Task("gsm8k", BENCHMARKS["gsm8k"], [worked] * 4, 5, 4), values, 0)]}, "m", None, 512
    )
    entry = results["results"]["gsm8k"]
    assert (entry["exact_match,strict-match"], entry["exact_match,flexible-extract"]) == (0.25, 0.75)
    assert "exact_match,strict-match" in table(results) and "0.25 ± 0.25" in table(results)


def test_texts_are_remembered_too(home, tmp_path, monkeypatch):
    (task,) = read_tasks("gsm8k", write_all(tmp_path / "eval"), 0, 3)
    written = []
    monkeypatch.setattr(
        benchmark_scores, "continued", lambda model, tokenizer, prompts, n: written.append(len(prompts)) or prompts
    )
    for _ in range(2):
        texts = ask(home.model, home.tokenizer, task, 512, Done(tmp_path / "done.jsonl", "m"))
        assert texts == [[question.requests[0].context] for question in task.questions]
    assert written == [3]


def test_the_results_have_the_form_of_the_harness():
    task = Task("ceval_law", BENCHMARKS["ceval"], [LONG] * 2, 5, 9)
    values = values_of(task.questions, [scores(-3, -2), scores(-1, -2)], ("acc",))
    results = results_of({"ceval": [(task, values, 1)]}, "out/mine", 2, 64)
    entry = {"alias": "ceval-valid_law", "acc,none": 0.5, "acc_stderr,none": 0.5}
    assert results["results"]["ceval-valid_law"] == entry
    assert results["groups"]["ceval-valid"]["acc,none"] == 0.5
    assert results["group_subtasks"] == {"ceval-valid": ["ceval-valid_law"]}
    assert results["n-samples"]["ceval-valid_law"] == {"original": 9, "effective": 2}
    lines = table(results).splitlines()
    assert len(lines) == 4 and lines[1].split() == ["ceval-valid_law", "5", "2", "1", "acc", "0.5", "±", "0.5"]
    assert lines[3] == "  cut: longer than 64 tokens (--seq_len), so they lost their beginning, examples first"


@pytest.mark.parametrize("name", ["arc_easy", "gsm8k"])
def test_questions_that_lose_their_beginning_are_counted(home, tmp_path, name):
    """Those of which the model is given less than there is: by as little as one token, and by any of their choices."""
    (task,) = read_tasks(name, write_all(tmp_path / "eval"), 0, None)
    lengths = []  # ids of each question's longest input
    for question in task.questions:
        pairs = pairs_of(home.tokenizer, [(request.context, request.continuation) for request in question.requests])
        if task.benchmark.in_words:
            lengths.append(len(pairs[0].context) + LONGEST)
        else:
            lengths.append(max(len(pair.context + pair.continuation) - 1 for pair in pairs))
    for max_len in (min(lengths) - 1, min(lengths), max(lengths) - 1, max(lengths)):
        assert n_cut(home.tokenizer, task, max_len) == sum(length > max_len for length in lengths)


# ---- what is known already


def flat(of_all: list[list[Score]]) -> list[float]:
    return [score.nats for of_question in of_all for score in of_question]


@pytest.fixture
def task(tmp_path) -> Task:
    (task,) = read_tasks("arc_easy", write_all(tmp_path / "eval"), 0, None)
    return task


def counted(monkeypatch) -> list[int]:
    """The numbers of requests that go to the model from here on."""
    asked = []
    plain = benchmark_scores.loglikelihoods
    monkeypatch.setattr(benchmark_scores, "loglikelihoods", lambda *args: asked.append(len(args[2])) or plain(*args))
    return asked


def test_a_stopped_evaluation_goes_on(home, task, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark_scores, "QUESTIONS_AT_ONCE", 2)
    file = tmp_path / "done.jsonl"
    whole = flat(ask(home.model, home.tokenizer, task, 64, Done(None, "m")))
    ask(home.model, home.tokenizer, task._replace(questions=task.questions[:2]), 64, Done(file, "m"))
    with file.open("ab") as stream:
        stream.write(b'{"digest": "cut')  # killed while it wrote
    asked = counted(monkeypatch)
    assert flat(ask(home.model, home.tokenizer, task, 64, Done(file, "m"))) == pytest.approx(whole, abs=1e-4)
    assert asked == [3]  # the choices of the third question
    asked.clear()
    assert flat(ask(home.model, home.tokenizer, task, 64, Done(file, "m"))) == pytest.approx(whole, abs=1e-4)
    assert not asked


def test_scores_of_another_model_or_of_other_texts_are_not_taken(home, task, tmp_path, monkeypatch):
    file = tmp_path / "done.jsonl"
    ask(home.model, home.tokenizer, task, 64, Done(file, "m"))
    asked = counted(monkeypatch)
    ask(home.model, home.tokenizer, task, 64, Done(file, "another"))
    changed = task.questions[0]._replace(
        requests=[Request("other", choice) for _, choice in task.questions[0].requests]
    )
    ask(home.model, home.tokenizer, task._replace(questions=[changed]), 64, Done(file, "m"))
    assert asked == [10, 3]


def model_of(bits: int | None = None, seed: int = 1, **tuning):
    """A small model, its base in so many bits, with an adapter of random numbers if `tuning` names one."""
    model = build(seed)
    if bits is not None:
        quantize_base(model, bits)
    if tuning:
        adapter = attach(model, TuningConfig(**tuning))
        shake(adapter.parameters())
    return model


TUNED = [{}, {"tune": "lora"}, {"tune": "dora"}, {"tune": "ia3"}, {"tune": "adapter"}, {"tune": "prefix"}]


@pytest.mark.parametrize("tuning", TUNED, ids=str)
@pytest.mark.parametrize("bits", [None, 16, 8, 4])
@torch.no_grad()
def test_whatever_tensor_changes_the_logits_changes_the_digest(home, bits, tuning):
    model = model_of(bits, **tuning)
    tokens = torch.arange(3, 43)[None]
    digest, logits = benchmark_scores.digest_of(model, home.tokenizer), model(tokens)
    assert digest == benchmark_scores.digest_of(model_of(bits, **tuning), home.tokenizer)
    worked_out = ("cos", "sin", "square")  # from the config, or from the base's weights
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name.rpartition(".")[2] in worked_out or not tensor.numel():
            continue
        kept = tensor.clone()
        tensor.copy_(kept.flip(0) if tensor.dim() > 1 else kept + 1)
        if not torch.equal(model(tokens), logits):
            assert benchmark_scores.digest_of(model, home.tokenizer) != digest, name
        tensor.copy_(kept)


def test_models_that_give_other_scores_have_other_digests(home):
    """Other bits, another base of the same adapter, and facts of an adapter that are in no weight."""
    lora = {"tune": "lora", "lora_rank": 4}
    models = [model_of(bits) for bits in (None, 16, 8, 4)]
    models += [model_of(bits, seed, **lora) for bits in (None, 8, 4) for seed in (1, 2)]
    models += [model_of(4, **lora, lora_alpha=alpha) for alpha in (1.0, 4.0)]
    models += [model_of(4, **lora, lora_alpha=4.0, rslora=True)]
    digests = {benchmark_scores.digest_of(model, home.tokenizer) for model in models}
    assert len(digests) == len(models)
    set_adapter(models[-1], None)  # the base alone
    assert benchmark_scores.digest_of(models[-1], home.tokenizer) == benchmark_scores.digest_of(
        models[3], home.tokenizer
    )


def test_the_digest_of_a_model_is_that_of_its_weights(home):
    before = benchmark_scores.digest_of(home.model, home.tokenizer)
    assert before == benchmark_scores.digest_of(home.model, home.tokenizer)
    weight = home.model.norm.weight.data
    weight[0] += 1
    changed = benchmark_scores.digest_of(home.model, home.tokenizer)
    weight[0] -= 1
    assert changed != before and json.dumps(before)
