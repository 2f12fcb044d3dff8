"""minillm: train a language model yourself and understand every line of it."""

import argparse
import contextlib
from collections.abc import Iterator

__version__ = "0.1.0"


class UserError(Exception):
    """A mistake or fault that a user can cause and mend.

    The message is one line naming the thing, its value, the limit and the remedy;
    the scripts print it without a traceback and exit with status 2.
    """


class UnsupportedError(UserError):
    """Something sound, of a kind that there is no code for here; who needs it least may go on without it."""


class Parser(argparse.ArgumentParser):
    """Takes a mistake in a command line as any other of the user's: one line, status 2."""

    def error(self, message: str):
        raise UserError(f"{message} (see {self.prog} --help)")


@contextlib.contextmanager
def naming_damage(source: object) -> Iterator[None]:
    """Whatever a file with wrong contents leads to inside becomes a `UserError` that names the file."""
    try:
        yield
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, ZeroDivisionError) as problem:
        raise UserError(f"{source}: damaged, or of another kind ({type(problem).__name__}: {problem})") from None
