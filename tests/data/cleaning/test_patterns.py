"""Every pattern of data/cleaning goes through long runs of one character in a time that grows as the run does."""

import importlib
import re
import signal
from pathlib import Path

import pytest

from data.cleaning import sft
from data.cleaning.text import lines, normalise, words

FOLDER = Path(__file__).parents[3] / "data" / "cleaning"
# Those that are only asked whether a line or an answer begins with them or is one: they are tried from its begin alone.
FROM_THE_BEGIN = {"ONLY_TAGS", "CREDIT", "URL_ALONE", "LINK_DEFINITION", "PLACEHOLDER", "REFUSAL", "ANSWER_AS_PROMPT"}
RUNS = (" ", "\t", "\u3000", "\n", " \n", "[", "![", "a", "7", "#", "|", "<", "&", "?", "中", "中 ", "( ", "1\n")
BETWEEN = (("", ""), ("x", "x"), ("中", "。"))  # what stands before and after a run
LENGTH = 200_000  # characters: one step for each takes milliseconds, and a thousand a second
LIMIT_S = 10.0  # of the processor: a time that grows as the square of the run is above that, see the test of this test


class TooSlow(Exception):
    """A search was stopped at the limit."""


def patterns() -> dict[str, re.Pattern]:
    """file:name → each pattern that is compiled at the top of a file."""
    found = {}
    for path in sorted(FOLDER.rglob("*.py")):
        module = importlib.import_module(".".join(path.relative_to(FOLDER.parents[1]).with_suffix("").parts))
        for name in re.findall(r"^(\w+) = re\.compile\(", path.read_text(encoding="utf-8"), re.MULTILINE):
            found[f"{path.name}:{name}"] = getattr(module, name)
    return found


def is_slow(work, run: str, before: str = "", after: str = "") -> bool:
    """Whether the work takes longer than the limit on a long run. The clock is the processor's, which waits with it."""

    def stop(*_):
        raise TooSlow

    handler = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, LIMIT_S)
    try:
        work(before + run * (LENGTH // len(run)) + after)
    except TooSlow:
        return True
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, handler)
    return False


@pytest.mark.parametrize("name", patterns())
def test_long_runs_take_a_time_that_grows_as_they_do(name):
    pattern = patterns()[name]
    works = [lambda text: pattern.sub("", text)]
    if isinstance(pattern.pattern, bytes):
        works = [lambda text: pattern.sub(b"", text.encode())]
    elif name.partition(":")[2] in FROM_THE_BEGIN:
        works = [pattern.match, pattern.fullmatch]
    slow = [(run, edges) for work in works for run in RUNS for edges in BETWEEN if is_slow(work, run, *edges)]
    assert not slow


def test_a_pattern_that_grows_as_the_square_is_found():
    assert is_slow(lambda text: re.sub(" +$", "", text), " ", "x", "x")
    assert not is_slow(lambda text: re.sub(" +x", "", text), " ", "", "x")


def test_tags_around_tags_take_no_pass_each():
    n = LENGTH // 7
    assert not is_slow(normalise._undressed, "<b>", "", "词" + "</b>" * n)
    assert normalise._undressed("<b><i><u>词</u></i></b>") == "词"


def test_all_patterns_are_tried():
    assert len(patterns()) == sum(path.read_text("utf-8").count("re.compile(") for path in FOLDER.rglob("*.py"))


def test_bounded_patterns_match_what_the_plain_ones_do():
    plain = [
        (normalise.END_OF_LINE_SPACE, re.compile(r"[ \t]+$", re.MULTILINE)),
        (normalise.BETWEEN_HANZI, re.compile("(?<=[\u4e00-\u9fff。])[ \t\u3000]+(?=[\u4e00-\u9fff。])")),
        (lines.LINK, re.compile(r"\[([^\]\n]+)\](?:\((?:https?:|mailto:|ftp:|/|#|\.)[^)\n]*\)|\[\w*\](?!\())")),
        (lines.PICTURE, re.compile(r"!\[[^\]\n]*\](?:\([^)\n]*\)|\[[^\]\n]*\])")),
    ]
    texts = ["a  \n b \t\n", "  ", "中 文\u3000 字 a 中  。 \n 中", "[[a](/b) ![[c](d)[e] [f][] [g](h) ![](x)"]
    for bounded, whole in plain:
        for text in texts:
            assert [match.span() for match in bounded.finditer(text)] == [m.span() for m in whole.finditer(text)]


def test_runs_of_lines_before_what_is_looked_for_do_not_count():
    assert sft.LIST_OR_CODE.search("a\n \n\n  - b") and sft.LIST_OR_CODE.search("a\n\n    b")
    assert sft.ROLE_IN_ANSWER.search("a\n\n \n 用户 ：b") and not sft.ROLE_IN_ANSWER.search("a 用户：b")
    assert sft.TRANSLATED_CODE.search("a\n\n 返回 x \n\n\nb") and sft.TRANSLATED_CODE.search("如果 x：\n\n  y =")
    assert sft._without_next_instruction("答。 \n\n \n 11. 说明：新的\n题") == "答。"
    assert len(words.FORUM.findall("!!顶!!\n\n...\n 路过\n好文章\nmark")) == 3
