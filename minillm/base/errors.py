"""The errors that a user can cause and fix: one line each, without a traceback."""

import contextlib
from collections.abc import Iterator
from pathlib import Path


class UserError(Exception):
    """A mistake or fault that a user can cause and fix.

    The message is one line naming the thing, its value, the limit and the remedy;
    the scripts print it without a traceback and exit with status 2.
    """


class UnsupportedError(UserError):
    """A valid input of a kind that is not supported here; a caller that can do without it may catch this."""


class MissingError(UserError):
    """A file that is not there; a caller for which it need not be there may catch this."""


@contextlib.contextmanager
def naming(source: str | Path) -> Iterator[None]:
    """A context whose `UserError`s name the file that the wrong values are from, in front."""
    try:
        yield
    except UserError as problem:
        raise type(problem)(f"{source}: {problem}") from None
