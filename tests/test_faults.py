import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from minillm.base import files
from tests import launch

ROOT = Path(__file__).parents[1]
OPTIONS = f"{launch.SMALL} --micro_batch_size 2"
SCRIPTS = [*(path.name for path in sorted(ROOT.glob("train_*.py"))), "-m minillm info --model x"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with the corpus in data/, another in other/, and in run/ a run of 6 steps with two checkpoints."""
    here = tmp_path_factory.mktemp("faults")
    launch.write_corpus(here / "data")
    launch.write_corpus(here / "other", seed=1)
    launch.finish("pretrain", options(here, "run", "--steps 6 --save_every 3"), here / "log" / "run")
    return here


def options(folder: Path, out: str, more: str = "") -> str:
    return f"--data {folder}/data --out {folder}/{out} {OPTIONS} {more}"


def copy_of_run(folder: Path, name: str) -> Path:
    shutil.copytree(folder / "run", folder / name)
    return folder / name


def refused(folder: Path, out: str, more: str, script: str = "pretrain", **how) -> str:
    """The one line with which a script refuses these options, exit status 2, and nothing else on stderr."""
    text = launch.finish(script, options(folder, out, more), folder / "log" / out, status=2, **how)
    assert "Traceback" not in text
    lines = [line for line in text.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and text.endswith(lines[0] + "\n"), text
    return lines[0]


# ---- kills and signals


@pytest.mark.slow
def test_killed_at_ten_random_moments_ends_as_if_never_killed(folder):
    """At some moment after its first checkpoint, in a save or in a step: each process comes at least one step further.

    On a machine that is busy with other things a process may come far before it is killed, so there are many steps.
    """
    n_steps = 60
    more = f"--steps {n_steps} --save_every 1 --dropout 0.1 --keep_last 3"
    launch.finish("pretrain", options(folder, "alive", more), folder / "log" / "alive")
    killed, draw, last = folder / "killed", random.Random(0), 0
    for _ in range(10):
        (process,) = launch.start("pretrain", options(folder, "killed", more), folder / "log" / "killed")
        process.wait_for_checkpoint(killed, last + 1)
        time.sleep(draw.random() * 0.04)
        process.kill(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, process.text
        assert max(launch.steps(killed)) > last
        last = max(launch.steps(killed))
    launch.finish("pretrain", options(folder, "killed", more), folder / "log" / "killed")
    assert launch.tensors(killed, n_steps) == launch.tensors(folder / "alive", n_steps)
    assert launch.losses(killed) == launch.losses(folder / "alive")
    assert not list(killed.glob("*.tmp-*")) and not list(killed.glob("*.old"))


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_signal_leaves_one_whole_checkpoint_and_the_same_command_goes_on(folder, number, status, ranks):
    out = f"signal-{status}-{ranks}"
    more = "--steps 1000 --schedule constant"
    processes = launch.start("pretrain", options(folder, out, more), folder / "log" / out, ranks)
    processes[0].wait_for("step 1/")
    for process in processes if ranks == 2 else processes * 2:  # one process gets it twice
        process.kill(number)
    assert [process.wait() for process in processes] == [status] * ranks
    (step,) = launch.steps(folder / out)
    assert f"stopped by signal {int(number)} after step {step}" in processes[0].text
    assert f"{number.name}: finishing this step, then saving" in processes[0].text
    assert list(launch.losses(folder / out)) == list(range(1, step + 1))

    more = f"--steps {step + 2} --schedule constant"
    launch.finish("pretrain", options(folder, out, more), folder / "log" / out, ranks)
    assert list(launch.losses(folder / out)) == list(range(1, step + 3))


@pytest.mark.parametrize("imported", ["tomllib", "torch"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_ctrl_c_while_a_script_imports_ends_it_without_a_traceback(script, imported, tmp_path):
    fake = "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\n"
    (tmp_path / f"{imported}.py").write_text(fake)
    env = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    how = dict(cwd=ROOT, env=env, capture_output=True, text=True, timeout=50)
    ended = subprocess.run([sys.executable, *script.split()], check=False, **how)
    assert ended.returncode in (130, -signal.SIGINT)  # of both a shell says 130
    assert not ended.stdout + ended.stderr


def test_a_signal_to_one_rank_alone_stops_both_at_the_same_step(folder):
    processes = launch.start("pretrain", options(folder, "one-signal", "--steps 1000"), folder / "log" / "one", 2)
    processes[0].wait_for("step 1/")
    processes[1].kill(signal.SIGTERM)
    assert [process.wait() for process in processes] == [143, 143]
    assert len(launch.steps(folder / "one-signal")) == 1


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_dies_ends_the_others_and_is_named(folder, victim):
    out = f"dead-{victim}"
    processes = launch.start("pretrain", options(folder, out, "--steps 100000"), folder / "log" / out, 2)
    processes[0].wait_for("step 1/")
    processes[victim].kill(signal.SIGKILL)
    assert processes[1 - victim].wait() == 3
    text = processes[1 - victim].text
    assert "Traceback" not in text
    gone = "rank 1 has failed or ended after step" if victim else "(rank 0, without torchrun) is gone"
    assert f"error: rank {1 - victim}: " in text and gone in text


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_hangs_ends_the_others_in_time_and_is_named(folder, victim):
    out = f"hung-{victim}"
    more = "--steps 100000 --timeout_s 10"  # longer than a step takes on a busy machine
    processes = launch.start("pretrain", options(folder, out, more), folder / "log" / out, 2)
    processes[0].wait_for("step 1/")
    processes[victim].kill(signal.SIGSTOP)
    try:
        assert processes[1 - victim].wait(100) == 3
    finally:
        processes[victim].kill(signal.SIGKILL)
    text = processes[1 - victim].text
    assert f"error: rank {1 - victim}: no step finished for 10 s after step " in text
    silent = "rank 1 gives no sign (last finished step" if victim else "(rank 0, without torchrun) gives no sign"
    assert silent in text and "Traceback" not in text


# ---- output that is lost, a folder that is lost


@pytest.mark.parametrize("how", ["a full disk", "a reader that has gone"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_whose_output_is_lost_saves_before_it_ends(folder, how, ranks):
    out = f"lost-output-{how.replace(' ', '-')}-{ranks}"
    more = "--steps 100000 --schedule constant --save_every 0"
    if how == "a full disk":
        stdout = Path("/dev/full")
    else:
        stdout = folder / f"{out}.pipe"
        os.mkfifo(stdout)
    (folder / out).mkdir()
    processes = launch.start("pretrain", options(folder, out, more), folder / "log" / out, ranks, stdout=str(stdout))
    if how == "a reader that has gone":
        with stdout.open() as reader:
            while "step 1/" not in reader.readline():
                pass
    assert [process.wait() for process in processes] == [141] * ranks, processes[0].text
    text = processes[0].text
    assert "Traceback" not in text and "Exception ignored" not in text
    if how == "a full disk":
        assert text.count("\n") == 1 and "error: standard output: No space left on device" in text
    (step,) = launch.steps(folder / out)
    assert list(launch.losses(folder / out)) == list(range(1, step + 1))
    launch.finish("pretrain", options(folder, out, f"--steps {step + 2} --schedule constant"), folder / "log" / out)
    assert list(launch.losses(folder / out)) == list(range(1, step + 3))


@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (0, 1, 2)])
def test_closed_streams_change_nothing(folder, closed):
    """The files that are opened first would get their numbers: a checkpoint could hold the words about a signal."""
    out = "closed-" + "".join(map(str, closed))
    (process,) = launch.start(
        "pretrain", options(folder, out, "--steps 6 --save_every 3"), folder / "log" / out, closed=closed
    )
    assert process.wait() == 0, process.text
    assert launch.tensors(folder / out, 6) == launch.tensors(folder / "run", 6)
    assert launch.losses(folder / out) == launch.losses(folder / "run")
    assert files.verify_folder(folder / out / "step-00000006") == []


@pytest.mark.parametrize("how", ["deleted", "moved", "without its lock"])
def test_a_folder_that_is_lost_during_a_run_is_made_again(folder, how):
    out = "vanished-" + how.split()[0]
    run = folder / out
    more = "--steps 100000 --schedule constant"
    (process,) = launch.start("pretrain", options(folder, out, more), folder / "log" / out)
    process.wait_for("step 1/")
    if how == "deleted":
        run.rename(folder / f"{out}-doomed")  # at once, since the run may make it again while it is being deleted
        shutil.rmtree(folder / f"{out}-doomed")
    elif how == "moved":
        run.rename(folder / f"{out}-elsewhere")
    else:
        (run / "lock").unlink()
    process.wait_for(f"{run}: was deleted or moved, so it is made again")
    assert f"in use by process {process.pid}" in refused(folder, out, more)
    process.kill(signal.SIGTERM)
    assert process.wait() == 143
    steps = launch.steps(run)
    assert len(steps) == 2  # one of then, one of the end
    assert list(launch.losses(run)) == list(range(1, steps[-1] + 1))
    assert (run / "options.toml").exists()
    launch.finish("pretrain", options(folder, out, f"--steps {steps[-1] + 2}"), folder / "log" / f"{out}-on")


def test_what_a_save_would_fail_by_is_said_before_the_first_step(folder):
    shutil.copytree(folder / "data", folder / "damaged-tokenizer")
    (folder / "damaged-tokenizer" / "tokenizer_config.json").write_text('{"chat_template"')
    line = refused(folder, "unsaved", f"--steps 3 --data {folder}/damaged-tokenizer")
    assert "tokenizer_config.json" in line
    assert not (folder / "unsaved" / "metrics.jsonl").exists() or launch.rows(folder / "unsaved") == []


def test_a_curve_that_cannot_be_drawn_ends_no_run(folder):
    out = "r$x^$"
    text = launch.finish("pretrain", options(folder, out, "--steps 2"), folder / "log" / "dollars", hidden=())
    assert f"curve {folder}/{out}/curve.png" in text and (folder / out / "curve.png").stat().st_size


@pytest.mark.parametrize("to", ["a file", "nothing"])
def test_no_link_in_a_run_leads_out_of_it(folder, to):
    """Whatever a run writes into its folder may be a link there: it is refused by name, or gives way to the file."""
    names = sorted({path.name for path in (folder / "run").iterdir()} | {"curve.png", "tensorboard"})
    assert {"lock", "metrics.jsonl", "options.toml", "step-00000006"} <= set(names)
    for name in names:
        run, outside = folder / f"linked-{to.split()[-1]}-{name}", folder / "outside"
        outside.unlink(missing_ok=True)
        if to == "a file":
            outside.write_text("mine")
        run.mkdir()
        (run / name).symlink_to(outside)
        more = "--steps 6 --save_every 3 --tensorboard" if name == "tensorboard" else "--steps 6 --save_every 3"
        how = {"hidden": ()} if name == "curve.png" else {}
        (process,) = launch.start("pretrain", options(folder, run.name, more), folder / "log" / run.name, **how)
        status = process.wait()
        assert status == 0 or (status == 2 and f"error: {run}/{name}" in process.text), process.text
        assert (outside.read_text() == "mine") if to == "a file" else not outside.exists(), name


# ---- what is not finite


def test_steps_that_are_not_finite_are_left_out_and_end_the_run_on_all_ranks(folder):
    run = copy_of_run(folder, "diverged")
    before = launch.tensors(run, 6)
    more = "--steps 40 --lr 1e30 --schedule constant --warmup_steps 0 --max_bad_steps 3 --save_every 1"
    processes = launch.start("pretrain", options(folder, "diverged", more), folder / "log" / "diverged", 2)
    assert [process.wait() for process in processes] == [2, 2], processes[0].text
    text = processes[0].text
    assert "--lr: 0.002 in the checkpoint, 1e+30 now" in text
    assert "error: step " in text and str(run) in text and "lower --lr" in text and "Traceback" not in text
    assert launch.tensors(run, 6) == before
    for step in launch.steps(run):
        weights = load_file(run / f"step-{step:08d}" / "model.safetensors")
        assert all(tensor.isfinite().all() for tensor in weights.values()), step


def test_weights_that_are_not_finite_are_named(folder):
    run = copy_of_run(folder, "spoilt") / "step-00000006"
    (run / "manifest.json").unlink()
    weights = load_file(run / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][2, 3] = torch.nan
    save_file(weights, run / "model.safetensors")
    line = refused(folder, "from-spoilt", f"--init_from {run}")
    assert "model.layers.1.mlp.up_proj.weight holds 1 of 2,048 values that are not finite" in line


# ---- one folder, one run


def test_two_runs_into_one_folder(folder):
    (first,) = launch.start("pretrain", options(folder, "busy", "--steps 100000"), folder / "log" / "first")
    first.wait_for("step 1/")
    line = refused(folder, "busy", "--steps 100000")
    assert f"--out {folder}/busy: in use by process {first.pid}" in line and "choose another --out" in line
    first.kill(signal.SIGKILL)
    first.wait()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ("--data {folder}/other --seq_len 32", ["another data", "another tokenizer", "choose another --out"]),
        ("--dim 64", ["another architecture", "choose another --out"]),
        ("--qk_norm", ["another architecture"]),
        ("--batch_size 16", ["batch size", "--allow_data_change"]),
        ("--seed 1", ["seed", "--allow_data_change"]),
        ("--optimizer adamw", ["--optimizer: muon in the checkpoint, adamw now (layers.0."]),
        ("--resume none", ["--resume none", "already holds checkpoints", "choose another --out"]),
        (
            "--resume {folder}/run/step-00000003",
            ["choose auto, which", "copy it there", "cp -r {folder}/run/step-00000003 {folder}/run-2/"],
        ),
    ],
)
def test_going_on_with_something_else_is_refused(folder, more, words):
    before = launch.rows(folder / "run")
    line = refused(folder, "run", "--steps 9 " + more.format(folder=folder))
    assert all(word.format(folder=folder) in line for word in words), line
    assert launch.rows(folder / "run") == before and launch.steps(folder / "run") == [3, 6]


def test_another_seed_may_be_allowed_and_another_rate_is_announced(folder):
    copy_of_run(folder, "allowed")
    more = "--steps 8 --seed 1 --allow_data_change --lr 1e-3"
    text = launch.finish("pretrain", options(folder, "allowed", more), folder / "log" / "allowed")
    assert "batch size, sequence length or seed: changed since the checkpoint, as --allow_data_change allows" in text
    run = folder / "allowed"
    for kept in (run / "options.toml", run / "step-00000008" / "resume" / "options.toml"):
        # another run that takes these options has not been allowed anything
        assert "allow_data_change = false" in kept.read_text()
    assert "--lr: 0.002 in the checkpoint, 0.001 now" in text
    assert list(launch.losses(folder / "allowed")) == list(range(1, 9))


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_step_folder_copied_into_another_run_is_where_that_one_goes_on(folder, ranks):
    """Its original stays as it is, and the run ends as the original did."""
    out, more = f"branch-{ranks}", "--save_every 1 --keep_last 9 --steps 6"
    shutil.copytree(folder / "run" / "step-00000003", folder / out / "step-00000003")
    text = launch.finish("pretrain", options(folder, out, more), folder / "log" / out, ranks)
    assert f"weights from {folder}/{out}/step-00000003" in text
    assert launch.steps(folder / out) == [3, 4, 5, 6] and launch.steps(folder / "run") == [3, 6]
    branched, original = launch.losses(folder / out), launch.losses(folder / "run")
    assert list(branched) == [4, 5, 6]
    assert branched == pytest.approx({step: original[step] for step in branched}, abs=1e-5)
    if ranks == 1:
        assert launch.tensors(folder / out, 6) == launch.tensors(folder / "run", 6)


def test_a_step_folder_that_was_copied_without_its_name_begins_no_new_run(folder):
    shutil.copytree(folder / "run" / "step-00000003", folder / "nameless")
    assert "nameless: is a checkpoint itself" in refused(folder, "nameless", "--steps 6")
    assert not (folder / "nameless" / "lock").exists()


@pytest.mark.parametrize("file", ["model.safetensors", "resume/optimizer.safetensors", "resume/train_state.json"])
def test_a_flipped_byte_is_noticed_and_the_checkpoint_before_is_used(folder, file):
    run = copy_of_run(folder, "flipped-" + file.replace("/", "-"))
    damaged = run / "step-00000006" / file
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    text = launch.finish("pretrain", options(folder, run.name, "--steps 6 --save_every 3"), folder / "log" / run.name)
    assert f"step-00000006 is damaged and passed over: {file} differs from its checksum" in text
    assert launch.tensors(run, 6) == launch.tensors(folder / "run", 6)
    assert launch.losses(run) == launch.losses(folder / "run")


def test_no_whole_checkpoint_is_no_reason_to_begin_anew(folder):
    run = copy_of_run(folder, "ruined")
    for step in (3, 6):
        (run / f"step-{step:08d}" / "model.safetensors").write_bytes(b"")
    assert "none of its 2 checkpoints is whole" in refused(folder, "ruined", "--steps 9")
    assert launch.steps(run) == [3, 6]


def test_a_file_too_large_for_the_disk_is_said_before_the_first_step(folder):
    (folder / "limited").mkdir()
    line = refused(folder, "limited", "--steps 3", limit=20_000)
    assert "limit on a file is 20,000" in line and f"{folder}/limited" in line
    assert launch.rows(folder / "limited") == []


# ---- options


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ("--stesp 3", ["--stesp", "did you mean --steps"]),
        ("--steps many", ["--steps many", "whole number"]),
        ("--lr fast", ["--lr fast", "a number"]),
        ("--lr -1", ["--lr -1"]),
        ("--lr nan", ["--lr nan"]),
        ("--seed -1", ["--seed -1"]),
        ("--seed 4294967296", ["--seed 4294967296: must be 0 to 4,294,967,295"]),
        ("--seq_len 0", ["--seq_len 0"]),
        ("--grad_clip -1", ["--grad_clip -1"]),
        ("--weight_decay -1", ["--weight_decay -1"]),
        ("--warmup_steps -1", ["--warmup_steps -1"]),
        ("--min_lr_ratio 2", ["--min_lr_ratio 2"]),
        ("--eval_tokens 0", ["--eval_tokens 0"]),
        ("--timeout_s 0", ["--timeout_s 0"]),
        ("--max_bad_steps 0", ["--max_bad_steps 0"]),
        ("--dropout 1", ["--dropout 1.0: must be 0 to below 1"]),
        ("--optimizer sgd", ["--optimizer sgd", "muon, adamw"]),
        ("--device tpu", ["--device tpu", "choose auto, cpu"]),
        ("--micro_batch_size 0", ["--micro_batch_size 0"]),
        ("--data {folder}/nowhere", ["nowhere"]),
        ("--init_from {folder}/nowhere", ["nowhere: no such folder"]),
        ("--init_from {folder}/run --seq_len 1000", ["--seq_len 1000", "longest context is 512", "--max_seq_len 1000"]),
        (
            "--max_seq_len 16",
            ["--seq_len 32", "longest context is 16 tokens", "a row may be all one document", "or raise --max_seq_len"],
        ),
        ("--max_seq_len 16 --document_attention", ["--seq_len 32: the model's longest context is 16 tokens"]),
        ("--init_from {folder}/run --qk_norm", ["config.json decides", "qk_norm True (there False)", "--init_from"]),
        ("--init_from {folder}/run --preset 26m", ["--preset 26m: the model of --init_from has its shape already"]),
        ("--data {folder}/data:x", ["/data:x: the weight 'x' is no number"]),
        ("--n_heads 3 --dim 33", ["head_dim"]),
        ("--rope_scaling yarn", ["--rope_scaling yarn"]),
        ("--config {folder}/nowhere.toml", ["nowhere.toml"]),
        ("--out {folder}/data/meta.json", ["data/meta.json is a file", "give a folder"]),
    ],
)
def test_an_option_that_means_nothing_is_refused_in_one_line(folder, more, words):
    line = refused(folder, "refused", "--steps 2 " + more.format(folder=folder))
    assert all(word in line for word in words), line
    assert not (folder / "refused").exists()


def test_a_batch_that_does_not_divide_by_the_ranks(folder):
    text = launch.finish("pretrain", options(folder, "odd", "--batch_size 5"), folder / "log" / "odd", 2, status=2)
    assert "--batch_size 5 is no multiple of 2 rank(s): choose a multiple of 2" in text
    assert not (folder / "odd").exists()


def test_a_rank_that_is_refused_ends_the_others_without_a_traceback(folder):
    (first,) = launch.start("pretrain", options(folder, "busy2", "--steps 100000"), folder / "log" / "first2")
    first.wait_for("step 1/")
    processes = launch.start("pretrain", options(folder, "busy2", "--steps 100000"), folder / "log" / "second2", 2)
    assert [process.wait() for process in processes] == [2, 3]
    first.kill(signal.SIGKILL)
    first.wait()
    assert "in use by process" in processes[0].text
    assert "Traceback" not in processes[1].text and "error: rank 1: " in processes[1].text
