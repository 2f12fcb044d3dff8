import gzip
import json
import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm import UserError, chat_data, readers
from minillm.chat_data import InstructionRows, encode_messages, fit, lay_out, truncate
from minillm.config import ModelConfig
from minillm.model import Transformer
from minillm.tokenizer import Tokenizer
from minillm.vocab import train_tokenizer

PAD, BOS, EOS, SYSTEM, USER, ASSISTANT = 0, 8, 16, 101, 102, 103


class Numbers:
    """A tokenizer whose ids are read off the text: "5 6" is [5, 6]. The templates are those of minillm."""

    pad_id, bos_id, eos_id, vocab_size, sha256 = PAD, BOS, EOS, 200, "numbers"

    def encode_chat(self, messages, *, template="auto", add_generation_prompt=False):
        ids, learn = ([], []) if template == "simple" else ([BOS], [False])
        for message in messages:
            content = [int(word) for word in message["content"].split()]
            answer = message["role"] == "assistant"
            roles = {"system": [SYSTEM], "user": [USER], "assistant": [ASSISTANT]}
            opener = [BOS] * answer if template == "simple" else roles[message["role"]]
            content += [EOS] * answer
            ids += opener + content
            learn += [False] * len(opener) + [answer] * len(content)
        return ids, learn


def talk(*contents, system=None) -> list[dict]:
    """Question, answer, question, answer, …"""
    opening = [] if system is None else [{"role": "system", "content": system}]
    roles = ("user", "assistant")
    return opening + [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]


def example(messages, seq_len, template="chat"):
    ids, learn, cut = fit(messages, Numbers(), seq_len, template)
    return ids.tolist(), learn.astype(int).tolist(), cut


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pair(instruction, output, **more):
    return {"instruction": instruction, "input": "", "output": output, **more}


# ---- the rule


def one_row(prompt, answer, width, template="simple"):
    ids, learn, _ = fit(talk(prompt, answer), Numbers(), width, template)
    batch = lay_out([[(ids, learn)]], width, PAD, documents=False)
    return batch.x[0].tolist(), batch.y[0].tolist(), batch.mask[0].int().tolist()


def test_worked_example_of_the_articles():
    # prompt 1–7, bos 8, answer from 9, eos 16, rows of 16 tokens, hence 15 positions. Two deviations: the
    # masks printed in the article also learn the bos, and its code also learns one pad after the eos.
    # The mask here lies on Y and holds the answer and its eos, nothing else.
    x, y, mask = one_row("1 2 3 4 5 6 7", "9 10 11 12 13 14 15", 15)
    assert x == list(range(1, 16))
    assert y == list(range(2, 17))
    assert mask == [0] * 7 + [1] * 8
    x, y, mask = one_row("1 2 3 4 5 6 7", "9 10 11 12 13", 15)
    assert x == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, PAD, PAD]
    assert y == [2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, EOS, PAD, PAD]
    assert mask == [0] * 7 + [1] * 6 + [0] * 2


def test_a_bos_inside_the_prompt_starts_no_answer():
    x, _, mask = one_row("1 8 3 8 5 6 7", "9 8 11", 15)
    assert x == [1, 8, 3, 8, 5, 6, 7, 8, 9, 8, 11, PAD, PAD, PAD, PAD]
    assert mask == [0] * 7 + [1] * 4 + [0] * 4


def test_packed_row_by_hand():
    first, second = (encode_messages(talk(*t), Numbers(), "simple") for t in [("1 2", "9"), ("3", "10 11")])
    batch = lay_out([[first, second], [second]], 8, PAD, documents=True)
    assert batch.x.tolist() == [[1, 2, 8, 9, 3, 8, 10, 11], [3, 8, 10, 11] + [PAD] * 4]
    assert batch.y.tolist() == [[2, 8, 9, EOS, 8, 10, 11, EOS], [8, 10, 11, EOS] + [PAD] * 4]
    assert batch.mask.int().tolist() == [[0, 0, 1, 1, 0, 1, 1, 1], [0, 1, 1, 1, 0, 0, 0, 0]]
    assert batch.documents.tolist() == [[0, 0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1, 1, 1]]
    assert [t.dtype for t in batch] == [torch.int64, torch.int64, torch.bool, torch.int32]


