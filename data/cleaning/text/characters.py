"""What kind of character each is, for many texts at once: a table over all code points, and counts by `bincount`."""

import unicodedata
from functools import cache

import numpy as np

from minillm.datasets.files.encodings import usual_characters

# The kinds. Each character is of one of them.
KINDS = (
    *("space", "latin", "latin_1", "latin_1_sign", "digit", "hanzi", "function_hanzi", "rare_hanzi", "kana"),
    *("hangul", "cyrillic", "other_letter", "mark", "end_mark", "punctuation", "code_sign", "symbol", "damaged"),
)
KIND = {name: number for number, name in enumerate(KINDS)}
N_KINDS = len(KINDS)
LETTERS = ("latin", "latin_1", "hanzi", "function_hanzi", "rare_hanzi", "kana", "hangul", "cyrillic", "other_letter")
HANZI = ("hanzi", "function_hanzi", "rare_hanzi")

# Characters that hold a Chinese sentence together: modern, classical, Cantonese, in both scripts. Lists of titles and
# of menu entries hardly have any.
FUNCTION_HANZI = (
    "的了是在和不也就都而与與及或但把被这這那他她它我你您们們之其者于於以为為因所乎哉矣焉若则則个個着著过過到从從对對会會要来來"
    "嘅咗唔喺佢係啲嗰"
)
END_MARKS = '.。!！?？…．｡"”」』；'
CODE_SIGNS = "(){}[]=<>;_/\\`"
CONTROLS_OF_TEXT = "\t\n\r\f\v"

# (first, last code point, kind): what the general category of a character does not say.
RANGES = (
    (0x0400, 0x052F, "cyrillic"),
    (0x3041, 0x3096, "kana"),
    (0x30A1, 0x30FA, "kana"),
    (0x1100, 0x11FF, "hangul"),
    (0x3130, 0x318F, "hangul"),
    (0xAC00, 0xD7A3, "hangul"),
    (0x3400, 0x4DBF, "rare_hanzi"),
    (0x4E00, 0x9FFF, "rare_hanzi"),
    (0xF900, 0xFAFF, "rare_hanzi"),
    (0x20000, 0x3134F, "rare_hanzi"),
)
# By the first letter or by both letters of the general category in Unicode.
CATEGORIES = {"L": "other_letter", "M": "mark", "N": "digit", "P": "punctuation", "S": "symbol", "Z": "space"}
CATEGORIES |= {"Cc": "damaged", "Co": "damaged", "Cn": "damaged", "Cs": "damaged", "Cf": "punctuation"}


@cache
def kind_table() -> np.ndarray:
    """The kind of each code point, (0x110000,) uint8; made once in a process."""
    categories = [unicodedata.category(chr(point)) for point in range(0x20000)]
    kinds = [CATEGORIES.get(name) or CATEGORIES[name[0]] for name in categories]
    table = np.full(0x110000, KIND["damaged"], np.uint8)  # of the planes above, only hanzi are text
    table[: len(kinds)] = [KIND[kind] for kind in kinds]

    # Scripts, and among the hanzi those in daily use and those that hold sentences together.
    for first, last, kind in RANGES:
        part = table[first : last + 1]
        part[(part == KIND["other_letter"]) | (first >= 0x20000)] = KIND[kind]
    table[ord("〇")] = KIND["hanzi"]
    latin = table[:0x250]
    latin[latin == KIND["other_letter"]] = KIND["latin"]
    usual = np.array([ord(character) for character in usual_characters()])
    table[usual[table[usual] == KIND["rare_hanzi"]]] = KIND["hanzi"]  # Big5 has kana among them
    table[[ord(character) for character in FUNCTION_HANZI]] = KIND["function_hanzi"]

    # Letters and signs of Latin-1, which text in UTF-8 becomes when it is read as Latin-1.
    for point in range(0xA1, 0x100):
        is_letter = unicodedata.category(chr(point))[0] == "L"
        table[point] = KIND["latin_1" if is_letter else "latin_1_sign"]
    # Signs. What ASCII counts as symbols ($ + < = > ^ ` | ~) is punctuation here: formulas and tables are full of it.
    is_ascii_symbol = np.flatnonzero(table[:0x80] == KIND["symbol"])
    table[is_ascii_symbol] = KIND["punctuation"]
    table[[ord(character) for character in CODE_SIGNS]] = KIND["code_sign"]
    table[[ord(character) for character in END_MARKS]] = KIND["end_mark"]
    table[[ord(character) for character in CONTROLS_OF_TEXT]] = KIND["space"]
    table[[0xFFFC, 0xFFFD]] = KIND["damaged"]
    table[0xA0] = KIND["space"]
    return table


