"""The text of an answer in pieces, while its tokens come: whole characters, and no part of a stop string."""

from collections.abc import Sequence

from minillm.tokenizer.stream_decoder import StreamDecoder


class Pieces:
    """Turns tokens into pieces of text that can be shown at once. Text that may begin a stop string waits."""

    def __init__(self, tokenizer, stop_strings: Sequence[str] = ()):
        self.stop_strings = stop_strings
        self.is_stopped = False  # a stop string came: the text ends before it
        self._decoder = StreamDecoder(tokenizer)
        self._waiting = ""

    def push(self, token: int) -> str:
        """What can be shown after one more token, "" if nothing."""
        if self.is_stopped:
            return ""
        self._waiting += self._decoder.push(token)
        if any(s in self._waiting for s in self.stop_strings):
            self.is_stopped = True
            return self._take(len(cut(self._waiting, self.stop_strings)))
        return self._take(len(self._waiting) - could_become(self._waiting, self.stop_strings))

    def flush(self) -> str:
        """What is left after the last token."""
        if self.is_stopped:
            return ""
        self._waiting = cut(self._waiting + self._decoder.flush(), self.stop_strings)
        return self._take(len(self._waiting))

    @property
    def n_waiting(self) -> int:
        """Characters that wait."""
        return len(self._waiting)

    def _take(self, n: int) -> str:
        """The first n characters that wait."""
        text = self._waiting[:n]
        self._waiting = self._waiting[n:]
        return text


def cut(text: str, stop_strings: Sequence[str]) -> str:
    """The text before the first of these strings."""
    positions = [text.find(s) for s in stop_strings if s in text]
    return text[: min(positions, default=len(text))]


def text_before(tokenizer, ids: Sequence[int], stop_strings: Sequence[str]) -> str:
    """The text of a whole answer before the first of these strings, as `decode` gives it.

    They are looked for in the text that `Pieces` shows, which keeps the space that some tokenizers put before a text:
    an answer that begins with " is" ends before it. `decode` leaves that space out.
    """
    decoder = StreamDecoder(tokenizer)
    text = "".join(decoder.push(i) for i in ids) + decoder.flush()
    n_left_out = len(text) - len(tokenizer.decode(ids))
    return cut(text, stop_strings)[n_left_out:]


def could_become(text: str, stop_strings: Sequence[str]) -> int:
    """Length of the longest suffix of `text` that is a proper prefix of a stop string."""
    longest = max((len(s) - 1 for s in stop_strings), default=0)
    for n in range(min(longest, len(text)), 0, -1):
        if any(s.startswith(text[-n:]) for s in stop_strings):
            return n
    return 0
