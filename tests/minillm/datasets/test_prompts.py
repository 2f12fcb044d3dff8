"""Files of prompts, whatever their form, and what of them a reward function gets."""

import json

import numpy as np
import pytest

from minillm.base.errors import UserError
from minillm.datasets.prompts import PromptRows, prompt_of
from minillm.evaluation.checks import row_check
from tests.minillm.datasets.test_instructions import ASSISTANT, BOS, SYSTEM, USER, Numbers, talk, write_jsonl


@pytest.mark.parametrize(
    ("row", "question", "answer", "check"),
    [
        ({"prompt": "1", "answer": "2"}, "1", "2", "exact"),
        ({"prompt": "1", "answer": 2, "check": "number"}, "1", "2", "number"),
        ({"prompt": "1", "answer": "2", "check": "words"}, "1", "2", "words"),
        ({"prompt": "1"}, "1", None, "exact"),
        ({"instruction": "1", "input": "3", "output": "2"}, "1\n3", "2", "exact"),
        ({"instruction": "1", "input": "", "output": "2"}, "1", "2", "exact"),
        ({"messages": talk("1")}, "1", None, "exact"),
        ({"messages": talk("1"), "answer": "2"}, "1", "2", "exact"),
        ({"messages": talk("1", "2")}, "1", "2", "exact"),
        ({"messages": talk("0", "9", "1")}, "1", None, "exact"),
        ({"conversations": [{"from": "human", "value": "1"}, {"from": "gpt", "value": "2"}]}, "1", "2", "exact"),
        ({"question": "1", "answer": "3 + 4 = <<3+4=7>>7.\n#### 1,072"}, "1", "1,072", "number"),
        ({"messages": talk("1", "so\n#### 7")}, "1", "7", "number"),
        ({"prompt": "1", "chosen": "so\n#### 7", "rejected": "so\n#### 8"}, "1", "7", "number"),
        ({"question": "1", "answer": "so\n#### a cat\n"}, "1", "a cat", "exact"),
        ({"question": "1", "answer": "7 of 3 + 4. #### 7"}, "1", "7", "number"),  # without its line breaks
        ({"question": "1", "answer": "#### 7"}, "1", "7", "number"),
        ({"question": "1", "answer": "# A\n#### Notes\nUse x"}, "1", "# A\n#### Notes\nUse x", "exact"),
        ({"question": "1", "answer": "so #### a cat"}, "1", "so #### a cat", "exact"),
        ({"question": "1", "answer": "a\n####"}, "1", "a\n####", "exact"),
        ({"question": "1", "answer": 72.0}, "1", "72", "number"),
        ({"question": "1", "answer": 72}, "1", "72", "number"),
        ({"question": "1", "answer": -0.5}, "1", "-0.5", "number"),
        ({"question": "1", "answer": "72"}, "1", "72", "exact"),
        ({"prompt": "1", "reward_model": {"ground_truth": 72.0}}, "1", "72", "number"),
        (
            {
                "data_source": "openai/gsm8k",
                "prompt": talk("1"),
                "ability": "math",
                "reward_model": {"style": "rule", "ground_truth": "72"},
                "extra_info": {"answer": "long", "index": 3},
            },
            "1",
            "72",
            "number",
        ),
        ({"prompt": "1", "chosen": "2", "rejected": "3"}, "1", "2", "exact"),
        ({"chosen": talk("0", "9", "1", "2"), "rejected": talk("0", "9", "1", "3")}, "1", "2", "exact"),
        ({"chosen": "Human: 1\n\nAssistant: 2", "rejected": "Human: 1\n\nAssistant: 3"}, "1", "2", "exact"),
        ({"prompt": talk("1"), "completion": [{"role": "assistant", "content": "2"}]}, "1", "2", "exact"),
        ({"prompt": "1", "answer": None}, "1", None, "exact"),
        ({"messages": [], "prompt": "1", "answer": "2", "history": ""}, "1", "2", "exact"),
        ({"prompt": "1", "completion": "2", "label": True}, "1", "2", "exact"),
        ({"prompt": "1", "completion": "2", "label": False}, "1", None, "exact"),  # a bad answer is not the right one
        ({"question": "1", "answer": "2", "is_correct": "false"}, "1", None, "exact"),
        ({"messages": talk("1", "2"), "kto_tag": 0}, "1", None, "exact"),
        ({"prompt": "1", "answer": float("nan"), "system": "8"}, "1", None, "exact"),
    ],
)
def test_each_form_gives_prompt_answer_and_check(row, question, answer, check):
    messages, columns = prompt_of(row)
    assert messages[-1] == {"role": "user", "content": question}
    assert columns.get("answer") == answer and columns["check"] == check
    for key in ("extra_info", "data_source", "rejected", "messages"):
        assert columns.get(key) == row.get(key)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (3, "a row is a JSON object, not a number"),
        ({}, "its keys are none; a prompt is under one of messages"),
        ({"answer": "1"}, "its keys are answer; a prompt is under"),
        ({"chosen": "1", "rejected": "2"}, "'chosen' has no prompt"),
        ({"prompt": None, "answer": "1"}, "its keys are answer"),
        ({"prompt": " "}, "its prompt is empty"),
        ({"prompt": 3}, "'prompt' is a number, not a text"),
        ({"prompt": []}, "its prompt is empty"),
        ({"messages": talk("1", "2")[1:]}, "its prompt is empty"),
        ({"messages": [{"role": "tool", "content": "1"}]}, "role 'tool' is none of"),
        ({"prompt": "1", "answer": ["a", "b"]}, "'answer' is a list, not a right answer"),
        ({"prompt": "1", "reward_model": {"ground_truth": {"a": 1}}}, "'reward_model.ground_truth' is an object"),
        ({"prompt": "1", "tools": ["search"]}, "'tools' is not read"),
    ],
)
def test_a_bad_row_is_named_or_counted(tmp_path, row, reason):
    with pytest.raises(UserError) as error:
        prompt_of(row)
    assert reason in str(error.value)
    path = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "1"}, row, {"prompt": "2"}])
    with pytest.raises(UserError) as error:
        PromptRows(path, Numbers(), 16)
    assert f"{path}, row 2: " in str(error.value) and reason in str(error.value)
    rows = PromptRows(path, Numbers(), 16, on_bad_line="skip")
    assert rows.rows_per_epoch == 2 and "1 bad rows skipped" in rows.summary()


