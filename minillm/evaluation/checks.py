"""Whether an answer is right: the rules by which it is compared."""

import re
import unicodedata

FINAL = ".。!！?？;；,，、"  # punctuation at the end of an answer does not count


def _plain(text: str) -> str:
    """The text with single spaces and no final punctuation."""
    return " ".join(text.split()).rstrip(FINAL + " ")


def _last_number(text: str) -> float | None:
    """The last number of a text, as 1,234.5 or −3; None without one."""
    usual_signs = unicodedata.normalize("NFKC", text).replace("−", "-")
    numbers = re.findall(r"-?\d+(?:,\d{3})*(?:\.\d+)?", usual_signs)
    if not numbers:
        return None
    return float(numbers[-1].replace(",", ""))


def _words(text: str) -> set[str]:
    """The items listed in a text: what is between spaces and punctuation, without "and"."""
    usual_signs = unicodedata.normalize("NFKC", text).casefold()
    words = re.split(r"[\s,，、;；.。:：]+|和", usual_signs)
    return set(words) - {"", "and"}


CHECKS = {"exact": _plain, "number": _last_number, "words": _words}


def is_right(row: dict, answer: str) -> bool:
    """Whether `answer` equals the row's last message, compared by the rule in "check".

    exact: the same text up to spaces and final punctuation; number: the same last number; words: the same set.
    """
    what_counts = CHECKS[row.get("check", "exact")]
    expected = what_counts(row["messages"][-1]["content"])
    given = what_counts(answer)
    return given is not None and expected == given
