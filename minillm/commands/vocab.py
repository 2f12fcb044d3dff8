"""`python -m minillm vocab train|merge|prune|inspect`: training a vocabulary, or changing an existing one."""

import argparse
import random
import tempfile
from collections.abc import Callable, Iterable, Iterator

from tqdm import tqdm

from minillm.base import files
from minillm.base.errors import UserError
from minillm.checkpoint import run_folder
from minillm.datasets.text_files import BOUNDARIES, find_files, texts_of
from minillm.tokenizer import edit, measure, train
from minillm.tokenizer.tokenizer import Tokenizer

STRETCH = 4000  # characters; documents are learnt from or held out in stretches of at most this length
HELD_OUT, HELD_OUT_CHARACTERS = 50, 1 << 20  # one stretch in 50 is held out, up to this many characters
EXAMPLES = 5  # pieces shown of each kind


def add_parsers(command: Callable[[Callable, str], argparse.ArgumentParser]) -> None:
    """Give `vocab` its four commands; command(function, name): makes a parser."""
    sub = command(run_train, "train")
    _texts(sub, "--input", required=True, help="texts to learn from: files or folders (.txt .jsonl .json .gz .parquet)")
    sub.add_argument("--vocab_size", type=int, required=True, help="pieces in all")
    sub.add_argument("--out", required=True, help="new folder for tokenizer.model and its readable tokenizer.vocab")
    sub.add_argument("--model_type", default="bpe", choices=("bpe", "unigram"), help="default: bpe")
    sub.add_argument(
        "--max_memory",
        type=int,
        default=2560,
        help="MB that learning may take: of more text than that allows an even sample is learnt from (default 2560)",
    )
    sub.add_argument("--keep_digits_together", action="store_true", help="let a number be one piece")
    sub.add_argument("--required_chars", default="", metavar="TEXT", help="characters that must have a piece")
    text = f"share of the text by characters with a piece; default: {train.COVERAGE}, with at most half of the room"
    sub.add_argument("--character_coverage", type=float, metavar="SHARE", help=text)
    sub.add_argument("--user_defined", nargs="+", default=[], metavar="PIECE", help="pieces always cut out of a text")
    sub.add_argument("--control", nargs="+", default=[], metavar="PIECE", help="pieces that no text is cut into")
    sub.add_argument("--compare", nargs="+", default=[], metavar="MODEL", help="tokenizers to compare with")
    sub.add_argument("--seed", type=int, default=0, help="of the draw of lines, and of the held-out documents")

    sub = command(run_merge, "merge")
    sub.add_argument("--base", required=True, help="the vocabulary to add to: .model file or its folder")
    sub.add_argument("--add", required=True, help="the vocabulary whose pieces to add")
    sub.add_argument("--out", required=True, help="new folder")
    sub.add_argument("--rule", default="safe", choices=edit.RULES, help="common: score 0, changes old text")
    _texts(sub, "--corpus", help="texts to verify on; default: the pieces of both vocabularies")

    sub = command(run_prune, "prune")
    sub.add_argument("--base", required=True, help="the vocabulary to make smaller: .model file or its folder")
    _texts(sub, "--corpus", required=True, help="texts whose pieces stay")
    sub.add_argument("--keep", nargs="+", default=[], metavar="PIECE", help="pieces that stay whatever the texts use")
    sub.add_argument("--out", required=True, help="new folder")

    sub = command(run_inspect, "inspect")
    sub.add_argument("model", help=".model file or its folder")
    _texts(sub, "--corpus", help="texts to count characters per token on")
    sub.add_argument("--text", help="show how this text is cut")


def _load(path: str) -> Tokenizer:
    """The tokenizer of a .model file, a folder, or a run."""
    return Tokenizer.load(run_folder.tokenizer_folder(path))


def _texts(parser: argparse.ArgumentParser, name: str, **options) -> None:
    parser.add_argument(name, nargs="+", default=[], metavar="FILE", **options)
    parser.add_argument("--field", default="text", help="the key that holds a text in .jsonl, .json or .parquet")
    parser.add_argument("--split", default="blank", choices=BOUNDARIES, help="where texts end in a .txt")


def _read(paths: list[str], args, what: str) -> Iterator[str]:
    """All documents of the files, with a progress bar by bytes. Raises `UserError` naming file and place."""
    found = find_files(paths)
    with tqdm(
        total=sum(f.stat().st_size for f in found), unit="B", unit_scale=True, desc=what, leave=False, disable=None
    ) as bar:
        done = 0
        for path in found:
            for text, position in texts_of(path, boundary=args.split, field=args.field):
                bar.update(done + position - bar.n)
                yield text
            done += path.stat().st_size


def run_train(args) -> None:
    """Learn a vocabulary from texts.

    A fiftieth of the text is held out, to show how many characters a token has on text that was not learnt from.
    """
    files.refuse_existing(args.out)
    others = {path: _load(path) for path in args.compare}
    held_out: list[str] = []
    first: list[str] = []  # the first stretches learnt from, to measure on if nothing was held out
    draw = random.Random(args.seed + 1)

    def learnt() -> Iterator[str]:
        room = HELD_OUT_CHARACTERS
        for text in _read(args.input, args, "reading"):
            for stretch in (text[i : i + STRETCH] for i in range(0, len(text), STRETCH)):
                if first and room > 0 and draw.random() < 1 / HELD_OUT:
                    held_out.append(stretch)
                    room -= len(stretch)
                else:
                    first.extend([stretch] * (len(first) < HELD_OUT))
                    yield stretch

    own = (args.required_chars, tuple(args.user_defined), tuple(args.control))
    kind = train.Kind(args.model_type, not args.keep_digits_together, *own, args.character_coverage)
    sample = (args.max_memory << 20) // train.MEMORY_PER_BYTE
    with tempfile.TemporaryDirectory() as scratch:
        made = train.train_tokenizer(learnt(), args.vocab_size, scratch, sample_bytes=sample, seed=args.seed, kind=kind)
    edit.save(made, args.out, made, list(range(made.vocab_size)))
    print(f"{args.out}: {made.vocab_size:,} pieces")
    _show_scripts(made)
    shown = held_out or first
    why = "held-out characters" if held_out else "characters that were learnt from (too few to hold any out)"
    print(f"on {sum(map(len, shown)):,} {why}:")
    for name, tokenizer in {args.out: made, **others}.items():
        _show_density(name, tokenizer, shown)


