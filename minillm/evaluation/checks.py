"""Rewards: functions that say how good answers are.

A reward function takes the prompts' texts, the answers and the data's rows, all N of them, and returns N numbers:

    def reward(prompts: list[str], answers: list[str], rows: list[dict]) -> list[float]: ...

`load_term` makes one from a text, such as --reward takes; `weighted_sum` adds those that `split_terms` finds:

    exact, number, words    1 if the answer agrees with row["answer"] by that rule (datasets/questions.py), else 0
    check                   the same by the rule in row["check"]
    format:REGEX            1 if all of the answer matches the regular expression ("." also matches a line's end)
    length:N                1 up to N characters, from there falling to 0 at 2 N
    file.py:function        the user's own
    0.7*number,0.3*length:80    a weighted sum

Whatever such a function does wrong, while the model learns from it, ends the run with one line that says which function
did it and at which row: a reward that is silently wrong is learned as willingly as a right one.
"""

import contextlib
import copy
import importlib.util
import inspect
import math
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from minillm.base.errors import UserError
from minillm.datasets.questions import CHECKS, agrees, refuse_incomparable

RewardFunction = Callable[[list[str], list[str], list[dict]], list[float]]
TIME_LIMIT_S = 60.0  # of one call
LARGEST = 1e15  # of a reward, whose square must be finite in fp32
NAMES = (*CHECKS, "check", "format", "length")
WEIGHT = re.compile(r"\s*(-?(?:\d+\.?\d*|\.\d+))\s*\*\s*(.*)", re.DOTALL)
# A comma between terms, not one inside a regular expression: after it comes a weight, a name, or a file of Python.
BETWEEN_TERMS = re.compile(rf",(?=\s*-?[\d.]+\s*\*|\s*(?:{'|'.join(NAMES)})\s*(?:,|:|$)|[^,]*\.py:)")


def split_terms(spec: str) -> list[tuple[float, str]]:
    """(weight, term) of each term of a weighted sum; the weight is 1 if none is given."""
    terms = []
    for text in BETWEEN_TERMS.split(spec):
        match = WEIGHT.fullmatch(text)
        weight, term = (float(match[1]), match[2].strip()) if match else (1.0, text.strip())
        if not term:
            raise UserError(f"--reward {spec}: a term is empty; give {', '.join(NAMES)} or file.py:function")
        terms.append((weight, term))
    return terms


def load_term(term: str, time_limit_s: float = TIME_LIMIT_S) -> RewardFunction:
    """The reward function of one term without its weight. time_limit_s: of one of its calls.

    Raises UserError for a text that means none. So does the function, for whatever goes wrong in it.
    """
    name, _, argument = term.partition(":")
    path, _, function_name = term.rpartition(":")
    if name in NAMES:
        function = _built_in(name, argument)
    elif path.endswith(".py"):
        function = _users(Path(path), function_name, time_limit_s)
    else:
        raise UserError(
            f"--reward {term}: is neither one of {', '.join(NAMES)} nor file.py:function, nor a reward model's folder; "
            "in a sum with one give each term its weight: 0.5*number,0.5*out/reward"
        )
    return _checked(function, term, time_limit_s)


def row_check(spec: str) -> Callable[[dict], None]:
    """A function that raises UserError for a row to whose answers some term of a reward has nothing to compare."""
    comparing = [term for _, term in split_terms(spec) if term in (*CHECKS, "check")]

    def check(row: dict) -> None:
        for name in comparing:
            refuse_incomparable(_rule(name, row), _right_answer(row))

    return check


def weighted_sum(terms: list[tuple[float, RewardFunction]]) -> RewardFunction:
    """The sum of some functions' values, each times its weight."""

    def reward(prompts: list[str], answers: list[str], rows: list[dict]) -> list[float]:
        totals = [0.0] * len(answers)
        for weight, function in terms:
            for i, value in enumerate(function(prompts, answers, rows)):
                totals[i] += weight * value
        return totals

    return reward


# ---- the functions that are here


def _built_in(name: str, argument: str) -> RewardFunction:
    """One of NAMES; argument: what follows its colon."""
    if name in ("format", "length") and not argument:
        raise UserError(f"--reward {name}: give {'format:REGEX' if name == 'format' else 'length:N, N in characters'}")
    if name not in ("format", "length") and argument:
        raise UserError(f"--reward {name}:{argument}: {name} takes nothing after a colon; the row has the answer")
    if name == "format":
        return _each(_matches(argument))
    if name == "length":
        return _each(_soft_limit(argument))
    return _each(lambda answer, row: float(agrees(_rule(name, row), _right_answer(row), answer)))


def _each(score: Callable[[str, dict], float]) -> RewardFunction:
    """A reward function from one of a single answer and its row, which it names when something goes wrong."""

    def reward(prompts: list[str], answers: list[str], rows: list[dict]) -> list[float]:
        values = []
        for answer, row in zip(answers, rows, strict=True):
            try:
                values.append(score(answer, row))
            except (UserError, TimeUp) as problem:
                raise UserError(
                    f"{_row_name(len(values), prompts)}: {problem}, for the answer {answer!r:.60}"
                ) from None
        return values

    return reward


def _rule(name: str, row: dict) -> str:
    """The name of the rule by which an answer is compared."""
    rule = row.get("check", "exact") if name == "check" else name
    if rule not in list(CHECKS):  # a list, since the value may have no hash
        raise UserError(f"check {rule!r:.40} is none of {', '.join(CHECKS)}")
    return rule


def _right_answer(row: dict) -> str:
    if not isinstance(row.get("answer"), str):
        raise UserError("the row has no right answer (a column 'answer') to compare with")
    return row["answer"]