def test_placeholders_stand_before_each_example_and_teach_nothing():
    first, second = (encode_messages(talk(*t), Numbers(), "simple") for t in [("1 2", "9"), ("3", "10 11")])
    batch = lay_out([[first, second], [second]], 13, PAD, documents=True, n_virtual=2)
    assert batch.x.tolist() == [
        [PAD, PAD, 1, 2, 8, 9, PAD, PAD, 3, 8, 10, 11, PAD],
        [PAD, PAD, 3, 8, 10, 11] + [PAD] * 7,
    ]
    assert batch.y[0].tolist() == [PAD, PAD, 2, 8, 9, EOS, PAD, PAD, 8, 10, 11, EOS, PAD]
    assert batch.mask[0].int().tolist() == [0, 0, 0, 0, 1, 1, 0, 0, 0, 1, 1, 1, 0]
    assert batch.documents.tolist() == [[0] * 6 + [1] * 6 + [2], [0] * 6 + [1] * 7]


@pytest.mark.parametrize("kept_tokens", [1 << 25, 0])
@pytest.mark.parametrize("packing", [True, False])
def test_rows_with_placeholders_are_no_longer_and_hold_the_same_examples(tmp_path, monkeypatch, packing, kept_tokens):
    monkeypatch.setattr(chat_data, "KEPT_TOKENS", kept_tokens)
    rows = [pair("1 " * (i % 7 + 1), "2 " * (i % 5 + 1)) for i in range(40)] + [pair("1", "3 " * 40)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    plain = InstructionRows(path, Numbers(), 27, packing=packing)
    data = InstructionRows(path, Numbers(), 30, packing=packing, n_virtual=3)
    assert data.counts == plain.counts and data.counts["cut"] == 1
    batch = data.batch(np.arange(data.rows_per_epoch))
    assert batch.x.shape[1] == 30 and batch.n_targets() == plain.batch(np.arange(plain.rows_per_epoch)).n_targets()
    for x, mask in zip(batch.x.tolist(), batch.mask, strict=True):
        starts = [t for t in range(30) if x[t] == BOS]  # the template begins with it
        assert starts and all(x[t - 3 : t] == [PAD] * 3 and not mask[t - 3 : t].any() for t in starts)
    if packing:
        used = sum(len(ids) - 1 + 3 for ids, _ in map(data._example, range(len(rows))))
        assert f"{used / (30 * data.rows_per_epoch):.1%} full" in data.summary()
    with pytest.raises(
        UserError, match="--seq_len 3: a row needs at least 1 position beside the virtual tokens of --n_virtual 3"
    ):
        InstructionRows(path, Numbers(), 3, n_virtual=3)


def test_several_turns_by_hand():
    ids, learn, cut = example(talk("1", "2 3", "4", "5", system="7"), 20)
    assert ids == [BOS, SYSTEM, 7, USER, 1, ASSISTANT, 2, 3, EOS, USER, 4, ASSISTANT, 5, EOS]
    assert learn == [0, 0, 0, 0, 0, 0, 1, 1, 1, 0, 0, 0, 1, 1]
    assert not cut


def test_a_turn_can_be_left_out_of_the_loss():
    messages = talk("1", "2 3", "4", "5")
    messages[1]["learn"] = False
    assert example(messages, 20)[1] == [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1]
    messages = talk("1", "2 3", "4", "5", "6")
    messages[3]["learn"] = False  # nothing is learned from there on, so nothing of it is kept
    assert example(messages, 20)[:2] == ([BOS, USER, 1, ASSISTANT, 2, 3, EOS], [0, 0, 0, 0, 1, 1, 1])


def test_an_empty_answer_teaches_nothing():
    assert example(talk("1 2", " \n"), 20) == ([], [], False)
    assert example(talk("1", "", "4", "5"), 20)[1] == [0, 0, 0, 0, 0, 0, 0, 0, 1, 1]
    assert example(talk("1"), 20) == ([], [], False)


# ---- what is too long


def test_exact_fit_is_not_cut():
    whole = [BOS, USER, 1, 2, ASSISTANT, 4, 5, 6, EOS]
    assert example(talk("1 2", "4 5 6"), 8) == (whole, [0] * 5 + [1] * 4, False)
    assert example(talk("1 2", "4 5 6"), 7) == (whole[:2] + whole[3:], [0] * 4 + [1] * 4, True)


def test_a_long_prompt_is_shortened_from_its_middle():
    ids, learn, cut = example(talk("1 2 3 4 5 6 7", "9"), 7, "simple")
    assert ids == [1, 2, 3, 6, 7, BOS, 9, EOS]
    assert learn == [0, 0, 0, 0, 0, 0, 1, 1]
    assert cut


def test_a_long_answer_loses_its_end_and_gets_no_eos():
    ids, learn, cut = example(talk("1 2", "20 21 22 23 24 25 26 27 28 29 30"), 11, "simple")
    assert ids == [1, 2, BOS, 20, 21, 22, 23, 24, 25, 26, 27, 28]
    assert learn == [0] * 3 + [1] * 9
    assert cut


def test_a_long_prompt_keeps_a_quarter_before_a_long_answer():
    ids, learn, _ = example(talk("1 2 3 4 5 6 7", "20 21 22 23 24 25 26 27 28 29 30"), 11, "simple")
    assert ids == [1, 7, BOS, 20, 21, 22, 23, 24, 25, 26, 27, 28]
    assert learn == [0] * 3 + [1] * 9


def test_a_long_conversation_loses_its_earliest_turns():
    messages = talk("1", "2", "3", "4", "5", "6", system="7")
    head, last = [BOS, SYSTEM, 7], [USER, 5, ASSISTANT, 6, EOS]
    assert example(messages, 17)[0] == [*head, USER, 1, ASSISTANT, 2, EOS, USER, 3, ASSISTANT, 4, EOS, *last]
    assert example(messages, 16)[0] == [*head, USER, 3, ASSISTANT, 4, EOS, *last]
    assert example(messages, 12)[::2] == ([*head, USER, 3, ASSISTANT, 4, EOS, *last], True)
    assert example(messages, 11)[0] == head + last
    assert example(messages, 6)[0] == [BOS, SYSTEM, *last]
    assert example(messages[1:] + talk("9"), 6)[0] == [BOS, *last]  # what follows the last answer costs nothing


MESSAGES = st.lists(
    st.fixed_dictionaries(
        {
            "role": st.sampled_from(["system", "user", "assistant"]),
            "content": st.lists(st.integers(20, 99).map(str), max_size=12).map(" ".join),
            "learn": st.sampled_from([True, True, False]),
        }
    ),
    max_size=8,
)


@given(MESSAGES, st.integers(1, 40), st.sampled_from(["chat", "simple"]))
@settings(deadline=None)
def test_what_is_cut_still_fits_and_still_teaches(messages, seq_len, template):
    ids, learn, cut = fit(messages, Numbers(), seq_len, template)
    whole, learned = encode_messages(messages, Numbers(), template)
    answers = [m for m in messages if m["role"] == "assistant" and m["learn"] and m["content"]]
    assert bool(len(ids)) == bool(answers)
    assert cut == (len(whole) > seq_len + 1)
    if answers:
        assert len(ids) <= seq_len + 1
        assert learn[-1]
        assert not learn[0]
        pairs = iter(zip(whole.tolist(), learned.tolist(), strict=True))
        assert all(token in pairs for token in zip(ids.tolist(), learn.tolist(), strict=True))  # a subsequence
    again = truncate(ids, learn, seq_len)
    assert np.array_equal(again[0], ids)


# ---- rows of files


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"", "empty line"),
        (b'{"instruction": "1"', "not JSON"),
        (b'{"instruction": "1", "output": "\xff"}', "not UTF-8 (byte 0xFF, column 33)"),
        (b"[" * 100_000, "not JSON"),
        (b"3", "a row is a JSON object, not a int"),
        (b'{"instruction": "1", "input": "2"}', "its keys are instruction, input; known are messages"),
        (b'{"instruction": "1", "output": 2}', "'output' is a int, not a text"),
        (b'{"instruction": ["1"], "output": "2"}', "'instruction' is a list, not a text"),
        (b'{"messages": "1"}', "'messages' is not a list of JSON objects"),
        (b'{"messages": [{"role": "user"}]}', "'content' is missing"),
        (b'{"messages": [{"role": "tool", "content": "1"}]}', "role 'tool' is none of system, user"),
        (b'{"messages": [{"role": "assistant", "content": "1", "learn": "no"}]}', "is true or false, not ['no']"),
        (b'{"instruction": "1", "instances": [3]}', "'instances' is not a list"),
        (b'{"prompt": "1", "response": "2", "history": ["1"]}', "'history' is a list of [question, answer]"),
        (b'{"prompt": "1", "response": "2", "history": 3}', "'history' is a list of [question, answer]"),
    ],
)
def test_a_bad_row_is_named_or_counted(tmp_path, line, reason):
    path = tmp_path / "rows.jsonl"
    good = json.dumps(pair("1", "2")).encode()
    path.write_bytes(good + b"\n" + line + b"\n" + good)
    with pytest.raises(UserError) as error:
        InstructionRows(path, Numbers(), 16)
    assert f"{path}, row 2: " in str(error.value)
    assert reason in str(error.value)
    data = InstructionRows(path, Numbers(), 16, on_bad_line="skip")
    assert data.counts["bad rows"] == 1
    assert "2 rows, 2 examples: 2 kept, 1 bad rows skipped" in data.summary()


