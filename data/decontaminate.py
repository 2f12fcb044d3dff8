"""Which texts hold rows of a benchmark: runs of 13 tokens that both have.

A token is a word, or a single character of Chinese or Japanese; case, punctuation and the width of letters do not
count. A row of fewer than 13 tokens is found where all of them stand in a text; one of fewer than 5 is never looked
for, since such texts are found everywhere, nor is a run that more than 50 rows have: it is how a task is put.

    index = build_index(["What is the boiling point of water at sea level in degrees Celsius on Earth?", …])
    found_in(index, texts)   → for each text the rows found in it, with the place

13 is what GPT-3 took at most (Brown et al., 2020, appendix C). Shorter runs are found in texts that share a phrase.

Runs are compared by hashes of 64 bits, made by numpy for all tokens of a text at once. Both levels, characters of a
token and tokens of a run, are polynomials modulo 2⁶⁴, taken as differences of running sums:

    sums[i] = Σ_{j < i} value[j] · base^j      hash of i … k = (sums[k] − sums[i]) · base^−i
"""

import functools
import sys
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

RUN = 13  # tokens
SHORTEST = 5  # tokens of a row that can be looked for
MOST_ROWS = 50  # that a run may be from
CHARACTERS_AT_ONCE = 1 << 19
OVERLAP = 1 << 12  # characters that two parts of a long text share
TOKEN_BASE = 0x9E3779B97F4A7C15  # odd numbers, of no meaning
RUN_BASE = 0xD6E8FEB86659FD93
FILTER_BITS = 22  # a hash is looked up only if its first bits are those of one in the index
BETWEEN, IN_WORD, ALONE = 0, 1, 2  # what a character is: between tokens, part of a word, or a token by itself
ALONE_RANGES = ((0x3040, 0x3100), (0x3400, 0x4DC0), (0x4E00, 0xA000), (0xF900, 0xFB00), (0x20000, 0x40000))


class Index(NamedTuple):
    """The runs of some rows.

    hashes: (N,) uint64, sorted; rows: (N,) int64, the row that each run is from. lengths: how many tokens runs have.
    filter: (2^FILTER_BITS,) bool, which first bits occur. n_rows: in all; too_short: rows without a run that
    could be looked for.
    """

    hashes: np.ndarray
    rows: np.ndarray
    lengths: list[int]
    filter: np.ndarray
    n_rows: int
    too_short: list[int]


class Match(NamedTuple):
    """A row of the index that a text holds, and the first run of it: the text's tokens there, with single spaces."""

    row: int
    run: str


def build_index(rows: Iterable[str | Sequence[str]]) -> Index:
    """The index of these rows; a row may be several texts, any of which counts."""
    hashes: list[np.ndarray] = []
    row_of: list[np.ndarray] = []
    lengths = set()
    number = -1
    for number, row in enumerate(rows):
        for text in [row] if isinstance(row, str) else row:
            tokens = tokens_of(text)
            length = min(RUN, len(tokens.hashes))
            if length < SHORTEST:
                continue
            lengths.add(length)
            runs = np.unique(_runs(running_sums(tokens.hashes, RUN_BASE), length))
            hashes.append(runs)
            row_of.append(np.full(len(runs), number))

    all_hashes = np.concatenate([np.empty(0, dtype=np.uint64), *hashes])
    order = np.argsort(all_hashes, kind="stable")
    all_hashes = all_hashes[order]
    all_rows = np.concatenate([np.empty(0, dtype=np.int64), *row_of])[order]

    # the words of a task, which all its rows begin with, tell of none of them
    _, number_of, times = np.unique(all_hashes, return_inverse=True, return_counts=True)
    is_telling = times[number_of] <= MOST_ROWS
    all_hashes, all_rows = all_hashes[is_telling], all_rows[is_telling]
    too_short = np.setdiff1d(np.arange(number + 1), all_rows).tolist()

    is_first_bits = np.zeros(1 << FILTER_BITS, dtype=bool)
    is_first_bits[all_hashes >> np.uint64(64 - FILTER_BITS)] = True
    return Index(all_hashes, all_rows, sorted(lengths), is_first_bits, number + 1, too_short)


def found_in(index: Index, texts: Sequence[str]) -> list[list[Match]]:
    """For each text the rows of the index that it holds, each once, in the order of their numbers.

    Short texts are quicker together than one by one.
    """
    found: list[dict[int, Match]] = [{} for _ in texts]
    for numbers, parts in _blocks(texts):
        tokens = tokens_of("\n".join(parts))
        part_ends = np.cumsum([len(part) + 1 for part in parts])
        part_of = np.searchsorted(part_ends, tokens.begins, side="right")  # (n tokens,)
        sums = running_sums(tokens.hashes, RUN_BASE)
        for length in index.lengths:
            for place, row in _hits(index, sums, part_of, length):
                number = numbers[part_of[place]]
                found[number].setdefault(row, Match(row, tokens.text_of(place, length)))
    return [[matches[row] for row in sorted(matches)] for matches in found]


def _hits(index: Index, sums: np.ndarray, part_of: np.ndarray, length: int) -> Iterator[tuple[int, int]]:
    """(number of the first token, row) of each run of this length that is in the index.

    sums: those of the tokens' hashes; part_of: (n tokens,), the number of the text that each is in.
    """
    runs = _runs(sums, length)
    is_inside = part_of[: len(runs)] == part_of[length - 1 :][: len(runs)]  # not over the end of a text
    maybe = np.flatnonzero(is_inside & index.filter[runs >> np.uint64(64 - FILTER_BITS)])
    begins = np.searchsorted(index.hashes, runs[maybe], side="left")
    ends = np.searchsorted(index.hashes, runs[maybe], side="right")
    for place, begin, end in zip(maybe, begins, ends, strict=True):
        for row in index.rows[begin:end]:
            yield int(place), int(row)


