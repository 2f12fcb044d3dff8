import gzip
import json
import math

import numpy as np
import pytest
import torch

from minillm.base.errors import UserError
from minillm.datasets.fitting import encode_messages
from minillm.datasets.prompts import prompt_of
from minillm.datasets.questions import agrees, is_right, read_questions, read_questions_of
from minillm.distributed.ranks import Ranks
from minillm.evaluation import answers
from minillm.evaluation.validation import Validation, read_text
from minillm.generation.completion import Completion
from minillm.model.config import ModelConfig
from minillm.model.transformer import Transformer
from minillm.tokenizer.tokenizer import Tokenizer

ONE = Ranks(0, 1, torch.device("cpu"))


class Bytes:
    """A tokenizer whose ids are bytes, with eos 0 and bos 1; its template is question, bos, answer."""

    bos_id, eos_id, start_id, vocab_size = 1, 0, 0, 256

    def encode(self, text):
        return list(text.encode())

    def encode_many(self, texts):
        return [self.encode(text) for text in texts]

    def decode(self, ids):
        return bytes(ids).decode("utf-8", errors="replace")

    def encode_chat(self, messages, *, template="auto", add_generation_prompt=False):
        return [t for m in messages for t in self.encode(m["content"])] + [1], []

    def stop_ids(self, template="auto"):
        return [self.eos_id]

    def byte_lengths(self):
        return np.array([0, 0] + [1] * 254)


def model():
    built = Transformer(ModelConfig(vocab_size=256, dim=16, n_layers=1, n_heads=2, max_seq_len=32))
    built.init_weights(0)
    return built


@pytest.mark.parametrize(
    "check, expected, answer, right",
    [
        ("exact", "The cat sat.", " The  cat\nsat ", True),
        ("exact", "小猫坐着。", "小猫坐着", True),
        ("exact", "The cat sat.", "the cat sat.", False),
        ("exact", "a. b", "a b", False),
        ("exact", "", "anything", False),
        ("number", "7", "3 + 4 = 7.", True),
        ("number", "7", "7 is more than 5", False),
        ("number", "1200", "about 1,200", True),
        ("number", "-3", "It is −3", True),
        ("number", "12", "１２", True),
        ("number", "12", "The range is 10-12", True),
        ("number", "12", "10−12", True),
        ("number", "5", "2024-05", True),
        ("number", "3", "model A-3", True),
        ("number", "-3", "答案是-3。", True),
        ("number", "-3", "x=-3", True),
        ("number", "7", "seven", False),
        ("number", "7.0", "7", True),
        ("words", "cat, dog and bird", "bird dog, cat.", True),
        ("words", "猫、狗和鸟。", "鸟，猫，狗", True),
        ("words", "cat, dog", "cat", False),
        ("words", "cat, dog", "cat, dog, cow", False),
    ],
)
def test_an_answer_is_compared_as_its_row_says(check, expected, answer, right):
    row = {"check": check, "messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": expected}]}
    assert is_right(row, answer) is right


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def test_questions_are_read_from_any_known_shape(tmp_path):
    pair = {"instruction": "Add", "input": "1 2", "output": "3", "family": "sum", "check": "number"}
    chat = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    rows = read_questions(write(tmp_path / "q.jsonl", [pair, chat, pair]))
    assert [row["messages"][0]["content"] for row in rows] == ["Add\n1 2", "q", "Add\n1 2"]
    assert rows[0]["family"] == "sum"
    assert len(read_questions(tmp_path / "q.jsonl", 2)) == 2
    write(tmp_path / "one.jsonl", [chat])
    both = [tmp_path / "one.jsonl", tmp_path / "q.jsonl"]
    for limit, expected in ((9, [rows[1], *rows]), (3, [rows[1], *rows[:2]]), (1, [rows[1]])):
        assert read_questions_of(both, limit) == expected
    assert read_questions_of([], 3) == []


WORKED = "3 + 4 = <<3+4=7>>7.\n#### 7"


