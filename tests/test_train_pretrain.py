import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch

import train_pretrain
from minillm.base.command_line import parse
from minillm.base.errors import UserError
from minillm.base.options import declared
from minillm.datasets.token_bins import TokenBins
from minillm.datasets.windows import TokenWindows
from minillm.distributed.ranks import Ranks
from minillm.model.config import ModelConfig, preset
from minillm.model.transformer import Transformer
from minillm.tokenizer.tokenizer import Tokenizer
from minillm.training import starting_model
from minillm.training.config import too_little
from minillm.training.step import seed_step
from tests import launch
from train_pretrain import Config, notes, open_windows

OPTIONS = f"{launch.SMALL} --micro_batch_size 2"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with the corpus in data/; each test's runs go beside it."""
    here = tmp_path_factory.mktemp("pretrain")
    launch.write_corpus(here / "data")
    return here


def options(folder: Path, out: str, more: str = "") -> str:
    return f"--data {folder}/data --out {folder}/{out} {OPTIONS} {more}"


def train(folder: Path, out: str, more: str = "", **how) -> str:
    return launch.finish("pretrain", options(folder, out, more), folder / "log" / out, **how)


@pytest.fixture(scope="module")
def straight(folder) -> dict[int, float]:
    """Losses of 20 steps at a constant learning rate on one rank."""
    train(folder, "constant", "--steps 20 --schedule constant")
    return launch.losses(folder / "constant")


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_stopped_and_resumed_is_bit_for_bit_the_run_never_stopped(folder, optimizer):
    more = f"--steps 40 --optimizer {optimizer} --dropout 0.1 --eval_every 10"
    straight, broken = folder / f"straight-{optimizer}", folder / f"broken-{optimizer}"
    train(folder, straight.name, more)

    (process,) = launch.start("pretrain", options(folder, broken.name, f"{more} --save_every 20"), folder / "broken")
    process.wait_for_checkpoint(broken, 20)
    process.kill(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    text = train(folder, broken.name, more)

    assert "--save_every: 20 in the checkpoint, 500 now" in text
    assert launch.tensors(broken, 40) == launch.tensors(straight, 40)
    assert launch.losses(broken) == launch.losses(straight) and len(launch.losses(broken)) == 40
    scores = [
        {row["step"]: row["val_loss"] for row in launch.rows(run) if "val_loss" in row} for run in (broken, straight)
    ]
    assert scores[0] == scores[1] and list(scores[0]) == [10, 20, 30, 40]


def test_every_field_of_the_model_is_an_option_with_the_same_help_and_range():
    options, fields = declared(Config), declared(ModelConfig)
    assert fields.keys() - {"vocab_size", "trained_seq_len"} <= options.keys()
    for name in fields.keys() - {"vocab_size", "trained_seq_len"}:
        assert dataclasses.replace(options[name], group="") == dataclasses.replace(fields[name], group=""), name
    fields_without_help = {field.name for field in dataclasses.fields(ModelConfig)} - fields.keys()
    # the first is an option of its own, which needs the model's context; the second makes another kind of model
    assert fields_without_help == {"rope_scaling", "score_head"}


def test_what_a_run_writes_down_makes_the_same_run(folder):
    """options.toml has every option: those of the command line, the defaults, and what the run chose by itself."""
    text = train(folder, "told", "--steps 3 --softcap 20")
    run = folder / "told"
    (line,) = [line for line in text.replace("\n  ", " ").splitlines() if line.startswith("not the defaults: ")]
    given = ("steps = 3", "softcap = 20.0", "dim = 32", "optimizer = muon", "document_attention = false")
    assert all(words in line for words in given) and "none" not in line and "keep_last" not in line
    written = tomllib.loads((run / "options.toml").read_text(encoding="utf-8"))
    assert written.keys() == {field.name for field in dataclasses.fields(Config)}
    assert written["lr"] == 2e-3 and written["init_from"] == "none" and written["preset"] == "tiny"
    assert (run / "step-00000003" / "resume" / "options.toml").read_bytes() == (run / "options.toml").read_bytes()
    again = f"--config {run}/options.toml --out {folder}/retold"
    launch.finish("pretrain", again, folder / "log" / "retold")
    assert launch.tensors(folder / "retold", 3) == launch.tensors(run, 3)
    assert written | {"out": f"{folder}/retold"} == tomllib.loads((folder / "retold" / "options.toml").read_text())


def test_dropout_is_not_the_same_every_step(folder):
    """With weights that stay as drawn the losses tell the masks: each step has those of its own number."""
    train(folder, "dropout", "--steps 3 --lr 0 --dropout 0.3")
    config = ModelConfig(
        vocab_size=400, dim=32, n_layers=2, n_heads=2, n_kv_heads=1, ffn_dim=64, max_seq_len=512, dropout=0.3
    )
    model = Transformer(config)
    model.init_weights(seed=0)
    windows = TokenWindows([(TokenBins(folder / "data", "train"), 1.0)], 32, seed=0)

    def loss(step: int, masks_of: int) -> float:
        seed_step(0, masks_of, rank=0)
        batches = [windows.batch(np.arange(row, row + 2)) for row in range(8 * (step - 1), 8 * step, 2)]
        with torch.no_grad():
            nats = sum(float(model(batch.x, batch.y, mask=batch.mask)) for batch in batches)
        return nats / sum(batch.n_targets() for batch in batches)

    trained = launch.losses(folder / "dropout")
    assert trained == pytest.approx({step: loss(step, step) for step in (1, 2, 3)}, abs=1e-6)
    assert all(abs(trained[step] - loss(step, 1)) > 1e-4 for step in (2, 3))


def test_two_ranks_take_the_same_steps_as_one(folder, straight):
    train(folder, "two", "--steps 20 --schedule constant", ranks=2)
    assert launch.losses(folder / "two") == pytest.approx(straight, abs=1e-5)
    assert launch.norms(folder / "two") == pytest.approx(launch.norms(folder / "constant"), rel=1e-3)


def test_the_first_step_is_the_mean_over_the_global_batch(folder, straight):
    """Computed here from the pieces, in one pass over all rows and with torch's own loss."""
    config = ModelConfig(
        vocab_size=400, dim=32, n_layers=2, n_heads=2, n_kv_heads=1, ffn_dim=64, max_seq_len=512, tie_embeddings=True
    )
    model = Transformer(config)
    model.init_weights(seed=0)
    windows = TokenWindows([(TokenBins(folder / "data", "train"), 1.0)], 32, seed=0)
    batch = windows.batch(np.arange(8))
    targets = batch.y.flatten()
    is_bos = targets == 1
    assert 0 < is_bos.sum() < 20  # given at the beginning of each document, so no target
    loss = torch.nn.functional.cross_entropy(model(batch.x).flatten(0, 1)[~is_bos], targets[~is_bos])
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    assert straight[1] == pytest.approx(loss.item(), abs=1e-5)
    assert launch.norms(folder / "constant")[1] == pytest.approx(norm.item(), rel=1e-4)


def test_going_on_with_another_number_of_ranks(folder, straight):
    for steps, ranks in ((7, 1), (13, 2), (20, 1)):
        text = train(folder, "changing", f"--steps {steps} --schedule constant", ranks=ranks)
        if steps > 7:
            assert f"ranks: {3 - ranks} in the checkpoint, {ranks} now" in text
    assert launch.losses(folder / "changing") == pytest.approx(straight, abs=1e-5)


def test_the_size_of_micro_batches_changes_nothing_but_rounding(folder, straight):
    train(folder, "whole", "--steps 5 --schedule constant --micro_batch_size 8")
    train(folder, "recomputed", "--steps 5 --schedule constant --checkpoint_activations")
    first = {step: straight[step] for step in range(1, 6)}
    assert launch.losses(folder / "whole") == pytest.approx(first, abs=1e-5)
    assert launch.losses(folder / "recomputed") == pytest.approx(first, abs=1e-6)


def z_losses(run: Path) -> dict[int, float]:
    return {row["step"]: row["z_loss"] for row in launch.rows(run) if "z_loss" in row}


@pytest.fixture(scope="module")
def with_z_loss(folder) -> tuple[dict, dict, dict]:
    """Loss, z-loss and gradient norm of 5 steps with --z_loss, in one micro-batch of 8."""
    train(folder, "z", "--steps 5 --schedule constant --z_loss 0.01 --micro_batch_size 8")
    return launch.losses(folder / "z"), z_losses(folder / "z"), launch.norms(folder / "z")


def test_the_z_loss_is_palms_and_the_logged_loss_is_the_cross_entropy_alone(folder, straight, with_z_loss):
    """The first step computed here from the pieces, by autograd of the formula in fp64."""
    config = ModelConfig(
        vocab_size=400, dim=32, n_layers=2, n_heads=2, n_kv_heads=1, ffn_dim=64, max_seq_len=512, tie_embeddings=True
    )
    model = Transformer(config)
    model.init_weights(seed=0)
    model.double()
    windows = TokenWindows([(TokenBins(folder / "data", "train"), 1.0)], 32, seed=0)
    batch = windows.batch(np.arange(8))
    z = model(batch.x)[batch.mask]
    log_z = z.exp().sum(-1).log()
    cross_entropy = (log_z - z[torch.arange(len(z)), batch.y[batch.mask]]).mean()
    z_loss = 0.01 * log_z.square().mean()
    (cross_entropy + z_loss).backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()

    logged, added, norms = with_z_loss
    assert logged[1] == pytest.approx(cross_entropy.item(), abs=1e-5) == pytest.approx(straight[1], abs=1e-5)
    assert added[1] == pytest.approx(z_loss.item(), rel=1e-5)
    assert norms[1] == pytest.approx(norm.item(), rel=1e-4)
    assert abs(norms[1] - launch.norms(folder / "constant")[1]) > 1e-3 * norms[1]
    assert added[5] < added[1] and not z_losses(folder / "constant")
    assert [row["val_loss"] < 6 for row in launch.rows(folder / "z") if "val_loss" in row] == [True]


@pytest.mark.parametrize(
    ("more", "ranks"),
    [
        ("--micro_batch_size 1", 1),
        ("--micro_batch_size 2", 1),
        ("--micro_batch_size 4", 1),
        ("--impl reference", 1),
        ("--micro_batch_size 4", 2),
        ("--shard 2", 2),
        ("--tensor_parallel 2", 2),
        ("--context_parallel 2", 2),
    ],
)
def test_the_z_loss_is_the_same_however_a_batch_is_cut(folder, with_z_loss, more, ranks):
    out = f"z {more} {ranks}".replace(" ", "-")
    # tensor parallelism divides heads, so there must be two of each
    shape = "--n_kv_heads 2" if "tensor" in more else ""
    logged, added, norms = with_z_loss
    if shape:
        train(folder, "z-heads", f"--steps 5 --schedule constant --z_loss 0.01 {shape}")
        logged, added = launch.losses(folder / "z-heads"), z_losses(folder / "z-heads")
        norms = launch.norms(folder / "z-heads")
    train(folder, out, f"--steps 5 --schedule constant --z_loss 0.01 {more} {shape}", ranks=ranks)
    assert launch.losses(folder / out) == pytest.approx(logged, abs=1e-5)
    assert z_losses(folder / out) == pytest.approx(added, rel=1e-4)
    assert launch.norms(folder / out) == pytest.approx(norms, rel=1e-3)


def test_a_run_goes_on_with_the_z_loss_that_it_began_with(folder, with_z_loss):
    for other in ("", "--z_loss 0.1"):
        text = train(folder, "z", f"--steps 6 --schedule constant {other}", status=2)
        assert "made with another loss (--z_loss: 0.01 in the checkpoint" in text
    train(folder, "z", "--steps 6 --schedule constant --z_loss 0.01")
    assert sorted(z_losses(folder / "z")) == [1, 2, 3, 4, 5, 6]


def test_a_batch_that_no_number_divides_is_computed_in_few_parts(folder):
    """Of 37 sequences 19 and 18, which is the step of one pass over all; and what it writes down is read back."""
    more = f"--data {folder}/data {launch.SMALL} --batch_size 37 --schedule constant"
    launch.finish("pretrain", f"{more} --steps 3 --out {folder}/prime", folder / "log" / "prime")
    launch.finish("pretrain", f"{more} --steps 3 --micro_batch_size 37 --out {folder}/once", folder / "log" / "once")
    assert launch.losses(folder / "prime") == pytest.approx(launch.losses(folder / "once"), abs=1e-5)
    assert launch.norms(folder / "prime") == pytest.approx(launch.norms(folder / "once"), rel=1e-4)
    told = folder / "prime" / "options.toml"
    assert tomllib.loads(told.read_text())["micro_batch_size"] == 19
    again = f"--config {told} --out {folder}/prime-again"
    launch.finish("pretrain", again, folder / "log" / "prime-again")
    assert launch.tensors(folder / "prime-again", 3) == launch.tensors(folder / "prime", 3)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_lower_precision_trains_almost_alike_and_resumes(folder, straight, dtype):
    out = f"{dtype}"
    train(folder, out, f"--steps 4 --schedule constant --dtype {dtype}")
    text = train(folder, out, f"--steps 8 --schedule constant --dtype {dtype}")
    losses = launch.losses(folder / out)
    assert "--steps: 4 in the checkpoint, 8 now" in text
    assert list(losses) == list(range(1, 9))
    assert losses[8] == pytest.approx(straight[8], abs=0.3) and losses[8] < losses[1]
    state = json.loads((folder / out / "step-00000008" / "resume" / "train_state.json").read_text())
    if dtype == "float16":  # good steps in a row since the beginning, not since resuming
        assert state["scaler"]["_growth_tracker"] == 8


def test_float16_may_follow_float32_and_the_other_way_round(folder):
    for steps, dtype in ((2, "float32"), (4, "float16"), (6, "float32")):
        train(folder, "mixed", f"--steps {steps} --schedule constant --dtype {dtype}")
    assert list(launch.losses(folder / "mixed")) == [1, 2, 3, 4, 5, 6]


def test_metrics_have_the_promised_columns_and_the_end_says_where_all_is(folder):
    text = train(folder, "shown", "--steps 6 --eval_every 3 --save_every 2 --keep_last 2", hidden=())
    rows = launch.rows(folder / "shown")
    for row in rows:
        if "loss" in row:
            assert set(row) == {"step", "loss", "lr", "grad_norm", "tokens_per_s", "mfu", "time_s"}
            assert 0 < row["mfu"] < 2
        else:
            assert {"step", "val_loss", "val_bpb"} <= set(row)
    assert [row["step"] for row in rows] == [1, 2, 3, 3, 4, 5, 6, 6]
    times = [row["time_s"] for row in rows if "loss" in row]
    assert times == sorted(times)
    assert launch.steps(folder / "shown") == [4, 6]
    assert (folder / "shown" / "curve.png").stat().st_size > 1000
    for words in (
        "dim = 32",
        "step 3: val_loss ",
        "validation: ",
        "bits per byte",
        "a sample:",
        "step-00000006",
        "curve.png",
        "next: ",
    ):
        assert words in text, words

    again = train(folder, "shown", "--steps 6 --eval_every 3 --save_every 2 --keep_last 2")
    assert "has finished its 6 steps" in again
    assert launch.rows(folder / "shown") == rows

    # ended between the last step and the end of what follows it: that is done again, and no step
    (folder / "shown" / "concluded.json").unlink()
    again = train(folder, "shown", "--steps 6 --eval_every 3 --save_every 2 --keep_last 2")
    assert "validation: " in again and "a sample:" in again and "next: " in again
    assert list(launch.losses(folder / "shown")) == list(range(1, 7))
    assert "has finished its 6 steps" in train(folder, "shown", "--steps 6")

    longer = train(folder, "shown", "--steps 8")
    assert "--steps: 6 in the checkpoint, 8 now" in longer
    assert launch.rows(folder / "shown")[-1]["step"] == 8
    assert launch.rows(folder / "shown")[-2]["time_s"] > times[-1]


def test_continuing_from_a_model_starts_at_its_loss_and_at_step_1(folder, straight):
    said = "a lower one keeps more of what"
    assert said not in train(folder, "onward", f"--steps 2 --init_from {folder}/constant --lr 1e-4")
    losses = launch.losses(folder / "onward")
    assert list(losses) == [1, 2]
    assert losses[1] < straight[1] - 0.5 and losses[1] == pytest.approx(straight[20], abs=0.5)
    without_lr = options(folder, "as_new", f"--steps 1 --init_from {folder}/constant").replace("--lr 2e-3", "")
    assert said in launch.finish("pretrain", without_lr, folder / "log" / "as_new")


def test_a_continued_run_needs_the_model_it_began_from_no_more(folder, straight):
    """Unless that is the frozen base of what it trains."""
    base = folder / "base"
    shutil.copytree(folder / "constant" / "step-00000020", base)
    more = f"--init_from {base} --max_seq_len 1024 --rope_scaling yarn:2 --save_every 1"
    train(folder, "grown", f"{more} --steps 2")
    shutil.rmtree(base)
    train(folder, "grown", f"{more} --steps 4")
    assert list(launch.losses(folder / "grown")) == [1, 2, 3, 4]
    branch = folder / "branch"
    branch.mkdir()
    shutil.copytree(folder / "grown" / "step-00000003", branch / "step-00000003")
    train(folder, "branch", f"{more} --steps 4")
    assert launch.tensors(branch, 4) == launch.tensors(folder / "grown", 4)
    alone = Ranks(0, 1, torch.device("cpu"))
    for out, tune in (("grown", "lora"), ("new", "full")):
        with pytest.raises(UserError, match=f"{base}: no such folder"):
            starting_model.find_init(Config(out=str(folder / out), init_from=str(base), tune=tune), alone)


def test_a_model_whose_tokenizer_is_not_read_goes_on_with_ids_alone(folder, straight):
    model = folder / "model"
    shutil.copytree(folder / "constant" / "step-00000020", model)
    for name in ("tokenizer.model", "manifest.json"):
        (model / name).unlink()
    (model / "tokenizer.json").rename(model / "tekken.json")  # a kind that is not read
    more = options(folder, "unread", f"--steps 2 --init_from {model}")
    text = launch.finish("pretrain", more, folder / "log" / "unread", status=2)
    assert "Traceback" not in text and "its tokenizer is a tekken.json, but only tokenizer.model" in text
    ids = next((folder / "data").glob("train-*.bin"))
    more += f" --data {ids} --data_dtype uint16 --data_vocab_size 400"
    launch.finish("pretrain", more, folder / "log" / "unread")
    assert launch.losses(folder / "unread")[1] < straight[1] - 0.5


def test_what_other_tools_would_read_otherwise_is_said(folder):
    tokenizer = Tokenizer.load(folder / "data")
    after_eos = tokenizer.with_settings(add_bos=False, after_eos=True)
    shape = dict(vocab_size=tokenizer.vocab_size, dim=16, n_layers=1, n_heads=2)
    assert notes(tokenizer, ModelConfig(**shape), folder) == []
    (line,) = notes(after_eos, ModelConfig(**shape), folder)
    assert "--wrap bos_eos" in line
    (line,) = notes(tokenizer, ModelConfig(**shape, qkv_bias=True), folder)
    assert "PreTrainedTokenizerFast" in line


@pytest.mark.parametrize(
    "given",
    [
        ["--data", "data/bundled/"],
        ["--data", "./data/bundled:1,nowhere:1"],
        ["--data", "nowhere:1,data/bundled:1"],
        ["--data", "nowhere", "--schedule", "wsd", "--decay_data", "data/bundled"],
    ],
)
def test_the_bundled_corpus_is_written_however_its_folder_is_named(tmp_path, monkeypatch, given):
    def build():
        raise UserError("the corpus is being written")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_pretrain.bundled, "build", build)
    monkeypatch.setattr(sys, "argv", ["train_pretrain.py", "--device", "cpu", *given])
    with pytest.raises(UserError, match="is being written"):
        train_pretrain.main()


