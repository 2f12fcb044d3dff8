"""Show what a vocabulary is made of."""

from dataclasses import dataclass

from minillm.base.options import option
from minillm.commands.vocab.texts import TextOptions, load_tokenizer, read_texts, show_density, show_scripts


@dataclass(frozen=True, kw_only=True)
class Config(TextOptions):
    model: str = option(help=".model file or its folder", positional=True)
    corpus: tuple[str, ...] = option((), "texts to count characters per token on", group="texts")
    text: str | None = option(None, "show how this text is cut", may_be_blank=True)


def run(config: Config) -> None:
    tokenizer = load_tokenizer(config.model)
    trainer = tokenizer.model.proto.trainer_spec
    kind = trainer.ModelType.Name(trainer.model_type).lower()
    print(f"{config.model}: {tokenizer.vocab_size:,} pieces, {kind}, sha256 {tokenizer.sha256[:16]}")
    special = ", ".join(f"{name} {getattr(tokenizer, f'{name}_id')}" for name in ("bos", "eos", "pad"))
    normalizer = tokenizer.model.proto.normalizer_spec
    space = "yes" if normalizer.add_dummy_prefix else "no"
    print(f"{special}; normalization {normalizer.name or 'none'}; a space put before each text: {space}")
    show_scripts(tokenizer)
    if config.text is not None:
        ids = tokenizer.encode(config.text)
        print(" ".join(tokenizer.model.proto.pieces[i].piece for i in ids))
        print(ids)
    if config.corpus:
        show_density(config.model, tokenizer, read_texts(config.corpus, config, "reading"))
