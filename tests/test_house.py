"""The house holds: who may import whom, how large it may grow, and that it needs nothing it does not name."""

import ast
import io
import re
import tokenize
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Floors, lowest first. A file imports from its own folder or from a lower floor; folders of one floor do not know each
# other. The scripts and `minillm/__main__.py` stand on top.
FLOORS = [
    {"kernels", "base"},
    {"model", "tokenizer", "datasets", "distributed"},
    {"checkpoint"},
    {"data"},
    {"tuning"},
    {"generation"},
    {"evaluation", "training"},
    {"alignment", "serving"},
    {"commands"},
    {"scripts"},
]
FLOOR = {folder: number for number, folders in enumerate(FLOORS) for folder in folders}
KERNEL_USERS = {"minillm/model/ops.py", "minillm/model/quant.py"}

# Tokens of code that each folder may hold: a line break, a comment or a longer name costs nothing, a new idea does.
# What it held when it was last weighed, plus a tenth.
BUDGET = {
    "kernels": 71_900,
    "base": 11_300,  # folders that several processes fill
    "model": 19_150,  # memory and time of layouts of many GPUs; weights packed for generation in three kinds; a mask
    "tokenizer": 18_600,  # answers that a template spells too; what two files of one folder disagree on; forged turns
    "datasets": 26_550,  # data of the decay, best fit; tables; tokens kept; places, spans; numbers as right answers
    "distributed": 12_500,  # sharding, tensor and context parallelism, exchanges, work shared by ranks with copies
    "checkpoint": 20_110,  # reward models' folders; files that all ranks write together; keys of GGUF, users of a step
    "data": 64_000,  # rows of benchmarks, cleaning of texts and instructions, near duplicates, mixing, a report
    "tuning": 11_850,  # an alpha for rslora; what PEFT's files leave out
    "generation": 11_650,  # many requests in one running batch; a compiled step
    "evaluation": 14_300,  # benchmarks, also in training, shared by ranks, read by families
    "training": 21_550,  # sharding, saving in the background, a step ahead, z-loss, logs, a profile, Muon by owners
    "alignment": 23_100,  # models dealt out over ranks
    "serving": 11_000,  # the interface of OpenAI over HTTP, and the chat page's headers
    "commands": 30_650,  # judged answers, pairs, a server, other tools' speeds, plans, a cluster's checks, bits
    "scripts": 15_270,
}
MOST_FILES = 15  # of one folder, besides its __init__.py
MOST_LINES = {"file": 300, "function": 60}
MOST_PARAMETERS = 7  # besides self; not of kernels and ops, whose parameters are those of the formula

OPTIONAL = {
    "matplotlib",
    "tensorboard",
    "wandb",
    "pyarrow",
    "transformers",
    "peft",
    "gguf",
    "liger_kernel",
    "flash_attn",
}
OPTIONAL |= {"trafilatura", "warcio", "zstandard", "datasketch", "datatrove"}
OPTIONAL |= {"bitsandbytes", "tokenizers", "jinja2", "trl", "datasets", "lm_eval"}
OPTIONAL |= {"uvicorn", "xllamacpp"}
WHOLE_FOLDERS = ("minillm", "kernels", "data/world", "data/cleaning")
SOURCES = sorted(
    [
        *(path for folder in WHOLE_FOLDERS for path in (ROOT / folder).rglob("*.py")),
        *(path for folder in ("data", ".") for path in (ROOT / folder).glob("*.py") if path.name != "setup.py"),
    ]
)
each_source = pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))


def folder_of(parts: tuple[str, ...]) -> str:
    """The folder that a dotted name or a path belongs to: `minillm.model.ops` → model."""
    if parts[0] in ("kernels", "data"):
        return parts[0]
    if parts[0] == "minillm" and len(parts) > 2:
        return parts[1]
    return "scripts"


def imports(path: Path, top_level_only: bool = False) -> set[str]:
    """Dotted names that a file imports: `from minillm.base import files` gives minillm.base.files."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = set()
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def module_of(name: str) -> Path | None:
    """The file of this project that a dotted name is in: a module, or the module that defines it."""
    for parts in (name.split("."), name.split(".")[:-1]):
        for path in (ROOT.joinpath(*parts).with_suffix(".py"), ROOT.joinpath(*parts, "__init__.py")):
            if parts and path.exists():
                return path
    return None


@each_source
def test_a_file_imports_from_its_own_folder_or_a_lower_floor(path):
    own = folder_of(path.relative_to(ROOT).parts)
    if path == ROOT / "minillm" / "__init__.py":
        assert not imports(path)
        return
    for name in imports(path):
        if name.split(".")[0] not in ("minillm", "kernels", "data"):
            continue
        other = folder_of((*module_of(name).relative_to(ROOT).parts,))
        assert other == own or FLOOR[other] < FLOOR[own], f"{own} imports {name}"
        assert other != "kernels" or own == "kernels" or path.relative_to(ROOT).as_posix() in KERNEL_USERS, name


@each_source
def test_what_is_installed_does_without_what_is_not(path):
    """`pip install .` brings minillm and kernels alone, and a user's folder may hold a data.py of its own."""
    if path.relative_to(ROOT).parts[0] in ("minillm", "kernels"):
        assert "data" not in {name.split(".")[0] for name in imports(path)}


def test_every_script_ends_quietly_when_its_reader_has_gone():
    """`python … | head`: a script is run by what handles a closed pipe. The two that print to a parent need not."""
    ways = ("run_script(main)", "run_training(main)", "lesson.run(main)", "end_with_reader()\n")
    for path in (*SOURCES, *(ROOT / "docs" / "course").glob("*.py")):
        _, is_script, end = path.read_text(encoding="utf-8").partition('if __name__ == "__main__":')
        name = path.relative_to(ROOT).as_posix()
        if is_script and name not in ("kernels/prove/machine.py", "minillm/training/kernel_check.py"):
            assert any(way in end for way in ways), name


