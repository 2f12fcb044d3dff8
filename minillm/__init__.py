"""minillm: train a language model yourself and understand every line of it."""

import argparse
import contextlib
from collections.abc import Iterator

__version__ = "0.1.0"


class UserError(Exception):
    """A mistake or fault that a user can cause and fix.

    The message is one line naming the thing, its value, the limit and the remedy;
    the scripts print it without a traceback and exit with status 2.
    """


class UnsupportedError(UserError):
    """A valid input of a kind that is not supported here; a caller that can do without it may catch this."""


class Parser(argparse.ArgumentParser):
    """Reports a mistake in a command line like every other `UserError`: one line, status 2."""

    def error(self, message: str):
        raise UserError(f"{message} (see {self.prog} --help)")


@contextlib.contextmanager
def naming_damage(source: object) -> Iterator[None]:
    """Turns whatever wrong contents of a file raise inside into a `UserError` that names the file."""
    try:
        yield
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, ZeroDivisionError) as problem:
        raise UserError(f"{source}: damaged, or of another kind ({type(problem).__name__}: {problem})") from None
