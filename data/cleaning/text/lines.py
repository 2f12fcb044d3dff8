"""Lines that are no part of a text: menus, footers, credits, rulers, links. They are cut before a document is judged.

Two sorts are cut: those that a pattern knows, and those that many documents share (`recurring`), which need a first
pass over all documents. Lines in blocks of code are left alone.
"""

import hashlib
import itertools
import re
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from data.cleaning.text.normalise import BLANK_LINES, FENCED, outside_code

LONGEST = 120  # characters of a line that a pattern may cut
REMEMBERED = 1 << 16  # shorter lines whose kind and hash are remembered: those of menus come again and again
# A line that holds one of these, and is short, is a page's and not a text's.
ANYWHERE = re.compile(
    r"上一篇[:：]|下一篇[:：]|[上下]一页|版权所有|ICP备|公网安备|责任编辑|责编[:：]|分享到|扫一扫|登录\s*[|｜/]\s*(?:立即)?注册|立即注册"
    r"|请先登录|登录后才|登录或注册|返回(?:首页|顶部)|网站地图|设为首页|加入收藏|收藏本站|相关(?:阅读|文章|推荐)[:：]|热门标签|【?字号[:：]"
    r"|【?(?:打印本页|关闭窗口)|展开全文|阅读全文|点击查看|查看(?:原图|更多)|访问的页面不存在|自动跳转到首页|本版积分规则|回帖后跳转"
    r"|没有权限查看此内容|您(?:现在|当前)的位置[:：]|广告服务|诚聘英才|本文由.{0,30}(?:编译|翻译|推出)|译者[:：].*校对[:：]"
)
# The same in lower-case English.
ANYWHERE_EN = (
    *("all rights reserved", "cookie policy", "use of cookies", "we use cookies", "accept cookies", "skip to content"),
    *("skip to main content", "add to cart", "subscribe to our newsletter", "powered by wordpress", "copyright ©"),
    *("powered by discuz", "copyright (c)", "404 not found", "lorem ipsum"),
)
LATIN_WORD = re.compile("[A-Za-z]{5}")
# A line of nothing but these, with separators between, is a menu.
_MENU = (
    "首页|关于我们|新闻中心|产品(?:展示|中心)|成功案例|人才招聘|联系(?:我们|方式)|在线留言|登录|注册|忘记密码|购物车|返回|广告服务|版权声明|隐私政策"
    "|帮助中心|手机版|小黑屋|archiver|搜索|更多|发表回复"
    "|home|about(?: us)?|products?|services?|blog|contact(?: us)?|faqs?|log ?in|sign ?(?:in|up|out)|register|my account"
    "|cart|checkout|site ?map|privacy(?: policy)?|terms(?: of (?:use|service))?|help|search|menu|share|tweet|print|next"
    "|previous|back to top|(?:continue )?read(?:ing)? more"
)
_BETWEEN = r"[ \t\u3000|｜/\\·•*>»«<,，、:：\[\]【】\-–—]*"  # no mark that ends a sentence
MENU = re.compile(rf"^{_BETWEEN}(?:(?:{_MENU})(?:[ \t]*\(\d+\))?{_BETWEEN})+$", re.IGNORECASE | re.MULTILINE)
_RULE = r"\-=_*~#·•.—─━★☆◆◇▲▼■●○※+"
RULER = re.compile(rf"^[ \t\u3000]*[{_RULE}][ \t\u3000{_RULE}]{{2,}}$", re.MULTILINE)
CREDIT = re.compile(
    r"\W*(?:via|来源|来自|出处|原文(?:链接|地址)?|source)\s*[:：]\s*\W*(?:https?://|www\.)\S+\W*", re.IGNORECASE
)
URL_ALONE = re.compile(r"\W*(?:https?://|www\.)\S+\W*", re.IGNORECASE)
LINK_DEFINITION = re.compile(r"\s{0,3}\[[^\]\n]+\]:\s*(?:https?://|www\.|/|#)\S*.*")

# Markdown: a picture goes, of a link its words stay. Their length has a bound, since each bracket of a run begins one.
PICTURE = re.compile(r"!\[[^\]\n]{0,300}\](?:\([^)\n]*\)|\[[^\]\n]*\])")
LINK = re.compile(r"\[([^\]\n]{1,300})\](?:\((?:https?:|mailto:|ftp:|/|#|\.)[^)\n]*\)|\[\w*\](?!\())")

