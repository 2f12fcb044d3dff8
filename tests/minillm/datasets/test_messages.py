import pytest

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
        ({"prompt": "a", "response": "b", "history": [["c", "d"]]}, [talk("c", "d", "a", "b")]),
        (
            {"instruction": "a", "instances": [{"input": "i", "output": "b"}, {"input": "", "output": "c"}]},
            [talk("a\ni", "b"), talk("a", "c")],
        ),
        ({"messages": talk("a", "b", system="s")}, [talk("a", "b", system="s")]),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "s"},
            [talk("a", "b", system="s")],
        ),
        (
            {"messages": [{"role": "assistant", "content": "a", "weight": 0}, *talk("b")]},
            [[{"role": "assistant", "content": "a", "learn": False}, *talk("b")]],
        ),
    ],
)
def test_known_forms_of_rows(row, expected):
    assert conversations(row) == expected


def test_answers_are_learned_unless_marked_or_empty():
    (messages,) = conversations({"messages": [*talk("a", "b", "c", " "), {**talk("", "d")[1], "train": False}]})
    assert [is_learned(message) for message in messages] == [False, True, False, False, False]