def test_mixtures_documents_and_raw_bins(folder):
    other = launch.write_corpus(folder / "other" / "data", seed=0)  # the same text, so the same tokenizer
    mixture = f"{folder}/data:3,{other}:1"
    launch.finish("pretrain", options(folder, "mixture", f"--data {mixture} --steps 2"), folder / "log" / "mixture")
    train(folder, "documents", "--steps 2 --document_attention")
    raw = folder / "raw.bin"
    np.random.default_rng(0).integers(0, 300, 20_000).astype("<u2").tofile(raw)
    more = f"--data {raw} --data_dtype uint16 --data_vocab_size 300 --steps 2"
    text = launch.finish("pretrain", options(folder, "raw", more), folder / "log" / "raw")
    assert text.endswith(f"next: python -m minillm plot {folder}/raw\n")  # it has no tokenizer to be taught with
    for out in ("mixture", "documents", "raw"):
        assert list(launch.losses(folder / out)) == [1, 2] and launch.steps(folder / out) == [2]
    assert not (folder / "raw" / "step-00000002" / "tokenizer.model").exists()


@pytest.mark.parametrize("more", ["--data_dtype uint32", "--data_vocab_size 7"])
def test_what_describes_a_raw_bin_is_refused_where_there_is_none(folder, more):
    text = train(folder, "described", f"--steps 2 {more}", status=2)
    assert f"error: {more}: means nothing without a raw .bin" in text
    raw = folder / "described.bin"
    np.full(200, 5, dtype="<u2").tofile(raw)
    config = parse(Config, "", ["--data", str(raw), "--data_dtype", "uint16", "--data_vocab_size", "7"])
    assert open_windows(config)[1].sources[0].vocab_size == 7


