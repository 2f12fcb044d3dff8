"""Scripts under --shard, as processes: the losses of whole copies, questions asked on all ranks, and a checkpoint."""

import pytest

from tests import launch
from tests.test_train_dpo import OPTIONS, write_pairs

SHARDED = pytest.mark.parametrize(
    ("script", "more"),
    [
        ("dpo", "--epochs 0.2 --optimizer adamw"),
        ("dpo", "--epochs 0.2 --tune lora --lora_rank 2"),
        ("dpo", "--epochs 0.2 --optimizer adamw --loss kto"),  # in the last step rank 1 has nothing to compare
        ("reward", "--steps 3 --optimizer adamw --save_every 2"),
    ],
)


@pytest.mark.slow
@SHARDED
def test_shards_learn_from_preferences_as_whole_copies_do(tmp_path, script, more):
    launch.write_corpus(tmp_path / "data")
    base = f"--data {tmp_path}/data --out {tmp_path}/base {launch.SMALL} --steps 4 --max_seq_len 128"
    launch.finish("pretrain", base, tmp_path / "log-base")
    train = write_pairs(tmp_path / "train.jsonl", 60)
    held_out = write_pairs(tmp_path / "held_out.jsonl", 11, seed=1)
    option = {"dpo": "--eval_pairs", "reward": "--eval_data"}[script]
    common = f"--data {train} {option} {held_out} --init_from {tmp_path}/base {OPTIONS} --eval_every 1 {more}"
    for shard in (1, 2):
        options = f"{common} --shard {shard} --out {tmp_path}/{script}-{shard}"
        launch.finish(script, options, tmp_path / f"log-{shard}", ranks=2)
    whole, divided = (tmp_path / f"{script}-{shard}" for shard in (1, 2))
    assert launch.losses(divided) == pytest.approx(launch.losses(whole), abs=2e-6) != {}
    assert launch.norms(divided) == pytest.approx(launch.norms(whole), rel=1e-5)
    watched = [[row for row in launch.rows(run) if "loss" not in row] for run in (whole, divided)]
    assert len(watched[0]) > 1
    for one, other in zip(*watched, strict=True):
        assert other == pytest.approx(one, rel=1e-3, abs=1e-4)
