"""The numbers that describe a document, from which the rules decide. All are per character: no words are segmented.

A number is NaN where it says nothing of a document, so that no threshold can hold for it.
"""

import numpy as np

from data.cleaning.text import words
from data.cleaning.text.characters import (
    END_MARKS,
    HANZI,
    KIND,
    LETTERS,
    code_points,
    kind_counts,
    longest_run,
    owners,
    repeated_grams,
    total,
)
from data.cleaning.text.normalise import without_code

FEATURES = {
    "length": "characters",
    "unended_length": "characters, of a text that does not end with an end mark",
    "cut": "share of the text that lay in lines that were cut",
    "personal": "mail addresses, mobile and identity numbers, per 500 characters",
    "damaged": "share of damaged characters (U+FFFD, private use, unassigned, control)",
    "rare_hanzi": "share of hanzi that are neither in the first level of GB 2312 nor in that of Big5",
    "latin_1": "share of letters and signs between U+00A1 and U+00FF",
    "mojibake": "marks of lost bytes, per 500 characters",
    "kana": "share of kana among letters",
    "hangul": "share of hangul among letters",
    "cyrillic": "share of Cyrillic among letters",
    "other_script": "share of letters of further scripts",
    "english_words": "share of 25 common words, of English text that is no code",
    "function_hanzi": "share of characters that hold sentences together, of Chinese without an end mark",
    "letters": "share of letters and hanzi",
    "digits": "share of digits",
    "symbols": "share of symbols beyond ASCII, other than punctuation",
    "repeated_grams": "share of runs of 12 characters that came before, from 100 characters on",
    "longest_run": "how often a character follows itself, per 500 characters",
    "repeated_lines": "share of lines that came before, of more than 5",
    "tags": "share of characters in HTML tags, of a text that does not explain them",
    "page_code": "pieces of CSS and JavaScript, per 500 characters, of a text that does not explain them",
    "long_runs": "share of characters in runs of over 100 without a space, other than links",
    "sales": "words that sell, and 2 for a contact beside two of them, per 500 characters",
    "stub": "1 if the text ends with “read more” and the like: it was cut off",
    "forum": "share of lines that are a forum's one-word replies",
    "end_marks": "end marks per 100 characters, from 100 characters on",
}
NAMES = tuple(FEATURES)
KNOWN = ("cut", "personal", "damaged", "stub")  # found while a text is mended; personal is a count there
LANGUAGES = ("zh", "en", "ja", "ko", "ru", "other")

FEW_HANZI = 20  # below, the share of rare ones is taken as if there were so many
FEW_LETTERS = 20
LEAST_PROSE = 30  # letters in lines without tags and code: a text may be about these
LEAST_PROSE_SHARE = 0.2  # of what is no space: of lessons on HTML 96 % have more, of pages hardly cleaned 0 to 15 %
CODE_FROM = 0.04  # share of signs such as braces: source code, of whose words no language is known
ENOUGH_WORDS = 20_000  # characters from which the language is known
COUNTED_LENGTH = 500  # characters: what is counted is per so many in longer texts, and as it is in shorter ones


def features(texts: list[str], known: np.ndarray) -> np.ndarray:
    """The numbers of many texts, (n, len(NAMES)) float32. Blocks of code are left out, where there is other text.

    known: (n, len(KNOWN)) float, what was found while the texts were mended.
    """
    prose = [without_code(text) for text in texts]
    points, borders = code_points(prose)
    counts = kind_counts(points, owners(borders), len(texts))
    lengths = np.diff(borders)
    table = np.full((len(texts), len(NAMES)), np.nan)
    column = {name: table[:, number] for number, name in enumerate(NAMES)}

    per_500 = np.minimum(1, COUNTED_LENGTH / np.maximum(lengths, 1))
    column["length"][:] = [len(text) for text in texts]
    is_unended = np.array([not text.rstrip().endswith(tuple(END_MARKS)) for text in texts], bool)
    column["unended_length"][is_unended] = lengths[is_unended]
    for number, name in enumerate(KNOWN):
        column[name][:] = known[:, number]
    column["personal"] *= np.minimum(1, COUNTED_LENGTH / np.maximum(column["length"], 1))
    _of_characters(column, counts, lengths)
    _of_repetition(column, points, borders, lengths)
    column["longest_run"] *= per_500

    # What regular expressions and lines tell, text by text.
    is_code = counts[:, KIND["code_sign"]] > CODE_FROM * lengths
    for number, text in enumerate(prose):
        has_latin = counts[number, KIND["latin"]] >= FEW_LETTERS
        found = _of_one_text(text, float(per_500[number]), bool(has_latin))
        if _is_english(counts[number]) and not is_code[number]:
            found["english_words"] = english_share(text)
        for name, value in found.items():
            column[name][number] = value
    return table.astype(np.float32)