ROWS = [pair(f"{i} 9", f"{i + 1} " * (i % 5 + 1)) for i in range(20, 60)]


def as_bytes(form: str) -> bytes:
    lines = [json.dumps(row) for row in ROWS]
    text = {
        "lines": "\n".join(lines),
        "bom": "\ufeff" + "\n".join(lines) + "\n",
        "crlf": "\r\n".join(lines) + "\r\n\r\n\n",
        "gz": "\n".join(lines),
        "array": json.dumps(ROWS),
        "pretty": "\ufeff \n" + json.dumps(ROWS, indent=2).replace("\n", "\r\n") + "\n",
        "array.gz": json.dumps(ROWS),
    }[form]
    data = text.encode()
    return gzip.compress(data) if form.endswith("gz") else data


@pytest.mark.parametrize("form", ["lines", "bom", "crlf", "gz", "array", "pretty", "array.gz"])
@pytest.mark.parametrize("kept_tokens", [1 << 25, 0])
def test_all_forms_of_a_file_give_the_same_batches(tmp_path, monkeypatch, form, kept_tokens):
    expected = InstructionRows(write_jsonl(tmp_path / "plain.jsonl", ROWS), Numbers(), 32, seed=5)
    (tmp_path / "other").write_bytes(as_bytes(form))
    monkeypatch.setattr(chat_data, "KEPT_TOKENS", kept_tokens)
    monkeypatch.setattr(readers, "READ", 7)
    data = InstructionRows(tmp_path / "other", Numbers(), 32, seed=5)
    assert bool(len(data.ids)) == bool(kept_tokens)
    assert data.summary() == expected.summary()
    positions = np.arange(2 * data.rows_per_epoch)
    for ours, theirs in zip(data.batch(positions), expected.batch(positions), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (json.dumps(ROWS).encode()[:-1], "after item 40 of the array comes the end of the file"),
        (gzip.compress(os.urandom(100) + json.dumps(ROWS).encode())[:-20], "cannot be read"),
        (b"\x1f\x8b no gzip", "cannot be read"),
        (b"", "nothing left to learn from (0 rows"),
        (b"[]", "nothing left to learn from (0 rows"),
        (json.dumps(pair("1", "")).encode(), "1 dropped (empty answer)"),
        (json.dumps({"messages": talk("1")}).encode(), "1 dropped (no answer)"),
    ],
)
def test_a_file_that_is_none_is_refused(tmp_path, content, reason):
    path = tmp_path / "rows"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        InstructionRows(path, Numbers(), 16)
    assert reason in str(error.value)
    assert str(path) in str(error.value)


