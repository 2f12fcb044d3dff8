"""What is to be shown on a GPU, line by line: the commands, how long they usually take, and when they are ended.

The order finds what is wrong before it costs time: each line relies on those before it. The Hopper path comes late. It
waits for barriers, so a fault may hang the GPU itself for what follows.
"""

import shlex
from dataclasses import dataclass
from pathlib import Path

MOST_WORKERS = 12  # of pytest: each holds a CUDA context of half a gigabyte

# Words of an output that ends well although what was to be shown did not happen.
TORCH_INSTEAD = ("using torch's. Please report it", "ops: torch (")  # the kernels are wrong; they cannot be used at all
HOPPER_LEFT_OUT = ("needs a Hopper GPU", "these kernels are written for Triton")  # why tests were skipped


@dataclass(frozen=True)
class Line:
    """One line of the proof; it passes if all its commands end with code 0.

    usual_s: an estimate; the line is not begun with less time than this. limit_s: it is ended after this time.
    commands: one after the other; "{out}" stands for the report's folder, "{workers}" for pytest's option.
    fails_on: words of the output, each of which means failure although the code is 0. results: the folder in `out` of
    a benchmark's kernels.csv. printed_as: the op whose tokens per second the output names. memory_gib, architecture:
    the GPU that it needs; 0 means any.
    """

    name: str
    shows: str
    commands: tuple[str, ...]
    usual_s: float
    limit_s: float
    fails_on: tuple[str, ...] = ()
    results: str = ""
    printed_as: str = ""
    memory_gib: int = 0
    architecture: int = 0


LINES = (
    Line(
        "training",
        "the self-check's verdict, twenty steps, and five with LoRA on a base of 4 bits",
        (
            "python train_pretrain.py --steps 20 --out {out}/pretrain",
            "python train_sft.py --init_from {out}/pretrain --out {out}/lora --tune lora --base_bits 4 --steps 5",
        ),
        usual_s=60,
        limit_s=150,
        fails_on=TORCH_INSTEAD,
    ),
    Line(
        "tests",
        "every kernel against its specification, in all layouts and dtypes; some 1,200 kernels are compiled",
        (
            'python -m pytest {workers} -m "not slow and not gpu" -k "not sm90" -o faulthandler_timeout=90 '
            "--ignore=tests/kernels/prove tests/kernels "
            "tests/minillm/model/test_ops.py tests/minillm/model/test_linears.py "
            "tests/minillm/training/test_kernel_check.py",
        ),
        usual_s=120,
        limit_s=260,
    ),
    Line(
        "rows",
        "the kernels beside others, but for attention",
        (
            "python -m kernels.bench rms_norm swiglu rope decode loss quant_matmul adamw muon --quick "
            "--out {out}/bench-rows",
        ),
        usual_s=90,
        limit_s=180,
        results="bench-rows",
    ),
    Line(
        "attention",
        "attention beside others, by plain Triton",
        ("python -m kernels.bench attention --quick --without sm_90 --out {out}/bench-attention",),
        usual_s=60,
        limit_s=150,
        results="bench-attention",
    ),
    Line(
        "step-124m",
        "whole training steps, 12 layers of 768, beside PyTorch and transformers",
        ("python -m minillm bench train --preset 124m --device cuda --rows 32 --seq_len 1024 --vocab_size 32000",),
        usual_s=60,
        limit_s=150,
        fails_on=TORCH_INSTEAD,
        printed_as="step 124m",
        memory_gib=30,
    ),
    Line(
        "generate-1b",
        "generated tokens a second, 1.1 billion parameters, beside transformers",
        ("python -m minillm bench generate --preset 1b --device cuda",),
        usual_s=60,
        limit_s=120,
        fails_on=TORCH_INSTEAD,
        printed_as="generate 1b",
        memory_gib=12,
    ),
    Line(
        "hopper-tests",
        "Hopper's own attention against its specification, twenty times over",
        # A test that hangs ends its worker after a minute: it has failed, by name, and the others go on.
        (
            "python -m pytest {workers} -vv -m 'not slow' "
            "-o faulthandler_timeout=60 -o faulthandler_exit_on_timeout=true tests/kernels/attention/test_sm90.py",
        ),
        usual_s=60,  # 31 kernels of 3.5 s each, several at a time; in one process two minutes more
        limit_s=200,
        fails_on=HOPPER_LEFT_OUT,
        architecture=90,
    ),
    Line(
        "hopper-attention",
        "both ways of attention side by side",
        ("python -m kernels.bench attention --quick --out {out}/bench-hopper",),
        usual_s=60,
        limit_s=150,
        results="bench-hopper",
        architecture=90,
    ),
    Line(
        "step-1b",
        "whole training steps, 1.1 billion parameters, beside PyTorch and transformers",
        ("python -m minillm bench train --preset 1b --device cuda --rows 8 --seq_len 2048 --vocab_size 32000",),
        usual_s=90,
        limit_s=180,
        fails_on=TORCH_INSTEAD,
        printed_as="step 1b",
        memory_gib=70,
    ),
    Line(
        "shapes",
        "more than 2³¹ numbers, 131,072 tokens",
        ('python -m pytest -m gpu -k "not sm90" -o faulthandler_timeout=90 tests',),
        usual_s=45,
        limit_s=150,
        memory_gib=70,
    ),
    Line(
        "everything",
        "all rows of the benchmark, all sides",
        ("python -m kernels.bench --out {out}/bench",),
        usual_s=900,
        limit_s=2700,
        results="bench",
        memory_gib=70,
    ),
)


def words(command: str, out: Path, workers: str) -> list[str]:
    """A command of a line as a list of words, still with "python" in front."""
    return shlex.split(command.format(out=shlex.quote(str(out)), workers=workers))


def pytest_workers(n_cores: int, has_xdist: bool) -> str:
    """pytest's option for tests in parallel, if its plugin is there."""
    return f"-n {min(MOST_WORKERS, n_cores)}" if has_xdist else ""


def obstacle(line: Line, machine: dict[str, str]) -> str:
    """Why this GPU cannot run a line; "" if it can."""
    if line.architecture and machine["architecture"] != f"sm_{line.architecture}":
        return f"only for sm_{line.architecture}"
    if line.memory_gib > float(machine["memory"].split()[0]):
        return f"needs a GPU with {line.memory_gib} GiB"
    return ""
