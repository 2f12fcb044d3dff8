"""Give a model another vocabulary: embedding and head follow the mapping of ids, new pieces get a start."""

import shlex
from dataclasses import dataclass
from pathlib import Path

from minillm.base.options import Options, option
from minillm.checkpoint import resize


@dataclass(frozen=True)
class Config(Options):
    model: str = option(help="run or model folder whose tokenizer is the old one")
    tokenizer: str = option(help="the new one: folder or .model that vocab merge or prune wrote")
    out: str = option(help="new model folder")
    id_map: str | None = option(None, "id_map.json; none: the one beside the new tokenizer")
    start: str = option(
        "mean",
        "new rows: mean of the old sub-tokens' (mean), of all (mean_all), or drawn like all (normal)",
        resize.STARTS,
    )
    pad_to_multiple: int = option(1, "of the number of rows (GPUs like 64)", at_least=1)


def run(config: Config) -> None:
    id_map = config.id_map
    if id_map is None:
        tokenizer = Path(config.tokenizer)
        folder = tokenizer if tokenizer.is_dir() else tokenizer.parent
        id_map = folder / "id_map.json"
    report = resize.resize_folder(
        config.model,
        config.tokenizer,
        id_map,
        config.out,
        start=config.start,
        multiple=config.pad_to_multiple,
    )
    print(report)
    print(f"next: python data/prepare.py --input … --tokenizer {shlex.quote(config.out)} --out DIR")
