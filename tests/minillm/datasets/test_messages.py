import pytest

from minillm.base.errors import UnsupportedError, UserError
from minillm.datasets.messages import conversations, is_learned


def pair(instruction, output):
    return {"instruction": instruction, "input": "", "output": output}


def talk(*contents, system=None) -> list[dict]:
    """Question, answer, question, answer, …"""
    opening = [] if system is None else [{"role": "system", "content": system}]
    roles = ("user", "assistant")
    return opening + [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (pair("a", "b"), [talk("a", "b")]),
        ({"instruction": "a", "input": None, "output": "b"}, [talk("a", "b")]),
        ({"instruction": "a", "input": "i", "output": "b", "system": "s"}, [talk("a\ni", "b", system="s")]),
        ({"instruction": "", "input": "i", "output": "b", "family": "f"}, [talk("i", "b")]),
        ({"question": "a", "answer": "b"}, [talk("a", "b")]),
        ({"query": "a", "response": "b", "history": None}, [talk("a", "b")]),
        ({"system_prompt": "s", "question": "a", "response": "b"}, [talk("a", "b", system="s")]),
        ({"instruction": "a", "context": "c", "response": "b"}, [talk("a\nc", "b")]),
        ({"question": "a", "context": "", "answer": "b"}, [talk("a", "b")]),
        ({"input": "a", "output": "b", "context": "c"}, [talk("a\nc", "b")]),
        ({"instruction": "a", "input": float("nan"), "system": float("nan"), "output": "b"}, [talk("a", "b")]),
        ({"messages": None, "instruction": "a", "output": "b"}, [talk("a", "b")]),
        ({"prompt": None, "query": "a", "output": "b"}, [talk("a", "b")]),
        *(
            ({key: empty, "instruction": "a", "output": "b"}, [talk("a", "b")])
            for key in ("messages", "conversations", "instances", "history")
            for empty in ([], "", None, float("nan"))
        ),
        ({"messages": [], "conversations": talk("a", "b")}, [talk("a", "b")]),
        ({"messages": [], "instruction": "a", "instances": [{"output": "b", "history": ""}]}, [talk("a", "b")]),
        ({"messages": [], "id": 3, "instances": None}, [[]]),  # counted as one without an answer
        ({"prompt": "a", "response": "b", "history": [["c", "d"]]}, [talk("c", "d", "a", "b")]),
        (
            {"instruction": "a", "instances": [{"input": "i", "output": "b"}, {"input": "", "output": "c"}]},
            [talk("a\ni", "b"), talk("a", "c")],
        ),
        ({"messages": talk("a", "b", system="s")}, [talk("a", "b", system="s")]),
        ({"messages": talk("a", "b", system="s"), "system": "s"}, [talk("a", "b", system="s")]),  # said once
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "s"},
            [talk("a", "b", system="s")],
        ),
        (
            {"messages": [{"role": "assistant", "content": "a", "weight": 0}, *talk("b")]},
            [[{"role": "assistant", "content": "a", "learn": False}, *talk("b")]],
        ),
        (
            {"prompt": talk("a", "b", "c", system="s"), "completion": [{"role": "assistant", "content": "d"}]},
            [[*talk("a", system="s"), {"role": "assistant", "content": "b", "learn": False}, *talk("c", "d")]],
        ),
    ],
)
def test_known_forms_of_rows(row, expected):
    assert conversations(row) == expected


def parts(*texts) -> list[dict]:
    return [{"type": "text", "text": text} for text in texts]


def test_contents_may_be_lists_of_texts_and_roles_have_other_names():
    row = {"messages": [{"role": "developer", "content": "s"}, {"role": "User", "content": parts("a", "b")}]}
    row["messages"] += [{"role": "model", "content": [{"type": "output_text", "text": "c"}, "d"]}]
    assert conversations(row) == [talk("ab", "cd", system="s")]


# Every way of saying it that is known: the mark, and whether the answer is learned.
MARKS = [(key, value, value != 0) for key in ("learn", "train", "trainable", "training") for value in (True, False)]
MARKS += [(key, value, value != 0) for key in ("loss", "weight", "loss_weight", "loss_scale") for value in (0.0, 1, 0)]
MARKS += [(key, value, not value) for key in ("masked", "is_masked", "no_loss", "ignore") for value in (True, False)]
MARKS += [(key, value, True) for key in ("weight", "loss", "masked", "label") for value in (None, float("nan"))]
MARKS += [("label", True, True), ("kto_tag", 1, True), ("loss", "False", False), ("weight", "1.0", True)]


@pytest.mark.parametrize(("key", "value", "learned"), MARKS)
def test_what_marks_an_answer_as_not_learned_is_honoured(key, value, learned):
    for row in ({"messages": talk("a", "b", "c", "d")}, {"history": [["a", "b"]], "prompt": "c", "response": "d"}):
        (messages,) = conversations({**row, key: value})
        assert [is_learned(message) for message in messages] == [False, learned, False, learned]
    for names in (("messages", "role", "content", "assistant"), ("conversations", "from", "value", "gpt")):
        row = {names[0]: [{names[1]: "user", names[2]: "a"}, {names[1]: names[3], names[2]: "b", key: value}]}
        (messages,) = conversations(row)
        assert [is_learned(message) for message in messages] == [False, learned]


