"""Which tokenizer a preparation takes, how it begins texts, and which command trains on the result."""

import random
import shlex
from collections.abc import Iterator
from pathlib import Path

from data.bin_folder import BinFolder
from data.bin_writer import read_json
from data.sources import Source, check_unchanged
from data.tokenize_files import bad_line_error, fault, is_val
from minillm.base.errors import UserError
from minillm.base.files import sha256
from minillm.checkpoint import run_folder
from minillm.datasets.files.text_files import text_of
from minillm.tokenizer import train
from minillm.tokenizer.tokenizer import Tokenizer

TOKENIZER_SAMPLE = 16 << 20  # bytes of text that a tokenizer is learnt from


def usual_wrap(out: Path, tokenizer: Tokenizer | None) -> str:
    """How documents are wrapped if --wrap is not given: as they were in `out`, else as the tokenizer's model knows.

    tokenizer: the one that is given; None: it will be learnt, and documents begin with bos.
    """
    before = read_json(out / "meta.json")
    if before and (tokenizer is None or before.get("tokenizer_sha256") == tokenizer.sha256):
        return "bos_eos" if before.get("wrap") == "bos_eos" else "eos"
    begins_with_bos = tokenizer is None or tokenizer.start_id != tokenizer.eos_id
    return "bos_eos" if begins_with_bos else "eos"


def with_wrap(tokenizer: Tokenizer, wrap: str) -> Tokenizer:
    """The tokenizer, set to begin texts as `wrap` says."""
    if wrap == "bos_eos" and tokenizer.bos_id == tokenizer.eos_id:
        raise UserError("--wrap bos_eos: the tokenizer has no bos piece; choose --wrap eos")
    start_id = tokenizer.bos_id if wrap == "bos_eos" else tokenizer.eos_id
    if tokenizer.start_id == start_id:
        return tokenizer
    return tokenizer.with_settings(add_bos=wrap == "bos_eos", after_eos=wrap == "eos")


def learnt_tokenizer(folder: BinFolder, size: int, sources: list[Source], learnt_from: str) -> Tokenizer:
    """A tokenizer of the training documents; the one in the folder if it is just that."""
    out = folder.out
    meta = read_json(out / "meta.json")
    if meta.get("learnt_from") == learnt_from and holds(out, meta.get("tokenizer_sha256")):
        return Tokenizer.load(out)
    print(f"{out}: learning a tokenizer of {size:,} pieces", flush=True)
    how = {"sample_bytes": TOKENIZER_SAMPLE, "option": "--train_tokenizer"}
    tokenizer = train.train_tokenizer(_sample(sources), size, folder.new_tokenizer, **how)
    check_unchanged(sources)
    return tokenizer


def holds(out: Path, tokenizer_sha256: str | None) -> bool:
    files = [out / name for name in ("tokenizer.model", "tokenizer.json")]  # SentencePiece's, a byte-level BPE's
    return any(file.is_file() and sha256(file) == tokenizer_sha256 for file in files)


def _sample(sources: list[Source]) -> Iterator[str]:
    """Training documents for the tokenizer, all or a uniform sample; only those taken are decoded."""
    size = sum(source.text_size for source in sources)
    rate = 2 * TOKENIZER_SAMPLE / max(size, 1)
    draw = random.Random(0).random
    for source in sources:
        options = source.options
        for record in source.records():
            if rate < 1 and draw() > rate:
                continue
            try:
                text = text_of(record.kind, record.raw, options.field)
            except UserError as error:
                if options.on_bad_line == "error":
                    raise bad_line_error(source.name, fault(record, error)) from None
                continue  # counted when it is tokenized
            if not is_val(text.encode(), options):
                yield text


def next_command(out: str, tokenizer: str | None) -> str:
    """The command that trains on the bins in `out`: a new model, or the one whose folder or run `tokenizer` names."""
    command = f"python train_pretrain.py --data {shlex.quote(out)}"
    if tokenizer and (run_folder.tokenizer_folder(tokenizer) / "config.json").is_file():
        command += f" --init_from {shlex.quote(tokenizer)}"
    return f"{command} --out {shlex.quote(f'out/{Path(out).resolve().name}')}"
