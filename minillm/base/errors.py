"""The errors that a user can cause and fix: one line each, without a traceback."""


class UserError(Exception):
    """A mistake or fault that a user can cause and fix.

    The message is one line naming the thing, its value, the limit and the remedy;
    the scripts print it without a traceback and exit with status 2.
    """


class UnsupportedError(UserError):
    """A valid input of a kind that is not supported here; a caller that can do without it may catch this."""


class MissingError(UserError):
    """A file that is not there; a caller for which it need not be there may catch this."""
