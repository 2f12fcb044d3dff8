"""Benchmarks in many forms → their questions; which of them stand in the training documents."""

import gzip
import json
from pathlib import Path

import pytest

from data.contamination import check_texts, read_benchmarks, rows_of_benchmark, table
from data.prepare import main
from data.sources import Options
from data.tokenize_files import is_val
from minillm.base.errors import UserError

QUESTION = "Which of these animals lays the eggs that most people have for breakfast on a Sunday?"
CHINESE = "小明每天早上吃三个鸡蛋，然后去学校上课。"


def write_lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


ROWS = [
    ({"question": QUESTION, "choices": ["a"], "answer": 0}, [QUESTION]),
    ({"Question": CHINESE, "A": "1", "Answer": "A"}, [CHINESE]),
    ({"question": {"stem": QUESTION, "choices": []}, "answerKey": "A"}, [QUESTION]),
    ({"passage": "p", "question": "cause", "premise": QUESTION}, [QUESTION]),
    ({"ctx": QUESTION, "activity_label": "Cooking"}, [QUESTION]),
    ({"sentence": "Ann saw _ there", "option1": "Bob", "option2": "Eve"}, ["Ann saw Bob there", "Ann saw Eve there"]),
    ({"context_options": ["one", "two"], "continuation": "c"}, ["one", "two"]),
    ({"question": None, "text": QUESTION}, [QUESTION]),
]


@pytest.mark.parametrize(("row", "texts"), ROWS)
def test_the_question_of_a_row(tmp_path, row, texts):
    assert rows_of_benchmark(write_lines(tmp_path / "b.jsonl", [row])) == [texts]


def test_tables_with_and_without_names(tmp_path):
    named = tmp_path / "named.csv"
    named.write_text(f",Question,A\n0,{CHINESE},3\n", encoding="utf-8")
    unnamed = tmp_path / "unnamed.tsv"
    unnamed.write_text(f"{CHINESE}\t18\n{QUESTION}\t3\n", encoding="utf-8")
    assert rows_of_benchmark(named) == [[CHINESE]]
    assert rows_of_benchmark(unnamed) == [[CHINESE], [QUESTION]]
    assert rows_of_benchmark(named, "A") == [["3"]]


def test_faults_are_named(tmp_path):
    path = write_lines(tmp_path / "b.jsonl", [{"question": QUESTION}, {"q": QUESTION}])
    with pytest.raises(
        UserError, match=r"b.jsonl, row 2: has no key .* \(its keys: q\); name the key with --check_field"
    ):
        rows_of_benchmark(path)
    with pytest.raises(UserError, match="row 1: has no 'q'"):
        rows_of_benchmark(path, "q")
    with pytest.raises(UserError, match="question is 3, not a text"):
        rows_of_benchmark(write_lines(path, [{"question": 3}]))
    with pytest.raises(UserError, match="holds no row"):
        rows_of_benchmark(write_lines(path, []))
    with pytest.raises(UserError, match=r"notes\.md: not a known kind of file"):
        read_benchmarks([write_lines(tmp_path / "notes.md", [])])
    with pytest.raises(UserError, match="gone: no such file or folder"):
        read_benchmarks([tmp_path / "gone"])
    with pytest.raises(UserError, match="--check_field q: means nothing with --check_against none; leave it out"):
        main_with(tmp_path, "--check_field", "q")


def main_with(out: Path, *words: str) -> None:
    main_argv = ["--input", str(out / "t.jsonl"), "--out", str(out / "bins"), "--train_tokenizer", "360", *words]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["prepare.py", *main_argv])
        main()


