"""A few rows of our own in the forms in which benchmarks are published."""

import csv
import json
from pathlib import Path

LABELS = {"text": ["Tom", "the ball", "a cat"], "label": ["A", "B", "C"]}
NUMBERED = {"text": ["apple", "ball", "cat", "Tom"], "label": ["1", "2", "3", "4"]}
FIVE = {"text": ["ball", "cat", "apple", "Tom", "the"], "label": list("ABCDE")}

# benchmark → (split, rows as Hugging Face's parquet files have them)
HUB = {
    "arc_easy": (
        "test",
        [
            {"id": "a", "question": "Who has the ball?", "choices": LABELS, "answerKey": "A"},
            {"id": "b", "question": "谁有 the cat?", "choices": NUMBERED, "answerKey": "3"},
            {"id": "c", "question": "What has Tom?", "choices": LABELS, "answerKey": "C"},
        ],
    ),
    "hellaswag": (
        "validation",
        [
            {
                "activity_label": "Ball games",
                "ctx_a": "Tom has a [header] ball.",
                "ctx_b": "the Cat",
                "endings": ["has  it.", "is [title] Tom's cat.", "has the apple [step] too.", "Who?"],
                "label": str(label),
            }
            for label in (0, 3)
        ],
    ),
    "piqa": (
        "validation",
        [
            {"goal": "To hold the ball", "sol1": "take the ball.", "sol2": "take the apple away.", "label": 0},
            {"goal": "谁有ball?\n", "sol1": "Tom", "sol2": "the cat", "label": 1},
        ],
    ),
    "winogrande": (
        "validation",
        [
            {"sentence": "Tom has the cat since _ is kind.", "option1": "Tom", "option2": "the cat", "answer": "1"},
            {"sentence": "Who has the ball? _ has.", "option1": "The apple", "option2": "Tom", "answer": "2"},
        ],
    ),
    "boolq": (
        "validation",
        [
            {"passage": "Tom has the ball.", "question": "has Tom the ball", "label": 1},
            {"passage": "The cat has the apple.", "question": "has Tom the apple", "label": 0},
        ],
    ),
    "copa": (
        "validation",
        [
            {"premise": "Tom has it.", "choice1": "He took it.", "choice2": "A cat.", "question": "cause", "label": 0},
            {"premise": "The ball. ", "choice1": "Apple", "choice2": "It fell.", "question": "effect", "label": 1},
        ],
    ),
    "openbookqa": (
        "test",
        [
            {"question_stem": "The ball is with", "choices": LABELS, "answerKey": "A"},
            {"question_stem": "Tom has", "choices": NUMBERED, "answerKey": "2"},
        ],
    ),
    "commonsense_qa": (
        "validation",
        [
            {"question": " Who has the ball? ", "question_concept": "ball", "choices": FIVE, "answerKey": "D"},
            {"question": "谁有 it?", "question_concept": "it", "choices": FIVE, "answerKey": "B"},
        ],
    ),
    "lambada_openai": ("test", [{"text": "Who has the ball? Tom has the ball"}, {"text": "谁有 the cat"}]),
}
HUB["arc_challenge"] = HUB["arc_easy"]
WORKED = [{"question": f"Tom has {n} balls and 1 cat?", "answer": f"{n}+1={n + 1}\n#### {n + 1}"} for n in range(5)]
EXAMS = {  # as in CSV: question, choices, letter
    "test": [("Who has it? ", "Tom", "the cat", "ball", "apple", "A"), ("谁有ball", "一", "2", "cat", "Tom", "D")],
    "dev": [("Who?", "a", "b", "c", "d", "B"), ("What, then?", "ball", "cat", "Tom", "all", "C")],
}


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_table(path: Path, rows: list, names: list[str] | None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([*([names] if names else []), *rows])


def write_all(folder: Path) -> Path:
    """A folder with all benchmarks; the exams as their authors publish them, the others in Hugging Face's form."""
    for name, (split, rows) in HUB.items():
        write_rows(folder / name / f"{split}.jsonl", rows)
        if name != "lambada_openai":
            write_rows(folder / name / "train.jsonl", [*reversed(rows)])
    for split in ("train", "test"):
        write_rows(folder / "gsm8k" / f"{split}.jsonl", WORKED)
    for split, rows in EXAMS.items():
        write_table(folder / "mmlu" / "data" / split / f"college_physics_{split}.csv", rows, None)
        numbered = [(number, *row) for number, row in enumerate(rows)]
        names = ["Question", "A", "B", "C", "D", "Answer"]
        write_table(folder / "cmmlu" / split / "agronomy.csv", numbered, ["", *names])
        split_of_ceval = {"test": "val"}.get(split, split)
        names = ["id", "question", "A", "B", "C", "D", "answer"]
        write_table(folder / "ceval" / split_of_ceval / f"law_{split_of_ceval}.csv", numbered, names)
    return folder
