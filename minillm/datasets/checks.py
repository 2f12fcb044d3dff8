"""Whether an answer is right: the rules by which it is compared."""

import re
import unicodedata

FINAL = ".。!！?？;；,，、"  # punctuation at the end of an answer does not count
NUMBER = re.compile(r"-?\d+(?:,\d{3})*(?:\.\d+)?")
BETWEEN_WORDS = re.compile(r"[\s,，、;；.。:：]+|和")


def _plain(text: str) -> str:
    """The text with single spaces and no final punctuation."""
    return " ".join(text.split()).rstrip(FINAL + " ")


def _last_number(text: str) -> float | None:
    """The last number in a text; None if there is none."""
    text = unicodedata.normalize("NFKC", text).replace("−", "-")
    numbers = NUMBER.findall(text)
    return float(numbers[-1].replace(",", "")) if numbers else None


def _words(text: str) -> set[str]:
    """The items listed in a text: what is between spaces and punctuation, without "and"."""
    text = unicodedata.normalize("NFKC", text).casefold()
    return set(BETWEEN_WORDS.split(text)) - {"", "and"}


CHECKS = {"exact": _plain, "number": _last_number, "words": _words}  # name → what is compared


def is_right(row: dict, answer: str) -> bool:
    """Whether `answer` equals the row's last message, compared by the rule in "check".

    exact: the same text up to spaces and final punctuation; number: the same last number; words: the same set.
    """
    compared = CHECKS[row.get("check", "exact")]
    expected = compared(row["messages"][-1]["content"])
    given = compared(answer)
    return given is not None and expected == given
