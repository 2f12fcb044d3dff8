"""minillm: train a language model yourself and understand every line of it."""

__version__ = "0.1.0"


class UserError(Exception):
    """A mistake or fault that a user can cause and mend.

    The message is one line naming the thing, its value, the limit and the remedy;
    the scripts print it without a traceback and exit with status 2.
    """