@pytest.mark.parametrize("workers", [1, 3])
def test_rows_are_counted_with_their_documents(tmp_path, monkeypatch, workers):
    monkeypatch.setattr("data.contamination.BLOCK_BYTES", 200)
    texts = [f"Text {n} of many others, which has nothing to do with it." for n in range(30)]
    texts[7] = f"A quiz.\n{QUESTION.upper()} Hens."
    texts[8] = f"{QUESTION} And {CHINESE}"
    texts[20] = "This is a gene made of, which is not the question."
    paths = [write_lines(tmp_path / f"{part}.jsonl", [{"text": text} for text in texts[part::2]]) for part in (0, 1)]
    with gzip.open(tmp_path / "second.json.gz", "wt") as file:
        json.dump([{"goal": "What is a gene made of?"}, {"goal": "dresser"}, {"goal": CHINESE}], file)
    first = write_lines(tmp_path / "first.jsonl", [{"question": "unasked " * 13}, {"question": QUESTION}])
    benchmarks = read_benchmarks([first, tmp_path / "second.json.gz"])
    report = check_texts(benchmarks, paths, Options(val_fraction=0), workers)

    assert report["documents"] == 30
    counts = [[entry[name] for name in ("rows", "too_short", "found", "documents")] for entry in report["files"]]
    assert counts == [[2, 0, 1, 2], [3, 1, 1, 1]]
    assert [(row["row"], row["n_documents"]) for row in report["rows"]] == [(2, 2), (3, 1)]
    assert report["rows"][0]["document"] == f"{paths[0]}, record 5"  # the first in the order of the files
    assert report["rows"][0]["run"] == "which of these animals lays the eggs that most people have for breakfast"
    assert "first.jsonl" in table(report) and "50.00%" in table(report)


def test_documents_of_validation_are_passed_over(tmp_path):
    options = Options(val_fraction=0.5)
    texts = [f"{QUESTION} {n}" for n in range(20)]
    n_train = sum(not is_val(text.encode(), options) for text in texts)
    path = write_lines(tmp_path / "t.jsonl", [{"text": text} for text in texts] + [{"other": 1}])
    report = check_texts(read_benchmarks([write_lines(tmp_path / "b.jsonl", [ROWS[0][0]])]), [path], options)
    assert 0 < n_train < 20
    assert (report["documents"], report["bad_documents"]) == (n_train, 1)
    assert report["rows"][0]["n_documents"] == n_train


def test_the_command_writes_what_it_found(tmp_path, capsys):
    texts = [f"Text {n}: the quick brown fox and {n % 7} lazy dogs" for n in range(300)]
    write_lines(tmp_path / "t.jsonl", [{"text": text} for text in [*texts, f"Quiz: {QUESTION}"]])
    benchmark = write_lines(tmp_path / "b.jsonl", [{"query": QUESTION}])
    main_with(tmp_path, "--check_against", str(benchmark), "--val_fraction", "0.02")
    report = json.loads((tmp_path / "bins" / "contamination.json").read_text())
    assert report["rows"][0]["document"] == f"{tmp_path / 't.jsonl'}, record 301"
    assert "100.00%" in capsys.readouterr().out


@pytest.mark.parametrize("is_val_of_its_own", [False, True])
def test_what_is_looked_through_is_what_is_trained_on(is_val_of_its_own, tmp_path):
    texts = [f"Text {n}: the quick brown fox and {n % 7} lazy dogs" for n in range(300)]
    asked = f"Quiz: {QUESTION}"
    write_lines(tmp_path / "t.jsonl", [{"text": text} for text in [*texts, "", *texts[:5], asked, asked]])
    val = write_lines(tmp_path / "val.jsonl", [{"text": text} for text in [*texts[:40], asked]])
    benchmark = write_lines(tmp_path / "b.jsonl", [{"query": QUESTION}])
    of_validation = ("--val_input", str(val)) if is_val_of_its_own else ("--val_fraction", "0.1")
    main_with(tmp_path, "--check_against", str(benchmark), *of_validation)
    report, meta = (json.loads((tmp_path / "bins" / f"{name}.json").read_text()) for name in ("contamination", "meta"))
    assert report["documents"] == sum(file["documents"] for file in meta["files"]["train"]) < 300
    if is_val_of_its_own:
        assert not report["rows"]
