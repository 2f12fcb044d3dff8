"""Every page is there in both languages, and the two are in step: headings, code, tables' numbers, names, links.

One rule for code blocks: what follows `# ` on a line is a comment and may be translated, all else is the same.
"""

import re
from collections import Counter
from pathlib import Path

import pytest

from tests.test_docs import BLOCK, ROOT, Page

COMMENT = re.compile(r"(^|\s+)# .*", re.MULTILINE)
TABLE = re.compile(r"(?:^\|.*\n)+", re.MULTILINE)
NUMBER = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)?(?:e[+-]?\d+)?")
CHANGING = ("generation", "evaluation", "distributed", "diloco", "checkpoint", "interop", "datasets", "serving")
CHANGING += ("cleaning", "README", "training", "kernels", "interop", "machines", "sft", "plan")
PAIRS = [("README.md", "README.zh.md")]
PAIRS += [(f"docs/en/{path.name}", f"docs/zh/{path.name}") for path in sorted(ROOT.glob("docs/en/*.md"))]


def chinese_file(path: Path) -> str:
    """The Chinese counterpart of a file of the project, or the file itself where languages share it."""
    name = path.resolve().relative_to(ROOT).as_posix()
    return dict(PAIRS).get(name, name)


def place(page: Path, link: str) -> str:
    """Where a link leads: a file, its Chinese one if there are two, and the number of the heading there."""
    if link.startswith("https://"):
        return link
    name, _, anchor = link.partition("#")
    file = page.parent / (name or page.name)
    if not anchor:
        return chinese_file(file)
    anchors = Page(file).anchors if file.exists() else []
    return f"{chinese_file(file)}, heading {anchors.index(anchor) if anchor in anchors else 'missing'}"


def contents(path: Path) -> dict[str, list]:
    """What a page must share with its counterpart, by the name of the thing."""
    page = Page(path)
    tables = TABLE.findall(BLOCK.sub("", page.text))
    links = {place(path, link) for link in page.links}
    return {
        "heading levels": [level for level, _ in page.headings],
        "code blocks": [COMMENT.sub("", block).strip() for block in BLOCK.findall(page.text)],
        "numbers of a table": [sorted(Counter(NUMBER.findall(table)).items()) for table in tables],
        "code names": sorted({" ".join(word.split()) for word in page.words}),
        "links": sorted(links - {"README.zh.md"}),  # each README names the other
    }


def first_difference(kind: str, english: list, chinese: list) -> str:
    """One line on where two lists part, or nothing."""
    if kind in ("code names", "links"):
        missing, extra = sorted({*english} - {*chinese}), sorted({*chinese} - {*english})
        return f"{kind}: the Chinese page lacks {missing} and has besides {extra}" if missing or extra else ""
    for number, (ours, theirs) in enumerate(zip(english, chinese, strict=False)):
        if ours != theirs:
            return f"{kind}: number {number} from 0 is\n  {ours!r} in English and\n  {theirs!r} in Chinese"
    if len(english) != len(chinese):
        return f"{kind}: {len(english)} in English, {len(chinese)} in Chinese"
    return ""


def test_the_same_pages_are_there_in_both_languages():
    english, chinese = ({path.name for path in ROOT.glob(f"docs/{language}/*.md")} for language in ("en", "zh"))
    assert english - chinese <= {f"{name}.md" for name in CHANGING} and not chinese - english


@pytest.mark.parametrize("english, chinese", PAIRS, ids=[english for english, _ in PAIRS])
def test_a_page_is_in_step_with_its_translation(english, chinese):
    if Path(english).stem in CHANGING:
        pytest.xfail("the English page is being changed")
    ours, theirs = contents(ROOT / english), contents(ROOT / chinese)
    found = [first_difference(kind, ours[kind], theirs[kind]) for kind in ours]
    assert not any(found), f"{english} and {chinese}:\n" + "\n".join(line for line in found if line)