# Lines that many documents share. A line that looks like code is none: programs of all documents hold it.
CODE = re.compile(
    r"[{}\\]|;$|^(?:\||//|/\*|#!|#include|[$>] )|\w=[\"'\w]|\s[-+*/.:]?=\s|\w\([^()]*\)$|</?[a-zA-Z][^<>]{0,300}>|-\*-"
    r"|^(?:return|pass|else|elif|if|try|except|raise|finally|with|for|while|break|continue|do|done|then|fi|end|begin|case"
    r"|default|import|from|def|class|assert|yield|public|private|static|var|let|const|int|void|print|echo|cd|git|sudo)\b"
)
MAY_BE_CODE = re.compile(r"[{}\\=<]|[;)]$|^[|/#$>a-z]|-\*-")  # all that CODE matches has one of these; sooner searched
SENTENCE_END = tuple('。！？!?.…；;”’"」』')
SINGLE_FROM = 24  # bytes of UTF-8: shorter lines recur in good texts, such as “是的。”; they are cut in runs alone
RUN_FROM = 4  # lines that recur, one after another: a menu, if none ends a sentence
LONG_FROM = 128  # bytes of a line of sentences: lists of articles quote it, so it must recur in many more documents
LONG_TIMES = 5  # so many times as many
NO_LINE = 0
LEAST_LEFT = 20  # letters: a document of which the menus leave less is a menu


def cut_lines(text: str) -> tuple[str, int, int]:
    """(the text without lines that are a page's, characters of the lines cut, characters of links taken out)."""
    if not may_hold_boilerplate(text):
        return text, 0, 0
    n_cut = 0
    n_of_links = 0

    def cut(part: str) -> str:
        nonlocal n_cut, n_of_links
        kept = []
        for line in part.split("\n"):
            kind = _kind_of_short(line) if len(line) <= LONGEST else _kind(line)
            if kind == "boilerplate":
                n_cut += len(line)
            elif kind == "link":
                n_of_links += len(line)
            else:
                without = LINK.sub(r"\1", PICTURE.sub("", line)) if "](" in line or "][" in line else line
                n_of_links += len(line) - len(without)
                if without.strip() or not line.strip():
                    kept.append(without)
        return "\n".join(kept)

    text = outside_code(text, cut)
    return text.strip("\n"), n_cut, n_of_links


def may_hold_boilerplate(text: str) -> bool:
    """Whether there can be a line to cut: whole texts are searched sooner than their lines."""
    if "//" in text or "www." in text or "](" in text or "]:" in text:
        return True
    short = text if len(text) <= LONGEST else "\n".join([line for line in text.split("\n") if len(line) <= LONGEST])
    return bool(_holds_phrase(short) or RULER.search(short) or MENU.search(short))


def _holds_phrase(text: str) -> bool:
    if not text.isascii() and ANYWHERE.search(text):
        return True
    if not LATIN_WORD.search(text):
        return False
    lower = text.lower()
    return any(phrase in lower for phrase in ANYWHERE_EN)


def _kind(line: str) -> str:
    if is_boilerplate(line):
        return "boilerplate"
    return "link" if is_link_or_ruler(line) else "text"


@lru_cache(REMEMBERED)
def _kind_of_short(line: str) -> str:
    return _kind(line)


def is_boilerplate(line: str) -> bool:
    """Whether a pattern knows this line as a page's: a menu, a footer, a notice."""
    return 0 < len(line) <= LONGEST and bool(line.strip()) and (_holds_phrase(line) or bool(MENU.fullmatch(line)))


def is_link_or_ruler(line: str) -> bool:
    """Whether a line is nothing but a link, its definition, the credit of a source, or a ruler."""
    if "//" not in line and "www." not in line:
        return len(line) <= LONGEST and bool(
            RULER.fullmatch(line) or ("]:" in line and LINK_DEFINITION.fullmatch(line))
        )
    patterns = (LINK_DEFINITION, URL_ALONE, CREDIT)
    return len(line) <= 4 * LONGEST and any(pattern.fullmatch(line) for pattern in patterns)


# ---- Lines that many documents share.