def test_what_is_no_file_and_what_is_no_choice(tmp_path):
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(UserError, match="cannot be read"):
            InstructionRows(path, Numbers(), 16)
    path = write_jsonl(tmp_path / "rows", ROWS)
    with pytest.raises(UserError, match="choose error or skip"):
        InstructionRows(path, Numbers(), 16, on_bad_line="ignore")
    with pytest.raises(UserError, match="--seq_len 0"):
        InstructionRows(path, Numbers(), 0)


# ---- the data set


def examples_of(batch) -> list[tuple]:
    """(x, y, mask) of every example of a packed batch; an example that is all padding is left out."""
    found = []
    for x, y, mask, numbers in zip(*(t.tolist() for t in batch), strict=True):
        for n in sorted(set(numbers)):
            columns = [
                column for column, number in zip(zip(x, y, mask, strict=True), numbers, strict=True) if number == n
            ]
            if any(m for _, _, m in columns):
                found.append(tuple(columns))
    return found


def test_a_position_is_a_number(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    data = InstructionRows(path, Numbers(), 32, seed=1)
    n = data.rows_per_epoch
    positions = np.arange(3 * n)
    whole = data.batch(positions)
    fresh = InstructionRows(path, Numbers(), 32, seed=1)
    for i in np.random.default_rng(0).permutation(3 * n):  # epochs back and forth
        for one, all_at_once in zip(fresh.batch(positions[i : i + 1]), whole, strict=True):
            assert torch.equal(one[0], all_at_once[i])
    epochs = [examples_of(data.batch(np.arange(e * n, (e + 1) * n))) for e in range(3)]
    assert len(set(epochs[0])) == len(ROWS)
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])
    assert len({str(epoch) for epoch in epochs}) == 3
    assert examples_of(InstructionRows(path, Numbers(), 32, seed=2).batch(np.arange(n))) != epochs[0]
    assert data.total_rows(3) == 3 * n
    assert data.total_rows(0.5) == -(-n // 2)


def test_unpacked_rows_are_padded_to_the_longest_of_the_batch(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [pair("1", "2"), pair("1", " ".join(["3"] * 9))])
    data = InstructionRows(path, Numbers(), 64, packing=False)
    lengths = {int(data.batch(np.array([p])).x.shape[1]) for p in range(2)}
    assert lengths == {8, 16}  # 5 and 13 positions, rounded up to 8
    assert data.batch(np.arange(2)).x.shape == (2, 16)
    assert data.batch(np.arange(2)).documents is None
    assert InstructionRows(path, Numbers(), 13, packing=False).batch(np.arange(2)).x.shape == (2, 13)


def test_unpacked_epochs_have_an_order_each(tmp_path):
    data = InstructionRows(write_jsonl(tmp_path / "rows.jsonl", ROWS), Numbers(), 32, packing=False)
    n = data.rows_per_epoch
    assert n == len(ROWS)
    orders = [data.batch(np.arange(e * n, (e + 1) * n)).x[:, 2].tolist() for e in (0, 1)]  # the questions
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(20, 60))
    assert orders[0] != orders[1] != sorted(orders[1]) != orders[0]


