"""The benchmarks that papers print: how a row of each published file becomes a question with choices.

The prompts are those of lm-evaluation-harness 0.4.13, so that numbers compare: "Question: …\\nAnswer:" and " Paris". A
set is read as its authors publish it (JSONL, CSV) or as parquet from Hugging Face; where the two name things
otherwise, both are known.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

from minillm.base.errors import UserError
from minillm.evaluation.chinese_subjects import CEVAL, CMMLU
from minillm.evaluation.loglikelihood import Request

LETTERS = "ABCDEFGH"


class Question(NamedTuple):
    """requests: one for each choice, or a single one. sizes: the characters of each choice, by which acc_norm divides.

    right: the number of the right choice.
    """

    requests: list[Request]
    sizes: list[int]
    right: int = 0

    def example(self, joint: str) -> str:
        """The question with its right answer, as the questions after it show it."""
        return joint.join(self.requests[self.right])


class Benchmark(NamedTuple):
    """question: of a row. tested, shown: names that the split with the questions, and that with examples, go by.

    metrics: what is counted. subjects: None, or what a file's name becomes in `introduction`, which begins each prompt;
    then every file is a subject. columns: names of a CSV without a line of names. source: where the files are.
    """

    question: Callable[[dict], Question]
    tested: tuple[str, ...]
    source: str
    metrics: tuple[str, ...] = ("acc", "acc_norm")
    shown: tuple[str, ...] = ("train",)
    introduction: str = ""
    subjects: Callable[[str], str] | None = None
    columns: tuple[str, ...] | None = None
    shots: int = 0  # examples unless told otherwise
    joint: str = ""  # between the question and the answer of an example
    in_words: bool = False  # the model writes its answer, and a number is taken from it


# ---- parts of rows


def value_of(row: dict, *names: str) -> object:
    """The value under the first of these names that the row has. Raises `UserError` if it has none."""
    for name in names:
        if row.get(name) is not None:
            return row[name]
    raise UserError(f"has no {' or '.join(map(repr, names))} (its keys: {', '.join(map(str, row))})")


def text_of(row: dict, *names: str) -> str:
    """The text under the first of these names. Raises `UserError` for anything but text."""
    value = value_of(row, *names)
    if not isinstance(value, str):
        raise UserError(f"{names[0]} is {value!r:.40}, not a text")
    return value


def texts_of(row: dict, name: str) -> list[str]:
    """The list of texts under a name. Raises `UserError` for a text, of which each character would be a choice."""
    values = value_of(row, name)
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise UserError(f"{name} is {values!r:.40}, not a list of texts (a .csv has none; take .jsonl or .parquet)")
    return values


def number_of(row: dict, *names: str) -> int:
    """The number of the right choice, from 0: 1, "1" or true."""
    value = value_of(row, *names)
    try:
        number = int(value)
    except (TypeError, ValueError, OverflowError):
        number = None
    if number is None or (isinstance(value, float) and number != value):
        raise UserError(f"{names[0]} is {value!r:.40}, not the number of a choice")
    return number


def labelled_choices(row: dict) -> tuple[str, list[str], int]:
    """(question, choices, number of the right one) of ARC, OpenBookQA and CommonsenseQA, in either published form.

    The authors write {"question": {"stem", "choices": [{"text", "label"}]}}, Hugging Face {"question" or
    "question_stem", "choices": {"text": [], "label": []}}.
    """
    inner = row["question"] if isinstance(row.get("question"), dict) else row
    choices = value_of(inner, "choices")
    if isinstance(choices, list) and all(isinstance(choice, dict) for choice in choices):
        choices = {key: [value_of(choice, key) for choice in choices] for key in ("text", "label")}
    if not isinstance(choices, dict):
        raise UserError(f"choices is {choices!r:.40}, neither a list of objects nor lists of texts and labels")
    texts = texts_of(choices, "text")
    labels = value_of(choices, "label")
    if not isinstance(labels, list) or len(labels) != len(texts):
        raise UserError(f"its {len(texts)} choices have the labels {labels!r:.40}, not one each")
    labels = [str(label) for label in labels]  # 1 or "1"
    key = str(value_of(row, "answerKey")).strip()
    if key not in labels:
        raise UserError(f"answerKey {key!r:.20} is none of its labels {', '.join(labels)}")
    return text_of(inner, "stem", "question_stem", "question"), texts, labels.index(key)


def chosen(context: str, choices: list[str], right: int) -> Question:
    """A question with one context, after which each choice is read behind a space."""
    if not 0 <= right < len(choices):
        raise UserError(f"its right choice is number {right} of {len(choices)}, counted from 0")
    if not all(choices):
        raise UserError("one of its choices is empty")
    return Question([Request(context, f" {choice}") for choice in choices], [len(c) for c in choices], right)


def lettered(question: str, choices: list[str], right: int, answer: str) -> Question:
    """A question that lists its choices, and is answered by the letter of one."""
    lines = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False)]
    return chosen("\n".join([question.strip(), *lines, answer]), list(LETTERS[: len(choices)]), right)


# ---- rows of each set


def arc(row: dict) -> Question:
    question, choices, right = labelled_choices(row)
    return chosen(f"Question: {question}\nAnswer:", choices, right)


def openbookqa(row: dict) -> Question:
    return chosen(*labelled_choices(row))


def commonsense_qa(row: dict) -> Question:
    question, choices, right = labelled_choices(row)
    return lettered(f"Question: {question.strip()}", choices, right, "Answer:")


def hellaswag(row: dict) -> Question:
    context = f"{text_of(row, 'activity_label')}: {text_of(row, 'ctx_a')} {str(row.get('ctx_b') or '').capitalize()}"
    endings = [_without_marks(ending) for ending in texts_of(row, "endings")]
    return chosen(_without_marks(context), endings, number_of(row, "label"))


def _without_marks(text: str) -> str:
    """WikiHow's marks of titles and steps taken out."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def piqa(row: dict) -> Question:
    choices = [text_of(row, "sol1"), text_of(row, "sol2")]
    return chosen(f"Question: {text_of(row, 'goal')}\nAnswer:", choices, number_of(row, "label"))


