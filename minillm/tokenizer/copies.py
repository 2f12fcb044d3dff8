"""A tokenizer in other processes: what makes it the same, and how it gets there."""

import datetime
import hashlib

from minillm.tokenizer import jinja_template


class Copied:
    """The part of a `Tokenizer` by which other processes know it and get a copy of it."""

    @property
    def identity(self) -> str:
        """Hex digest of all that `encode_chat` depends on: the files, and the day if a template may tell it."""
        digest = hashlib.sha256(repr([self.data, sorted(self.files.items())]).encode())
        if any(b"strftime_now" in data for data in self.files.values()):
            digest.update(jinja_template.strftime_now("%Y-%m-%d").encode())
        return digest.hexdigest()

    def __reduce__(self) -> tuple:
        """How pickle copies it, with the time that its templates tell."""
        is_json = not self._own_file
        arguments = (self.files, self._source) if is_json else (self.data, self._source, self.files)
        return _copy, (type(self), arguments, jinja_template.STARTED)


def _copy(kind: type[Copied], arguments: tuple, started: datetime.datetime) -> Copied:
    jinja_template.STARTED = started
    return kind(*arguments)