def _of_characters(column: dict[str, np.ndarray], counts: np.ndarray, lengths: np.ndarray) -> None:
    """Shares of kinds of characters, of those that are no spaces."""
    n_visible = np.maximum(lengths - counts[:, KIND["space"]], 1)
    letters = total(counts, LETTERS)
    hanzi = total(counts, HANZI)
    enough_letters = np.maximum(letters, FEW_LETTERS)
    for name in ("kana", "hangul", "cyrillic"):
        column[name][:] = counts[:, KIND[name]] / enough_letters
    column["other_script"][:] = counts[:, KIND["other_letter"]] / enough_letters
    column["rare_hanzi"][:] = counts[:, KIND["rare_hanzi"]] / np.maximum(hanzi, FEW_HANZI)
    column["latin_1"][:] = total(counts, ("latin_1", "latin_1_sign")) / n_visible
    column["letters"][:] = letters / n_visible
    column["digits"][:] = counts[:, KIND["digit"]] / n_visible
    column["symbols"][:] = total(counts, ("symbol", "latin_1_sign", "mark")) / n_visible

    is_chinese = (hanzi >= FEW_HANZI) & (hanzi > 0.5 * letters)
    is_list = is_chinese & (counts[:, KIND["end_mark"]] == 0)
    column["function_hanzi"][is_list] = (counts[:, KIND["function_hanzi"]] / np.maximum(hanzi, 1))[is_list]
    is_long = lengths >= 100
    column["end_marks"][is_long] = (100 * counts[:, KIND["end_mark"]] / np.maximum(lengths, 1))[is_long]


def _of_repetition(column: dict[str, np.ndarray], points: np.ndarray, borders: np.ndarray, lengths: np.ndarray) -> None:
    is_long = lengths >= 100
    column["repeated_grams"][is_long] = repeated_grams(points, borders)[is_long]
    column["longest_run"][:] = longest_run(points, borders)


def _of_one_text(text: str, per_500: float, has_latin: bool) -> dict[str, float]:
    """What is found by searching one text.

    per_500: what a count is multiplied by. has_latin: whether there is a word in Latin letters.
    """
    found: dict[str, float] = {}
    size = max(len(text), 1)

    lines = [line for line in text.split("\n") if line.strip()]
    if len(lines) > 5:
        found["repeated_lines"] = 1 - len(set(lines)) / len(lines)
    found["forum"] = len(words.FORUM.findall(text)) / max(len(lines), 1)

    n_questions = len(words.QUESTION_MARKS.findall(text)) if "????" in text else 0
    n_marks = 0 if text.isascii() else sum(map(text.count, words.MOJIBAKE))
    found["mojibake"] = (n_marks + (n_questions if n_questions > 1 else 0)) * per_500

    n_sales = sum(map(text.lower().count, words.SALES_EN)) if has_latin else 0
    if not text.isascii():
        n_sales += len(words.SALES.findall(text))
    if n_sales >= 2 and words.CONTACT.search(text):
        n_sales += 2
    found["sales"] = n_sales * per_500

    n_in_tags = sum(map(len, words.TAG.findall(text))) if "<" in text else 0
    n_pieces = len(words.CODE_OF_PAGES.findall(text)) if "{" in text else 0
    if not (n_in_tags or n_pieces) or not explains_code(text):
        found["tags"] = n_in_tags / size
        found["page_code"] = n_pieces * per_500
    found["long_runs"] = _in_long_runs(text) / size
    return found


def explains_code(text: str) -> bool:
    """Whether tags and scripts are what a text is about: much of it is prose, in lines without them.

    What is left of a page has its tags in the lines that they dress, and scripts beside nothing else.
    """
    n_letters = n_visible = 0
    for line in text.split("\n"):
        tags = words.TAG.findall(line) if "<" in line else []
        if all(map(words.MENTIONED_TAG.fullmatch, tags)):
            line = words.TAG.sub("", line) if tags else line  # lists of tags' names are neither prose nor page
            n_in_line = sum(map(str.isalpha, line))
            n_letters += n_in_line if n_in_line > 4 and not words.CODE_LINE.search(line) else 0
        n_visible += sum(map(len, line.split()))
    return n_letters >= LEAST_PROSE and n_letters > LEAST_PROSE_SHARE * n_visible


def _in_long_runs(text: str) -> int:
    """Characters in long runs of ASCII without a space, links left out."""
    if not words.LONG_RUN.search(text):
        return 0
    return sum(map(len, words.LONG_RUN.findall(words.URL.sub(" ", text))))


def english_share(text: str) -> float:
    """The share of common English words among those that spaces part, at the beginning of a long text."""
    parts = text[:ENOUGH_WORDS].lower().split()
    return sum(map(words.ENGLISH.__contains__, parts)) / max(len(parts), 1)


def _is_english(counts: np.ndarray) -> bool:
    """Whether Latin letters are most of a text, by its counts of kinds (N_KINDS,)."""
    latin = counts[KIND["latin"]] + counts[KIND["latin_1"]]
    hanzi = sum(counts[KIND[kind]] for kind in HANZI)
    return bool(latin >= 5 * FEW_LETTERS and latin > 10 * hanzi)


def languages(texts: list[str]) -> np.ndarray:
    """The language of each text by its script, an index into LANGUAGES, (n,) uint8. Latin letters count as English."""
    points, borders = code_points(texts)
    counts = kind_counts(points, owners(borders), len(texts))
    letters = np.maximum(total(counts, LETTERS), 1)
    hanzi, latin = total(counts, HANZI), counts[:, KIND["latin"]] + counts[:, KIND["latin_1"]]
    share = {name: counts[:, KIND[name]] / letters for name in ("kana", "hangul", "cyrillic", "other_letter")}
    conditions = [
        share["kana"] > 0.05,
        share["hangul"] > 0.1,
        share["cyrillic"] > 0.1,
        share["other_letter"] > 0.3,
        4 * hanzi >= latin,  # a hanzi says as much as an English word
    ]
    names = ["ja", "ko", "ru", "other", "zh"]
    found = np.select(conditions, [LANGUAGES.index(name) for name in names], LANGUAGES.index("en"))
    return found.astype(np.uint8)
