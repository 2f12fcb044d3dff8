"""Training a vocabulary with SentencePiece, so that no text is lost in encoding."""

import io
import os
import random
import re
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import sentencepiece
from tqdm import tqdm

from minillm.base.errors import UserError
from minillm.tokenizer.chat_template import ROLES
from minillm.tokenizer.sentencepiece_model import SPACE_MARK
from minillm.tokenizer.tokenizer import Tokenizer

MEMORY_PER_BYTE = 40  # of text learnt from, in bytes: measured 31 to 37 for Chinese, 14 for English
MAX_LINE = 1000  # characters; SentencePiece would drop a line over 4,192 bytes, so longer ones are cut
PRINTABLE = "".join(map(chr, range(33, 127)))  # ASCII, which every vocabulary has whole
SMALLEST = 263 + len(PRINTABLE) + 3  # pieces: the special ones, the bytes, ASCII, and two or three to learn
COVERAGE = 0.9995  # of the text by characters that have a piece of their own, if the vocabulary is large enough
ESCAPED = str.maketrans({"\n": "\\n", "\r": "\\r", "\t": "\\t"})  # how a piece is shown to people
TAKEN = {"<unk>", "<s>", "</s>", "<pad>", *ROLES.values(), *(f"<0x{byte:02X}>" for byte in range(256))}
UNKNOWN_MARK = "▅"  # what SentencePiece puts in place of a character without a piece


@dataclass(frozen=True)
class Kind:
    """Options of a vocabulary.

    model_type: "bpe", or "unigram" (Kudo 2018, arXiv:1804.10959). split_digits: each digit is a piece of its own.
    required: characters besides printable ASCII that get a piece even if the text lacks them. user_defined: pieces that
    a text is always encoded with; control: pieces that text is never encoded as. coverage: share of the text whose
    characters have a piece of their own, the others being encoded as bytes; None: COVERAGE, but using at most half of
    the pieces that are left to learn.
    """

    model_type: str = "bpe"
    split_digits: bool = True
    required: str = ""
    user_defined: tuple[str, ...] = ()
    control: tuple[str, ...] = ()
    coverage: float | None = None

    @property
    def characters(self) -> str:
        """Characters that always get a piece; a space has one anyway."""
        return "".join(sorted({*PRINTABLE, *self.required} - {" ", *self.user_defined}))

    @property
    def fixed(self) -> int:
        """The smallest possible size: special, byte and requested pieces, and two or three more to learn."""
        return SMALLEST - len(PRINTABLE) + len(self.characters) + len(self.user_defined) + len(self.control)

    def check(self) -> None:
        """Raises UserError for pieces that a vocabulary cannot have."""
        bad = sorted({SPACE_MARK, UNKNOWN_MARK, "\0"} & set(self.required))
        if bad:
            raise UserError(f"--required_chars {bad[0]!r}: a mark of SentencePiece's own; leave it out")
        there = set(TAKEN)
        for name, pieces in (("--user_defined", self.user_defined), ("--control", self.control)):
            for piece in pieces:
                if not piece or UNKNOWN_MARK in piece or "\0" in piece:
                    raise UserError(f"{name} {piece!r}: a piece must not be empty or hold {UNKNOWN_MARK} or NUL")
                if piece in there:
                    raise UserError(f"{name} {piece!r}: given twice, or in every vocabulary already; leave it out")
                there.add(piece)
        if self.coverage is not None and not 0 < self.coverage <= 1:
            raise UserError(f"--character_coverage {self.coverage}: choose one above 0, at most 1")


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    out_folder: str | Path,
    *,
    sample_bytes: int = 16 << 20,
    seed: int = 0,
    kind: Kind = Kind(),
    option: str = "--vocab_size",
) -> Tokenizer:
    """Learn a vocabulary, BPE unless `kind` says otherwise, and save it in `out_folder` with a readable `.vocab`.

    texts: any number of documents; a uniform sample by `seed` of about `sample_bytes` (UTF-8) of their lines is kept
        in memory and learnt from, which takes up to MEMORY_PER_BYTE times as much memory.
    vocab_size: all pieces, including the 263 special and byte pieces and printable ASCII. option: its name in errors.

    Same texts and seed give the same file. Raises UserError when the text is too small for the vocabulary,
    naming the largest possible, or the vocabulary for the characters.
    """
    kind.check()
    if vocab_size < kind.fixed:
        raise UserError(f"{option} {vocab_size}: at least {kind.fixed} (bytes, ASCII, special and required pieces)")
    lines = _sample_lines(texts, sample_bytes, seed)
    if not lines:
        raise UserError("no text to train a tokenizer on: every document is empty")
    counts = Counter()
    for line in lines:
        counts.update(line)
    size, model = min(vocab_size, 1 << 30), None  # SentencePiece takes 31 bits
    while not isinstance(model, bytes):
        usual = _without_rare(lines, counts, size, kind)
        if not any(usual):
            raise UserError(f"{option} {vocab_size:,}: the text repeats too little to learn pieces from; add text")
        with _progress(size):
            model = _learn(usual, size, kind)
        if isinstance(model, int):
            size = model  # fewer pieces leave fewer to single characters, which may lower the limit again
    if size < vocab_size:
        raise UserError(f"{option} {vocab_size:,}: the text gives at most {size:,} pieces; ask for fewer or add text")
    tokenizer = Tokenizer(model, "trained model")
    tokenizer.save(out_folder)
    write_readable(tokenizer, Path(out_folder))
    return tokenizer


