"""What the pages name is there: links, files, options, commands."""

import importlib
import math
import re
import shlex
import sys
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest

from data import bench_cleaning, bundled, clean, mix, prepare
from docs.course import lesson
from kernels import tune
from kernels.bench import suite
from kernels.prove import command as prove
from kernels.shared.launch import SHARED_MEMORY
from minillm import __main__
from minillm.base import command_line
from minillm.base.options import declared
from tests import launch
from train_pretrain import Config as Pretrain

ROOT = Path(__file__).parents[1]
SCRIPTS = {path.name: importlib.import_module(path.stem).Config for path in ROOT.glob("train_*.py")}
SOURCES = sorted(path for top in ("minillm", "kernels", "data", "docs/course") for path in (ROOT / top).rglob("*.py"))
BLOCK = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
TORCHRUN = {"nproc_per_node", "nnodes", "rdzv_backend", "rdzv_endpoint", "rdzv_conf", "local_addr", "max_restarts"}
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*/*.md"), *ROOT.glob("docs/*/course/*.md")]
every_page = pytest.mark.parametrize("path", PAGES, ids=lambda path: f"{path.parent.name}/{path.name}")


class Page:
    def __init__(self, path: Path):
        self.text = path.read_text(encoding="utf-8")
        prose = BLOCK.sub("", self.text)
        self.headings = re.findall(r"^(#+) (.*)", prose, re.MULTILINE)
        self.anchors = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for _, title in self.headings]
        self.blocks = [re.sub(r"  +# .*", "", block) for block in BLOCK.findall(self.text)]
        self.words, self.links = re.findall("`([^`]+)`", prose), re.findall(r"\]\(([^)]+)\)", prose)
        lines = [line for block in self.blocks for line in block.replace("\\\n", "").splitlines()]
        lines += [word for word in self.words if word.startswith("python") and " --" in word]
        found = [
            re.search(r"((?:\w+/)*\w+\.py|(?<=-m )(?:minillm|kernels\.\w+)) .*", line.replace(" …", ""))
            for line in lines
        ]
        self.commands = [shlex.split(match[0]) for match in found if match]


@every_page
def test_links_and_files_are_there(path):
    links = [link.partition("#") for link in Page(path).links if not link.startswith("https://")]
    targets = [(path.parent / (file or path.name), anchor) for file, _, anchor in links]
    assert not [str(f) for f, anchor in targets if not f.exists() or (anchor and anchor not in Page(f).anchors)]
    files = set(re.findall(r"\b(?:minillm|data|kernels|tests)/[\w/*]+\.py|\btrain_\w+\.py", Page(path).text))
    files |= {word for word in Page(path).words if re.fullmatch(r"[\w/*]+\.py", word)} - {"convert_hf_to_gguf.py"}
    files -= set(re.findall(r"^\+\+\+ b/(.*)$", Page(path).text, re.MULTILINE))  # which a change on the page makes
    assert not [file for file in files if not list(ROOT.glob(file))]


def broken_bold(prose: str) -> list[str]:
    """Where `**` would be shown as it is, by CommonMark's rule: `**字。**字`, a letter outside and none inside."""
    found = []
    for paragraph in re.sub("`[^`]*`", "``", prose).split("\n\n"):
        for number, match in enumerate(re.finditer(r"\*\*", paragraph)):
            before, after = paragraph[: match.start()][-1:], paragraph[match.end() :][:1]
            outside, inside = (before, after) if number % 2 == 0 else (after, before)
            if inside.isspace() or (re.match(r"\w", outside) and not re.match(r"\w", inside)):
                found.append(paragraph[max(0, match.start() - 20) : match.end() + 10])
    return found


def test_bold_words_that_would_not_be_bold_are_found():
    assert broken_bold("甲**乙。**丙") == ["甲**乙。**丙"]
    assert broken_bold("甲**`b`**丙 a ** b**") and broken_bold("** b**")
    assert not broken_bold("甲**乙**丙 **a.** b（**c**）`**` **`d`** e")


@every_page
def test_headings_tables_and_bold_words_are_shown_as_such(path):
    page = Page(path)
    prose = BLOCK.sub("", page.text)
    levels = [len(level) for level, _ in page.headings]
    assert levels[0] == 1 and levels.count(1) == 1 and all(b - a <= 1 for a, b in pairwise(levels))
    for table in re.findall(r"(?:^\|.*\n)+", prose, re.MULTILINE):
        rows = [re.split(r"(?<!\\)\|", line.strip()[1:-1]) for line in table.splitlines()]
        assert len({len(row) for row in rows}) == 1, table
        assert set("".join(rows[1])) <= set(":- "), table
    assert not broken_bold(prose)


@pytest.mark.parametrize("path", [*ROOT.glob("*.py"), *SOURCES], ids=lambda path: str(path.relative_to(ROOT)))
def test_pages_that_the_code_names_are_there(path):
    pages = re.findall(r"(?<![\w/])docs/[\w/-]+\.md", path.read_text(encoding="utf-8"))
    assert not [page for page in pages if not (ROOT / page).exists()]


@every_page
def test_steps_can_be_shared_out_among_the_processes_of_torchrun(path, monkeypatch):
    for line in "\n".join(Page(path).blocks).replace("\\\n", "").splitlines():
        if "torchrun" in line and "train_pretrain.py" in line and "…" not in line:
            launcher, _, options = line.partition("train_pretrain.py")
            monkeypatch.setattr("sys.argv", ["train_pretrain.py", *shlex.split(options)])
            asked = command_line.parse(Pretrain, "")
            ranks = math.prod(int(n) for n in re.findall(r"--(?:nnodes|nproc_per_node) (\d+)", launcher))
            assert asked.batch_size % (asked.micro_batch_size * ranks) == 0, line


@every_page
def test_commands_and_options_are_known(path, monkeypatch):
    if path.name == "changing.md":  # whose options are there once its changes are made: tests/docs/test_changing.py
        return
    monkeypatch.setattr(prepare, "prepare", lambda *_, **options: None)
    monkeypatch.setattr(prepare, "report", lambda meta: None)
    monkeypatch.setattr(prepare, "read_benchmarks", lambda files, field: [])
    monkeypatch.setattr(lesson, "corpus", lambda quick: "data/bundled")
    parse = {name: partial(command_line.parse, config, "") for name, config in SCRIPTS.items()}
    parse["data/mix.py"] = partial(command_line.parse, mix.Config, "")
    parse["data/bench_cleaning.py"] = partial(command_line.parse, bench_cleaning.Config, "")
    parse["data/clean.py"] = lambda: command_line.parse(clean.Config, "")
    parse |= {"data/prepare.py": prepare.main, "minillm": lambda: __main__.parse_command(sys.argv[1:])}
    parse |= {"kernels.bench": suite.build_parser().parse_args, "kernels.tune": tune.build_parser().parse_args}
    parse |= {f"docs/course/{path.name}": lambda: lesson.options("") for path in ROOT.glob("docs/course/*.py")}
    parse |= {f"docs/course/checks/{path.name}": lambda: None for path in ROOT.glob("docs/course/checks/*.py")}
    parse["kernels.prove"] = prove.build_parser().parse_args
    parse["tests/kernels/offline.py"] = lambda: SHARED_MEMORY[int(sys.argv[1])]
    for command in Page(path).commands:
        monkeypatch.setattr("sys.argv", command)
        parse[command[0]]()
    modules = (suite, tune, prove)
    sources = "".join(Path(module.__file__).read_text(encoding="utf-8") for module in modules)
    configs = [importlib.import_module(module).Config for module in __main__.COMMANDS.values()]
    known = {
        name
        for config in (*SCRIPTS.values(), prepare.Config, clean.Config, bundled.Config, mix.Config, *configs)
        for name in declared(config)
    }
    known |= {*re.findall(r'"--(\w+)"', sources), *TORCHRUN, "config", "help", "name", "quick", "solutions"}
    assert set(re.findall(r"(?<![\w-])--(\w+)", Page(path).text)) <= known


FOLDERS = ("model", "tokenizer", "datasets", "checkpoint", "tuning", "generation", "evaluation", "training")


def test_folders_give_the_names_that_the_readme_promises():
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition("## In Python")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `minillm\.(\w+)` \| (.*) \|$", section, re.MULTILINE)
    promised = {folder: sorted(re.findall(r"`(\w+)`", names)) for folder, names in rows}
    assert set(promised) == set(FOLDERS)
    for folder, names in promised.items():
        module = importlib.import_module(f"minillm.{folder}")
        assert sorted(module.__all__) == names and all(hasattr(module, name) for name in names)


def test_the_readme_trains_a_model_in_python(tmp_path, capsys):
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition("## In Python")[2]
    code = section.partition("```python\n")[2].partition("```")[0]
    corpus = launch.write_corpus(tmp_path / "corpus")
    for whole, small in (
        ("data/bundled", str(corpus)),
        ("seq_len=128", "seq_len=32"),
        ("range(100)", "range(8)"),
    ):
        assert whole in code
        code = code.replace(whole, small)
    exec(compile(code, "README.md", "exec"), {})
    loss, text = re.search(r"([\d.]+) nats a token after 8 steps\n(.*)", capsys.readouterr().out, re.DOTALL).groups()
    assert float(loss) < math.log(400) and text.strip()