def code_points(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """All texts end to end as code points, (c,) uint32, and where each begins and the last ends, (n + 1,) int64."""
    points = np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), np.uint32)
    borders = np.zeros(len(texts) + 1, np.int64)
    np.cumsum([len(text) for text in texts], out=borders[1:])
    return points, borders


def owners(borders: np.ndarray) -> np.ndarray:
    """The number of the text that each character belongs to, (c,) int64; borders: as `code_points` gives them."""
    return np.repeat(np.arange(len(borders) - 1), np.diff(borders))


def kind_counts(points: np.ndarray, owner: np.ndarray, n_texts: int) -> np.ndarray:
    """How many characters of each kind each text has, (n, N_KINDS) int64."""
    cells = owner * N_KINDS + kind_table()[points]
    return np.bincount(cells, minlength=n_texts * N_KINDS).reshape(n_texts, N_KINDS)


def total(counts: np.ndarray, kinds: tuple[str, ...]) -> np.ndarray:
    """The characters of several kinds together, (n,) int64."""
    return counts[:, [KIND[kind] for kind in kinds]].sum(1)


# ---- Repetition.

GRAM = 12  # characters
# Odd multipliers, one for each doubling of a gram's length.
MULTIPLIERS = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0xD6E8FEB86659FD93], np.uint64)
OWNER_BITS = 20  # of a sort key; the other 44 are of the gram's hash


def repeated_grams(points: np.ndarray, borders: np.ndarray) -> np.ndarray:
    """The share of each text's grams of GRAM characters that came before in the same text, (n,) float64.

    The hash of a gram is made from those of its halves, so that no loop goes over characters; sorting keys of (text,
    hash) puts equal grams beside each other. 44 bits of hash: in a text of a million characters 0.03 grams are taken
    for equal by mistake.
    """
    n_texts = len(borders) - 1
    if len(points) < GRAM:
        return np.zeros(n_texts)
    if n_texts >= 1 << OWNER_BITS:
        raise ValueError(f"{n_texts:,} texts at once; at most {1 << OWNER_BITS:,} have room in a sort key")

    # Hashes of 2, 4 and 8 characters, then of 8 + 4. Arithmetic is modulo 2⁶⁴.
    gram = (points.astype(np.uint64) + np.uint64(1)) * MULTIPLIERS[3]
    gram ^= gram >> np.uint64(29)
    for length, multiplier in zip((1, 2, 4), MULTIPLIERS, strict=False):
        half = gram
        gram = half[:-length] * multiplier + half[length:]
    gram = gram[:-4] * MULTIPLIERS[3] + half[8:]  # half: of 4 characters
    gram ^= gram >> np.uint64(32)
    gram *= MULTIPLIERS[0]

    # Grams that lie within one text, sorted.
    owner = owners(borders)
    is_within = owner[: len(gram)] == owner[GRAM - 1 :]
    key = (owner[: len(gram)][is_within].astype(np.uint64) << np.uint64(64 - OWNER_BITS)) | (
        gram[is_within] >> np.uint64(OWNER_BITS)
    )
    key.sort()
    is_repeat = key[1:] == key[:-1]
    owner_of_repeat = (key[1:][is_repeat] >> np.uint64(64 - OWNER_BITS)).astype(np.int64)
    n_repeats = np.bincount(owner_of_repeat, minlength=n_texts)
    n_grams = np.maximum(np.diff(borders) - GRAM + 1, 1)
    return n_repeats / n_grams


# Characters that rulers and rows of dots are made of: a long run of them is no sign of a broken text.
RULERS = " \t\n\u3000-=_*#~./·…─━—+|。"


def longest_run(points: np.ndarray, borders: np.ndarray) -> np.ndarray:
    """How often the most repeated character follows itself in each text, (n,) int64; rulers do not count."""
    longest = np.zeros(len(borders) - 1, np.int64)
    if not len(points):
        return longest
    is_start = np.concatenate([[True], points[1:] != points[:-1]])
    is_start[borders[:-1][borders[:-1] < len(points)]] = True
    starts = np.flatnonzero(is_start)
    lengths = np.diff(starts, append=len(points))
    is_long = (lengths > 2) & ~np.isin(points[starts], [ord(character) for character in RULERS])
    owner = np.searchsorted(borders, starts[is_long], side="right") - 1
    np.maximum.at(longest, owner, lengths[is_long])
    return longest
