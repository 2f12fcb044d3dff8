"""Which modules of a model are meant: those that a method adapts by default, or those that options name.

A module is named by its path in transformers' model, "model.layers.0.self_attn.q_proj", or by the end of that path,
"q_proj".
"""

import difflib
from collections.abc import Callable, Iterator

from torch import nn

from minillm.base.errors import UserError
from minillm.checkpoint.huggingface import export_name
from minillm.model.quant import QuantLinear
from minillm.model.transformer import RMSNorm, Transformer
from minillm.tuning.options import TuningConfig

LINEAR = nn.Linear | QuantLinear
NORM = RMSNorm | nn.RMSNorm | nn.LayerNorm
IA3_TARGETS = ("k_proj", "v_proj", "down_proj")  # the paper's; for the last one the input is scaled


def base_modules(model: Transformer) -> Iterator[tuple[str, nn.Module]]:
    """Path and module of everything in the base, also while an adapter has put its own modules there."""
    active = vars(model).get("active")
    replaced = {} if active is None else active.base
    inside = tuple(f"{path}." for path in replaced)
    for path, module in model.named_modules():
        if replaced.get(path) is not None:
            yield from replaced[path].named_modules(prefix=path)
        elif path not in replaced and not path.startswith(inside):
            yield path, module


def linear_paths(model: Transformer) -> list[str]:
    """Paths of all linear layers, the head among them."""
    return [path for path, module in base_modules(model) if isinstance(module, LINEAR)]


def split_names(text: str) -> list[str]:
    """A comma-separated list of module names, split."""
    return [name.strip() for name in text.split(",")]


# ---- what an adapter wraps


def default_targets(model: Transformer, options: TuningConfig) -> str:
    """Names of the modules that the method adapts, comma-separated: the given ones, or its usual ones.

    LoRA's are all linear layers that the model's layers have, whatever they are called.
    """
    if options.target_modules:
        return options.target_modules
    if options.tune == "ia3":
        return ",".join(IA3_TARGETS)
    in_layers = [path for path in linear_paths(model) if path.startswith("layers.")]
    return ",".join(dict.fromkeys(_name_in_layer(path) for path in in_layers))


def _name_in_layer(path: str) -> str:
    """layers.0.self_attn.q_proj → q_proj; layers.0.mlp.2, whose end says nothing, → mlp.2"""
    _, _, inner = path.split(".", 2)
    last = inner.rpartition(".")[2]
    return inner if last.isdecimal() else last


def chosen_targets(model: Transformer, options: TuningConfig) -> list[str]:
    """Paths of the modules to adapt, in the model's order. Raises `UserError` for a name that cannot be adapted."""
    source = "--target_modules" if options.target_modules else f"--tune {options.tune} adapts by default"
    return matching_targets(model, default_targets(model, options), source)


def matching_targets(model: Transformer, text: str, source: str = "--target_modules") -> list[str]:
    """Paths of the linear layers (and the embedding) that comma-separated names mean: last parts of their paths.

    source: what named them, for the `UserError` that a name raises which means no such module.
    """
    modules = dict(base_modules(model))
    known = [path for path, module in modules.items() if isinstance(module, LINEAR) or path == "embed_tokens"]
    known = [path for path in known if path != "score"]  # which is trained in full
    for name in split_names(text):
        others = [path for path in modules if path and name and is_end(name, path)]
        if others and not set(others) & set(known):
            kind = type(modules[others[0]]).__name__
            raise UserError(f"{source} {name}: {others[0]} is a {kind}, which cannot be adapted; {_choices(known)}")
    return _matching(known, text, source, is_end)


def is_end(name: str, path: str) -> bool:
    """Whether a name is a module's path in transformers' model, or the last parts of it."""
    return f".{export_name(path)}".endswith(f".{name}")


