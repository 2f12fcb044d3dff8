"""Options from a command line, a file, and Python; what is refused, and how it is said."""

import math
from dataclasses import dataclass, fields, replace

import pytest

from minillm.base.command_line import parse
from minillm.base.errors import UserError
from minillm.base.options import Options, differences, option, optional_copy, part, to_toml
from minillm.generation.sampling import Sampling
from minillm.training.config import TrainingConfig


@dataclass(frozen=True)
class Few(Options):
    steps: int = option(10, "steps", at_least=1, group="length")
    lr: float = option(1e-3, "rate")
    name: str | None = option(None, "a name")
    shape: str = option("cosine", "shape", ("cosine", "wsd"))
    compile: bool = option(False, "compile, 100 % of it")
    window: int | None = option(None, "tokens")


def test_defaults_then_file_then_command_line(tmp_path):
    file = tmp_path / "a.toml"
    file.write_text('steps = 20\nlr = 5\nname = "file"\n', encoding="utf-8-sig")  # as Windows' Notepad saves it
    assert parse(Few, "", []) == Few()
    read = parse(Few, "", ["--config", str(file), "--steps", "30"])
    assert (read.steps, read.lr, read.name) == (30, 5.0, "file") and isinstance(read.lr, float)


def test_values_by_type():
    read = parse(Few, "", ["--steps", "1e3", "--compile", "--window", "7", "--name", "none"])
    assert read == Few(steps=1000, compile=True, window=7, name=None)
    assert parse(Few, "", ["--compile", "false", "--window=none"]) == Few()


@dataclass(frozen=True)
class Whole(Options):
    n: int = option(0, "a number", at_least=-(1 << 70), at_most=1 << 70)


def test_whole_numbers_are_read_digit_by_digit(tmp_path):
    """Beyond 2^53 a float takes one for another, and a half for a whole."""
    file = tmp_path / "a.toml"
    exact = [0, 7, -7, 10**18, *((1 << bits) + one for bits in (53, 63, 64, 69) for one in (-1, 1))]
    for number in exact:
        for spelled in (str(number), f"{number}.0", f"{number}e0", f"{number * 10}e-1"):
            assert parse(Whole, "", [f"--n={spelled}"]).n == number
        file.write_text(f"n = {number}\n")
        assert parse(Whole, "", ["--config", str(file)]).n == number
    halves = [f"{number}.5" for number in exact]
    for text in (*halves, "1e-1", "1e400", "1e-999999999", "1e999999999", "nan", "inf", "1/2", "0x10", "1" * 5000):
        with pytest.raises(UserError, match=f"--n {text}: expected a whole number"):
            parse(Whole, "", [f"--n={text}"])
    assert parse(Sampling, "", ["--seed", str((1 << 64) - 1)]).seed == (1 << 64) - 1  # the largest there is


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--stps", "3"], "did you mean --steps"),
        (["--steps", "3.5"], "--steps 3.5: expected a whole number"),
        (["--steps", "many"], "whole number"),
        (["--lr", "fast"], "--lr fast: expected a number"),
        (["--compile", "maybe"], "true or false"),
        (["--shape", "round"], "choose one of cosine, wsd"),
        (["--name", ""], "--name '': expected text"),
        (["--steps"], "expected one argument"),
        (["stray"], "stray"),
        (["--config", "/nonexistent.toml"], "--config /nonexistent.toml: no such file; give a file of"),
    ],
)
def test_bad_command_lines_say_what_is_wrong(argv, said):
    with pytest.raises(UserError, match=said):
        parse(Few, "", argv)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"step = 3", "step: no such option; did you mean --steps"),
        (b"[train]\nsteps = 3", r"\[train\]: sections and dotted names are not used"),
        (b"lr = 1\nsteps: 3", r"no TOML: .*line 2.*; give a file of lines NAME = VALUE"),
        (b"name = '\xff'", "no TOML: .*utf-8"),
        (b"steps = 'many'", "--steps many: expected a whole number"),
        (b"steps = [3]", r"--steps \[3\]: expected a whole number"),
        (b"steps = true", "--steps True: expected a whole number"),
        (b"lr = false", "--lr False: expected a number"),
        (b"name = true", "--name True: expected text"),
        (b"name = ''", "--name '': expected text"),
        (b"name = ['a', 'b']", r"--name \['a', 'b'\]: expected text \(several go into one, with commas between\)"),
        (b"name = {a = 1}", "--name {'a': 1}: expected text"),
        (b"compile = []", r"--compile \[\]: expected true or false"),
        (b"shape = ['wsd']", r"--shape \['wsd'\]: choose one of cosine, wsd"),
        (b"shape = 'round'", "--shape round: choose one of cosine, wsd"),
    ],
)
def test_what_is_wrong_in_a_file_is_named_with_it(tmp_path, text, said):
    file = tmp_path / "a.toml"
    file.write_bytes(text)
    with pytest.raises(UserError, match=f"{file}: {said}"):
        parse(Few, "", ["--config", str(file)])


def test_help_shows_every_option_with_its_default(capsys):
    with pytest.raises(SystemExit) as ended:
        parse(TrainingConfig, "what it does", ["--help"])
    shown = capsys.readouterr().out
    assert ended.value.code == 0
    for f in fields(TrainingConfig):
        assert f"--{f.name} " in shown and f.metadata["option"].help.split()[0] in shown