def test_data_of_the_decay_is_read_from_its_first_step_on_and_resumed_bit_for_bit(folder):
    """Until the decay a run is the one without; a run stopped on either side of the border ends as the whole one."""
    other = launch.write_corpus(folder / "late" / "data", seed=0)  # the same text, so the same tokenizer
    wsd = "--steps 20 --schedule wsd --decay_share 0.5 --save_every 4 --keep_last 0"
    mixture = f"--decay_data {folder}/data:1,{other}:3"
    train(folder, "no-decay", wsd)
    said = train(folder, "decay", f"{wsd} {mixture}")
    assert f"{folder}/data:1,{other}:3: read from step 11 on, while the learning rate falls" in said
    without, whole = launch.losses(folder / "no-decay"), launch.losses(folder / "decay")
    assert all(whole[step] == without[step] for step in range(1, 11))
    assert whole[11] != without[11]

    def copy_up_to(step: int, of: str, name: str) -> None:
        shutil.copytree(folder / of, folder / name)
        for later in range(step + 4, 21, 4):
            shutil.rmtree(folder / name / f"step-{later:08}")

    # from either side of the border, and from a run that chose no data of the decay yet
    for step, of in ((8, "decay"), (16, "decay"), (8, "no-decay")):
        name = f"{of}-{step}"
        copy_up_to(step, of, name)
        train(folder, name, f"{wsd} {mixture}")
        assert launch.losses(folder / name) == whole
        assert launch.tensors(folder / name, 20) == launch.tensors(folder / "decay", 20)

    # once some was read it stays
    copy_up_to(12, "decay", "changed")
    said = train(folder, "changed", wsd, status=2)
    assert "was made with another data of the decay" in said and "--decay_data" in said

    # lengthened after it began, the decay would begin elsewhere, and with it another order
    copy_up_to(12, "decay", "longer")
    said = train(folder, "longer", f"{wsd} {mixture} --steps 40", status=2)
    assert "step-00000012: the decay, which reads --decay_data, began after step 10 and would now after step 20" in said
    said = train(folder, "longer", f"{wsd} {mixture} --steps 40 --allow_data_change", status=0)
    assert "some texts come again and some never, as --allow_data_change allows" in said and "would keep" not in said
    copy_up_to(8, "decay", "lengthened")
    said = train(folder, "lengthened", f"{wsd} {mixture} --steps 40")
    assert "read from step 21 on" in said and "some never" not in said


