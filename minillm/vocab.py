"""Learning a vocabulary by SentencePiece, with nothing of the text lost."""

import io
import random
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import sentencepiece

from minillm import UserError
from minillm.tokenizer import ROLES, Tokenizer

MAX_LINE = 1000  # characters; SentencePiece would drop a line over 4,192 bytes, so longer ones are cut
PRINTABLE = "".join(map(chr, range(33, 127)))  # ASCII, which every vocabulary has whole
SMALLEST = 263 + len(PRINTABLE) + 3  # pieces: the special ones, the bytes, ASCII, and two or three to learn
COVERAGE = 0.9995  # of the text by characters that have a piece of their own, if the vocabulary is large enough


@dataclass(frozen=True)
class Kind:
    """What a vocabulary is to be like.

    model_type: "bpe", or "unigram" (Kudo 2018, arXiv:1804.10959). split_digits: each digit a piece of its own.
    required: characters that get a piece whatever the text has, beside printable ASCII. user_defined: pieces that a
    text is always cut into where they stand; control: pieces that no text is ever cut into.
    """

    model_type: str = "bpe"
    split_digits: bool = True
    required: str = ""
    user_defined: tuple[str, ...] = ()
    control: tuple[str, ...] = ()

    @property
    def fixed(self) -> int:
        """Pieces that are not learnt: special ones, bytes and those asked for; two or three must be left to learn."""
        return SMALLEST + len(set(self.required) - set(PRINTABLE)) + len(self.user_defined) + len(self.control)


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    out_folder: str | Path,
    *,
    sample_bytes: int = 16 << 20,
    seed: int = 0,
    kind: Kind = Kind(),
) -> Tokenizer:
    """Learn a vocabulary, BPE unless `kind` says otherwise, and save it in `out_folder` with a readable `.vocab`.

    texts: any number of documents; at most about `sample_bytes` (UTF-8) of their lines, chosen evenly by `seed`,
        are kept in memory and learnt from.
    vocab_size: all pieces, the 263 special and byte pieces and printable ASCII included.

    Same texts and seed give the same file. Raises UserError when the text is too small for the vocabulary,
    naming the largest possible, or the vocabulary for the characters.
    """
    if vocab_size < kind.fixed:
        raise UserError(f"vocab_size {vocab_size}: at least {kind.fixed} (bytes, ASCII and special pieces)")
    lines = _sample_lines(texts, sample_bytes, seed)
    if not lines:
        raise UserError("no text to train a tokenizer on: every document is empty")
    counts = Counter()
    for line in lines:
        counts.update(line)
    size, model = vocab_size, None
    while not isinstance(model, bytes):
        usual = _without_rare(lines, counts, size, kind)
        if not any(usual):
            raise UserError(f"vocab_size {vocab_size:,}: the text repeats too little to learn pieces from; add text")
        if isinstance(model := _learn(usual, size, kind), int):
            size = model  # with fewer pieces fewer characters have their own, and so the limit may sink again
    if size < vocab_size:
        raise UserError(f"vocab_size {vocab_size:,}: the text gives at most {size:,} pieces; ask for fewer or add text")
    tokenizer = Tokenizer(model, "trained model")
    tokenizer.save(out_folder)
    rows = (f"{i}\t{p.piece}\t{p.score:g}\n" for i, p in enumerate(tokenizer._proto.pieces))
    (Path(out_folder) / "tokenizer.vocab").write_text("".join(rows), encoding="utf-8")
    return tokenizer


def _learn(lines: list[str], size: int, kind: Kind) -> bytes | int:
    """The model; or, if the lines do not give so many pieces, how many SentencePiece thinks they give."""
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type=kind.model_type,
            vocab_size=size,
            character_coverage=1.0,
            required_chars=PRINTABLE + "".join(sorted(set(kind.required) - set(PRINTABLE))),
            byte_fallback=True,
            split_digits=kind.split_digits,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            pad_id=3,
            pad_piece="<pad>",
            control_symbols=[*ROLES.values(), *kind.control],
            user_defined_symbols=list(kind.user_defined),
            max_sentence_length=4 * MAX_LINE + 1,
            num_threads=4,  # recorded in the file, so it must not depend on the machine
            minloglevel=2,
        )
    except RuntimeError as error:
        limit = re.search(r"value <= (\d+)", str(error))
        if not limit:
            raise
        return int(limit[1])
    return model.getvalue()


def _without_rare(lines: list[str], counts: Counter, size: int, kind: Kind) -> list[str]:
    """Cut the lines at characters too rare for a piece of their own: these are spelt in bytes.

    At most half of the pieces that are free go to single characters; SentencePiece itself would give up when
    the characters are too many.
    """
    sure = {*PRINTABLE, " ", *kind.required}
    room, covered, rare = (size - kind.fixed) // 2, sum(counts[character] for character in sure), {}
    for character, count in counts.most_common():
        if character not in sure:
            if room <= 0 or covered > COVERAGE * counts.total():
                rare[ord(character)] = "\n"
            covered, room = covered + count, room - 1
    return "\n".join(lines).translate(rare).split("\n") if rare else lines


def _sample_lines(texts: Iterable[str], limit: int, seed: int) -> list[str]:
    """Lines of the texts, each kept with the same probability, halved whenever they exceed `limit` bytes."""
    draw = random.Random(seed).random
    kept: list[str] = []
    size, rate = 0, 1.0
    for text in texts:
        # ▁ would be taken for a space; a line with ▅, SentencePiece's own mark, would be dropped.
        for line in re.split("[\n▁▅]", text):
            for start in range(0, len(line), MAX_LINE):
                if rate == 1.0 or draw() < rate:
                    kept.append(line[start : start + MAX_LINE])
                    size += len(kept[-1].encode())
            if size > limit:
                kept = [line for line in kept if draw() < 0.5]
                size, rate = sum(len(line.encode()) for line in kept), rate / 2
    return kept
