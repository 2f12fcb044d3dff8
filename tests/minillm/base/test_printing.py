import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from minillm.base.errors import UserError
from minillm.base.printing import LONGEST_LINE, VisibleOutput, clipped, one_line, print_text, visible
from minillm.base.process import run_script
from minillm.tokenizer.stream_decoder import StreamDecoder
from minillm.tokenizer.tokenizer import Tokenizer
from minillm.tokenizer.train import train_tokenizer

CLIPBOARD = "\x1b]52;c;cm0gLXJm\x07"  # a terminal that obeys writes this to the clipboard


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (CLIPBOARD, r"\x1b]52;c;cm0gLXJm\x07"),
        ("\x9b2J and \x9d0;title\x9c", r"\x9b2J and \x9d0;title\x9c"),  # the same commands in one character
        ("visible\rhidden\b\x7f", r"visible\x0dhidden\x08\x7f"),
        ("abc\u202edcba\u2066x\u2069", r"abc\u202edcba\u2066x\u2069"),
        (os.fsdecode("镇.txt".encode("gbk")), r"\xd5\xf2.txt"),  # a file's name that is not UTF-8
        ("\ud800", r"\ud800"),
        ("小镇。\tdéjà\n\n👍🏽 שלום", "小镇。\tdéjà\n\n👍🏽 שלום"),
    ],
)
def test_what_commands_a_terminal_is_shown_and_nothing_else_is(text, shown):
    assert visible(text) == shown
    assert visible(shown) == shown


def test_an_error_is_one_line_of_bounded_length_that_keeps_its_remedy():
    line = one_line("meta.json: " + "\x1b[2J\nerror: forged" * 10_000 + "; prepare the data again")
    assert "\n" not in line and "\x1b" not in line
    assert len(line) < LONGEST_LINE + 50
    assert line.startswith(r"meta.json: \x1b[2J\nerror: forged") and line.endswith("; prepare the data again")
    assert clipped("a" * 80) == "a" * 80 and len(clipped("a" * 10_000)) < 120


def test_every_error_and_every_print_of_a_script_is_visible(capsys):
    def fail():
        print(f"reading {CLIPBOARD}")
        raise UserError(f"{CLIPBOARD}: no such option {'x' * 100_000}; give another")

    assert run_script(fail) == 2
    out, err = capsys.readouterr()
    assert out == f"reading {visible(CLIPBOARD)}\n"
    assert "\x1b" not in err and err.count("\n") == 1 and len(err) < 1100 and err.endswith("; give another\n")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("wrap", [lambda stream: stream, VisibleOutput], ids=["plain", "in a script"])
@pytest.mark.parametrize(
    ("kind", "raw", "is_shown"),
    [(Terminal, False, True), (Terminal, True, False), (io.StringIO, False, False), (io.StringIO, True, False)],
)
def test_a_models_text_is_visible_on_a_terminal_and_as_it_is_in_a_pipe(monkeypatch, wrap, kind, raw, is_shown):
    stream = kind()
    monkeypatch.setattr(sys, "stdout", wrap(stream))
    for character in CLIPBOARD:  # a command may come in several pieces
        print_text(character, raw)
    assert stream.getvalue() == (visible(CLIPBOARD) if is_shown else CLIPBOARD)


def test_a_command_spelt_in_byte_pieces_is_visible(monkeypatch, tmp_path):
    """One byte a piece: C2 9B, the command that ESC [ is too, is whole only after its second piece."""
    texts = ("the cat sees the dog", "a bird hears the river", "red and old")
    train_tokenizer(texts, 363, tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    decoder = StreamDecoder(tokenizer)
    stream = Terminal()
    monkeypatch.setattr(sys, "stdout", stream)
    ids = [tokenizer.pieces.table.index(bytes([byte])) for byte in "\x9b2J\x1b[2J".encode()]
    for token in ids:
        print_text(decoder.push(token))
    assert stream.getvalue() == r"\x9b2J\x1b[2J"


CLOSED = """
import os, sys
from minillm.base.process import run_script
def main():
    with open(sys.argv[1], "w") as file:
        print("to stdout")
        print("to stderr", file=sys.stderr)
        os.write(2, b"of a signal")
        file.write(sys.stdin.read() + "the file's own words")
sys.exit(run_script(main))
"""


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_do_not_lead_into_files(tmp_path, closed):
    command = f'"$0" -c "$1" "$2" {closed}'
    words = ["sh", "-c", command, sys.executable, CLOSED, str(tmp_path / "file")]
    assert subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True).returncode == 0
    assert (tmp_path / "file").read_text() == "the file's own words"


FULL = """
import sys
from pathlib import Path
from minillm.base.errors import UserError
from minillm.base.process import run_script
def main():
    try:
        print("words", flush=sys.argv[1] != "at the end")
    except OSError as problem:
        if sys.argv[1] == "as an error of a file":
            raise UserError(f"out: {problem.strerror}") from None
        raise
sys.exit(run_script(main))
"""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
@pytest.mark.parametrize("how", ["at once", "at the end", "as an error of a file"])
def test_a_full_disk_under_the_output_is_one_line(how):
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([sys.executable, "-c", FULL, how], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert done.stderr == (
        "error: standard output: No space left on device; make room there, or send the output elsewhere\n"
    )
