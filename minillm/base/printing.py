"""What is printed: a word of a file or a model never commands the terminal, and an error stays one line.

A terminal obeys what it is sent: ESC ]52 writes the clipboard, a carriage return hides what stood before it, and a
bidirectional override shows letters in another order than they have. So such characters are shown by their number.
"""

import contextlib
import re
import sys
from collections.abc import Iterator
from typing import TextIO

# Controls except tab and line feed; bidirectional overrides and isolates; halves of characters, among them the bytes of
# a file name that is not UTF-8.
COMMANDS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
LONGEST_LINE = 1000  # characters of an error
SHOWN_OF_VALUE = 80  # characters of a value that an error quotes


def visible(text: str) -> str:
    r"""The text with each character that could command a terminal as its number: ESC becomes `\x1b`."""
    return COMMANDS.sub(_number, text)


def _number(match: re.Match) -> str:
    code = ord(match[0])
    if 0xDC80 <= code <= 0xDCFF:  # how Python holds a byte that is not UTF-8
        code -= 0xDC00
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def one_line(text: str) -> str:
    """An error as one visible line: its middle left out if it is very long, since the remedy stands at its end."""
    return clipped(visible(text).replace("\n", "\\n"), LONGEST_LINE)


def clipped(text: str, length: int = SHOWN_OF_VALUE) -> str:
    """The text, its middle left out if it has more than `length` characters."""
    if len(text) <= length:
        return text
    n_end = length // 3
    n_begin = length - n_end
    return f"{text[:n_begin]} … ({len(text) - length:,} characters) … {text[-n_end:]}"


class VisibleOutput:
    """A stream of text that shows what could command a terminal; all else is that of `stream`."""

    def __init__(self, stream: TextIO):
        self.stream = stream
        self.lost: OSError | None = None  # why it takes no more: a full disk, a reader that has gone

    def write(self, text: str, raw: bool = False) -> int:
        with self._noting_loss():
            return self.stream.write(text if raw else visible(text))

    def flush(self) -> None:
        with self._noting_loss():
            self.stream.flush()

    @contextlib.contextmanager
    def _noting_loss(self) -> Iterator[None]:
        try:
            yield
        except OSError as problem:
            self.lost = problem
            raise

    def __getattr__(self, name: str):
        return getattr(self.stream, name)


def log_line(line: str) -> None:
    """Print a line beside the output proper. It is dropped where nobody can read it any more: a remark ends nothing."""
    with contextlib.suppress(OSError):  # the program behind a pipe has ended, the disk of a log is full
        print(visible(line), file=sys.stderr, flush=True)


def print_text(text: str, raw: bool = False) -> None:
    """Print a piece of a model's text: to a pipe or a file as it is, to a terminal visibly unless `raw`."""
    raw = raw or not sys.stdout.isatty()
    if isinstance(sys.stdout, VisibleOutput):
        sys.stdout.write(text, raw)
    else:
        sys.stdout.write(text if raw else visible(text))
    sys.stdout.flush()
