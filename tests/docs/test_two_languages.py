"""Every page is there in both languages, and the two are in step: headings, code, tables' numbers, names, links.

One rule for code blocks: what follows `# ` on a line is a comment and may be translated, all else is the same.
"""

import re
from collections import Counter
from pathlib import Path

import pytest

from tests.test_docs import BLOCK, ROOT, Page

COMMENT = re.compile(r"(^|\s+)# .*", re.MULTILINE)
TABLE = re.compile(r"(?:^ *\|.*\n)+", re.MULTILINE)
NUMBER = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)?(?:e[+-]?\d+)?")
ENGLISH, CHINESE = ROOT / "docs" / "en", ROOT / "docs" / "zh"
PAIRS = {ROOT / "README.md": ROOT / "README.zh.md"}  # English page → Chinese page
PAIRS |= {page: CHINESE / page.relative_to(ENGLISH) for page in sorted(ENGLISH.rglob("*.md"))}
PICTURES = {  # English picture → the same in Chinese
    path.with_name(path.name.replace("-zh.", ".")): path for path in (ROOT / "docs" / "images").rglob("*-zh.png")
}


def place(page: Path, link: str) -> str:
    """Where a link leads: a file, from an English page its Chinese one if there are two, and the heading's number."""
    if link.startswith("https://"):
        return link
    name, _, anchor = link.partition("#")
    file = (page.parent / (name or page.name)).resolve()
    target = ({**PAIRS, **PICTURES}.get(file, file) if page in PAIRS else file).relative_to(ROOT).as_posix()
    if not anchor:
        return target
    anchors = Page(file).anchors if file.exists() else []
    return f"{target}, heading {anchors.index(anchor) if anchor in anchors else 'missing'}"


def contents(page: Path) -> dict[str, list[list[str]]]:
    """What a page must share with its counterpart: by the name of the thing, lists whose order does not count."""
    read = Page(page)
    tables = TABLE.findall(BLOCK.sub("", read.text))
    links = {place(page, link) for link in read.links} - {"README.md", "README.zh.md"}  # READMEs name one another
    return {
        "heading level": [[level] for level, _ in read.headings],
        "code block": [COMMENT.sub("", block).strip().splitlines() for block in BLOCK.findall(read.text)],
        "table's numbers": [NUMBER.findall(table) for table in tables],
        "code names": [sorted({" ".join(word.split()) for word in read.words})],
        "links": [sorted(links)],
    }


def differences(english: Path, chinese: Path) -> list[str]:
    """A line for each thing in which two pages are out of step: what only one of them has, at the first such place."""
    ours, theirs = contents(english), contents(chinese)
    lines = []
    for kind in ours:
        if len(ours[kind]) != len(theirs[kind]):
            lines.append(f"{kind}: {len(ours[kind])} in English, {len(theirs[kind])} in Chinese")
        for number, (one, other) in enumerate(zip(ours[kind], theirs[kind], strict=False), start=1):
            if Counter(one) != Counter(other):
                only = [list((Counter(a) - Counter(b)).elements()) for a, b in ((one, other), (other, one))]
                lines.append(f"{kind} {number}: only in English {only[0]}, only in Chinese {only[1]}")
                break
    return lines


def test_the_same_pages_are_there_in_both_languages():
    english, chinese = ({page.relative_to(folder) for page in folder.rglob("*.md")} for folder in (ENGLISH, CHINESE))
    assert english == chinese


@pytest.mark.parametrize("english", PAIRS, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_a_page_is_in_step_with_its_translation(english):
    assert not differences(english, PAIRS[english])


@pytest.mark.parametrize(
    "old, new, told",
    [
        ("## B", "### B", "heading level 2"),
        ("\nrun --x 1", "\nrun --x 2", "code block 1"),
        ("| 1,024 |", "| 1,023 |", "table's numbers 1: only in English ['1,024'], only in Chinese ['1,023']"),
        ("| 1,024 |\n", "| 1,024 |\n\ntext\n\n| 1 |\n", "table's numbers: 1 in English, 2 in Chinese"),
        ("`name`", "`nome`", "code names 1"),
        ("#b)", "#a)", "links 1"),
        ("# why", "# 为什么", None),
        ("text", "文字", None),
    ],
)
def test_what_is_out_of_step_is_told(tmp_path, monkeypatch, old, new, told):
    page = "# A\n\ntext `name` [there](one.md#b)\n\n## B\n\n```\nrun --x 1  # why\n```\n\n| 1,024 |\n"
    english, chinese = tmp_path / "one.md", tmp_path / "two.md"
    english.write_text(page, encoding="utf-8")
    chinese.write_text(page.replace("one.md", "two.md").replace(old, new), encoding="utf-8")
    monkeypatch.setattr("tests.docs.test_two_languages.ROOT", tmp_path)
    monkeypatch.setattr("tests.docs.test_two_languages.PAIRS", {english: chinese})
    found = differences(english, chinese)
    assert found == [] if told is None else len(found) == 1 and told in found[0]