def check_rank(options: TuningConfig, model: Transformer) -> None:
    """Raise `UserError` if the rank is above the smaller side of every targeted matrix."""
    smaller_side = {}
    for path in chosen_targets(model, options):
        layer = model.get_submodule(path)
        shape = layer.weight.shape if isinstance(layer, nn.Embedding) else (layer.in_features, layer.out_features)
        smaller_side[path] = min(shape)
    largest = max(smaller_side, key=smaller_side.get)
    if options.lora_rank > smaller_side[largest]:
        limit = f"at most {smaller_side[largest]}, the smaller side of {largest}"
        raise UserError(f"--lora_rank {options.lora_rank}: {limit}; a larger one adds nothing but memory, so lower it")


# ---- what is trained in full


def modules_to_save(model: Transformer, text: str | None, targets: list[str]) -> list[str]:
    """Paths of the modules to train in full: like PEFT, all whose path ends with one of the names.

    targets: paths of the modules that are adapted. Raises `UserError` for one of those, and for a quantized one.
    """
    if not text:
        return []
    known = [path for path, _ in model.named_modules() if path]
    chosen = _matching(known, text, "--modules_to_save", lambda name, path: export_name(path).endswith(name))
    for path in chosen:
        if any(f"{target}.".startswith(f"{path}.") for target in targets):
            raise UserError(f"--modules_to_save {text}: {path} is a target module, too; leave it out of one of them")
        if any(isinstance(module, QuantLinear) for module in model.get_submodule(path).modules()):
            raise UserError(f"--modules_to_save {text}: {path} is quantized, and so cannot be trained in full")
    return chosen


def train_layers(model: Transformer, text: str) -> list[str]:
    """Paths that --train_layers means: last:2, first:1, numbers of layers, embed, head, norms, comma-separated."""
    chosen: set[str] = set()
    for item in text.replace(" ", "").split(","):
        chosen |= _layers_of(model, item, text)
    inside = tuple(f"{path}." for path in chosen)  # a norm of a layer that is trained anyway
    return [path for path, _ in model.named_modules() if path in chosen and not path.startswith(inside)]


def _layers_of(model: Transformer, item: str, text: str) -> set[str]:
    """The paths that one item of --train_layers means; text: all of it, for the message."""
    n_layers = len(model.layers)
    kind, _, count = item.partition(":")
    if kind in ("first", "last") and count.isdecimal() and 1 <= int(count) <= n_layers:
        begin = 0 if kind == "first" else n_layers - int(count)
        return {f"layers.{number}" for number in range(begin, begin + int(count))}
    if item.isdecimal() and int(item) < n_layers:
        return {f"layers.{int(item)}"}
    if item == "embed":
        return {path for path, module in model.named_modules() if isinstance(module, nn.Embedding)}
    if item == "head":
        return {"score" if model.config.score_head else "lm_head"}
    if item == "norms":
        return {path for path, module in model.named_modules() if isinstance(module, NORM)}
    raise UserError(
        f"--train_layers {text}: {item!r} is none of first:N, last:N (N from 1 to {n_layers}), 0 to {n_layers - 1}, "
        "embed, head, norms"
    )


# ---- names


def _matching(known: list[str], text: str, source: str, matches: Callable[[str, str], bool]) -> list[str]:
    """The known paths that any of the comma-separated names matches (name, path), in the model's order."""
    wanted = split_names(text)
    for name in wanted:
        if not name or not any(matches(name, path) for path in known):
            raise UserError(f"{source} {name}: the model has no such module; {_choices(known, name)}")
    return [path for path in known if any(matches(name, path) for name in wanted)]


def _choices(known: list[str], name: str = "") -> str:
    """What to write instead of `name`: the nearest name, else all of them."""
    ends = sorted({path.rpartition(".")[2] for path in known if not path.rpartition(".")[2].isdecimal()})
    near = difflib.get_close_matches(name, ends, n=1)
    return f"did you mean {near[0]}?" if near else f"choose from {', '.join(ends)}"
