"""The house holds: who may import whom, how large it may grow, and that it needs nothing it does not name."""

import ast
import io
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = [
    {"config", "metrics", "packing", "distributed", "files", "sentencepiece_model", "byte_bpe", "chat_templates"},
    {"ops", "losses", "products", "kv_cache", "tokenizer", "data", "messages", "readers", "run"},
    {"model", "chat_data", "vocab", "vocab_edit", "vocab_commands", "data/"},
    {"optim", "parallel", "checkpoint", "huggingface", "quant", "resize", "decode", "decode_cuda", "tuning/"}
    | {"llama2c", "gguf_format", "gguf_model"},
    {"validation", "generate", "evaluate", "plot", "training", "bench", "bench_tune", "selfcheck"}
    | {"model_commands", "info_command", "port_commands"},
    {"__main__", "train_pretrain", "train_sft"},
]
# Lines of code, a budget for each kind of reader: who follows a training run needs neither the kernels, nor the
# generator of the bundled corpus, nor other people's formats, nor the benchmarks; and who came for one of these needs
# nothing else.
BUDGET = {
    "library and scripts": 5850,
    "formats": 900,
    "benchmarks": 400,
    "minillm/tuning/": 930,
    "kernels/": 4220,
    "data/": 1400,
}
PARTS = {
    **dict.fromkeys(("byte_bpe", "gguf_format", "gguf_model", "llama2c", "port_commands"), "formats"),
    **dict.fromkeys(("bench", "bench_tune"), "benchmarks"),
}
FOLDERS = ("data/", "kernels/", "tuning/")  # rooms of several files; their folders belong to them
LAYER = {name: number for number, names in enumerate(LAYERS) for name in names}
OPTIONAL = {"matplotlib", "tensorboard", "pyarrow", "transformers", "peft", "gguf", "liger_kernel", "flash_attn"}
OPTIONAL |= {"bitsandbytes"}
SOURCES = sorted(
    [
        *(path for folder in ("minillm", "kernels", "data/world") for path in (ROOT / folder).rglob("*.py")),
        *(path for folder in ("data", ".") for path in (ROOT / folder).glob("*.py") if path.name != "setup.py"),
    ]
)


def place(path: Path) -> str:
    """The room a file stands in: its module's name, or that of its folder if this is one of `FOLDERS`."""
    parts = [f"{part}/" for part in path.relative_to(ROOT).parts]
    return next((part for part in parts if part in FOLDERS), path.stem)


def imports(path: Path, top_level_only: bool = False) -> set[str]:
    """Dotted names that a file imports: `from minillm import run` gives minillm.run."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = set()
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def rooms_used(path: Path) -> set[str]:
    used = set()
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "minillm" and len(parts) > 1 and f"{parts[1]}/" in FOLDERS:
            used.add(f"{parts[1]}/")
        elif parts[0] == "minillm" and len(parts) > 1 and (ROOT / "minillm" / f"{parts[1]}.py").exists():
            used.add(parts[1])
        elif parts[0] in ("data", "kernels"):
            used.add(f"{parts[0]}/")
    return used - {place(path)}


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_imports_only_from_its_own_layer_or_below(path):
    room = place(path)
    if room == "__init__":
        assert not rooms_used(path)
        return
    if room == "kernels/":
        assert not any(name.split(".")[0] in ("minillm", "data") for name in imports(path))
        return
    used = rooms_used(path)
    assert ("kernels/" in used) == (room == "ops")
    assert room in LAYER, f"{path.name} has no layer: give it one in this test"
    too_high = {other for other in used - {"kernels/"} if LAYER[other] > LAYER[room]}
    assert not too_high, f"{room} (layer {LAYER[room]}) imports {too_high}"
    if LAYER[room] == 0:
        assert not used, f"layer 0 knows nothing of each other, but {room} imports {used}"


def test_no_import_cycle_inside_a_layer():
    graph = {place(path): rooms_used(path) for path in SOURCES if place(path) in LAYER}

    def reach(room: str, path: tuple[str, ...]) -> None:
        assert room not in path, " → ".join((*path, room))
        for other in graph.get(room, set()):
            if LAYER.get(other) == LAYER[room]:
                reach(other, (*path, room))

    for room in graph:
        reach(room, ())


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_optional_packages_are_imported_where_they_are_used(path):
    assert not {name.split(".")[0] for name in imports(path, top_level_only=True)} & OPTIONAL


def code_lines(source: str) -> set[int]:
    """Numbers of lines that hold code: no blanks, comments or docstrings."""
    tree = ast.parse(source)
    documentation = set()
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
            value = body[0].value
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                documentation |= set(range(value.lineno, value.end_lineno + 1))
    skipped = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in skipped:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return lines - documentation


def test_code_lines_counts_code_alone():
    source = '"""Doc\nstring."""\n\n# comment\ndef f(x):\n    """Doc."""\n    return (\n        x\n    )\n'
    assert code_lines(source) == {5, 7, 8, 9}


def budget_of(path: Path) -> str:
    above = [f"{folder.as_posix()}/" for folder in path.relative_to(ROOT).parents]
    own = PARTS.get(path.stem, "library and scripts") if above[0] == "minillm/" else "library and scripts"
    return next((folder for folder in above if folder in BUDGET), own)


@pytest.mark.parametrize("part", BUDGET)
def test_each_part_stays_within_its_budget(part):
    files = [p for p in SOURCES if budget_of(p) == part]
    sizes = {str(p.relative_to(ROOT)): len(code_lines(p.read_text(encoding="utf-8"))) for p in files}
    assert sum(sizes.values()) <= BUDGET[part], sizes


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_functions_stay_within_a_screen(path):
    source = path.read_text(encoding="utf-8")
    lines = code_lines(source)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            size = len(lines & set(range(node.lineno, node.end_lineno + 1)))
            assert size <= 60, f"{path.name}: {node.name} has {size} lines of code"
