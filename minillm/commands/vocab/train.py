"""Learn a vocabulary from texts.

A fiftieth of the text is held out, to show how many characters a token has on text that was not learnt from.
"""

import random
import shlex
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from minillm.base import files
from minillm.base.options import option
from minillm.commands.vocab.texts import TextOptions, load_tokenizer, read_texts, show_density, show_scripts
from minillm.tokenizer import edit, train
from minillm.tokenizer.tokenizer import Tokenizer

STRETCH = 4000  # characters; documents are learnt from or held out in stretches of at most this length
HELD_OUT = 50  # of this many stretches one is held out
HELD_OUT_CHARACTERS = 1 << 20  # but no more than this in all


@dataclass(frozen=True, kw_only=True)
class Config(TextOptions):
    input: tuple[str, ...] = option(
        help="texts to learn from: files or folders (.txt .jsonl .json .gz .parquet)", group="texts"
    )
    out: str = option(help="new folder for tokenizer.model and its readable tokenizer.vocab")
    vocab_size: int = option(help="pieces in all", at_least=1)
    model_type: str = option("bpe", "how pieces are chosen", ("bpe", "unigram"))
    max_memory: int = option(
        2560,
        "MB that learning may take: of more text than that allows an even sample is learnt from",
        at_least=1,
    )
    keep_digits_together: bool = option(False, "let a number be one piece")
    required_chars: str | None = option(None, "characters that must have a piece", may_be_blank=True)
    character_coverage: float | None = option(
        None,
        f"share of the text by characters with a piece; none: {train.COVERAGE}, with at most half of the room",
        above=0,
        at_most=1,
    )
    user_defined: tuple[str, ...] = option((), "pieces always cut out of a text", may_be_blank=True)
    control: tuple[str, ...] = option((), "pieces that no text is cut into", may_be_blank=True)
    compare: tuple[str, ...] = option((), "tokenizers to compare with")
    seed: int = option(0, "of the draw of lines, and of the held-out documents", at_least=0)


class HeldOut:
    """Passes texts on in stretches, and keeps some of them apart.

    held_out: the stretches that were not passed on. first: the first that were, to measure on if none was held out.
    """

    def __init__(self, texts: Iterable[str], seed: int):
        self.texts = texts
        self.draw = random.Random(seed)
        self.held_out: list[str] = []
        self.first: list[str] = []

    def __iter__(self) -> Iterator[str]:
        room = HELD_OUT_CHARACTERS
        for text in self.texts:
            for begin in range(0, len(text), STRETCH):
                stretch = text[begin : begin + STRETCH]
                if self.first and room > 0 and self.draw.random() < 1 / HELD_OUT:
                    self.held_out.append(stretch)
                    room -= len(stretch)
                    continue
                if len(self.first) < HELD_OUT:
                    self.first.append(stretch)
                yield stretch


def run(config: Config) -> None:
    files.refuse_existing(config.out)
    others = {path: load_tokenizer(path) for path in config.compare}
    texts = HeldOut(read_texts(config.input, config, "reading"), config.seed + 1)
    kind = train.Kind(
        config.model_type,
        not config.keep_digits_together,
        config.required_chars or "",
        config.user_defined,
        config.control,
        config.character_coverage,
    )
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer = train.train_tokenizer(
            iter(texts),
            config.vocab_size,
            scratch,
            sample_bytes=(config.max_memory << 20) // train.MEMORY_PER_BYTE,
            seed=config.seed,
            kind=kind,
        )
    edit.save(tokenizer, config.out, tokenizer, list(range(tokenizer.vocab_size)))
    print(f"{config.out}: {tokenizer.vocab_size:,} pieces")
    show_scripts(tokenizer)
    _compare(texts, {config.out: tokenizer, **others})
    folder = shlex.quote(config.out)
    print("next, for a new model and for one that exists:")
    print(f"  python data/prepare.py --input … --tokenizer {folder} --out DIR")
    print(f"  python -m minillm vocab merge --base MODEL --add {folder} --out DIR")


def _compare(texts: HeldOut, tokenizers: dict[str, Tokenizer]) -> None:
    """Print how many characters a token has, for each tokenizer, on text that was held out if there is any."""
    stretches = texts.held_out or texts.first
    what = "held-out characters"
    if not texts.held_out:
        what = "characters that were learnt from (too few to hold any out)"
    print(f"on {sum(map(len, stretches)):,} {what}:")
    for name, tokenizer in tokenizers.items():
        show_density(name, tokenizer, stretches)
