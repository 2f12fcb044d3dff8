"""Files of instructions become batches, epoch after epoch."""

import gzip
import json
import os

import numpy as np
import pytest
import torch

from minillm.base.errors import UserError
from minillm.datasets.files import json_rows
from minillm.datasets.instructions import InstructionRows
from minillm.model.config import ModelConfig
from minillm.model.transformer import Transformer
from minillm.tokenizer.tokenizer import Tokenizer
from minillm.tokenizer.train import train_tokenizer
from tests.minillm.datasets.test_instructions import Numbers, pair, talk, write_jsonl

# ---- rows of files


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"", "empty line"),
        (b'{"instruction": "1"', "not JSON"),
        (b'{"instruction": "1", "output": "\xff"}', "not UTF-8 (byte 0xFF, column 33)"),
        (b"[" * 100_000, "not JSON"),
        (b"3", "a row is a JSON object, not a number"),
        (b'{"instruction": "1", "input": "2"}', "its keys are instruction, input; known are messages"),
        (b'{"instruction": "1", "output": 2}', "'output' is a number, not a text"),
        (b'{"instruction": ["1"], "output": "2"}', "'instruction' is a list, not a text"),
        (b'{"messages": "1"}', "'messages' is not a list of JSON objects"),
        (b'{"messages": [{"role": "user"}]}', "'content' is missing"),
        (b'{"messages": [{"role": "tool", "content": "1"}]}', "role 'tool' is none of system, developer, user"),
        (
            b'{"messages": [{"role": "assistant", "content": "1", "learn": "no"}]}',
            "'learn' is 'no'; what is learned is said by true",
        ),
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


def test_the_summary_names_what_was_cut_and_what_was_not_used(tmp_path):
    rows = [
        pair("1 " * 30, "2"),
        pair("1", "2 " * 30),
        {"messages": talk("1 " * 9, "2", "3", "4 " * 5), "context": "c"},
        pair("1", "2", context="", note="n", source="s"),
        pair("1", "2", note="n"),
    ]
    data = InstructionRows(write_jsonl(tmp_path / "rows.jsonl", rows), Numbers(), 16)
    cut = "3 cut to fit (in 1 earlier turns, in 1 the prompt, in 1 the answer's end)"
    assert f"5 kept, 0 dropped, {cut}; " in data.summary()
    assert data.summary().splitlines()[0].endswith("; keys not used: note (2 rows), context (1 rows), source (1 rows)")
    data = InstructionRows(write_jsonl(tmp_path / "rows.jsonl", [rows[0], pair("", "2")]), Numbers(), 3)
    assert "1 dropped (no room for an answer)" in data.summary()
    with pytest.raises(
        UserError, match=r"nothing left to learn from .*1 dropped \(no room for an answer\).*; raise --seq"
    ):
        InstructionRows(write_jsonl(tmp_path / "rows.jsonl", rows[:1]), Numbers(), 1)


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
def test_all_forms_of_a_file_give_the_same_batches(tmp_path, monkeypatch, form):
    expected = InstructionRows(write_jsonl(tmp_path / "plain.jsonl", ROWS), Numbers(), 32, seed=5)
    (tmp_path / "other").write_bytes(as_bytes(form))
    monkeypatch.setattr(json_rows, "READ_AT_ONCE", 7)
    data = InstructionRows(tmp_path / "other", Numbers(), 32, seed=5)
    assert data.summary() == expected.summary()
    positions = np.arange(2 * data.rows_per_epoch)
    for ours, theirs in zip(data.batch(positions)[:4], expected.batch(positions)[:4], strict=True):
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
        with pytest.raises(UserError, match=r"no such file|cannot be read|not a file but a folder"):
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
    for x, y, mask, numbers in zip(*(t.tolist() for t in batch[:4]), strict=True):
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
        for one, all_at_once in zip(fresh.batch(positions[i : i + 1])[:4], whole[:4], strict=True):
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


def test_a_fingerprint_is_of_the_rows_alone(tmp_path):
    paths = [write_jsonl(tmp_path / name, rows) for name, rows in (("a", ROWS), ("b", ROWS), ("less", ROWS[:-1]))]
    first, same, less = (InstructionRows(path, Numbers(), 32).fingerprint for path in paths)
    assert first == same != less


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