@dataclass(frozen=True)
class Rules(Options):
    """One option of each kind of rule."""

    model: str = option(help="a folder", positional=True)
    runs: tuple[str, ...] = option((), "several", group="lists")
    share: float = option(0.5, "a share", at_least=0, below=1)
    cap: float | None = option(None, "a cap", above=0)
    bits: int | None = option(None, "bits", (16, 8), only_with=("kind", ("small", "smaller")))
    slope: float | None = option(None, "of the cap", at_least=0, only_with=("cap", ()))
    kind: str = option("large", "a kind", ("large", "small", "smaller"))


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["m", "--share", "1"], "--share 1.0: must be 0 to below 1"),
        (["m", "--share", "-0.1"], "--share -0.1: must be 0 to below 1"),
        (["m", "--cap", "0"], "--cap 0.0: must be above 0"),
        (["m", "--cap", "inf"], "--cap inf: must be a finite number"),
        (["m", "--cap", "nan"], "--cap nan: must be a finite number"),
        (["m", "--bits", "4"], "--bits 4: choose one of 16, 8"),
        (["m", "--bits", "8"], "--bits 8: means nothing with --kind large; leave it out, or choose small or smaller"),
        (["m", "--slope", "0"], "--slope 0.0: means nothing with --cap none; leave it out, or give another --cap"),
        (
            ["m", "--share", "2", "--cap", "x", "--kind", "odd"],
            "--share 2.0: .*; --cap x: .*; --kind odd: choose",
        ),
        ([], "arguments are required: MODEL"),
        (["m", "--mdel", "n"], "no such option"),
    ],
)
def test_rules_are_held_on_a_command_line(argv, said):
    with pytest.raises(UserError, match=said):
        parse(Rules, "", argv)


def test_rules_are_held_in_python_and_in_files_too(tmp_path):
    with pytest.raises(UserError, match="--share 1: must be 0 to below 1; --cap nan: must be a finite number"):
        Rules("m", share=1, cap=math.nan)
    with pytest.raises(UserError, match=r"--steps 1000.*: must be at most 1,099,511,627,776"):
        Few(steps=10**30)
    file = tmp_path / "a.toml"
    file.write_text("share = 2\ncap = 0\n")
    with pytest.raises(UserError, match=rf"{file}: --share 2.0: .*; {file}: --cap 0.0: "):
        parse(Rules, "", ["m", "--config", str(file)])
    assert parse(Rules, "", ["m", "--config", str(file), "--share", "0", "--cap", "1"]) == Rules(
        "m", share=0.0, cap=1.0
    )


def test_lists_and_positions():
    read = parse(Rules, "", ["m", "--runs", "a", "b", "--kind", "small", "--runs", "c", "--bits", "8"])
    assert read == Rules("m", ("a", "b", "c"), bits=8, kind="small")


@dataclass(frozen=True)
class Numbers(Options):
    clients: tuple[int, ...] = option((1,), "clients", at_least=1)


def test_numbers_of_a_list_may_be_joined_by_commas():
    assert parse(Numbers, "", ["--clients", "1,4", "16"]) == Numbers((1, 4, 16))
    for given, said in (("1,x", "--clients x: expected a whole number"), ("4,0", "--clients 0: must be at least 1")):
        with pytest.raises(UserError, match=said):
            parse(Numbers, "", ["--clients", given])


def test_help_is_in_groups_with_ranges(capsys):
    with pytest.raises(SystemExit):
        parse(Rules, "what it does", ["--help"], program="it")
    shown = " ".join(capsys.readouterr().out.split())
    assert shown.startswith("usage: it MODEL [--name value …] [--config FILE] what it does options: MODEL a folder")
    assert "lists: --runs TEXT [TEXT ...] several general: --help, -h" in shown
    assert "--share X a share (0 to below 1, default 0.5)" in shown
    assert "--bits 16|8 bits (with --kind small|smaller, default none)" in shown


def test_what_is_written_is_read_back(tmp_path):
    """Every value of a configuration: text with quotes and other alphabets, None, lists, booleans, large and small."""
    file = tmp_path / "options.toml"
    for config in (
        Few(),
        Few(steps=3, lr=1e-30, name='a "b" \\ 中文 \t\x7f', shape="wsd", compile=True, window=7),
        Few(name="true", lr=2.0),
        Rules("m", ("a b", "c,d"), share=0.0, cap=1e16),
        TrainingConfig(lr=0.1, micro_batch_size=4),
    ):
        file.write_text(to_toml(config), encoding="utf-8")
        words = ["m"] if isinstance(config, Rules) else []
        assert parse(type(config), "", [*words, "--config", str(file)]) == config
    assert 'lr = "none"\n' in to_toml(TrainingConfig()) and "# optimizer\n" in to_toml(TrainingConfig())


def test_none_takes_the_place_of_a_default_that_is_a_value(tmp_path):
    @dataclass(frozen=True)
    class Default(Options):
        limit: int | None = option(5, "of something")

    file = tmp_path / "options.toml"
    file.write_text(to_toml(Default(limit=None)))
    assert parse(Default, "", ["--config", str(file)]).limit is None


def test_only_what_differs_from_the_defaults_is_told():
    assert differences(TrainingConfig()) == ""
    changed = replace(TrainingConfig(), steps=20, compile=True, lr=0.5)
    assert differences(changed) == "steps = 20, lr = 0.5, compile = true"
    assert differences(Rules("m", ("a", "b"))) == "model = m, runs = a b"


def test_an_optional_copy_has_the_rules_of_the_original():
    copy = optional_copy(Rules, group="copied", leave_out=("model",))
    assert copy() == copy(runs=None, share=None, cap=None, bits=None, kind=None)
    with pytest.raises(UserError, match="--share 1: must be 0 to below 1"):
        copy(share=1)
    assert parse(copy, "", ["--share", "0.25", "--kind", "none"]) == copy(share=0.25)
    assert part(Rules("m", share=0.25), copy).share == 0.25