@each_source
def test_a_command_to_copy_quotes_what_stands_in_it(path):
    """Paths have spaces: what an f-string puts behind an option of a command that it shows goes through shlex."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    quoted = {
        target.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and ast.unparse(node.value).startswith("shlex.")
        for target in node.targets
    }
    for node in ast.walk(tree):
        text = ""
        for part in node.values if isinstance(node, ast.JoinedStr) else ():
            if isinstance(part, ast.Constant):
                text += part.value
                continue
            value = ast.unparse(part.value)
            if re.search(r"(python -m minillm|data/prepare\.py|python train_\w+\.py)[^;]* --(?!preset)\w+ $", text):
                assert value.startswith("shlex.") or value in quoted, f"line {node.lineno}: {value}"
            text += value


def test_folders_have_their_floor():
    folders = {folder_of(path.relative_to(ROOT).parts) for path in SOURCES}
    assert folders == set(FLOOR)


def test_no_circle_of_imports():
    graph = {path: {module_of(name) for name in imports(path)} - {None, path} for path in SOURCES}
    finished = set()

    def visit(path: Path, trail: tuple[Path, ...]) -> None:
        assert path not in trail, " → ".join(str(p.relative_to(ROOT)) for p in (*trail, path))
        if path in finished:
            return
        for other in graph.get(path, set()):
            if other.name != "__init__.py":
                visit(other, (*trail, path))
        finished.add(path)

    for path in graph:
        visit(path, ())


@each_source
def test_the_project_imports_from_files_not_from_folders(path):
    """A folder's `__init__.py` is for users of the library: inside, the import says in which file a thing is."""
    if path.name == "__init__.py":
        return
    for name in imports(path):
        module = module_of(name) if name.split(".")[0] in ("minillm", "kernels", "data") else None
        assert module is None or module.name != "__init__.py", name


@each_source
def test_optional_packages_are_imported_where_they_are_used(path):
    assert not {name.split(".")[0] for name in imports(path, top_level_only=True)} & OPTIONAL


# ---- size

LAYOUT = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)


def code_tokens(source: str) -> list[tokenize.TokenInfo]:
    """The tokens that are code: no comments, docstrings, line breaks or indentation, and no commas before a bracket."""
    documentation = set()
    for node in ast.walk(ast.parse(source)):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
            value = body[0].value
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                documentation |= set(range(value.lineno, value.end_lineno + 1))
    tokens = [
        token
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type not in LAYOUT and token.start[0] not in documentation
    ]
    following = [token.string for token in tokens[1:]]
    before_a_bracket = [token.string == "," and after in ")]}" for token, after in zip(tokens, following, strict=False)]
    return [token for token, left_out in zip(tokens, [*before_a_bracket, False], strict=False) if not left_out]


def code_lines(tokens: list[tokenize.TokenInfo]) -> set[int]:
    """Numbers of the lines that hold these tokens."""
    return {line for token in tokens for line in range(token.start[0], token.end[0] + 1)}


def test_what_counts_is_code_alone():
    source = '"""Doc\nstring."""\n\n# comment\ndef f(x):\n    """Doc."""\n    return (\n        x,\n    )\n'
    tokens = code_tokens(source)
    assert [token.string for token in tokens] == ["def", "f", "(", "x", ")", ":", "return", "(", "x", ")"]
    assert code_lines(tokens) == {5, 7, 8, 9}


def test_files_that_sources_name_are_there():
    named = re.compile(r"(?<![\w/.])(?:data|minillm|kernels)/[\w/]+\.(?:py|toml)\b")
    texts = {path: path.read_text(encoding="utf-8") for path in (*SOURCES, *(ROOT / "data").rglob("*.toml"))}
    wrong = {
        (path.name, name) for path, text in texts.items() for name in named.findall(text) if not (ROOT / name).exists()
    }
    assert not wrong


def test_each_folder_stays_within_its_budget():
    tokens, lines = Counter(), Counter()
    for path in SOURCES:
        found = code_tokens(path.read_text(encoding="utf-8"))
        folder = folder_of(path.relative_to(ROOT).parts)
        tokens[folder] += len(found)
        lines[folder] += len(code_lines(found))
    sizes = "\n".join(f"{f:<12} {n:>7} tokens, {n / lines[f]:4.1f} a line" for f, n in sorted(tokens.items()))
    too_large = {f: n for f, n in tokens.items() if n > BUDGET.get(f, 0)}
    assert not too_large, f"{too_large}\n{sizes}"


def test_folders_hold_few_files():
    files = Counter(path.parent for path in SOURCES if path.name != "__init__.py")
    assert not {str(folder): n for folder, n in files.items() if n > MOST_FILES}


@each_source
def test_files_and_functions_stay_within_a_sitting(path):
    source = path.read_text(encoding="utf-8")
    lines = code_lines(code_tokens(source))
    assert len(lines) <= MOST_LINES["file"]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            size = len(lines & set(range(node.lineno, node.end_lineno + 1)))
            assert size <= MOST_LINES["function"], f"{node.name} has {size} lines of code"


@each_source
def test_functions_take_few_parameters(path):
    if folder_of(path.relative_to(ROOT).parts) == "kernels" or path == ROOT / "minillm" / "model" / "ops.py":
        return
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            names = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            n_parameters = len([name for name in names if name not in ("self", "cls", "ctx")])
            assert n_parameters <= MOST_PARAMETERS, f"{node.name} takes {n_parameters}"