def winogrande(row: dict) -> Question:
    """Two contexts, one with each name in the gap, and the same rest of the sentence after both."""
    before, gap, after = text_of(row, "sentence").partition("_")
    right = number_of(row, "answer") - 1
    if not gap or right not in (0, 1):
        raise UserError("its sentence has no gap '_', or its answer is neither 1 nor 2")
    names = [text_of(row, "option1"), text_of(row, "option2")]
    return Question([Request(before + name, f" {after.strip()}") for name in names], [1, 1], right)


def boolq(row: dict) -> Question:
    context = f"{text_of(row, 'passage')}\nQuestion: {text_of(row, 'question')}?\nAnswer:"
    return chosen(context, ["no", "yes"], number_of(row, "label", "answer"))


def copa(row: dict) -> Question:
    """The choices have a space of their own before them, besides the one that all have."""
    joint = {"cause": "because", "effect": "therefore"}.get(text_of(row, "question"))
    if joint is None:
        raise UserError(f"question is {row['question']!r:.40}, neither cause nor effect")
    choices = [text_of(row, name) for name in ("choice1", "choice2")]
    choices = [f" {choice[:1].lower()}{choice[1:]}" for choice in choices]
    return chosen(f"{text_of(row, 'premise').strip()[:-1]} {joint}", choices, number_of(row, "label"))


def mmlu(row: dict) -> Question:
    if "choices" in row:
        return lettered(text_of(row, "question"), texts_of(row, "choices"), number_of(row, "answer"), "Answer:")
    return _four_columns(row, "Answer:")


def chinese(row: dict) -> Question:
    return _four_columns(row, "答案：")


def _four_columns(row: dict, answer: str) -> Question:
    """A question with its choices in the columns A to D, and the letter of the right one."""
    letter = text_of(row, "answer", "Answer").strip()
    if letter not in ("A", "B", "C", "D"):
        raise UserError(f"its answer is {letter!r:.20}, none of A, B, C, D")
    choices = [str(value_of(row, name)) for name in "ABCD"]
    return lettered(text_of(row, "question", "Question"), choices, "ABCD".index(letter), answer)