@pytest.mark.parametrize(
    ("reward", "reason"),
    [
        ("exact", "the row has no right answer"),
        ("0.5*length:9,0.5*number", "the row has no right answer"),
        ("check", "check 'sounds' is none of"),
        ("number", "its right answer 'two' has no number"),
        ("0.5*length:9,check", "its right answer 'two' has no number"),
        ("words", None),
        ("length:9", None),
        ("rewards.py:mine", None),
    ],
)
def test_a_row_that_a_reward_cannot_judge_is_found_when_it_is_read(tmp_path, reward, reason):
    rows = [{"prompt": "1", "answer": "1"}, {"prompt": "2"}]
    if reward == "check":
        rows[1] |= {"answer": "2", "check": "sounds"}
    elif reward in ("number", "0.5*length:9,check", "words"):
        rows[1] |= {"answer": "two", "check": "number"}
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    if reason is None:
        assert PromptRows(path, Numbers(), 16, check_row=row_check(reward)).rows_per_epoch == 2
        return
    with pytest.raises(UserError, match=f"row 2: {reason}"):
        PromptRows(path, Numbers(), 16, check_row=row_check(reward))
    rows = PromptRows(path, Numbers(), 16, check_row=row_check(reward), on_bad_line="skip")
    assert rows.rows_per_epoch == 1 and "1 bad rows skipped" in rows.summary()


def test_ids_end_with_what_opens_an_answer(tmp_path):
    rows = [{"messages": talk("1", "2", "3", system="7"), "wishes": {"people": ["4"]}}]
    [prompt] = PromptRows(write_jsonl(tmp_path / "rows.jsonl", rows), Numbers(), 16).rows(np.array([0]))
    assert prompt.ids == [BOS, SYSTEM, 7, USER, 1, ASSISTANT, 2, 16, USER, 3, ASSISTANT]
    assert (prompt.number, prompt.text) == (0, "3")
    assert prompt.row["wishes"] == {"people": ["4"]} and "answer" not in prompt.row


def test_each_epoch_has_every_prompt_once_in_an_order_of_its_own(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": f"{i}", "n": i} for i in range(50)])
    data, again, other = (PromptRows(path, Numbers(), 16, seed=seed) for seed in (1, 1, 2))
    epochs = [[prompt.row["n"] for prompt in data.rows(np.arange(50) + 50 * e)] for e in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(50)) and epochs[0] != epochs[1]
    assert [p.row["n"] for p in again.rows(np.arange(60, 90))] == epochs[1][10:40]  # a pure function of the position
    assert [p.row["n"] for p in other.rows(np.arange(50))] != epochs[0]
    assert all(p.number == p.row["n"] and p.text == str(p.number) for p in data.rows(np.arange(50)))
    assert [p.number for p in data.rows(np.arange(4), end=2)] == epochs[0][:2]
    assert data.total_rows(1.5) == 75 and data.fingerprint == again.fingerprint


def test_another_room_that_drops_other_prompts_is_other_data(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "1"}, {"prompt": "2 3 4 5 6 7"}])

    def fingerprint(room: int) -> str:
        return PromptRows(path, Numbers(), 16, room=room).fingerprint

    assert fingerprint(1) == fingerprint(2) != fingerprint(10)


def test_a_prompt_that_leaves_no_room_is_dropped_and_counted(tmp_path):
    rows = [{"prompt": "1 " * n} for n in (1, 5, 6, 9)]  # 3 more tokens each
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    data = PromptRows(path, Numbers(), 12, room=4)
    assert data.rows_per_epoch == 2
    expected = "4 rows: 2 prompts kept, 2 dropped (no room for an answer of 4 tokens); 12 tokens, the longest has 8; 0"
    assert data.summary() == expected + " with a right answer"
    with pytest.raises(UserError, match=r"that can be asked .* 4 dropped .*; lower --max_new_tokens or"):
        PromptRows(path, Numbers(), 12, room=9)
    with pytest.raises(UserError, match="--seq_len 4: an answer needs 4 positions"):
        PromptRows(path, Numbers(), 4, room=4)
    most_dropped = PromptRows(path, Numbers(), 12, room=8).summary()  # one of 4 prompts is kept
    assert most_dropped.endswith(
        "\nmore prompts are too long than are kept: a lower --max_new_tokens keeps more, or, in "
        "training, a longer --seq_len"
    )


def test_a_file_that_changes_is_noticed(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "1"}])
    data = PromptRows(path, Numbers(), 16)
    path.write_text(json.dumps({"prompt": "2"}) + "\n")
    with pytest.raises(UserError, match="has changed at byte 0"):
        data.rows(np.array([0]))
