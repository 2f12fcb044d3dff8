"""The commands around training: `python -m minillm COMMAND`, each with --help.

A command is a file with a dataclass `Config` of its options and a function `run(config)`; the first line of its
docstring says what it does. To add one, write the file and name it here.
"""

import ast
import difflib
import importlib
import importlib.util
import signal
import sys
from collections.abc import Callable
from pathlib import Path

if __name__ == "__main__":  # while the imports below take their time, Ctrl-C ends the process without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from minillm.base.command_line import parse
from minillm.base.errors import UserError
from minillm.base.options import Options
from minillm.base.process import run_script

COMMANDS = {
    "generate": "minillm.commands.generate",
    "chat": "minillm.commands.chat",
    "serve": "minillm.commands.serve",
    "eval": "minillm.commands.evaluate",
    "pairs": "minillm.commands.pairs",
    "plot": "minillm.commands.plot",
    "info": "minillm.commands.info",
    "plan": "minillm.commands.plan",
    "vocab train": "minillm.commands.vocab.train",
    "vocab merge": "minillm.commands.vocab.merge",
    "vocab prune": "minillm.commands.vocab.prune",
    "vocab inspect": "minillm.commands.vocab.inspect",
    "resize": "minillm.commands.resize",
    "import": "minillm.commands.formats.import_model",
    "export": "minillm.commands.formats.export_model",
    "merge": "minillm.commands.merge",
    "check_cluster": "minillm.commands.check_cluster",
    "bench train": "minillm.commands.bench.train",
    "bench generate": "minillm.commands.bench.generate",
    "bench tune": "minillm.commands.bench.tune",
    "bench data": "minillm.commands.bench.data",
    "bench align": "minillm.commands.bench.align",
    "bench eval": "minillm.commands.bench.evaluate",
    "bench busy": "minillm.commands.bench.busy",
    "bench serve": "minillm.commands.bench.serve",
}


def main(argv: list[str] | None = None) -> int:
    """Run a command line, by default that of the process; returns the exit status. Without words all are listed."""
    words = sys.argv[1:] if argv is None else argv
    if not words:
        print(overview())
        return 2  # nothing was asked for, which a script should notice
    if words[-1] in ("-h", "--help") and not _split(words[:-1])[0]:
        print(overview(" ".join(words[:-1])))
        return 0
    run, config = parse_command(words)
    return run(config) or 0


def parse_command(words: list[str]) -> tuple[Callable, Options]:
    """The function of a command and its options, from the words after `python -m minillm`."""
    name, rest = _split(words)
    if not name:
        raise UserError(_what_to_give(words))
    module = importlib.import_module(COMMANDS[name])  # only now, so that --help need not wait for torch
    return module.run, parse(module.Config, module.__doc__, rest, program=f"python -m minillm {name}")


def _split(words: list[str]) -> tuple[str, list[str]]:
    """The command that a line begins with, and what follows it; no command: an empty name."""
    for n_words in (2, 1):
        name = " ".join(words[:n_words])
        if name in COMMANDS:
            return name, words[n_words:]
    return "", words


def _what_to_give(words: list[str]) -> str:
    """What is wrong with a line that begins with no command."""
    listed = "(python -m minillm --help lists them)"
    below = [name for name in COMMANDS if name.startswith(f"{words[0]} ")]
    if below and len(words) == 1:
        return f"{words[0]}: choose one of {', '.join(below)}"
    typed = " ".join(words[:2]) if below else words[0]
    near = difflib.get_close_matches(typed, [*COMMANDS], n=1)
    if near:
        return f"{typed}: no such command; did you mean {near[0]}? {listed}"
    if below:
        return f"{typed}: no such command; choose one of {', '.join(below)}"
    return f"{typed}: no such command {listed}"


def overview(first_word: str = "") -> str:
    """All commands with what they do, a line each; first_word: only those that begin with it."""
    chosen = [name for name in COMMANDS if not first_word or name.startswith(f"{first_word} ")]
    if not chosen:
        raise UserError(_what_to_give([first_word]))
    width = max(map(len, chosen))
    lines = [f"  {name:<{width}}  {_summary(COMMANDS[name])}" for name in chosen]
    usage = f"usage: python -m minillm {first_word or 'COMMAND'} …"
    return "\n".join([usage, "", *lines, "", "Each has its own --help."])


def _summary(module: str) -> str:
    """The first line of a module's docstring, read without importing it."""
    source = Path(importlib.util.find_spec(module).origin).read_text(encoding="utf-8")
    return ast.get_docstring(ast.parse(source)).split("\n")[0]


if __name__ == "__main__":
    sys.exit(run_script(main))
