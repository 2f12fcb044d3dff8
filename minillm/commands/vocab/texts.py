"""What the commands around vocabularies share: reading texts and tokenizers, and what they print."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from tqdm import tqdm

from minillm.base.options import Options, option
from minillm.checkpoint import run_folder
from minillm.datasets.files import encodings
from minillm.datasets.files.text_files import BOUNDARIES, find_files, print_left_out, texts_of
from minillm.tokenizer import measure
from minillm.tokenizer.tokenizer import Tokenizer

EXAMPLES = 5  # pieces shown of each kind


@dataclass(frozen=True)
class TextOptions(Options):
    """Where texts begin and end in the files that a command reads."""

    field: str = option("text", "the key that holds a text in .jsonl, .json or .parquet", group="texts")
    split: str = option("blank", "where texts end in a .txt", BOUNDARIES, group="texts")
    encoding: str = option("utf-8", "of .txt and JSON: gb18030, big5, utf-16 …", group="texts")

    def problems(self) -> list[str]:
        return encodings.problems(self.encoding)


def load_tokenizer(path: str) -> Tokenizer:
    """The tokenizer of a .model file, a folder, or a run."""
    return Tokenizer.load(run_folder.tokenizer_folder(path))


def read_texts(paths: Iterable[str], options: TextOptions, what: str) -> Iterator[str]:
    """All documents of the files, with a progress bar by bytes. Raises `UserError` naming file and place."""
    left_out: Counter[str] = Counter()
    files = find_files(list(paths), left_out)
    print_left_out(left_out)
    n_bytes = sum(file.stat().st_size for file in files)
    with tqdm(total=n_bytes, unit="B", unit_scale=True, desc=what, leave=False, disable=None) as bar:
        n_before = 0  # bytes of the files before this one
        for file in files:
            how = {"boundary": options.split, "field": options.field, "encoding": options.encoding}
            for text, position in texts_of(file, **how):
                bar.update(n_before + position - bar.n)
                yield text
            n_before += file.stat().st_size


def show_scripts(tokenizer: Tokenizer) -> None:
    """Print how many pieces are of which script."""
    counts = measure.scripts(tokenizer)
    print("pieces: " + ", ".join(f"{name} {count:,}" for name, count in counts.items()))


def show_density(name: str, tokenizer: Tokenizer, texts: Iterable[str]) -> None:
    """Print characters per token, and the share of characters covered by pieces other than bytes."""
    begins_a_character = _first_bytes(tokenizer)
    n_characters = 0
    n_tokens = 0
    n_spelt = 0  # characters without a piece
    for text in texts:
        ids = tokenizer.encode(text)
        n_characters += len(text)
        n_tokens += len(ids)
        n_spelt += sum(i in begins_a_character for i in ids)
    density = n_characters / max(1, n_tokens)
    covered = 1 - n_spelt / max(1, n_characters)
    print(f"  {name:<32}{density:6.3f} characters per token, {covered:8.3%} covered by pieces")


def _first_bytes(tokenizer: Tokenizer) -> set[int]:
    """Ids that count the characters without a piece, each of which gives exactly one: the piece of its first byte, or
    the unknown piece.

    All but the first of a character's bytes in UTF-8 are of the form 10xxxxxx. A newline is always a byte piece, though
    it needs no other.
    """
    ids = set()
    for i, piece in enumerate(tokenizer.model.proto.pieces):
        if piece.type == piece.UNKNOWN:
            ids.add(i)
        elif piece.type == piece.BYTE and piece.piece != "<0x0A>":
            byte = int(piece.piece[3:5], 16)
            if not 0x80 <= byte < 0xC0:
                ids.add(i)
    return ids
