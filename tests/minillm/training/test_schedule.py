import dataclasses

import pytest

from minillm.training.config import TrainingConfig
from minillm.training.schedule import Schedule, lr_at

SCHEDULE = Schedule(lr=1.0, steps=100, warmup=10, shape="cosine", min_ratio=0.1, decay=0.2)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ("constant", {0: 0.1, 9: 1.0, 10: 1.0, 99: 1.0}),
        ("cosine", {0: 0.1, 10: 1.0, 55: 0.55, 100: 0.1}),
        ("wsd", {0: 0.1, 10: 1.0, 80: 1.0, 90: 0.55, 100: 0.1}),
    ],
)
def test_schedules_at_known_points(shape, expected):
    schedule = dataclasses.replace(SCHEDULE, shape=shape)
    for step, value in expected.items():
        assert lr_at(step, schedule) == pytest.approx(value)


def test_no_warmup_and_all_warmup():
    assert lr_at(0, dataclasses.replace(SCHEDULE, warmup=0)) == 1.0
    assert lr_at(99, dataclasses.replace(SCHEDULE, warmup=100)) == 1.0


def test_options_have_all_that_the_learning_rate_needs():
    schedule = Schedule.of(TrainingConfig(lr=0.5, steps=100, warmup_steps=10, min_lr_ratio=0.1))
    assert lr_at(0, schedule) == pytest.approx(0.05) and lr_at(9, schedule) == 0.5
    assert lr_at(100, schedule) == pytest.approx(0.05)
    usual = [Schedule.of(TrainingConfig(lr=0.5, steps=steps)).warmup for steps in (5, 20, 200, 2000)]
    assert usual == [0, 2, 20, 20]
