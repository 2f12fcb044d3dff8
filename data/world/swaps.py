"""A word in a text for another of its kind: one place for another, three for four, Anna for Peter.

What is said instead fits the words around it: the noun after an article or a measure word, a plural after a number.

Read next: preferences.py, where such changes make wrong answers.
"""

import re

from data.world.draw import Draw
from data.world.words import (
    ACTORS,
    COLOURS,
    EN,
    FACT_WORDS,
    NUMBERS,
    PAST_TIMES,
    PEOPLE,
    PLACES,
    SIZES,
    THINGS,
    TOWNS,
    WORDS_ZH,
    ZH,
)


def kinds_of(lang: int) -> dict[str, object]:
    """Form of a word → its kind; forms of one kind may stand for each other.

    Those whom stories are about have a kind of their own: a name that no story has would give a wrong answer away.
    """
    kinds: dict[str, object] = {}
    for thing in THINGS:
        kinds[thing[lang]] = ("thing", thing.measure if lang == ZH else thing.en[0] in "aeiou")
        if lang == EN:
            kinds[thing.plural] = "things"
    words = {
        "actor": ACTORS,
        "person": PEOPLE,
        "place": PLACES,
        "town": TOWNS,
        "time": PAST_TIMES,
        "number": NUMBERS[1:],
        "size": SIZES,
        "colour": COLOURS,
    }
    for kind, of_kind in {**words, **FACT_WORDS}.items():
        for word in of_kind:
            kinds.setdefault(word[lang], kind)
    return kinds


KINDS = (kinds_of(ZH), kinds_of(EN))
FORMS_OF = [
    {kind: [form for form, other in kinds.items() if other == kind] for kind in set(kinds.values())} for kinds in KINDS
]
ANY_FORM = [
    re.compile(rf"{edge}(?:\d+|{'|'.join(sorted(map(re.escape, kinds), key=len, reverse=True))}){edge}")
    for kinds, edge in zip(KINDS, ("", r"\b"), strict=True)
]
ANY_UNIT = (re.compile("|".join(map(re.escape, WORDS_ZH)) + r"|\d+|.", re.DOTALL), re.compile(r"\S+\s*"))


def units(text: str, lang: int) -> list[str]:
    """The words of a text, each with the space after it; Chinese signs that belong to none stand alone."""
    return ANY_UNIT[lang].findall(text)


def another_value(draw: Draw, text: str, lang: int) -> str | None:
    """The text with one of its words exchanged; None if none can be."""
    found = list(ANY_FORM[lang].finditer(text))
    if not found:
        return None
    match = draw.pick(found)
    return text[: match.start()] + another(draw, match[0], lang) + text[match.end() :]


def another(draw: Draw, form: str, lang: int) -> str:
    """Another form of the same kind, or another number; the same if there is none."""
    if form.isdigit():
        near = [int(form) + change for change in (-3, -2, -1, 1, 2, 3)]
        return str(draw.pick([number for number in near if number > 1])) if int(form) > 1 else form
    others = [other for other in FORMS_OF[lang][KINDS[lang][form]] if other != form]
    return draw.pick(others) if others else form


def other_word_of(draw: Draw, text: str, lang: int) -> str | None:
    """The text with one of its words exchanged for another of its kind that it has too, or with another number."""
    found = list(ANY_FORM[lang].finditer(text))
    forms = {match[0] for match in found}
    changes = []
    for match in found:
        if match[0].isdigit():
            changes.append((match, another(draw, match[0], lang)))
            continue
        kind = KINDS[lang][match[0]]
        changes += [(match, other) for other in sorted(forms) if KINDS[lang].get(other) == kind and other != match[0]]
    if not changes:
        return None
    match, new = draw.pick(changes)
    return text[: match.start()] + new + text[match.end() :]