def test_positions_beyond_the_end_are_all_masked(tmp_path):
    for packing in (True, False):
        data = InstructionRows(write_jsonl(tmp_path / "rows.jsonl", ROWS), Numbers(), 32, packing=packing)
        end = data.rows_per_epoch
        batch = data.batch(np.array([end - 1, end, end + 1]), end=end)
        assert batch.mask.any(1).tolist() == [True, False, False]
        empty = data.batch(np.array([end, end + 9]), end=end)
        assert not empty.mask.any()
        model = Transformer(ModelConfig(vocab_size=200, dim=16, n_layers=1, n_heads=2))
        loss = model(empty.x, empty.y, mask=empty.mask, documents=empty.documents)
        loss.backward()
        assert loss == 0
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_a_file_changed_under_the_run_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(chat_data, "KEPT_TOKENS", 0)
    path = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    data = InstructionRows(path, Numbers(), 32)
    data.batch(np.arange(data.rows_per_epoch))
    with path.open("r+b") as file:
        file.seek(17)
        file.write(b"7")
    with pytest.raises(UserError, match="has changed at byte 0 since"):
        data.batch(np.arange(data.rows_per_epoch))


@pytest.mark.parametrize("kept_tokens", [1 << 25, 0])
def test_the_first_pass_is_kept(tmp_path, monkeypatch, kept_tokens):
    monkeypatch.setattr(chat_data, "KEPT_TOKENS", kept_tokens)
    path = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    first = InstructionRows(path, Numbers(), 32, cache_dir=tmp_path / "cache")
    (cache,) = (tmp_path / "cache").iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(InstructionRows, "_scan", None)
        second = InstructionRows(path, Numbers(), 32, cache_dir=tmp_path / "cache")
    assert second.summary() == first.summary()
    assert second.fingerprint == first.fingerprint
    assert torch.equal(second.batch(np.arange(9)).x, first.batch(np.arange(9)).x)
    cache.write_bytes(cache.read_bytes()[:-50])
    assert InstructionRows(path, Numbers(), 32, cache_dir=tmp_path / "cache").summary() == first.summary()
    write_jsonl(path, ROWS[:-1])
    shorter = InstructionRows(path, Numbers(), 32, cache_dir=tmp_path / "cache")
    assert shorter.counts["rows"] == len(ROWS) - 1
    assert shorter.fingerprint != first.fingerprint