def test_shorter_rows_keep_the_context_that_the_model_has(folder):
    """The preset's longest context is 512 tokens; a run with longer rows has theirs, and goes on with it."""
    train(folder, "long-rows", "--steps 2 --seq_len 600 --batch_size 2")
    more = "--steps 3 --seq_len 32 --batch_size 2"
    assert "accept it by --allow_data_change" in train(folder, "long-rows", more, status=2)
    said = train(folder, "long-rows", f"{more} --allow_data_change")
    assert "data: another order begins" in said and list(launch.losses(folder / "long-rows")) == [1, 2, 3]


def test_rows_of_whole_documents_resume_bit_for_bit_and_are_the_same_on_two_ranks(folder):
    more = "--steps 8 --save_every 4 --keep_last 0 --pack best_fit"
    said = train(folder, "packed", more)
    assert "of the documents are cut (by windows " in said
    whole = launch.losses(folder / "packed")
    shutil.copytree(folder / "packed", folder / "packed-4")
    shutil.rmtree(folder / "packed-4" / "step-00000008")
    train(folder, "packed-4", more)
    assert launch.tensors(folder / "packed-4", 8) == launch.tensors(folder / "packed", 8)
    train(folder, "packed-2", more, ranks=2)
    assert launch.losses(folder / "packed-2") == pytest.approx(whole, rel=1e-5)

    shutil.rmtree(folder / "packed-4" / "step-00000008")
    said = train(folder, "packed-4", "--steps 8", status=2)
    assert "--pack" in said and "choose another --out" in said


