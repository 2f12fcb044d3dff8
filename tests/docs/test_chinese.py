"""The commands of docs/en/chinese.md go their whole way on the bundled corpus, and what it promises holds there."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests import launch

PAGE = launch.ROOT / "docs" / "en" / "chinese.md"
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(out: Path) -> list[tuple[str, str]]:
    """(language, text) of each block of the page's commands, with folders of the test's and fewer steps."""
    commands = PAGE.read_text(encoding="utf-8").partition("## On real texts")[0]
    commands = commands.replace("python data/bundled.py", f"python data/bundled.py --out {out}/bundled")
    commands = commands.replace('Path("data/bundled")', f'Path("{out}/bundled")')
    commands = commands.replace("out/chinese", f"{out}/chinese").replace("--epochs 1", "--steps 6 --eval_rows 8")
    commands = commands.replace("--seq_len 128", "--seq_len 128 --eval_tokens 4096")
    commands = re.sub(r"--steps (\d+)", lambda match: f"--steps {max(2, int(match[1]) // 5)}", commands)
    return BLOCK.findall(commands)


def execute(line: str, out: Path) -> str:
    """Run a command as a process that starts at once; return what it printed."""
    words = shlex.split(line)[1:]
    script, arguments = ("minillm/__main__.py", words[2:]) if words[0] == "-m" else (words[0], words[1:])
    process = launch.Process(
        script, arguments, out / "printed.txt", {}, hidden=() if "plot" in words else ("matplotlib",)
    )
    assert process.wait(seconds=300) == 0, f"{line}\n{process.text}"
    return process.text


def answer(line: str, question: str) -> str:
    """What `chat` prints, which reads its question from standard input."""
    words = [sys.executable, *shlex.split(line)[1:]]
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8"}
    run = subprocess.run(
        words, cwd=launch.ROOT, env=environment, input=question, capture_output=True, encoding="utf-8", check=True
    )
    return run.stdout


@pytest.mark.slow
def test_the_whole_way_on_the_bundled_corpus(tmp_path):
    printed = {}
    for language, text in blocks(tmp_path):
        if language == "python":
            exec(compile(text, PAGE.name, "exec"), {})
            continue
        for line in text.replace("\\\n", " ").splitlines():
            printed[line] = answer(line, "南希最喜欢吃什么？\n") if "chat" in line else execute(line, tmp_path)

    def of(*words: str) -> str:
        """What the one command printed that holds all these words."""
        (found,) = (text for line, text in printed.items() if all(word in line for word in words))
        return found

    def number(pattern: str, text: str) -> float:
        return float(re.search(pattern, text)[1])

    assert ", 0 of these changed" in of("vocab merge") and "unreachable 0" in of("vocab merge")
    density = [
        number(r"([\d.]+) characters per token", of("inspect", f"{tmp_path}/chinese/vocab-{name}"))
        for name in ("old", "new")
    ]
    assert density[1] > 2 * density[0]
    with_surgery, without = (
        number(r"bits per byte +([\d.]+)", of("eval", f"{name}-stage2-merged", f"chinese-{name}"))
        for name in ("new", "old")
    )
    assert with_surgery < without
    assert (tmp_path / "chinese" / "curves.png").stat().st_size > 10_000
    # the question was read and answered (after so few steps perhaps by nothing), and another one asked for
    assert re.findall("^> ", of("chat"), re.MULTILINE) == ["> "] * 2 and "not asked" not in of("chat")
