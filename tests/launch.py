"""What the tests of the training scripts share: a tiny corpus, and the scripts as real processes that start at once.

A process that has imported torch and the scripts is forked for each run, so a start takes milliseconds instead of
seconds. Everything else is as from a shell: own process, own signals, exit status, output in a file, ranks that
find each other through the variables that torchrun sets.
"""

import json
import multiprocessing
import os
import random
import resource
import runpy
import signal
import socket
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
SMALL = "--dim 32 --n_layers 2 --n_heads 2 --n_kv_heads 1 --ffn_dim 64 --seq_len 32 --batch_size 8 --warmup_steps 4"
SMALL += " --lr 2e-3 --eval_every 0 --eval_tokens 512 --device cpu --dtype float32"
WORDS = (
    "the",
    "a",
    "red",
    "old",
    "cat",
    "dog",
    "bird",
    "sees",
    "hears",
    "house",
    "river",
    "hill",
    "in",
    "on",
    "and",
    "then",
)


def write_corpus(folder: Path, seed: int = 0) -> Path:
    """Token bins of some 20,000 tokens with a tokenizer of their own, made as a user makes them."""
    from data.prepare import prepare

    draw = random.Random(seed)
    documents = [" ".join(draw.choices(WORDS, k=40)) + f" {draw.randrange(1000)}." for _ in range(500)]
    folder.mkdir(parents=True)
    text = folder.parent / f"{folder.name}.txt"
    text.write_text("\n\n".join(documents), encoding="utf-8")
    prepare([text], folder, train_tokenizer=400, val_fraction=0.05, workers=1)
    return folder


class Process:
    """A script under way in one process."""

    def __init__(self, script: str, arguments: list[str], output: Path, env: dict[str, str], **how):
        self.output = output
        output.parent.mkdir(parents=True, exist_ok=True)
        self.process = server().Process(target=_run, args=(script, arguments, str(output), env), kwargs=how)
        self.process.start()
        self.pid = self.process.pid

    def kill(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self, seconds: float = 60) -> int:
        """The exit status; −9 for one that was killed. A process that has not ended by then is killed: −9, too."""
        self.process.join(seconds)
        if self.process.is_alive():
            self.kill(signal.SIGKILL)
            self.process.join()
            raise AssertionError(f"did not end within {seconds} s:\n{self.text}")
        return self.process.exitcode

    def wait_for(self, text: str, seconds: float = 60) -> None:
        """Return as soon as `text` has been printed."""
        until = time.monotonic() + seconds
        while text not in self.text:
            if time.monotonic() > until or not self.process.is_alive():
                raise AssertionError(f"{text!r} was never printed:\n{self.text}")
            time.sleep(0.005)

    def wait_for_checkpoint(self, run: Path, step: int, seconds: float = 60) -> None:
        """Return as soon as the checkpoint of `step`, or a later one, lies in the run's folder."""
        until = time.monotonic() + seconds
        while max(steps(run), default=0) < step:
            assert self.process.is_alive() and time.monotonic() < until, f"no step {step}:\n{self.text}"
            time.sleep(0.001)

    @property
    def text(self) -> str:
        return self.output.read_text() if self.output.exists() else ""


def start(
    script: str,
    arguments: str | list[str],
    output: Path,
    ranks: int = 1,
    environment: dict[str, str] | None = None,
    **how,
) -> list[Process]:
    """Start train_<script>.py with these arguments on so many ranks; their output goes to <output>-<rank>.txt.

    environment: more variables of each. how: `hidden`, packages that shall seem not to be installed (by default
    matplotlib: a run then draws no curve, which takes longer than its training); `limit`, the largest file in bytes;
    `stdout`, a file or pipe of its own; `closed`, numbers of standard streams that are closed at the start.
    """
    arguments = arguments.split() if isinstance(arguments, str) else arguments
    port = str(free_port())
    shared = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        Process(
            f"train_{script}.py",
            arguments,
            Path(f"{output}-{rank}.txt"),
            {} if ranks == 1 else {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} | (environment or {}),
            **how,
        )
        for rank in range(ranks)
    ]


def finish(script: str, arguments: str | list[str], output: Path, ranks: int = 1, status: int = 0, **how) -> str:
    """Run a script to its end on so many ranks; every one must end with this status. Returns what rank 0 printed."""
    processes = start(script, arguments, output, ranks, **how)
    for process in processes:
        assert process.wait() == status, process.text
    return processes[0].text


def rows(run: Path) -> list[dict]:
    """metrics.jsonl as a list."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> dict[int, float]:
    """Loss by step; a step logged twice is an error."""
    found = [(row["step"], row["loss"]) for row in rows(run) if "loss" in row]
    assert len(dict(found)) == len(found), found
    return dict(found)


def norms(run: Path) -> dict[int, float]:
    """Gradient norm by step, of before clipping: unlike losses it tells a gradient from twice that gradient."""
    return {row["step"]: row["grad_norm"] for row in rows(run) if "loss" in row}


def steps(run: Path) -> list[int]:
    """The steps of which the run's folder holds checkpoints."""
    return sorted(int(path.name[5:]) for path in run.glob("step-????????"))


def tensors(run: Path, step: int) -> dict[str, bytes]:
    """The bytes of a checkpoint's weights and optimizer."""
    folder = run / f"step-{step:08d}"
    return {name: (folder / name).read_bytes() for name in ("model.safetensors", "resume/optimizer.safetensors")}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def server():
    """Gives processes forked from one that has imported the scripts, single-threaded."""
    context = multiprocessing.get_context("forkserver")
    scripts = ["train_pretrain", "train_sft", "train_reward", "train_dpo", "train_grpo", "train_ppo"]
    context.set_forkserver_preload([*scripts, "torch._dynamo"])  # which optimizers import
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys([str(ROOT), os.environ.get("PYTHONPATH", str(ROOT))]))
    return context


def _run(
    script,
    arguments: list[str],
    output: str,
    env: dict[str, str],
    hidden=("matplotlib",),
    limit=None,
    stdout=None,
    closed=(),
) -> None:
    import torch

    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for number in (1, 2):
        os.dup2(file, number)
    os.close(file)
    if stdout:
        os.dup2(os.open(stdout, os.O_WRONLY), 1)
    for number in closed:
        os.close(number)
        setattr(sys, ("stdin", "stdout", "stderr")[number], None)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored
    os.environ.update(env)
    sys.modules.update(dict.fromkeys(hidden))
    torch.set_num_threads(1)
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    sys.argv = [script, *arguments]
    try:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    except Exception:
        sys.excepthook(*sys.exc_info())  # as the interpreter does; multiprocessing would print it by itself
        sys.exit(1)