@pytest.mark.parametrize("more", ["--document_attention false", "--tune prefix --init_from x"])
def test_rows_of_whole_documents_need_attention_inside_them(more):
    with pytest.raises(UserError, match="--pack best_fit: "):
        parse(Config, "", f"--pack best_fit {more}".split())


@pytest.mark.parametrize("more", ["", "--schedule cosine", "--schedule wsd --decay_share 0", "--schedule constant"])
def test_data_of_a_decay_that_never_comes_is_refused(more):
    with pytest.raises(UserError, match="--decay_data: no step reads it"):
        parse(Config, "", f"--steps 20 --decay_data x {more}".split())


def test_a_raw_bin_that_changed_is_noticed_and_one_that_moved_is_not(folder):
    tokens = np.random.default_rng(0).integers(0, 300, 20_000).astype("<u2")
    where, moved = folder / "changing.bin", folder / "moved.bin"
    tokens.tofile(where)
    how = "--data_dtype uint16 --data_vocab_size 300"
    launch.finish("pretrain", options(folder, "bin", f"--data {where} {how} --steps 2"), folder / "log" / "bin")
    tokens.tofile(moved)
    launch.finish("pretrain", options(folder, "bin", f"--data {moved} {how} --steps 3"), folder / "log" / "bin")
    for changed in (np.roll(tokens, 1), np.append(tokens, [5]).astype("<u2")):
        changed.tofile(where)
        more = options(folder, "bin", f"--data {where} {how} --steps 4")
        text = launch.finish("pretrain", more, folder / "log" / "bin", status=2)
        assert "made with another data" in text and "or accept it by --allow_data_change" in text
    launch.finish("pretrain", f"{more} --allow_data_change", folder / "log" / "bin")


