"""The chat page as a file: what needs no browser to be seen."""

import base64
import hashlib
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest

from minillm.serving.page import PAGE, chat_page, content_security_policy

ROOT = Path(__file__).parents[4]
SOURCE = PAGE.read_text(encoding="utf-8")
STYLE, SCRIPT = (re.search(f"<{tag}>(.*?)</{tag}>", SOURCE, re.DOTALL)[1] for tag in ("style", "script"))


class Elements(HTMLParser):
    """The elements in the markup of the page, each (tag, attributes)."""

    def __init__(self):
        super().__init__()
        self.found: list[tuple[str, dict]] = []
        self.feed(SOURCE)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


def test_the_policy_names_the_script_and_the_style():
    html, headers = chat_page()
    assert html.decode() == SOURCE
    for text in (STYLE, SCRIPT):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in headers["Content-Security-Policy"]
    assert "unsafe" not in headers["Content-Security-Policy"]
    with pytest.raises(ValueError):
        content_security_policy(html + b"<script></script>")


def test_nothing_comes_from_outside_and_no_text_becomes_markup():
    for tag, attributes in Elements().found:
        assert not [name for name in attributes if name.startswith("on") or name == "style"], tag
        assert attributes.get("src") is None
        assert attributes.get("href", "#").startswith(("#", "data:image/svg+xml,")), tag
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function|import\(", SCRIPT
    )
    assert not re.search(r"@import|url\(", STYLE)


def test_each_id_is_there_once_and_each_that_is_asked_for_is_there():
    ids = Counter(attributes["id"] for _, attributes in Elements().found if "id" in attributes)
    assert not [name for name, times in ids.items() if times > 1]
    made = {"welcome"} | set(re.findall(r"^  (\w+): \{ min", SCRIPT, re.MULTILINE))
    asked = set(re.findall(r'\$\("([\w-]+)"\)', SCRIPT)) | set(re.findall(r"#([a-z][\w-]*) [{.:]", STYLE))
    assert asked <= set(ids) | made


def test_each_word_is_there_in_both_languages_and_used():
    table = SCRIPT.partition("const WORDS = {")[2].partition("\n};")[0]
    words = {
        name: both for name, *both in re.findall(r'^  (\w+): \[\s*("[^"]*"),\s*("[^"]*"),?\s*\],$', table, re.MULTILINE)
    }
    assert len(words) == len(re.findall(r"^  \w+:", table, re.MULTILINE))
    for name, (english, chinese) in words.items():
        assert sorted(re.findall(r"\{\d\}", english)) == sorted(re.findall(r"\{\d\}", chinese)), name
    rest = SOURCE.replace(table, "")
    samplings = re.findall(r"^  (\w+): \{ min", SCRIPT, re.MULTILINE)
    used = set(re.findall(r'data-(?:text|label|hint)="(\w+)"', rest)) | {
        *samplings,
        *(f"{name}Help" for name in samplings),
    }
    literal = set(re.findall(r'"(\w+)"', rest))
    assert used <= set(words)
    assert set(words) <= used | literal
    assert set(re.findall(r'say\("(\w+)"', rest)) <= set(words)


def test_each_action_is_there_and_used():
    table = SCRIPT.partition("const ACTIONS = {")[2].partition("\n};")[0]
    actions = set(re.findall(r"^  (?:async )?(\w+)(?:\(|:)", table, re.MULTILINE))
    used = set(re.findall(r'data-action="(\w+)"', SOURCE)) | set(re.findall(r'tool\("(\w+)"', SCRIPT))
    used |= set(re.findall(r'"data-action": "(\w+)"', SCRIPT)) | set(re.findall(r'notify\(.*, "(\w+)"\)', SCRIPT))
    assert actions == used


@pytest.mark.parametrize("shade", [0, 1], ids=["light", "dark"])
def test_text_stands_out_from_what_is_behind_it(shade):
    """Contrast of at least 4.5, as WCAG 2.2 (1.4.3) asks for text."""
    pairs = re.findall(r"--([\w-]+): light-dark\((#\w{6}), (#\w{6})\)", STYLE)
    colours = {name: both[shade] for name, *both in pairs}

    def luminance(colour: str) -> float:
        parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(text: str, behind: str) -> float:
        darker, lighter = sorted((luminance(colours[text]), luminance(colours[behind])))
        return (lighter + 0.05) / (darker + 0.05)

    for text in ("ink", "quiet", "accent", "error"):
        for behind in ("paper", "side", "raised"):
            assert contrast(text, behind) >= 4.5, f"{text} on {behind}"
    assert contrast("ink", "tint") >= 4.5 and contrast("quiet", "tint") >= 4.5
    assert contrast("on-accent", "accent") >= 4.5 and contrast("paper", "ink") >= 4.5


def test_the_page_is_packed():
    assert 'package_data={"minillm.serving": ["chat.html"]}' in (ROOT / "setup.py").read_text(encoding="utf-8")


def test_the_page_can_be_read_in_a_sitting():
    lines = SCRIPT.splitlines()
    assert max(map(len, SOURCE.splitlines())) <= 320  # the icon's; code stays within 120
    assert max(map(len, lines)) <= 120
    starts = [number for number, line in enumerate(lines) if re.match(r"(async )?function", line)]
    for start in starts:
        end = lines.index("}", start)
        assert end - start < 45, lines[start]
