"""Training a vocabulary with SentencePiece, so that no text is lost in encoding."""

import io
import random
import re
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import sentencepiece

from minillm.base.errors import UserError
from minillm.base.files import write_file
from minillm.tokenizer.chat_template import ROLES
from minillm.tokenizer.sentencepiece_model import SPACE_MARK
from minillm.tokenizer.tokenizer import Tokenizer

MEMORY_PER_BYTE = 40  # of text learnt from, in bytes: measured 31 to 37 for Chinese, 14 for English
MAX_LINE = 1000  # characters; SentencePiece would drop a line over 4,192 bytes, so longer ones are cut
PRINTABLE = "".join(map(chr, range(33, 127)))  # ASCII, which every vocabulary has whole
SMALLEST = 263 + len(PRINTABLE) + 3  # pieces: the special ones, the bytes, ASCII, and two or three to learn
COVERAGE = 0.9995  # of the text by characters that have a piece of their own, if the vocabulary is large enough
ESCAPED = str.maketrans({"\n": "\\n", "\r": "\\r", "\t": "\\t"})  # how a piece is shown to people
TAKEN = {" ", "<unk>", "<s>", "</s>", "<pad>", *ROLES.values(), *(f"<0x{byte:02X}>" for byte in range(256))}
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
        marks = sorted({SPACE_MARK, UNKNOWN_MARK, "\0"} & set(self.required))
        if marks:
            raise UserError(f"--required_chars {marks[0]!r}: a mark of SentencePiece's own; leave it out")
        pieces_so_far = set(TAKEN)
        for name, pieces in (("--user_defined", self.user_defined), ("--control", self.control)):
            for piece in pieces:
                if not piece or UNKNOWN_MARK in piece or "\0" in piece:
                    raise UserError(f"{name} {piece!r}: a piece must not be empty or hold {UNKNOWN_MARK} or NUL")
                if SPACE_MARK in piece and name == "--user_defined":  # ▁ in a text would become a space
                    raise UserError(f"{name} {piece!r}: {SPACE_MARK} is SentencePiece's own mark; write a space")
                if piece in pieces_so_far:
                    raise UserError(f"{name} {piece!r}: given twice, or in every vocabulary already; leave it out")
                pieces_so_far.add(piece)
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

    Same texts and seed give the same file. Prints a line before and one after. Raises UserError when the text is too
    small for the vocabulary, naming the largest possible, or the vocabulary for the characters.
    """
    kind.check()
    if vocab_size < kind.fixed:
        raise UserError(f"{option} {vocab_size}: at least {kind.fixed} (bytes, ASCII, special and required pieces)")
    lines = _sample_lines(texts, sample_bytes, seed)
    if not lines:
        raise UserError("no text to train a tokenizer on: every document is empty")
    counts = Counter()
    n_bytes = 0
    for line in lines:
        counts.update(line)
        n_bytes += len(line.encode())
    print(f"learning {vocab_size:,} pieces from {n_bytes / 1e6:.1f} MB of text", flush=True)
    begun = time.monotonic()

    # Fewer pieces leave fewer to single characters, which may lower the limit again.
    size = min(vocab_size, 1 << 30)  # SentencePiece takes 31 bits
    model = None
    while model is None:
        usual = _without_rare(lines, counts, size, kind)
        if not any(usual):
            raise UserError(f"{option} {vocab_size:,}: the text repeats too little to learn pieces from; add text")
        model, size = _learn(usual, size, kind)
    if size < vocab_size:
        raise UserError(f"{option} {vocab_size:,}: the text gives at most {size:,} pieces; ask for fewer or add text")

    print(f"learnt {size:,} pieces in {time.monotonic() - begun:.1f} s", flush=True)
    tokenizer = Tokenizer(model, "trained model")
    tokenizer.save(out_folder)
    write_readable(tokenizer, Path(out_folder))
    return Tokenizer.load(out_folder)  # with the rules by which all others will read it


def write_readable(tokenizer: Tokenizer, folder: Path) -> None:
    """tokenizer.vocab: number, piece and score of each piece, one a line; line ends and tabs inside are escaped."""
    rows = [
        f"{i}\t{piece.piece.translate(ESCAPED)}\t{piece.score:g}\n"
        for i, piece in enumerate(tokenizer.model.proto.pieces)
    ]
    write_file(folder / "tokenizer.vocab", lambda scratch: scratch.write_bytes("".join(rows).encode()))


def _learn(lines: list[str], size: int, kind: Kind) -> tuple[bytes | None, int]:
    """(model, size); or, if the lines do not yield so many pieces, (None, how many they do), as SentencePiece says."""
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
            minloglevel=2,  # errors alone
        )
    except RuntimeError as error:
        limit = re.search(r"value <= (\d+)", str(error))
        if not limit:
            raise UserError(f"SentencePiece learns nothing from this text ({error!s:.200}); give more") from None
        return None, int(limit[1])
    return model.getvalue(), size


def _without_rare(lines: list[str], counts: Counter, size: int, kind: Kind) -> list[str]:
    """Cut the lines at characters too rare for a piece of their own, which are encoded as bytes.

    counts: how often each character occurs. Unless a coverage is given, at most half of the free pieces go to single
    characters. (SentencePiece itself fails if there are too many different characters.)
    """
    room = size - kind.fixed  # pieces that single characters may take
    share = kind.coverage
    if share is None:
        room //= 2
        share = COVERAGE
    wanted = share * counts.total()

    always_there = {*PRINTABLE, " ", *kind.required}
    covered = sum(counts[character] for character in always_there)
    rare = set()
    for character, count in counts.most_common():
        if character in always_there:
            continue
        if room <= 0 or covered >= wanted:
            rare.add(character)
        covered += count
        room -= 1
    if not rare:
        return lines
    line_ends = {ord(character): "\n" for character in rare}
    return "\n".join(lines).translate(line_ends).split("\n")


def _sample_lines(texts: Iterable[str], limit: int, seed: int) -> list[str]:
    """Lines of the texts, each with the same probability, which is halved whenever they exceed `limit` bytes."""
    draw = random.Random(seed).random
    sample: list[str] = []
    size = 0  # of the sample, in bytes
    rate = 1.0
    for text in texts:
        # SentencePiece would take ▁ for a space, and drop a line with ▅, its own mark.
        for line in re.split("[\n▁▅]", text):
            for start in range(0, len(line), MAX_LINE):
                if rate == 1.0 or draw() < rate:
                    sample.append(line[start : start + MAX_LINE])
                    size += len(sample[-1].encode())
                if size > limit:
                    sample = [line for line in sample if draw() < 0.5]
                    size = sum(len(line.encode()) for line in sample)
                    rate /= 2
    return sample
