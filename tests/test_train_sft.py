import json
import random
import re
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import train_sft
from minillm.base.errors import UserError
from minillm.checkpoint.huggingface import save_model
from minillm.datasets.instructions import InstructionRows
from minillm.distributed.watchdog import Watchdog
from minillm.model.config import ModelConfig
from minillm.model.transformer import Transformer
from minillm.tokenizer.chat_template import JINJA
from minillm.tokenizer.tokenizer import Tokenizer
from tests import launch

OPTIONS = "--seq_len 64 --batch_size 8 --micro_batch_size 2 --warmup_steps 2 --device cpu --dtype float32"


def write_instructions(path: Path, count: int, seed: int = 0) -> Path:
    """Questions of unequal length about a word, whose answer is the word."""
    draw = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            words = draw.choices(launch.WORDS, k=draw.randrange(2, 12))
            row = {"instruction": "say the last", "input": " ".join(words), "output": words[-1]}
            row["family"] = "last" if len(words) < 7 else "long"
            file.write(json.dumps(row) + "\n")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with a model of a few steps in base/, and instructions."""
    here = tmp_path_factory.mktemp("sft")
    launch.write_corpus(here / "data")
    base = f"--data {here}/data --out {here}/base {launch.SMALL} --micro_batch_size 8 --steps 4 --max_seq_len 128"
    launch.finish("pretrain", base, here / "log" / "base")
    write_instructions(here / "train.jsonl", 400)
    write_instructions(here / "held_out.jsonl", 12, seed=1)
    return here


def options(folder: Path, out: str, more: str = "") -> str:
    return f"--data {folder}/train.jsonl --init_from {folder}/base --out {folder}/{out} {OPTIONS} {more}"


def train(folder: Path, out: str, more: str = "", **how) -> str:
    return launch.finish("sft", options(folder, out, more), folder / "log" / out, **how)


def n_rows(folder: Path, **how) -> int:
    """Rows of one epoch."""
    return InstructionRows(folder / "train.jsonl", Tokenizer.load(folder / "data"), 64, **how).rows_per_epoch


@pytest.mark.parametrize("more", ["", "--optimizer adamw --packing false"], ids=["packed-muon", "unpacked-adamw"])
def test_stopped_and_resumed_is_bit_for_bit_the_run_never_stopped(folder, more):
    more += " --steps 40 --dropout 0.1"  # some epochs, so that the stop lies within one
    straight, broken = folder / f"straight-{len(more)}", folder / f"broken-{len(more)}"
    train(folder, straight.name, more)
    (process,) = launch.start("sft", options(folder, broken.name, f"{more} --save_every 20"), folder / "broken")
    process.wait_for_checkpoint(broken, 20)
    process.kill(signal.SIGKILL)
    process.wait()
    train(folder, broken.name, more)
    assert launch.tensors(broken, 40) == launch.tensors(straight, 40)
    assert launch.losses(broken) == launch.losses(straight) and len(launch.losses(broken)) == 40


def test_what_a_run_writes_down_makes_the_same_run_to_its_last_short_batch(folder):
    """The number of steps that follows from --epochs is written down, and read back it ends with the same rows."""
    run, again = folder / "told", folder / "retold"
    train(folder, "told", "--epochs 0.3")
    assert n_rows(folder) * 0.3 % 8, "a short last batch"
    launch.finish("sft", f"--config {run}/options.toml --out {again}", folder / "log" / "retold")
    (last,) = launch.steps(run)
    assert launch.tensors(again, last) == launch.tensors(run, last)
    assert launch.losses(again) == launch.losses(run)


@pytest.mark.parametrize(
    ("packing", "tune"), [("true", "full"), ("false", "full"), ("false", "prefix"), ("false", "prompt")]
)
def test_two_ranks_take_the_same_steps_as_one_to_the_last_short_batch(folder, packing, tune):
    an_epoch = n_rows(folder, packing=packing == "true")
    rows = 12 + an_epoch // 8 * 8 * (tune == "full")  # 4 beyond whole batches: the second rank ends on padding alone
    epochs = (rows - 0.5) / an_epoch
    runs = [folder / f"{tune}-{packing}-{ranks}" for ranks in (1, 2)]
    for ranks, run in enumerate(runs, start=1):
        packed = f"--packing {packing}" if tune == "full" else ""  # with virtual tokens it is false by itself
        train(folder, run.name, f"--epochs {epochs} {packed} --tune {tune}", ranks=ranks)
    one, two = map(launch.losses, runs)
    assert two == pytest.approx(one, abs=1e-5)
    one_norm, two_norm = map(launch.norms, runs)
    assert two_norm == pytest.approx(one_norm, rel=1e-3)
    assert len(one) == -(-rows // 8)


def test_the_z_loss_is_logged_beside_the_cross_entropy_alone(folder):
    for out, more in (("plain", ""), ("z", "--z_loss 0.01"), ("z-lora", "--z_loss 0.01 --tune lora --lora_rank 2")):
        train(folder, out, f"--steps 2 {more}")
    first, added, adapted = (launch.rows(folder / out)[0] for out in ("plain", "z", "z-lora"))
    assert "z_loss" not in first and added["z_loss"] == pytest.approx(adapted["z_loss"], rel=1e-5) != 0
    assert added["loss"] == pytest.approx(first["loss"], abs=1e-6) == pytest.approx(adapted["loss"], abs=1e-5)
    assert added["grad_norm"] != pytest.approx(first["grad_norm"], rel=1e-3)


def test_going_on_with_another_number_of_ranks(folder):
    for steps, ranks in ((4, 1), (8, 2), (12, 1)):
        train(folder, "changing", f"--steps {steps} --schedule constant", ranks=ranks)
    train(folder, "unchanging", "--steps 12 --schedule constant")
    assert launch.losses(folder / "changing") == pytest.approx(launch.losses(folder / "unchanging"), abs=1e-5)


def test_a_run_of_all_weights_goes_on_without_the_model_it_began_with(folder):
    """Bit for bit; but neither an adapter nor a run begun with another model does."""
    base = shutil.copytree(folder / "base", folder / "passing")
    start, more = f"--init_from {base} --schedule constant --dropout 0.1", "--steps 4"
    for out, steps in (("kept", "--steps 4"), ("orphan", "--steps 2"), ("adapted", "--steps 2 --tune lora")):
        train(folder, out, f"{start} {steps}")
    shutil.rmtree(base)
    assert f"weights from {folder}/orphan/step-00000002" in train(folder, "orphan", f"{start} {more}")
    assert launch.tensors(folder / "orphan", 4) == launch.tensors(folder / "kept", 4)
    for out, init in (("adapted --tune lora", base), ("orphan", folder / "mistyped"), ("new", base)):
        assert "no such folder" in train(
            folder, out.split()[0], f"{more} --out {folder}/{out} --init_from {init}", status=2
        )


def test_more_steps_than_an_epoch_has_begin_another(folder):
    steps = -(-n_rows(folder) // 8) + 3
    train(folder, "long", f"--steps {steps}")
    assert list(launch.losses(folder / "long")) == list(range(1, steps + 1))


def test_loss_falls_and_answers_are_counted_before_and_after(folder):
    more = f"--steps 30 --lr 1e-2 --schedule constant --eval_data {folder}/held_out.jsonl"
    text = train(folder, "learnt", more)
    losses = launch.losses(folder / "learnt")
    assert losses[30] < losses[1] - 1
    assert "rows, 400 examples: 400 kept, 0 dropped" in text
    assert "exact answers to 12 held-out questions, before → after:" in text and "  last " in text
    assert re.search(r"  total +[\d.]+% → +[\d.]+%   \(\d+/12\)\n", text)
    assert 0 <= launch.rows(folder / "learnt")[-1]["exact_match"] <= 1
    for words in ("weights from", "step-00000030", "next: "):
        assert words in text, words
    assert "has finished its 30 steps; to go on, raise --steps\n" in train(folder, "learnt", more)

    # stopped while it answered: it answers when it is started again
    (folder / "learnt" / "concluded.json").unlink()
    again = train(folder, "learnt", more)
    found = r"  total .*\n"
    assert re.search(found, again)[0] == re.search(found, text)[0]
    assert "has finished its 30 steps" in train(folder, "learnt", more)


def test_several_files_and_what_makes_a_finished_run_longer(folder):
    both = ["--data", f" {folder}/train.jsonl , {folder}/held_out.jsonl"]
    given = [*options(folder, "two-files", "--epochs 0.05").split(), *both]
    printed = launch.finish("sft", given, folder / "log" / "two-files")
    assert "412 rows, 412 examples" in printed and "held out: nothing" in printed
    assert "raise --epochs\n" in launch.finish("sft", given, folder / "log" / "two-files")


def test_held_out_questions_may_lie_in_several_files_or_in_one_with_a_comma_in_its_name(folder):
    two = f"{write_instructions(folder / 'two.jsonl', 2, seed=2)}, {folder}/held_out.jsonl"
    one = str(write_instructions(folder / "one, of five.jsonl", 5, seed=3))
    for number, (held_out, words) in enumerate([(two, "to 13 held-out"), (one, "to 5 held-out")]):
        asked = ["--eval_data", held_out, "--eval_rows", "13", "--steps", "1"]
        given = [*options(folder, f"several-{number}").split(), *asked]
        printed = launch.finish("sft", given, folder / "log" / f"several-{number}")
        assert f"exact answers {words} questions" in printed and "held out: nothing" not in printed


def test_the_bundled_instructions_are_written_where_they_are_asked_for(folder, monkeypatch):
    def build():
        raise UserError("the corpus is being written")

    monkeypatch.setattr(train_sft.bundled, "build", build)
    its_file = "data/bundled/sft_train.jsonl"
    ways = (
        [],
        *(["--data", path] for path in (f"./{its_file}", str(Path(its_file).absolute()), f"mine.jsonl, {its_file}")),
    )
    for data, words in (*((way, "is being written") for way in ways), (["--data", "nowhere.jsonl"], "nowhere.jsonl")):
        start = ["--init_from", str(folder / "base"), "--seq_len", "64", "--device", "cpu"]
        monkeypatch.setattr(sys, "argv", ["train_sft.py", *start, *data])
        with pytest.raises(UserError, match=words):
            train_sft.main()


def test_no_step_is_awaited_while_a_model_is_loaded_and_questions_are_asked(folder, monkeypatch):
    happened = []

    def note(owner, name, value=None):
        monkeypatch.setattr(owner, name, lambda *_, **__: happened.append(name) or value)

    note(train_sft.starting_model, "make_model", SimpleNamespace())
    note(Watchdog, "tick")
    note(train_sft.Run, "baseline", {})
    note(train_sft, "train", value=1)
    more = f"--steps 2 --eval_data {folder}/held_out.jsonl"
    monkeypatch.setattr(sys, "argv", ["train_sft.py", *options(folder, "ticks", more).split()])
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    assert train_sft.main() == 1
    for number, handler in zip((signal.SIGTERM, signal.SIGINT), before, strict=True):
        signal.signal(number, handler)
    assert happened == ["make_model", "baseline", "train"]


def test_questions_first_asked_of_a_resumed_run_are_counted_after_alone(folder):
    train(folder, "asked", "--steps 2 --schedule constant")
    text = train(folder, "asked", f"--steps 4 --schedule constant --eval_data {folder}/held_out.jsonl")
    assert "  last             not asked → " in text and "step-00000004" in text


@pytest.mark.parametrize("more", ["--eval_rows 5", "--eval_data {folder}/others.jsonl"])
def test_other_questions_than_those_of_the_start_are_not_compared_with_them(folder, more):
    out = f"others-{len(more)}"
    asked = f"--schedule constant --eval_data {folder}/held_out.jsonl"
    assert "not asked" not in train(folder, out, f"--steps 1 {asked}")
    assert "not asked" not in train(folder, out, f"--steps 2 {asked}")
    lines = (folder / "held_out.jsonl").read_text().splitlines()
    (folder / "others.jsonl").write_text("\n".join(lines[::-1][:6]))
    text = train(folder, out, f"--steps 3 {asked} {more.format(folder=folder)}")
    assert "  last             not asked → " in text and "of other questions than now" in text


def test_a_signal_leaves_one_whole_checkpoint(folder):
    (process,) = launch.start("sft", options(folder, "stopped", "--steps 1000"), folder / "log" / "stopped")
    process.wait_for("step 1/")
    process.kill(signal.SIGINT)
    assert process.wait() == 130
    (step,) = launch.steps(folder / "stopped")
    assert list(launch.losses(folder / "stopped")) == list(range(1, step + 1))


def test_the_rows_of_the_held_out_loss_do_not_depend_on_the_seed(folder):
    once = f"--steps 1 --lr 0 --eval_data {folder}/held_out.jsonl --eval_every 1 --eval_tokens 64 --packing false"
    for seed in (1, 2):
        train(folder, f"seed-{seed}", f"{once} --seed {seed}")
    first, second = (launch.rows(folder / f"seed-{seed}") for seed in (1, 2))
    (first, second) = ([row["val_loss"] for row in rows if "val_loss" in row] for rows in (first, second))
    assert first == second and len(first) == 1


def test_bad_held_out_rows_are_skipped_and_counted_too(folder):
    lines = (folder / "held_out.jsonl").read_text().splitlines()
    (folder / "holes.jsonl").write_text("\n".join([*lines[:3], "{not json", *lines[3:5]]))
    text = train(folder, "holes", f"--steps 1 --eval_data {folder}/holes.jsonl --on_bad_line skip")
    (line,) = (line for line in text.splitlines() if line.startswith("held out"))
    assert line.startswith("held out, 5 of them asked: 5 rows, ") and "1 bad rows skipped" in line
    assert "exact answers to 5 held-out questions" in text


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ("--init_from {folder}/nowhere", ["--init_from {folder}/nowhere: no such folder"]),
        ("--init_from none", ["--init_from none: no such folder"]),
        ("--data {folder}/nowhere.jsonl", ["nowhere.jsonl"]),
        ("--data ,", ["--data ,: names no file"]),
        ("--data {folder}/broken.jsonl", ["broken.jsonl, row 2", "--on_bad_line skip"]),
        ("--eval_data {folder}/nowhere.jsonl", ["nowhere.jsonl"]),
        ("--tune prefix --packing true", ["--packing true: the virtual tokens of --tune prefix stand before one text"]),
        ("--tune prompt --n_virtual 64", ["--seq_len 64", "beside the virtual tokens of --n_virtual 64"]),
        ("--seq_len 1000", ["--seq_len 1000", "longest context is 128; lower it"]),
        ("--epochs 0", ["--epochs 0"]),
        ("--epochs 3", ["--epochs 3: are", "steps, and --steps says 2; leave one of them out"]),
        ("--template none", ["--template none"]),
        ("--batch_size 0", ["--batch_size 0", "at least 1"]),
        ("--init_from {folder}/narrow", ["narrow: its tokenizer has", "more than the model's 50"]),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(folder, more, words):
    lines = (folder / "train.jsonl").read_text().splitlines()
    (folder / "broken.jsonl").write_text(lines[0] + "\n{not json\n")
    narrow = Transformer(ModelConfig(vocab_size=50, dim=16, n_layers=1, n_heads=2, max_seq_len=64))
    Tokenizer.load(folder / "data").save(folder / "narrow")
    save_model(narrow, folder / "narrow")
    text = train(folder, "refused", "--steps 2 " + more.format(folder=folder), status=2)
    (line,) = (line for line in text.splitlines() if line.startswith("error: "))
    assert text.endswith(line + "\n") and "Traceback" not in text
    assert all(word.format(folder=folder) in line for word in words), line


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ("--data {folder}/held_out.jsonl", ["another data"]),
        ("--template simple", ["another data"]),
        ("--packing false", ["another batch size"]),
    ],
)
def test_going_on_with_other_data_is_refused(folder, more, words):
    if not (folder / "begun").exists():
        train(folder, "begun", "--steps 2")
    text = train(folder, "begun", "--steps 4 " + more.format(folder=folder), status=2)
    assert all(word in text for word in words) and "--allow_data_change" in text and "Traceback" not in text


def test_held_out_answers_are_scored_as_often_as_asked_and_the_template_goes_along(folder):
    """--eval_every does something here too, and a checkpoint tells how its questions were put."""
    for ranks in (1, 2):
        more = f"--steps 4 --eval_every 2 --template simple --eval_data {folder}/held_out.jsonl"
        text = train(folder, f"scored-{ranks}", more, ranks=ranks)
        assert "step 2: held-out answers" in text
    one, two = (
        {row["step"]: row["val_loss"] for row in launch.rows(folder / f"scored-{ranks}") if "val_loss" in row}
        for ranks in (1, 2)
    )
    assert list(one) == [2, 4] and two == pytest.approx(one, abs=1e-4)
    checkpoint = folder / "scored-1" / "step-00000004"
    written = json.loads((checkpoint / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert written["chat_template"] == JINJA["simple"]
    state = json.loads((checkpoint / "resume" / "train_state.json").read_text(encoding="utf-8"))
    assert state["turns"] == 1  # what `chat` asks