def write_readable(tokenizer: Tokenizer, folder: Path) -> None:
    """tokenizer.vocab: number, piece and score of each piece, one a line; line ends and tabs inside are escaped."""
    rows = (f"{i}\t{p.piece.translate(ESCAPED)}\t{p.score:g}\n" for i, p in enumerate(tokenizer.model.proto.pieces))
    (folder / "tokenizer.vocab").write_text("".join(rows), encoding="utf-8", newline="\n")


@contextmanager
def _progress(size: int) -> Iterator[None]:
    """Show how many pieces there are so far, read from SentencePiece's stderr, which is otherwise hidden."""
    screen, (log, to_log) = os.fdopen(os.dup(2), "w"), os.pipe()
    os.dup2(to_log, 2)
    os.close(to_log)

    def follow() -> None:
        form = "{desc}{postfix} [{elapsed}]"
        with (
            os.fdopen(log, errors="replace") as lines,
            tqdm(desc=f"learning {size:,} pieces", bar_format=form, file=screen, leave=False, disable=None) as bar,
        ):
            for line in lines:
                if found := re.search(r"\bsize=(\d+)", line):  # BPE adds up to the size, unigram prunes down to it
                    bar.set_postfix_str(f"now {int(found[1]):,}", refresh=False)
                    bar.update()

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        os.dup2(screen.fileno(), 2)  # closes the pipe, which ends the thread
        thread.join()
        screen.close()


def _learn(lines: list[str], size: int, kind: Kind) -> bytes | int:
    """The model; or, if the lines do not yield so many pieces, how many they do according to SentencePiece."""
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type=kind.model_type,
            vocab_size=size,
            character_coverage=1.0,
            required_chars=kind.characters,
            byte_fallback=True,
            split_digits=kind.split_digits,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            pad_id=3,
            pad_piece="<pad>",
            control_symbols=[*ROLES.values(), *kind.control],
            user_defined_symbols=[piece.replace(" ", SPACE_MARK) for piece in kind.user_defined],
            max_sentence_length=4 * MAX_LINE + 1,
            num_threads=4,  # recorded in the file, so it must not depend on the machine
            minloglevel=0,  # for _progress
        )
    except RuntimeError as error:
        limit = re.search(r"value <= (\d+)", str(error))
        if not limit:
            raise
        return int(limit[1])
    return model.getvalue()


def _without_rare(lines: list[str], counts: Counter, size: int, kind: Kind) -> list[str]:
    """Cut the lines at characters too rare for a piece of their own, which are encoded as bytes.

    Unless a coverage is given, at most half of the free pieces go to single characters. (SentencePiece itself fails
    if there are too many different characters.)
    """
    room, share = size - kind.fixed, kind.coverage  # room: pieces that single characters may take
    if share is None:
        room, share = room // 2, COVERAGE
    sure = {*PRINTABLE, " ", *kind.required}  # characters that have a piece anyway
    wanted, covered, rare = share * counts.total(), sum(counts[c] for c in sure), {}
    for character, count in counts.most_common():
        if character not in sure:
            if room <= 0 or covered >= wanted:
                rare[ord(character)] = "\n"
            covered, room = covered + count, room - 1
    return "\n".join(lines).translate(rare).split("\n") if rare else lines


def _sample_lines(texts: Iterable[str], limit: int, seed: int) -> list[str]:
    """Lines of the texts, each kept with the same probability, halved whenever they exceed `limit` bytes."""
    draw = random.Random(seed).random
    kept: list[str] = []
    size, rate = 0, 1.0
    for text in texts:
        # SentencePiece would take ▁ for a space, and drop a line with ▅, its own mark.
        for line in re.split("[\n▁▅]", text):
            for start in range(0, len(line), MAX_LINE):
                if rate == 1.0 or draw() < rate:
                    kept.append(line[start : start + MAX_LINE])
                    size += len(kept[-1].encode())
                if size > limit:
                    kept = [line for line in kept if draw() < 0.5]
                    size, rate = sum(len(line.encode()) for line in kept), rate / 2
    return kept