def _blocks(texts: Sequence[str]) -> Iterator[tuple[list[int], list[str]]]:
    """(numbers of the texts, parts of them) of about CHARACTERS_AT_ONCE together, so that memory is bounded.

    Runs of up to OVERLAP characters lie whole in some part of a long text.
    """
    numbers: list[int] = []
    parts: list[str] = []
    size = 0
    for number, text in enumerate(texts):
        text = unicodedata.normalize("NFC", text)
        for begin in range(0, max(len(text) - OVERLAP, 1), CHARACTERS_AT_ONCE):
            part = text[begin : begin + CHARACTERS_AT_ONCE + OVERLAP]
            if parts and size + len(part) > CHARACTERS_AT_ONCE:
                yield numbers, parts
                numbers, parts, size = [], [], 0
            numbers.append(number)
            parts.append(part)
            size += len(part)
    if parts:
        yield numbers, parts


# ---- text → tokens → runs


class Tokens(NamedTuple):
    """The tokens of a text: hashes (n,) uint64, and the characters that each begins at and ends before, (n,) int64.

    codes: the characters of the whole text in lower case, uint32.
    """

    hashes: np.ndarray
    begins: np.ndarray
    ends: np.ndarray
    codes: np.ndarray

    def text_of(self, first: int, length: int) -> str:
        """Some tokens as text, with a space between two unless both are characters alone."""
        kinds, _ = character_table()
        text = ""
        kind_before = ALONE
        for begin, end in zip(self.begins[first : first + length], self.ends[first : first + length], strict=True):
            kind = kinds[self.codes[begin]]
            if text and not kind_before == kind == ALONE:
                text += " "
            text += "".join(map(chr, self.codes[begin:end]))
            kind_before = kind
        return text


def tokens_of(text: str) -> Tokens:
    """The words of a text, and the characters that are tokens by themselves."""
    kinds, lower = character_table()
    text = unicodedata.normalize("NFC", text)
    codes = lower[np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)]
    kind = kinds[codes]

    # a token begins where a character alone stands, or a word's first
    is_alone = kind == ALONE
    is_word = np.concatenate([[False], kind == IN_WORD, [False]])
    begins = np.flatnonzero(is_alone | (is_word[1:-1] & ~is_word[:-2]))
    ends = np.flatnonzero(is_alone | (is_word[1:-1] & ~is_word[2:])) + 1
    hashes = hashes_between(running_sums(codes, TOKEN_BASE), begins, ends, TOKEN_BASE)
    return Tokens(hashes, begins, ends, codes)


def _runs(sums: np.ndarray, length: int) -> np.ndarray:
    """The hash of each run of `length` tokens, (n − length + 1,) uint64, from the sums of all tokens' hashes."""
    begins = np.arange(max(len(sums) - length, 0))
    return hashes_between(sums, begins, begins + length, RUN_BASE)


def running_sums(values: np.ndarray, base: int) -> np.ndarray:
    """Σ values[j] · base^j over all j < i, (N + 1,) uint64. values: (N,), whole numbers from 0."""
    sums = np.zeros(len(values) + 1, dtype=np.uint64)
    np.cumsum(values.astype(np.uint64) * powers(base, len(values))[: len(values)], out=sums[1:])
    return sums


def hashes_between(sums: np.ndarray, begins: np.ndarray, ends: np.ndarray, base: int) -> np.ndarray:
    """The hash of the values from each begin to before each end, (n,) uint64, from their running sums."""
    inverse = pow(base, -1, 1 << 64)
    hashes = (sums[ends] - sums[begins]) * powers(inverse, len(sums))[begins]

    # the last steps of SplitMix64 (Steele et al., 2014): every bit then depends on all
    hashes ^= hashes >> np.uint64(30)
    hashes *= np.uint64(0xBF58476D1CE4E5B9)
    hashes ^= hashes >> np.uint64(27)
    hashes *= np.uint64(0x94D049BB133111EB)
    hashes ^= hashes >> np.uint64(31)
    return hashes


_powers: dict[int, np.ndarray] = {}  # by base; kept, since every text needs them


def powers(base: int, n: int) -> np.ndarray:
    """base^i modulo 2⁶⁴ for i from 0 to at least n − 1, uint64."""
    if base not in _powers or len(_powers[base]) < n:
        factors = np.full(1 << n.bit_length(), base, dtype=np.uint64)
        factors[0] = 1
        _powers[base] = np.cumprod(factors)
    return _powers[base]


@functools.cache
def character_table() -> tuple[np.ndarray, np.ndarray]:
    """For each code point what it is (BETWEEN, IN_WORD or ALONE), uint8, and itself in lower case, uint32.

    Letters, digits and the marks on them make words. Full-width letters become those of usual width.
    """
    kinds = np.zeros(sys.maxunicode + 1, dtype=np.uint8)
    lower = np.arange(sys.maxunicode + 1, dtype=np.uint32)
    for code in range(sys.maxunicode + 1):
        character = chr(code)
        if unicodedata.category(character)[0] in "LNM":
            kinds[code] = IN_WORD
            plain = unicodedata.normalize("NFKC", character).lower()
            if len(plain) == 1:
                lower[code] = ord(plain)
    for begin, end in ALONE_RANGES:
        kinds[begin:end][kinds[begin:end] == IN_WORD] = ALONE
    return kinds, lower