def line_hashes(text: str) -> list[int]:
    """The hash of each different line that may be cut if it recurs, 64 bits each; the last one tells long sentences.

    Not of code; and of a document of one line none, since that is a copy of the document and no line of a page.
    """
    if "\n" not in text:
        return []
    lines = {line.strip() for part in FENCED.split(text)[::2] for line in part.split("\n")}
    return sorted(set(map(line_hash, lines)) - {NO_LINE})


def line_hash(line: str) -> int:
    """The hash of a line without the spaces around it; NO_LINE of an empty one and of code."""
    return _hash_of_short(line) if len(line) <= LONGEST else _hash(line)


@lru_cache(REMEMBERED)
def _hash_of_short(line: str) -> int:
    return _hash(line)


def _hash(line: str) -> int:
    if not line or (MAY_BE_CODE.search(line) and CODE.search(line)):
        return NO_LINE
    data = line.encode()
    number = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")
    is_long = len(data) >= LONG_FROM and any(mark in line for mark in SENTENCE_END)
    return number | 1 if is_long else number & ~1


class Cut(NamedTuple):
    """A text without lines that recur. n_in_runs, n_alone: characters cut in menus, and in single lines."""

    text: str
    n_in_runs: int = 0
    n_alone: int = 0


def cut_recurring(text: str, recurring: set[int], cuts_alone: bool = True) -> Cut:
    """The text without the lines whose hashes recur: menus, which are runs of such lines, and longer ones alone.

    A document that mostly consists of such lines is a copy of others: it stays whole, for those who look for copies.
    """
    n_in_runs = n_alone = 0

    def cut(part: str) -> str:
        nonlocal n_in_runs, n_alone
        lines = part.split("\n")
        recurs = [number for number, line in enumerate(lines) if line_hash(line.strip()) in recurring]
        in_runs = _in_runs(lines, recurs)
        alone = {number for number in recurs if cuts_alone and number not in in_runs and _is_cut_alone(lines[number])}
        n_in_runs += sum(len(lines[number]) for number in in_runs)
        n_alone += sum(len(lines[number]) for number in alone)
        return "\n".join([line for number, line in enumerate(lines) if number not in in_runs and number not in alone])

    shorter = outside_code(text, cut)
    if n_in_runs:
        shorter = BLANK_LINES.sub("\n\n", shorter)
    is_menu = n_in_runs and sum(map(str.isalpha, shorter)) < LEAST_LEFT
    is_copy = 2 * n_alone > len(text) - n_in_runs
    return Cut(text) if is_menu or is_copy else Cut(shorter.strip("\n"), n_in_runs, n_alone)


def _in_runs(lines: list[str], recurs: list[int]) -> set[int]:
    """The numbers of lines in runs of RUN_FROM and more that recur and end no sentence; empty lines break no run."""
    found: set[int] = set()
    run: list[int] = []
    for number in recurs:
        if lines[number].rstrip().endswith(SENTENCE_END):
            continue
        if not run or any(line.strip() for line in lines[run[-1] + 1 : number]):
            run = []
        run.append(number)
        if len(run) >= RUN_FROM:
            found.update(run[-RUN_FROM:])
    return found


def _is_cut_alone(line: str) -> bool:
    """Whether a line that recurs is cut without others around it: long, and if indented a sentence, so no code."""
    is_code = line.startswith(("    ", "\t")) and not line.rstrip().endswith(SENTENCE_END)
    return not is_code and len(line.strip().encode()) >= SINGLE_FROM


def recurring(hashes: Callable[[], Iterable[np.ndarray]], least: int, at_once: int = 1 << 26) -> np.ndarray:
    """Those hashes that at least `least` documents hold, sorted, (n,) uint64; of long sentences LONG_TIMES as many.

    hashes(): goes through those of all documents, in arrays that may come from the disk; of each document without
    repeats. Memory holds about `at_once` of them at a time: one part of the range of hashes after another.
    """
    n_parts = max(1, -(-sum(map(len, hashes())) // at_once))
    edges = [(part << 64) // n_parts for part in range(n_parts + 1)]
    found = []
    for first, end in itertools.pairwise(edges):
        inside = [array[(array >= np.uint64(first)) & (array <= np.uint64(end - 1))] for array in hashes()]
        values, counts = np.unique(np.concatenate(inside or [np.zeros(0, np.uint64)]), return_counts=True)
        needed = np.where(values & np.uint64(1), LONG_TIMES * least, least)
        found.append(values[counts >= needed])
    return np.concatenate(found)
