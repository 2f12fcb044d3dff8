"""Remove from a vocabulary what some texts do not use; these are cut as before."""

from dataclasses import dataclass

from minillm.base.errors import UserError
from minillm.base.options import option
from minillm.commands.vocab.texts import TextOptions, load_tokenizer, read_texts
from minillm.tokenizer import edit


@dataclass(frozen=True, kw_only=True)
class Config(TextOptions):
    base: str = option(help="the vocabulary to make smaller: .model file or its folder")
    corpus: tuple[str, ...] = option(help="texts whose pieces stay", group="texts")
    keep: tuple[str, ...] = option((), "pieces that stay whatever the texts use", may_be_blank=True)
    out: str = option(help="new folder")


def run(config: Config) -> None:
    base = load_tokenizer(config.base)
    pruned, id_map = edit.prune(base, read_texts(config.corpus, config, "reading"), list(config.keep))
    n_lines = 0
    n_changed = 0
    for text in read_texts(config.corpus, config, "verifying"):
        for part in (text, *text.split("\n")):
            n_lines += 1
            ids_before = [id_map[i] for i in base.encode(part)]
            if ids_before != pruned.encode(part):
                n_changed += 1
    if not n_lines:
        raise UserError("--corpus: holds no text to keep pieces for; nothing was written")
    if n_changed:
        raise UserError(f"--corpus: {n_changed:,} of {n_lines:,} lines would be cut otherwise; nothing was written")
    edit.save(pruned, config.out, base, id_map)
    print(
        f"{config.out}: {pruned.vocab_size:,} of {base.vocab_size:,} pieces stay; "
        f"{n_lines:,} texts and lines, 0 changed"
    )
    print(edit.next_command(config.out))