def lambada(row: dict) -> Question:
    """The last word of a passage after all others."""
    context, _, word = text_of(row, "text").rpartition(" ")
    return Question([Request(context, f" {word}")], [len(word)])


def gsm8k(row: dict) -> Question:
    """A question whose continuation is the worked answer, which examples show and the model is to write."""
    answer = text_of(row, "answer")
    if "#### " not in answer:
        raise UserError("its answer has no result behind '#### '")
    return Question([Request(f"Question: {text_of(row, 'question')}\nAnswer:", f" {answer}")], [len(answer)])


def _mmlu_subject(subject: str) -> str:
    if subject in ("", "all"):
        raise UserError("mmlu: a file of all subjects; give the files or folders of single subjects")
    return subject.replace("_", " ")


def _subject_of(names: dict[str, str]) -> Callable[[str], str]:
    """What a subject is called in the prompt. Raises `UserError` for a file of an unknown one."""

    def name_of(subject: str) -> str:
        if subject not in names:
            raise UserError(f"{subject!r:.60} is no subject of this benchmark; name the files as they are published")
        return names[subject]

    return name_of


VALIDATION = ("validation", "valid", "val", "dev")
HUB = "https://huggingface.co/datasets"
BENCHMARKS = {
    "arc_easy": Benchmark(arc, ("test",), f"{HUB}/allenai/ai2_arc, ARC-Easy"),
    "arc_challenge": Benchmark(arc, ("test",), f"{HUB}/allenai/ai2_arc, ARC-Challenge"),
    "hellaswag": Benchmark(hellaswag, VALIDATION, f"{HUB}/Rowan/hellaswag"),
    "piqa": Benchmark(piqa, VALIDATION, f"{HUB}/baber/piqa"),
    "winogrande": Benchmark(winogrande, VALIDATION, f"{HUB}/allenai/winogrande, winogrande_xl", ("acc",)),
    "boolq": Benchmark(boolq, VALIDATION, f"{HUB}/aps/super_glue, boolq", ("acc",)),
    "copa": Benchmark(copa, VALIDATION, f"{HUB}/aps/super_glue, copa", ("acc",)),
    "openbookqa": Benchmark(openbookqa, ("test",), f"{HUB}/allenai/openbookqa, main"),
    "commonsense_qa": Benchmark(commonsense_qa, VALIDATION, f"{HUB}/tau/commonsense_qa", ("acc",)),
    "lambada_openai": Benchmark(
        lambada,
        ("test",),
        f"{HUB}/EleutherAI/lambada_openai",
        ("perplexity", "acc"),
        shown=("test",),
        joint=" ",  # the harness puts a second space into examples
    ),
    "gsm8k": Benchmark(
        gsm8k,
        ("test",),
        f"{HUB}/openai/gsm8k, main",
        ("exact_match,strict-match", "exact_match,flexible-extract"),
        shots=5,
        in_words=True,
    ),
    "mmlu": Benchmark(
        mmlu,
        ("test",),
        f"{HUB}/cais/mmlu, a folder a subject, or https://github.com/hendrycks/test (data.tar)",
        ("acc",),
        ("dev",),
        "The following are multiple choice questions (with answers) about {}.\n\n",
        _mmlu_subject,
        ("question", "A", "B", "C", "D", "answer"),
    ),
    "cmmlu": Benchmark(
        chinese,
        ("test",),
        "https://github.com/haonan-li/CMMLU, data",
        shown=("dev",),
        introduction="以下是关于{}的单项选择题，请直接给出正确答案的选项。\n\n",
        subjects=_subject_of(CMMLU),
    ),
    "ceval": Benchmark(
        chinese,
        ("val",),
        f"{HUB}/ceval/ceval-exam (ceval-exam.zip)",
        shown=("dev",),
        introduction="以下是中国关于{}的单项选择题，请选出其中的正确答案。\n\n",
        subjects=_subject_of(CEVAL),
    ),
}
