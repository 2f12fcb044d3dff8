"""Rows become the prompts that lm-evaluation-harness makes of them, in each form in which a set is published."""

import math

import pytest

from minillm.base.errors import UserError
from minillm.evaluation.benchmarks import BENCHMARKS, Question
from minillm.evaluation.loglikelihood import Request
from tests.minillm.evaluation.benchmark_rows import FIVE, HUB, LABELS


def question(name: str, row: dict) -> Question:
    return BENCHMARKS[name].question(row)


def hub(name: str, number: int = 0) -> Question:
    return question(name, HUB[name][1][number])


PHYSICS = {"question": " Who? ", "A": "a", "B": "b", "C": "c", "D": "d", "answer": "B"}
EXPECTED = {  # first context, first continuation, right choice
    "arc_easy": ("Question: Who has the ball?\nAnswer:", " Tom", 0),
    "hellaswag": ("Ball games: Tom has a ball. The cat", " has it.", 0),
    "piqa": ("Question: To hold the ball\nAnswer:", " take the ball.", 0),
    "winogrande": ("Tom has the cat since Tom", " is kind.", 0),
    "boolq": ("Tom has the ball.\nQuestion: has Tom the ball?\nAnswer:", " no", 1),
    "copa": ("Tom has it because", "  he took it.", 0),
    "openbookqa": ("The ball is with", " Tom", 0),
    "commonsense_qa": ("Question: Who has the ball?\nA. ball\nB. cat\nC. apple\nD. Tom\nE. the\nAnswer:", " A", 3),
    "lambada_openai": ("Who has the ball? Tom has the", " ball", 0),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_the_texts_are_those_of_the_harness(name):
    context, continuation, right = EXPECTED[name]
    made = hub(name)
    assert made.requests[0] == Request(context, continuation)
    assert made.right == right


def test_exams_list_their_choices():
    made = question("mmlu", PHYSICS)
    assert made.requests[1] == Request("Who?\nA. a\nB. b\nC. c\nD. d\nAnswer:", " B") and made.right == 1
    as_on_the_hub = {"question": " Who? ", "choices": ["a", "b", "c", "d"], "answer": 1}
    assert question("mmlu", as_on_the_hub) == made
    assert question("ceval", PHYSICS).requests[0].context.endswith("D. d\n答案：")
    capital = {name.capitalize() if name in ("question", "answer") else name: value for name, value in PHYSICS.items()}
    assert question("cmmlu", capital) == question("ceval", PHYSICS)


@pytest.mark.parametrize("name", ["arc_easy", "openbookqa", "commonsense_qa"])
def test_both_published_forms_are_the_same_question(name):
    """The authors' files hold one object a choice, Hugging Face's a list of texts and one of labels."""
    row = HUB[name][1][0]
    stem = row.get("question_stem", row.get("question"))
    choices = row["choices"]
    pairs = [{"text": t, "label": n} for t, n in zip(choices["text"], choices["label"], strict=True)]
    theirs = {"id": "1", "question": {"stem": stem, "choices": pairs}, "answerKey": row["answerKey"]}
    assert question(name, theirs) == hub(name)


def test_choices_may_be_numbered_and_more_or_fewer_than_four():
    assert hub("arc_easy", 1).right == 2 and len(hub("arc_easy", 1).requests) == 4
    assert len(hub("arc_easy").requests) == 3


def test_boolq_has_true_and_false_in_its_authors_files():
    row = {"passage": "p", "question": "q", "answer": True}
    assert question("boolq", row).right == 1 and question("boolq", {**row, "answer": False}).right == 0


def test_an_example_ends_in_the_right_answer():
    assert hub("arc_easy").example("") == "Question: Who has the ball?\nAnswer: Tom"
    assert hub("winogrande", 1).example("") == "Who has the ball? Tom has."


def test_a_worked_answer_is_what_examples_show():
    made = question("gsm8k", {"question": "1 + 1?", "answer": "It is 2.\n#### 2"})
    assert made.requests == [Request("Question: 1 + 1?\nAnswer:", " It is 2.\n#### 2")]
    assert BENCHMARKS["gsm8k"].shots == 5


WRONG = {
    "no result": ("gsm8k", {"question": "1 + 1?", "answer": "2"}, "no result behind"),
    "no key": ("arc_easy", {"question": "Who?", "choices": LABELS}, "has no 'answerKey'"),
    "a label that is none": ("arc_easy", {"question": "?", "choices": LABELS, "answerKey": "E"}, "none of its labels"),
    "too large": ("piqa", {"goal": "g", "sol1": "a", "sol2": "b", "label": 2}, "number 2 of 2"),
    "hidden, as in test files": ("piqa", {"goal": "g", "sol1": "a", "sol2": "b", "label": -1}, "number -1 of 2"),
    "no number": ("hellaswag", {**HUB["hellaswag"][1][0], "label": ""}, "not the number of a choice"),
    "no gap": ("winogrande", {"sentence": "s", "option1": "a", "option2": "b", "answer": "1"}, "no gap"),
    "unknown letter": ("mmlu", {**PHYSICS, "answer": "E"}, "none of A, B, C, D"),
    "empty choice": ("piqa", {"goal": "g", "sol1": "", "sol2": "b", "label": 0}, "is empty"),
    "no text": ("lambada_openai", {"text": 3}, "not a text"),
    "other joint": ("copa", {**HUB["copa"][1][0], "question": "why"}, "neither cause nor effect"),
    "a text, as in a table": ("arc_easy", {"question": "q", "choices": str(LABELS), "answerKey": "A"}, "choices is"),
    "fewer labels": (
        "openbookqa",
        {"question_stem": "q", "choices": {**LABELS, "label": ["A", "B"]}, "answerKey": "B"},
        "its 3 choices have the labels",
    ),
    "half a number": ("piqa", {"goal": "g", "sol1": "a", "sol2": "b", "label": 0.5}, "label is 0.5, not the number"),
    "no end": ("piqa", {"goal": "g", "sol1": "a", "sol2": "b", "label": math.inf}, "label is inf, not the number"),
    "a bare list": (
        "commonsense_qa",
        {"question": "q", "choices": {"text": FIVE["text"]}, "answerKey": "A"},
        "'label'",
    ),
}


@pytest.mark.parametrize(
    "wrong", ["abcd", "['a', 'b', 'c', 'd']", {"a": 1, "b": 2, "c": 3}, ["a", None, "c"], [1, 2, 3], 3]
)
@pytest.mark.parametrize("name", ["arc_easy", "openbookqa", "commonsense_qa", "hellaswag", "mmlu"])
def test_choices_are_a_list_of_texts(name, wrong):
    """Of a text each character would be a choice, and of null the word "None"."""
    rows = {
        "hellaswag": {**HUB["hellaswag"][1][0], "endings": wrong},
        "mmlu": {"question": "Who?", "choices": wrong, "answer": 1},
    }
    row = {"question": "q", "choices": {"text": wrong, "label": list("ABCD")[: len(LABELS["label"])]}, "answerKey": "B"}
    with pytest.raises(UserError, match="not a list of texts"):
        question(name, rows.get(name, row))


def test_labels_may_be_numbers():
    row = {"question": "Who?", "choices": {"text": ["a", "b"], "label": [1, 2]}}
    assert (
        question("arc_easy", {**row, "answerKey": 2}).right
        == question("arc_easy", {**row, "answerKey": "2"}).right
        == 1
    )


@pytest.mark.parametrize("case", WRONG)
def test_rows_that_are_none_of_the_benchmark_are_refused(case):
    name, row, message = WRONG[case]
    with pytest.raises(UserError, match=message):
        question(name, row)