def run_merge(args) -> None:
    """Add the pieces of one vocabulary to another, without changing how text is cut that has none of them."""
    base, more = _load(args.base), _load(args.add)
    done = edit.merge(base, more, args.rule)
    lost = measure.unreachable(done.tokenizer, done.added)
    if lost and args.rule == "safe":
        raise UserError(
            f"--add {args.add}: {len(lost)} pieces could never arise ({lost[:EXAMPLES]}); nothing was written"
        )
    print(f"added {len(done.added):,}, already there {done.already_there:,}, unreachable {len(lost):,}")
    for reason, pieces in done.refused.items():
        examples = " ".join(pieces[:EXAMPLES]).translate(train.ESCAPED)
        print(f"refused {len(pieces):,}: {reason} ({examples}{' …' if len(pieces) > EXAMPLES else ''})")
    if args.corpus:
        texts = _read(args.corpus, args, "verifying")
    else:
        texts = [text for tokenizer in (base, more) for text in edit.piece_texts(tokenizer)]
        print("without --corpus, the pieces of both vocabularies are the lines to verify on:")
    counts = measure.compare(base, done.tokenizer, done.added, texts)
    if not counts["characters"]:
        raise UserError("--corpus: holds no text to verify on; nothing was written")
    if counts["changed"] and args.rule == "safe":
        raise UserError(
            f"--corpus: {counts['changed']:,} lines without new pieces are cut otherwise; nothing was written"
        )
    print(
        f"{counts['lines']:,} lines, {counts['without']:,} without a new piece, {counts['changed']:,} of these changed"
    )
    before, after = (counts["characters"] / max(1, counts[f"{which}_tokens"]) for which in ("old", "new"))
    print(f"characters per token {before:.3f} → {after:.3f}")
    edit.save(done.tokenizer, args.out, base, done.id_map)
    print(f"{args.out}: {done.tokenizer.vocab_size:,} pieces, id_map.json; next: python -m minillm resize")


def run_prune(args) -> None:
    """Remove from a vocabulary what some texts do not use; these are cut as before."""
    base = _load(args.base)
    made, id_map = edit.prune(base, _read(args.corpus, args, "reading"), args.keep)
    lines = changed = 0
    for text in _read(args.corpus, args, "verifying"):
        for part in (text, *text.split("\n")):
            lines += 1
            changed += [id_map[i] for i in base.encode(part)] != made.encode(part)
    if not lines:
        raise UserError("--corpus: holds no text to keep pieces for; nothing was written")
    if changed:
        raise UserError(f"--corpus: {changed:,} of {lines:,} lines would be cut otherwise; nothing was written")
    edit.save(made, args.out, base, id_map)
    print(f"{args.out}: {made.vocab_size:,} of {base.vocab_size:,} pieces stay; {lines:,} texts and lines, 0 changed")


def run_inspect(args) -> None:
    """Show what a vocabulary is made of."""
    tokenizer = _load(args.model)
    spec = tokenizer.model.proto.trainer_spec
    kind = spec.ModelType.Name(spec.model_type).lower()
    print(f"{args.model}: {tokenizer.vocab_size:,} pieces, {kind}, sha256 {tokenizer.sha256[:16]}")
    special = ", ".join(f"{name} {getattr(tokenizer, f'{name}_id')}" for name in ("bos", "eos", "pad"))
    rules = tokenizer.model.proto.normalizer_spec
    space = "yes" if rules.add_dummy_prefix else "no"
    print(f"{special}; normalization {rules.name or 'none'}; a space put before each text: {space}")
    _show_scripts(tokenizer)
    if args.text is not None:
        ids = tokenizer.encode(args.text)
        print(" ".join(tokenizer.model.proto.pieces[i].piece for i in ids), ids, sep="\n")
    if args.corpus:
        _show_density(args.model, tokenizer, _read(args.corpus, args, "reading"))


def _show_scripts(tokenizer: Tokenizer) -> None:
    found = measure.scripts(tokenizer)
    print("pieces: " + ", ".join(f"{name} {count:,}" for name, count in found.items()))


def _show_density(name: str, tokenizer: Tokenizer, texts: Iterable[str]) -> None:
    """Print characters per token, and the share of characters covered by pieces other than bytes."""
    pieces = tokenizer.model.proto.pieces
    # exactly one of a character's bytes is not of the form 10xxxxxx; a newline is always a byte piece
    first_bytes = {
        i
        for i, p in enumerate(pieces)
        if p.type == p.UNKNOWN or (p.type == p.BYTE and int(p.piece[3:5], 16) & 0xC0 != 0x80 and p.piece != "<0x0A>")
    }
    characters = tokens = spelt = 0
    for text in texts:
        ids = tokenizer.encode(text)
        characters, tokens = characters + len(text), tokens + len(ids)
        spelt += sum(i in first_bytes for i in ids)
    share = 1 - spelt / max(1, characters)
    print(f"  {name:<32}{characters / max(1, tokens):6.3f} characters per token, {share:8.3%} covered by pieces")