# ---- with a real tokenizer and a real model


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    texts = [f"Who has the {thing}? Tom has the {thing}. 谁有{thing}？" for thing in ("ball", "cat", "apple")] * 30
    train_tokenizer(texts, 400, folder)
    return Tokenizer.load(folder)


THINGS = ["ball", "cat", "苹果", "<s>", "</s> x", "\u0000", "red kite", "a\n\nb", "▁", "🎈"]
TALKS = [{"messages": talk(f"Who has the {a}?", f"Tom has the {a}.", f"谁有{b}？", b)} for a in THINGS for b in THINGS]


def test_learned_ids_decode_to_the_answers(tmp_path, tokenizer):
    for template in ("chat", "simple"):
        data = InstructionRows(write_jsonl(tmp_path / "t.jsonl", TALKS), tokenizer, 256, template=template)
        batch = data.batch(np.arange(data.rows_per_epoch))
        learned = [[y for _, y, m in columns if m] for columns in examples_of(batch)]
        answers = sorted(f"Tom has the {a}.{b}" for a in THINGS for b in THINGS)
        assert sorted(tokenizer.decode(ids) for ids in learned) == answers
        assert all(ids.count(tokenizer.eos_id) == 2 and ids[-1] == tokenizer.eos_id for ids in learned)


def test_a_lone_surrogate_is_a_bad_row(tmp_path, tokenizer):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(pair("a", "b")) + '\n{"instruction": "a", "output": "\\ud83d"}\n')
    with pytest.raises(UserError, match=r"row 2: .*surrogate U\+D83D"):
        InstructionRows(path, tokenizer, 64)
    assert InstructionRows(path, tokenizer, 64, on_bad_line="skip").counts["bad rows"] == 1


def test_a_very_long_line(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "rows.jsonl", [pair("x" * 3_000_000, "Tom has the ball."), pair("a", "b" * 100_000)])
    data = InstructionRows(path, tokenizer, 64)
    assert data.counts["cut"] == 2
    assert data.summary().endswith("\nmost examples were cut: a longer --seq_len than 64 would learn more of them")
    assert data.batch(np.arange(2)).x.shape == (2, 64)


def test_packed_and_unpacked_rows_have_the_same_loss(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "talks.jsonl", TALKS)
    torch.manual_seed(0)
    model = Transformer(ModelConfig(vocab_size=tokenizer.vocab_size, dim=32, n_layers=2, n_heads=4, n_kv_heads=2))
    results = []
    for packing in (True, False):
        data = InstructionRows(path, tokenizer, 200, packing=packing)
        loss, targets = torch.zeros((), dtype=torch.float64), 0
        model.zero_grad()
        for start in range(0, data.rows_per_epoch, 4):
            batch = data.batch(np.arange(start, start + 4), end=data.rows_per_epoch)
            part = model(batch.x, batch.y, mask=batch.mask, documents=batch.documents)
            part.backward()
            loss, targets = loss + part.detach().double(), targets + batch.n_targets()
        results.append((loss / targets, targets, torch.cat([p.grad.flatten() for p in model.parameters()])))
    (packed, n, packed_grad), (unpacked, m, unpacked_grad) = results
    assert n == m
    assert abs(packed - unpacked) < 1e-6
    assert (packed_grad - unpacked_grad).norm() < 1e-5 * unpacked_grad.norm()