@pytest.mark.parametrize("split", ["train", "val"])
def test_bins_whose_content_changed_beside_the_same_meta_json_are_noticed(folder, split):
    data, out = folder / f"torn-{split}", f"of-torn-{split}"
    shutil.copytree(folder / "data", data)
    more = options(folder, out, f"--data {data} --save_every 2")
    launch.finish("pretrain", f"{more} --steps 2", folder / "log" / out)
    bin_file = data / f"{split}-00000.bin"
    whole = bin_file.read_bytes()
    bin_file.write_bytes(
        whole[: len(whole) // 2] + bytes(len(whole) - len(whole) // 2)
    )  # as of a copy that was cut short
    text = launch.finish("pretrain", f"{more} --steps 4", folder / "log" / out, status=2)
    assert "was made with another content of the data: choose" in text and "accept it by --allow_data_change" in text
    bin_file.write_bytes(whole)
    launch.finish("pretrain", f"{more} --steps 4", folder / "log" / out)


def test_tensorboard_holds_what_metrics_hold(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(folder, "board", "--steps 4 --tensorboard --schedule constant --save_every 2")
    shutil.rmtree(folder / "board" / "step-00000004")  # as if killed before it was there: steps 3 and 4 come again
    train(folder, "board", "--steps 6 --tensorboard --schedule constant")
    events = EventAccumulator(str(folder / "board" / "tensorboard")).Reload()
    logged = {event.step: event.value for event in events.Scalars("loss")}
    assert logged == pytest.approx(launch.losses(folder / "board")) and len(events.Scalars("loss")) == len(logged) == 6
    assert [event.step for event in events.Scalars("val_loss")] == [6]


@pytest.mark.slow
def test_torchrun_restarts_ranks_of_which_one_was_killed(folder, tmp_path):
    run, output = folder / "restarted", tmp_path / "output"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--max_restarts", "1"]
    more = options(folder, run.name, "--steps 100 --save_every 20 --timeout_s 20").split()
    with output.open("w") as stream:
        process = subprocess.Popen(
            [*command, "--nproc_per_node", "2", str(launch.ROOT / "train_pretrain.py"), *more],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            cwd=tmp_path,
            stdout=stream,
            stderr=stream,
        )
        until = time.monotonic() + 120
        try:
            while not launch.steps(run):
                assert process.poll() is None and time.monotonic() < until, output.read_text()
                time.sleep(0.01)
            os.kill(int((run / "lock").read_text().split()[1]), signal.SIGKILL)
            assert process.wait(60) == 0, output.read_text()
        finally:
            process.terminate()  # its ranks too, should they hang
    assert "weights from" in output.read_text() and list(launch.losses(run)) == list(range(1, 101))


@pytest.mark.slow
def test_torchrun_told_to_end_leaves_one_whole_checkpoint_and_the_rerun_goes_on(folder, straight, tmp_path):
    run, command = folder / "torchrun", [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    script = str(launch.ROOT / "train_pretrain.py")
    more = options(folder, run.name, "--steps 1000 --schedule constant").split()
    with (tmp_path / "output").open("w") as output:
        process = subprocess.Popen(
            [*command, "--nproc_per_node", "2", script, *more],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            cwd=tmp_path,
            stdout=output,
            stderr=output,
        )
        until = time.monotonic() + 120
        while not (run / "metrics.jsonl").exists() or not launch.rows(run):
            assert process.poll() is None and time.monotonic() < until, (tmp_path / "output").read_text()
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) != 0
    (step,) = launch.steps(run)
    assert f"stopped by signal 15 after step {step}" in (tmp_path / "output").read_text()

    train(folder, run.name, f"--steps {step + 2} --schedule constant", ranks=2)
    losses = launch.losses(run)
    assert list(losses) == list(range(1, step + 3))
    shared = {number: loss for number, loss in losses.items() if number in straight}
    assert shared == pytest.approx({number: straight[number] for number in shared}, abs=1e-5)


def test_defaults_that_are_too_little_for_a_model_are_said():
    """Those of the smallest preset; what was given is meant so, and a model to go on from has learnt already."""

    def lines(name, max_seq_len, **given):
        shape = preset(name, vocab_size=2048, max_seq_len=max_seq_len)
        return too_little(Config(preset=name, **given), shape)

    assert lines("tiny", 512) == []
    rows, steps = lines("124m", 1024)
    assert "rows of 128 tokens" in rows and steps.startswith("0.036 tokens a parameter")  # 1500·16·128 of 86.5 M
    assert "plan --preset 124m" in steps
    assert lines("124m", 1024, seq_len=1024, steps=10) == [] == lines("124m", 512, batch_size=512)
    assert lines("124m", 1024, init_from="DIR") == [rows]
