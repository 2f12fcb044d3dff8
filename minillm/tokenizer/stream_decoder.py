"""Text of ids that come one by one, as a model draws them."""

import codecs

from minillm.tokenizer.tokenizer import Tokenizer


class StreamDecoder:
    """Turns ids into text one by one, never showing part of a character.

    It decodes the continuation of a prompt, so a leading space is kept.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        # Where the text of an id depends on its neighbours, all are decoded again, after some letter before them.
        self._by_bytes = tokenizer.pieces.table is not None
        self._ids = [] if self._by_bytes else tokenizer.encode("a")
        self._shown = "" if self._by_bytes else tokenizer.decode(self._ids)

    def push(self, token_id: int) -> str:
        """The text that this id completes; "" while a character is still short of bytes."""
        if self._by_bytes:
            return self._utf8.decode(self._tokenizer.bytes_of([token_id])[0])
        self._ids.append(token_id)
        text = self._tokenizer.decode(self._ids)
        return "" if text.endswith("\ufffd") else self._show(text)

    def flush(self) -> str:
        """What is left at the end: U+FFFD for a character that never got all its bytes."""
        if self._by_bytes:
            return self._utf8.decode(b"", final=True)
        return self._show(self._tokenizer.decode(self._ids))

    def _show(self, text: str) -> str:
        new = text[len(self._shown) :]
        self._shown = text
        return new