@pytest.mark.parametrize(
    ("row", "answer", "right"),
    [
        ({"question": "q", "answer": WORKED}, "7 apples", True),
        ({"question": "q", "answer": WORKED}, "There are 3 and 4, so #### 7", True),
        ({"question": "q", "answer": WORKED}, "8", False),
        ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": WORKED}]}, "7", True),
        ({"question": "q", "answer": WORKED, "check": "exact"}, "7", False),
        ({"question": "q", "answer": WORKED, "check": None}, "7", True),
        ({"question": "q", "answer": "so\n#### a cat"}, "so\n#### a cat", True),
        ({"question": "q", "answer": 7}, "It is 7.", True),
        ({"question": "q", "answer": 7.0}, "8", False),
        ({"question": "q", "answer": 7.5, "check": "exact"}, "7.5", True),
        ({"question": "q", "answer": "7"}, "It is 7.", False),
    ],
)
def test_the_right_answer_is_that_of_a_reward(tmp_path, row, answer, right):
    (question,) = read_questions(write(tmp_path / "q.jsonl", [row]))
    assert is_right(question, answer) == right
    if question["check"] == "number":
        _, columns = prompt_of(row)
        assert agrees(columns["check"], columns["answer"], answer) == right


@pytest.mark.parametrize(
    "row, message",
    [
        ({"text": "x"}, "row 2: its keys are text"),
        ({"instruction": "a", "output": "b", "check": "number"}, "row 2: its right answer 'b' has no number, which"),
        ({"instruction": "a", "output": "b", "check": "vibes"}, "row 2: check 'vibes': choose one of exact"),
        ({"instruction": "a", "output": "b", "check": ["exact"]}, r"row 2: check \['exact'\]: choose one of exact"),
        ({"messages": [{"role": "user", "content": "q"}]}, "row 2: does not end with"),
    ],
)
def test_bad_questions_are_named(tmp_path, row, message):
    good = {"instruction": "a", "output": "b"}
    with pytest.raises(UserError, match=message):
        read_questions(write(tmp_path / "q.jsonl", [good, row]))
    assert len(read_questions(tmp_path / "q.jsonl", on_bad_line="skip")) == 1
    assert len(read_questions(write(tmp_path / "q.jsonl", [row, good, good]), 1, on_bad_line="skip")) == 1


