"""Add the pieces of one vocabulary to another; text that has none of them is cut as before."""

from collections.abc import Iterable
from dataclasses import dataclass

from minillm.base.errors import UserError
from minillm.base.options import option
from minillm.commands.vocab.texts import EXAMPLES, TextOptions, load_tokenizer, read_texts
from minillm.tokenizer import edit, measure, train
from minillm.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Config(TextOptions):
    base: str = option(help="the vocabulary to add to: .model file or its folder")
    add: str = option(help="the vocabulary whose pieces to add")
    out: str = option(help="new folder")
    rule: str = option("safe", "common: score 0, changes old text", edit.RULES)
    corpus: tuple[str, ...] = option(
        (), "texts to verify on; without any, the pieces of both vocabularies", group="texts"
    )


def run(config: Config) -> None:
    # merge, in memory
    base = load_tokenizer(config.base)
    more = load_tokenizer(config.add)
    merged = edit.merge(base, more, config.rule)
    unreachable = measure.unreachable(merged.tokenizer, merged.added)
    if unreachable and config.rule == "safe":
        raise UserError(
            f"--add {config.add}: {len(unreachable)} pieces could never arise ({unreachable[:EXAMPLES]}); "
            "nothing was written"
        )
    print(f"added {len(merged.added):,}, already there {merged.already_there:,}, unreachable {len(unreachable):,}")
    for reason, pieces in merged.refused.items():
        examples = " ".join(pieces[:EXAMPLES]).translate(train.ESCAPED)
        if len(pieces) > EXAMPLES:
            examples += " …"
        print(f"refused {len(pieces):,}: {reason} ({examples})")

    # cut the same text by both: no line without a new piece may be cut otherwise
    counts = measure.compare(base, merged.tokenizer, merged.added, _texts(config, base, more))
    if not counts["characters"]:
        raise UserError("--corpus: holds no text to verify on; nothing was written")
    if counts["changed"] and config.rule == "safe":
        raise UserError(
            f"--corpus: {counts['changed']:,} lines without new pieces are cut otherwise; nothing was written"
        )
    print(
        f"{counts['lines']:,} lines, {counts['without']:,} without a new piece, {counts['changed']:,} of these changed"
    )
    density_before = counts["characters"] / max(1, counts["old_tokens"])
    density_after = counts["characters"] / max(1, counts["new_tokens"])
    print(f"characters per token {density_before:.3f} → {density_after:.3f}")

    edit.save(merged.tokenizer, config.out, base, merged.id_map)
    print(f"{config.out}: {merged.tokenizer.vocab_size:,} pieces, id_map.json")
    print(edit.next_command(config.out))


def _texts(config: Config, base: Tokenizer, more: Tokenizer) -> Iterable[str]:
    """The texts to verify on: those of --corpus, else all pieces as texts."""
    if config.corpus:
        return read_texts(config.corpus, config, "verifying")
    print("without --corpus, the pieces of both vocabularies are the lines to verify on:")
    return [*edit.piece_texts(base), *edit.piece_texts(more)]
