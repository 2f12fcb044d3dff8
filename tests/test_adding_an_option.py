"""A model option that a reader adds in two files is right everywhere, or refused by its name: nothing fails open.

The edits are those that a reader would make, on a copy of the project: the field in `ModelConfig`, declared by
`option`, which makes it an option of the command line as well, and the arithmetic in the model. A model is then
trained with the option given on the command line. What it passes through is in option_checks.py.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from minillm.base.errors import UserError
from minillm.checkpoint import huggingface
from tests import launch

ROOT = Path(__file__).parents[1]
CONFIG, MODEL = "minillm/model/config.py", "minillm/model/transformer.py"

# name: (value on the command line, new parameters a layer, [(file, what is there once, what the reader makes of it)])
OPTIONS = {
    # the feed-forward network's gate squared, ReLU(gate)², in place of silu(gate)
    "activation": (
        "relu2",
        0,
        [
            (
                CONFIG,
                "    dropout: float",
                '    activation: str = option("swiglu", "swiglu, or relu2 of the gate", ("swiglu", "relu2"))\n'
                "    dropout: float",
            ),
            (
                MODEL,
                "        self.gate_proj = ",
                "        self.activation = config.activation\n        self.gate_proj = ",
            ),
            (
                MODEL,
                "ops.swiglu(gate, up)",
                '(ops.swiglu(gate, up) if self.activation == "swiglu" else torch.relu(gate).square() * up)',
            ),
        ],
    ),
    # each head's output times 1 + a trained number that starts at 0
    "head_gain": (
        "true",
        2,
        [
            (
                CONFIG,
                "    dropout: float",
                '    head_gain: bool = option(False, "a trained factor for each head")\n    dropout: float',
            ),
            (
                MODEL,
                "        self.o_proj = ",
                "        if config.head_gain:\n"
                "            self.gain = nn.Parameter(torch.zeros(config.n_heads))\n"
                "        self.o_proj = ",
            ),
            (
                MODEL,
                "        return ops.linears(out.flatten(",
                "        if self.config.head_gain:\n"
                "            out = out * (1 + self.gain)[:, None]\n"
                "        return ops.linears(out.flatten(",
            ),
        ],
    ),
}


def copy_of_the_project(folder: Path, edits: list[tuple[str, str, str]]) -> None:
    """The sources in `folder`, changed; an edit whose place is not there exactly once is an error."""
    for path in (
        *ROOT.glob("*.py"),
        *(p for top in ("minillm", "kernels", "data") for p in (ROOT / top).rglob("*.py")),
    ):
        place = folder / path.relative_to(ROOT)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, place)
    for file, before, after in edits:
        text = (folder / file).read_text(encoding="utf-8")
        assert text.count(before) == 1, f"{file}: {before!r} is there {text.count(before)} times; adapt the edit"
        (folder / file).write_text(text.replace(before, after), encoding="utf-8")


@pytest.fixture(scope="module")
def bins(tmp_path_factory) -> Path:
    return launch.write_corpus(tmp_path_factory.mktemp("corpus") / "bins")


@pytest.mark.parametrize("option", OPTIONS)
def test_an_added_option_is_right_everywhere_or_refused_by_its_name(option, bins, tmp_path):
    value, new_parameters, edits = OPTIONS[option]
    copy_of_the_project(tmp_path, edits)
    shutil.copytree(bins, tmp_path / "bins")
    command = [sys.executable, "-P", ROOT / "tests" / "option_checks.py", option, value, str(new_parameters)]
    env = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    checks = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert checks.returncode == 0, checks.stdout + checks.stderr
    assert checks.stdout.rstrip().endswith("export")
    for words in ([tmp_path / "train_pretrain.py"], ["-m", "minillm", "info"], ["-m", "minillm", "plan"]):
        command = [sys.executable, "-P", *words, "--help"]
        help_text = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True).stdout
        assert f"--{option} " in help_text, "a field declared by option() is an option there by that"
    with pytest.raises(UserError, match=f"{option}: this minillm has no such option"):
        huggingface.load_model(tmp_path / "saved")  # by the project as it is here
