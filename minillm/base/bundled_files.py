"""Where the bundled corpus lies, and which paths mean it. `data/bundled.py` writes it."""

from pathlib import Path

FOLDER = "data/bundled"  # where the training scripts look for it
FILES = (
    "meta.json",
    "world.json",  # which version of the generator has written the others
    "val_bits.npy",
    "sft_train.jsonl",
    "sft_heldout.jsonl",
    "requests_train.jsonl",
    "requests_heldout.jsonl",
    "preferences_train.jsonl",
    "preferences_heldout.jsonl",
)


def is_used(data: str | Path, beginning: str = "") -> bool:
    """Whether one of these paths, with commas between, is the bundled corpus or a file of it, however it is written.

    beginning: of the file's name.
    """
    folder = Path(FOLDER).resolve()
    known = {folder, *(folder / name for name in FILES)}
    paths = [Path(path.strip()).resolve() for path in str(data).split(",")]
    return any(path in known and path.name.startswith(beginning) for path in paths)


def is_file(data: str, name: str) -> bool:
    """Whether a path is that of this file in the bundled corpus, however it is written."""
    return Path(data).resolve() == Path(FOLDER, name).resolve()
