"""Each form in which preferences are written down, read into conversations and pairs of them."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.base.errors import UserError
from minillm.datasets.preference_forms import preference
from minillm.datasets.prompts import prompt_of
from tests.minillm.datasets.test_instructions import talk


def said(*contents, system=None) -> list[dict]:
    """Question, answer, …, of which only the last answer is learned."""
    messages = talk(*contents, system=system)
    earlier = [m | {"learn": False} if m["role"] == "assistant" else m for m in messages[:-1]]
    return [*earlier, messages[-1]]


def answer(content: str) -> dict:
    return {"role": "assistant", "content": content}


def sharegpt(*contents) -> list[dict]:
    return [{"from": ("human", "gpt")[i % 2], "value": content} for i, content in enumerate(contents)]


HH = "\n\nHuman: a b\n\nAssistant: c\n\nHuman: d: \n\nAssistant:"
PAIRS = [
    ({"prompt": "p", "chosen": "w", "rejected": "l"}, ["p"], None),
    ({"question": "p", "chosen": " w", "rejected": "l\n"}, ["p"], [" w", "l\n"]),  # texts as they are
    ({"system": "s", "prompt": "p", "chosen": "w", "rejected": "l"}, ["p"], None),
    ({"prompt": talk("p"), "chosen": [answer("w")], "rejected": [answer("l")]}, ["p"], None),
    ({"prompt": talk("p"), "chosen": "w", "rejected": answer("l")}, ["p"], None),
    ({"prompt": "p", "chosen": [answer("w")], "rejected": answer("l")}, ["p"], None),
    ({"prompt": talk("a", "b", "p"), "chosen": [answer("w")], "rejected": [answer("l")]}, ["a", "b", "p"], None),
    ({"instruction": "p", "input": "i", "chosen": "w", "rejected": "l"}, ["p\ni"], None),
    ({"instruction": "p", "input": "", "output": "o", "chosen": "w", "rejected": "l"}, ["p"], None),
    ({"instruction": "p", "history": [["a", "b"]], "chosen": "w", "rejected": "l"}, ["a", "b", "p"], None),
    ({"prompt": "p", "messages": [], "history": "", "instances": [], "chosen": "w", "rejected": "l"}, ["p"], None),
    (
        {"conversations": sharegpt("p"), "chosen": sharegpt("", "w")[1], "rejected": sharegpt("", "l")[1]},
        ["p"],
        None,
    ),
    ({"messages": talk("a", "b", "p"), "chosen": "w", "rejected": "l"}, ["a", "b", "p"], None),
    ({"conversations": sharegpt("p"), "chosen": [answer("w")], "rejected": "l"}, ["p"], None),
    ({"chosen": talk("a", "b", "p", "w"), "rejected": talk("a", "b", "p", "l")}, ["a", "b", "p"], None),
    ({"chosen": sharegpt("p", "w"), "rejected": sharegpt("p", "l")}, ["p"], None),
    ({"prompt": "p", "chosen": talk("p", "w"), "rejected": talk("p", "l")}, ["p"], None),  # ultrafeedback_binarized
    ({"prompt": talk("p"), "chosen": talk("p", "w"), "rejected": talk("p", "l")}, ["p"], None),
    (  # the same with the columns that it also has
        {"prompt": "p", "messages": talk("p", "w"), "chosen": talk("p", "w"), "rejected": talk("p", "l")},
        ["p"],
        None,
    ),
    ({"messages": talk("p"), "chosen": talk("p", "w"), "rejected": talk("p", "l")}, ["p"], None),
    ({"conversations": sharegpt("p"), "chosen": sharegpt("p", "w"), "rejected": sharegpt("p", "l")}, ["p"], None),
    ({"chosen": f"{HH} w: \n", "rejected": f"{HH} l"}, ["a b", "c", "d:"], ["w:", "l"]),
    ({"prompt": HH, "chosen": " w", "rejected": " l"}, ["a b", "c", "d:"], None),
]


@pytest.mark.parametrize(("row", "prompt", "answers"), PAIRS)
def test_each_form_of_a_pair(row, prompt, answers):
    unused: set[str] = set()
    found = preference(row, unused)
    assert found.talks == [said(*prompt, text, system=row.get("system")) for text in answers or ("w", "l")]
    assert found.pairs == [(0, 1, 0.0)] and found.label is None and found.kind == "" and not found.n_ties
    assert unused == ({"output"} if "output" in row else set())


def test_what_is_said_of_a_pair():
    row = {"prompt": "p", "chosen": "w", "rejected": "l", "margin": 1.5, "kind": "wrong", "score_chosen": 9.0}
    row |= {"chosen_model": "m", "note": "n", "lang": None}
    unused: set[str] = set()
    found = preference(row, unused)
    assert found.pairs == [(0, 1, 1.5)] and found.kind == "wrong" and unused == {"chosen_model", "note"}
    assert preference(row | {"margin": "0.5"}).pairs == [(0, 1, 0.5)]  # as in a .csv
    assert preference(row | {"margin": None}).pairs == [(0, 1, 0.0)]


@pytest.mark.parametrize("key", ["output", "responses", "completions", "answers"])
def test_a_ranked_list_gives_all_pairs(key):
    found = preference({"prompt": "p", key: ["a", "b", "c"]})
    assert found.talks == [said("p", text) for text in "abc"]
    assert found.pairs == [(0, 1, 0.0), (0, 2, 0.0), (1, 2, 0.0)]
    assert len(preference({"messages": talk("p"), key: list("abcd")}).pairs) == 6


def test_scores_set_the_best_against_each_that_has_less():
    row = {"prompt": "p", "responses": list("abcde"), "scores": [3, 4.5, 1, 4.5, 4]}
    found = preference(row)
    assert found.pairs == [(1, 0, 1.5), (1, 2, 3.5), (1, 4, 0.5)] and found.n_ties == 1
    found = preference({"prompt": "p", "responses": ["a", "b"], "scores": [2, 2]})
    assert found.pairs == [] and found.n_ties == 1


@pytest.mark.parametrize(
    ("row", "label"),
    [
        ({"prompt": "p", "completion": "w", "label": True}, True),
        ({"prompt": "p", "completion": "w", "label": False}, False),
        ({"prompt": "p", "completion": "w", "label": "False"}, False),
        ({"prompt": "p", "response": "w", "desirable": 1}, True),
        ({"prompt": talk("p"), "completion": [answer("w")], "label": False}, False),
        ({"messages": talk("p", "w"), "label": True}, True),
        ({"conversations": sharegpt("p", "w"), "kto_tag": False}, False),
        ({"instruction": "p", "input": "", "output": "w", "kto_tag": "true"}, True),
    ],
)
def test_one_answer_with_a_label(row, label):
    found = preference(row)
    assert found.talks == [said("p", "w")] and found.pairs == [] and found.label is label


def test_two_conversations_with_other_prompts_are_read_and_not_compared_here():
    found = preference({"chosen": talk("a", "b", "p", "w"), "rejected": talk("a", "x", "p", "l")})
    assert found.talks == [said("a", "b", "p", "w"), said("a", "x", "p", "l")]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (3, "a row is a JSON object, not a number"),
        ({}, "its keys are none; a preference is chosen and rejected"),
        ({"prompt": "p", "completion": "w"}, "its keys are prompt, completion; a preference is"),
        ({"label": True}, "its keys are label"),
        ({"prompt": "p", "chosen": "w"}, "'rejected' is missing (or null) beside 'chosen'"),
        ({"prompt": "p", "chosen": "w", "rejected": None}, "'rejected' is missing"),
        ({"chosen": "w", "rejected": "l"}, "'chosen' has no prompt: give one of messages"),
        ({"prompt": "p", "chosen": 3, "rejected": "l"}, "'chosen' is a number, not an answer"),
        ({"prompt": "p", "chosen": {"text": "w"}, "rejected": "l"}, "'from' is missing"),
        ({"prompt": "p", "chosen": ["w", "x"], "rejected": "l"}, "'chosen' is a list, not an answer"),
        ({"prompt": "p", "chosen": [], "rejected": "l"}, "'chosen' is a list, not an answer"),
        ({"chosen": talk("p"), "rejected": talk("p", "l")}, "does not end with an assistant's answer"),
        (
            {"prompt": "q", "chosen": talk("p", "w"), "rejected": talk("p", "l")},
            "its prompt is not in the conversation",
        ),
        ({"prompt": talk("q"), "chosen": talk("p", "w"), "rejected": "l"}, "its prompt is not in the conversation"),
        ({"chosen": f"{HH} w\n\nHuman: d", "rejected": f"{HH} l"}, "its last turn is the Assistant's"),
        (
            {"messages": talk("q", "w"), "chosen": talk("p", "w"), "rejected": talk("p", "l")},
            "'messages' is another conversation than that of its answers",
        ),
        ({"messages": 3, "chosen": "w", "rejected": "l"}, "'messages' is not a list of JSON objects"),
        ({"prompt": "p", "chosen": "w", "rejected": "l", "margin": -1}, "'margin' is -1; it is a number from 0 up"),
        ({"prompt": "p", "chosen": "w", "rejected": "l", "margin": "big"}, "'margin' is 'big'"),
        ({"prompt": "p", "chosen": "w", "rejected": "l", "margin": True}, "'margin' is True"),
        ({"prompt": "p", "chosen": "w", "rejected": "l", "margin": float("inf")}, "'margin' is inf"),
        ({"prompt": "p", "chosen": "w", "rejected": "l", "kind": 3}, "'kind' is a number, not a text"),
        ({"prompt": "p", "chosen": "w", "rejected": "l", "scores": [1, 2]}, "'scores' belong to a list of answers"),
        ({"prompt": "p", "responses": ["a"]}, "'responses' has 1 answer; a preference needs at least 2"),
        ({"prompt": "p", "responses": [], "scores": []}, "'responses' has 0 answer"),
        ({"prompt": "p", "responses": ["a", "b"], "scores": [1]}, "'scores' is no list of 2 numbers"),
        ({"prompt": "p", "responses": ["a", "b"], "scores": [1, "2"]}, "'scores' is no list of 2 numbers"),
        ({"prompt": "p", "responses": ["a", "b"], "scores": [1, float("nan")]}, "'scores' is no list of 2 numbers"),
        ({"prompt": "p", "responses": ["a", "b"], "scores": [1, 10**400]}, "'scores' is no list of 2 numbers"),
        ({"prompt": 3, "chosen": talk("p", "w"), "rejected": "l"}, "its prompt is not in the conversation"),
        ({"prompt": "p", "responses": ["a", "b"], "ranking": [1, 0]}, "'ranking' is not read in preferences"),
        ({"prompt": "p", "responses": ["a", "b"], "margin": 1}, "'margin' belongs to a pair"),
        ({"prompt": "p", "completion": "w", "label": 2}, "'label' is 2; a label is true or false"),
        ({"prompt": "p", "completion": "w", "label": True, "kto_tag": False}, "true or false, and one is enough"),
        ({"messages": talk("p"), "label": True}, "does not end with an assistant's answer"),
        ({"messages": talk("p", "w"), "label": True, "learn": False}, "marked as not to be learned"),
        ({"prompt": "p", "chosen": "w", "rejected": "l", "tools": ["t"]}, "'tools' is not read"),
        ({"prompt": "p", "chosen": {**answer("w"), "reasoning": "r"}, "rejected": "l"}, "'reasoning' is not read"),
    ],
)
def test_what_is_wrong_is_said(row, reason):
    with pytest.raises(UserError) as error:
        preference(row)
    assert reason in str(error.value)


# ---- rows of any kind

MESSAGE_KEYS = ("role", "content", "from", "value", "learn")
ROW_KEYS = (
    *("prompt", "instruction", "input", "history", "system", "messages", "conversations", "instances", "chosen"),
    *("rejected", "margin", "kind", "output", "completion", "responses", "scores", "label", "answer", "reward_model"),
)
TEXTS = st.sampled_from(["", " ", "1", "2", "user", "assistant", "\n\nHuman: 1\n\nAssistant: 2", "Human:", "#### 7"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 3) | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(MESSAGE_KEYS), inner, max_size=3),
    max_leaves=5,
)
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system", 3]), "content": TEXTS}), max_size=3
)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from(ROW_KEYS), VALUES | TEXTS | MESSAGES, max_size=5) | VALUES)
def test_any_row_is_read_or_refused_with_a_reason(row):
    for read in (preference, prompt_of):
        try:
            found = read(row)
        except UserError as problem:
            assert str(problem) and "\n" not in str(problem)
            continue
        if read is prompt_of:
            messages, columns = found
            assert messages[-1]["role"] != "assistant" and isinstance(columns.get("answer", ""), str)
            continue
        assert all(talk[-1]["role"] == "assistant" for talk in found.talks)
        assert all(i != j and i < len(found.talks) > j and m >= 0 for i, j, m in found.pairs)
        assert (found.label is None) == (len(found.talks) > 1)