def test_exact_match_counts_by_family_in_any_order(monkeypatch, capsys):
    lines = [
        ("upper", "a", "A"),
        ("upper", "bcd", "BCD"),
        ("upper", "ef", "eF"),
        (3, "x", "y"),
        ("long", "z" * 40, "Z"),
    ]
    questions = [
        {"family": f, "messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
        for f, q, a in lines
    ]
    asked = []

    def generate(model, prompts, max_new_tokens, *, sampling, stop_ids):
        asked.append(sorted(len(p) for p in prompts))
        done = [Completion(list(bytes(p[:-1]).decode().upper().encode()), "stop") for p in prompts]
        return done

    monkeypatch.setattr(answers, "generate", generate)
    monkeypatch.setattr(answers, "QUESTIONS_PER_BATCH", 2)
    scores = answers.exact_match(model(), Bytes(), questions)
    assert scores == {"3": (0, 1), "long": (0, 1), "upper": (2, 3)}  # the long one does not fit: never asked
    assert asked == [[2, 2], [3, 4]] and "1 of 5 questions fill the context" in capsys.readouterr().out
    lines = answers.table(scores).splitlines()
    assert lines[2].split() == ["upper", "66.7%", "(2/3)"] and lines[-1].split() == ["total", "40.0%", "(2/5)"]


def test_exact_match_asks_the_model():
    built = model()
    questions = [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": "x"}]} for q in ("ab", "c")
    ]
    said = answers.answers(built, Bytes(), [row["messages"][:-1] for row in questions], max_new_tokens=5)
    for row, answer in zip(questions, said, strict=True):
        row["messages"][1] = {"role": "assistant", "content": answer}
        tokens = [*row["messages"][0]["content"].encode(), 1]
        for _ in range(5):
            tokens.append(int(built(torch.tensor([tokens]))[0, -1].argmax()))
        assert answer == Bytes().decode(tokens[-5:]).split("\0")[0]
    assert answers.exact_match(built, Bytes(), questions, max_new_tokens=5) == {"all": (2, 2)}


def limit_for(monkeypatch, lengths, context, tokenizer=None, **how) -> tuple[int, str]:
    """(max_new_tokens that questions are answered with whose right answers have these lengths, what is said)."""
    limits, said = [], []

    def generate(model, prompts, max_new_tokens, **_):
        limits.append(max_new_tokens)
        return [Completion([], "stop") for _ in prompts]

    monkeypatch.setattr(answers, "generate", generate)
    built = Transformer(ModelConfig(vocab_size=256, dim=16, n_layers=1, n_heads=2, max_seq_len=context))
    texts = ["x" * length for length in lengths]
    talks = [[{"role": "user", "content": "q"}, {"role": "assistant", "content": text}] for text in texts]
    questions = [{"messages": messages} for messages in talks]
    answers.exact_match(built, tokenizer or Bytes(), questions, log=said.append, **how)
    (limit,) = limits
    return limit, "".join(said)


def test_an_answer_may_be_as_long_as_the_longest_right_one(monkeypatch):
    assert limit_for(monkeypatch, [3, 64], 2000) == (64, "")  # no less, for answers that say more than the right one
    assert limit_for(monkeypatch, [3, 200], 2000) == (200, "")
    limit, said = limit_for(monkeypatch, [3, 512, 513, 1500], 2000)
    assert limit == 512 and said.startswith("2 of 4 right answers are longer than the 512 tokens")
    limit, said = limit_for(monkeypatch, [3, 200], 100)
    assert limit == 200 and said.startswith("1 of 2 right answers") and said.endswith("context of 100 has room for")
    limit, said = limit_for(monkeypatch, [3, 200], 2000, max_new_tokens=5)
    assert limit == 5 and said.startswith("1 of 2 right answers are longer than the 5 tokens")


@pytest.mark.parametrize("template", ["chat", "simple"])
def test_the_longest_right_answer_has_room_for_its_end(monkeypatch, home, template):
    tokenizer = Tokenizer.load(home.path / "tokenizer")
    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "x" * 300}]
    learned = int(encode_messages(talk, tokenizer, template)[1].sum())  # its tokens, and the piece that ends it
    assert limit_for(monkeypatch, [3, 300], 2000, tokenizer, template=template) == (learned, "") and learned > 64


@pytest.mark.parametrize("name", ["t.txt", "t.jsonl", "t.json", "t.txt.gz"])
def test_a_text_is_scored_as_its_documents(tmp_path, name):
    documents, path = ["one day", "二", "three"], tmp_path / name
    if ".txt" in name:
        data = "\n\n".join(documents).encode()
        path.write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    elif name == "t.jsonl":
        write(path, [{"text": text} for text in documents])
    else:
        path.write_text(json.dumps([{"text": text} for text in documents]))
    built, texts = model().eval(), read_text(path, Bytes())
    scores = Validation(texts, Bytes(), 8, 1 << 20).scores(built, ONE, torch.no_grad())
    stream = [0] + [t for text in documents for t in (*text.encode(), 0)]
    nats = 0.0  # every token of every document and each eos once, in windows of 8
    for begin in range(0, len(stream) - 1, 8):
        window = torch.tensor([stream[begin : begin + 9]])
        nats -= float(built(window[:, :-1]).detach().log_softmax(-1).gather(-1, window[:, 1:, None]).sum())
    size = sum(len(text.encode()) for text in documents)
    assert scores["val_loss"] == pytest.approx(nats / (len(stream) - 1), rel=1e-5)
    assert scores["val_bpb"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    assert "floor_bpb" not in scores


def test_a_text_that_holds_nothing_is_refused(tmp_path):
    (tmp_path / "t.txt").write_text("\n\n \n")
    with pytest.raises(UserError, match="holds no text"):
        read_text(tmp_path / "t.txt", Bytes())