def _matches(pattern: str) -> Callable[[str, dict], float]:
    try:
        compiled = re.compile(pattern, re.DOTALL)
    except (re.error, RecursionError, OverflowError) as problem:
        raise UserError(f"--reward format:{pattern}: no regular expression ({problem})") from None
    return lambda answer, row: float(compiled.fullmatch(answer) is not None)


def _soft_limit(text: str) -> Callable[[str, dict], float]:
    if not text.strip().isdecimal() or int(text) < 1:
        raise UserError(f"--reward length:{text}: give a number of characters from 1 up")
    limit = int(text)
    return lambda answer, row: min(1.0, max(0.0, 2 - len(answer) / limit))


# ---- the user's own


def _users(path: Path, function_name: str, time_limit_s: float) -> RewardFunction:
    """A function from a file of Python, which is run once, with its folder on the path."""
    source = f"--reward {path}:{function_name}"
    if not path.is_file():
        raise UserError(f"{source}: there is no such file")
    if (folder := str(path.resolve().parent)) not in sys.path:
        sys.path.append(folder)  # the last place: a file there hides no other module
    module_spec = importlib.util.spec_from_file_location(f"reward_of_{path.stem}", path)
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module  # where its dataclasses look for the types that they name
    try:
        with time_limit(time_limit_s):
            module_spec.loader.exec_module(module)
    except (Exception, TimeUp, SystemExit) as problem:  # whatever that program does wrong
        raise UserError(f"{source}: the file cannot be run ({_described(problem)})") from None
    function = getattr(module, function_name, None)
    if not callable(function):
        there = [name for name, value in vars(module).items() if inspect.isfunction(value)]
        raise UserError(f"{source}: the file has no such function; it has {', '.join(there) or 'none'}")
    with contextlib.suppress(ValueError):  # some callables do not say what they take
        try:
            inspect.signature(function).bind([], [], [])
        except TypeError as problem:
            raise UserError(f"{source}: it must take (prompts, answers, rows), but {problem}") from None
    return function


# ---- what may go wrong in a call


def _checked(function: RewardFunction, term: str, time_limit_s: float) -> RewardFunction:
    """The function with a time limit; it raises UserError for whatever the function does wrong."""

    def reward(prompts: list[str], answers: list[str], rows: list[dict]) -> list[float]:
        source = f"reward {term}"
        try:
            with time_limit(time_limit_s):
                # copies, since answers to one prompt share its row, and the next term reads the same lists
                values = function(list(prompts), list(answers), [copy.deepcopy(row) for row in rows])
        except UserError as problem:
            raise UserError(f"{source}: {problem}") from None
        except (Exception, TimeUp, SystemExit) as problem:
            where = f"{len(answers)} answers, the first to {prompts[0]!r:.60}" if prompts else "no answers"
            raise UserError(f"{source}: {_described(problem)}, called with {where}") from None
        return _numbers(values, prompts, answers, source)

    return reward


def _numbers(values: object, prompts: list[str], answers: list[str], source: str) -> list[float]:
    """What a function returned as a list of numbers up to `LARGEST` in size, one for each answer."""
    if hasattr(values, "tolist"):  # of numpy or torch
        values = values.tolist()
    if not isinstance(values, list | tuple):
        raise UserError(f"{source}: returned {type(values).__name__}, not a list of {len(answers)} numbers")
    if len(values) != len(answers):
        raise UserError(f"{source}: returned {len(values)} values for {len(answers)} answers; one for each is needed")
    numbers = []
    for i, value in enumerate(values):
        try:
            number = math.nan if isinstance(value, str | bytes) else float(value)
        except (TypeError, ValueError, OverflowError, RuntimeError):
            number = math.nan
        if not abs(number) <= LARGEST:  # NaN, too
            why = f"beyond {LARGEST:g}" if math.isfinite(number) else "not a finite number"
            raise UserError(
                f"{source}: {_row_name(i, prompts)}: the value is {value!r:.40}, {why}, for the answer "
                f"{answers[i]!r:.60}"
            )
        numbers.append(number)
    return numbers


def _row_name(i: int, prompts: list[str]) -> str:
    return f"row {i + 1} of {len(prompts)} ({prompts[i]!r:.60})"


def _described(problem: BaseException) -> str:
    """An error in one line, with the line of the file where it was raised."""
    if isinstance(problem, TimeUp):
        return str(problem)
    trace = problem.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    place = f" in line {trace.tb_lineno} of {Path(trace.tb_frame.f_code.co_filename).name}" if trace else ""
    if isinstance(problem, SyntaxError):  # was raised by Python's own reader, and says where it stands itself
        place = ""
    text = " ".join(str(problem).split())[:200]
    return f"it raised {type(problem).__name__}: {text}{place}"


class TimeUp(BaseException):
    """A call took too long. No Exception, so that a function that catches all of those does not catch this."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises TimeUp in the body once it has run for so many seconds, then every second if it goes on, and at its end.

    Once is not enough: a function with a bare `except:` would take TimeUp for a fault of the answer at hand.

    A timer of the system interrupts Python's own loops, waits, and regular expressions, but no other long call in C.
    Only the main thread can be interrupted, and not on Windows: elsewhere there is no limit.
    """
    if not hasattr(signal, "SIGALRM") or threading.current_thread() is not threading.main_thread():
        yield
        return

    raised: list[TimeUp] = []

    def interrupt(number, frame):
        raised.append(TimeUp(f"it took more than {seconds:g} s"))
        raise raised[-1]

    old_handler = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old_handler)
    if raised:
        raise raised[-1]