SAID = {"role": "assistant", "content": "b"}
PAIR = {"instruction": "a", "output": "b"}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({**PAIR, "label": False}, "'label' is False: a bad answer (KTO)"),
        ({"messages": talk("a", "b"), "label": 0.0}, "'label' is 0.0: a bad answer (KTO)"),
        ({**PAIR, "kto_tag": "false"}, "'kto_tag' is 'false': a bad answer (KTO)"),
        ({**PAIR, "is_correct": False}, "'is_correct' is False: a bad answer (KTO)"),
        ({"messages": [{**SAID, "label": False}]}, "'label' is False: a bad answer (KTO)"),
        ({"messages": [{**SAID, "weight": 0.5}]}, "'weight' is 0.5; what is learned is said by true or false"),
        ({"messages": [{**SAID, "loss_mask": 0}]}, "'loss_mask' is 0; what is learned"),
        ({"messages": [{**SAID, "mask": True}]}, "'mask' is True; what is learned"),
        ({"messages": [{**SAID, "train_detail": [{"begin_offset": 0}]}]}, "'train_detail' is [{'begin_offset'"),
        ({"messages": [{**SAID, "output_with_loss": False}]}, "'output_with_loss' is False; what is learned"),
        ({**PAIR, "weight": 0.7}, "'weight' is 0.7; what is learned"),
        ({**PAIR, "completion_mask": [0, 1]}, "'completion_mask' is [0, 1]; what is learned"),
        ({"messages": [{"role": "user", "content": "a", "loss": True}, SAID]}, "loss: marks a user's message"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "'chosen' is not read (a preference pair"),
        ({**PAIR, "chosen": "b", "rejected": "c"}, "'chosen' is not read (a preference pair"),
        ({"messages": talk("a", "b"), "rejected_response": "c"}, "'rejected_response' is not read (a preference"),
        ({"conversations": talk("a"), "rejected": {"from": "gpt", "value": "c"}}, "'rejected' is not read"),
        ({"messages": [{**SAID, "reasoning_content": "t"}]}, "'reasoning_content' is not read (thoughts"),
        ({"messages": [{**SAID, "thinking": "t"}]}, "'thinking' is not read (thoughts"),
        ({**PAIR, "reasoning": "t"}, "'reasoning' is not read (thoughts"),
        ({"messages": [{**SAID, "content": None, "tool_calls": [{"name": "f"}]}]}, "'tool_calls' is not read (tools)"),
        ({"messages": [SAID], "tools": '[{"name": "f"}]'}, "'tools' is not read (tools)"),
        ({"messages": [{**SAID, "function_call": {"name": "f"}}]}, "'function_call' is not read (tools)"),
        ({"messages": [{"role": "tool", "content": "t"}]}, "role 'tool' is none of system"),
        ({**PAIR, "image": "a.png"}, "'image' is not read (images or sound)"),
        ({"messages": [SAID], "images": ["a.png"]}, "'images' is not read (images or sound)"),
        (
            {"messages": [{"role": "user", "content": [*parts("a"), {"type": "image_url"}]}]},
            "a part of type 'image_url'",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "'text' is missing"),
        ({**PAIR, "context": ["c"]}, "'context' is a list, not a text"),
        ({**PAIR, "output": float("nan")}, "'output' is empty (null or NaN), not a text"),
    ],
)
def test_what_would_be_learned_wrongly_is_refused_by_name(row, reason):
    with pytest.raises(UserError) as error:
        conversations(row)
    assert reason in str(error.value) and not isinstance(error.value, UnsupportedError)


@pytest.mark.parametrize(
    "row", [{"instances": []}, {"instances": [], "instruction": "a"}, {"history": [], "text": "a"}]
)
def test_a_row_of_empty_lists_alone_is_refused(row):
    with pytest.raises(UnsupportedError, match="known are messages"):
        conversations(row)


def test_an_empty_value_is_no_reason_to_refuse():
    empty = {"tools": "[]", "images": [], "chosen": None, "rejected": float("nan"), "reasoning": " ", "score": 3}
    message = {**SAID, "tool_calls": None, "reasoning_content": "", "function_call": {}}
    unused = set()
    assert conversations({"messages": [message], **empty}, unused) == [[SAID]]
    assert not unused


def test_keys_that_hold_text_and_are_not_read_are_named():
    unused = set()
    row = {"messages": [{**SAID, "name": "Tom"}], "prompt": "a", "context": "c", "id": 3, "topic": {"of": ["x"]}}
    conversations(row, unused)
    assert unused == {"messages.name", "prompt", "context", "topic"}
    unused = set()
    conversations({"instruction": "a", "query": "c", "output": "b", "text": "ab", "check": "exact", "lang": ""}, unused)
    assert unused == {"query", "text"}
    unused = set()
    conversations({"instruction": "a", "name": "n", "instances": [{"input": "i", "output": "b", "note": "x"}]}, unused)
    assert unused == {"name", "note"}


def test_answers_are_learned_unless_marked_or_empty():
    (messages,) = conversations({"messages": [*talk("a", "b", "c", " "), {**talk("", "d")[1], "train": False}]})
    assert [is_learned(message) for message in messages] == [False, True, False, False, False]
