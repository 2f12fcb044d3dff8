import dataclasses

import pytest

from minillm.base.errors import UserError
from minillm.training.config import TrainingConfig, summary
from minillm.training.schedule import Schedule, lr_at, rate_change, saved_schedule

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


def test_the_options_of_a_run_make_a_schedule():
    schedule = Schedule.of(TrainingConfig(lr=1e-3, steps=100))
    assert lr_at(0, schedule) == pytest.approx(1e-4) and lr_at(10, schedule) == pytest.approx(1e-3)


def test_no_warmup_and_all_warmup():
    assert lr_at(0, dataclasses.replace(SCHEDULE, warmup=0)) == 1.0
    assert lr_at(99, dataclasses.replace(SCHEDULE, warmup=100)) == 1.0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            dict(steps=2, warmup_steps=500),
            ["--warmup_steps 500: all 2 steps are warm-up; the learning rate ends at 0.4 %"],
        ),
        (dict(steps=4, warmup_steps=4), ["--warmup_steps 4: all 4 steps are warm-up; the learning rate ends at 100 %"]),
        (
            dict(steps=2, schedule="wsd"),
            ["--decay_share 0.2: rounds to none of 2 steps; the learning rate never falls"],
        ),
        (dict(steps=2, schedule="wsd", decay_share=0.0), []),
        (dict(steps=5, warmup_steps=4), []),
        *((dict(steps=steps), []) for steps in (1, 2, 20)),
    ],
)
def test_a_warm_up_or_decay_that_the_run_is_too_short_for_is_said(options, said):
    options = TrainingConfig(lr=0.5, **options)
    lines = summary(options).splitlines()
    assert [line for line in lines if "learning rate" in line] == [line for line in lines if line.startswith("--")]
    assert all(line.startswith(start) for line, start in zip(lines[2:], said, strict=True))

    # which is what the rates of all steps say
    rates = [lr_at(step, Schedule.of(options)) for step in range(options.steps)]
    if options.warmup_steps and options.steps <= options.warmup_steps:
        assert f"{100 * max(rates) / options.lr:.3g} % of the peak" in lines[2]
    else:
        assert max(rates) == options.lr
    assert not said or rates == sorted(rates)


def test_options_have_all_that_the_learning_rate_needs():
    schedule = Schedule.of(TrainingConfig(lr=0.5, steps=100, warmup_steps=10, min_lr_ratio=0.1))
    assert lr_at(0, schedule) == pytest.approx(0.05) and lr_at(9, schedule) == 0.5
    assert lr_at(100, schedule) == pytest.approx(0.05)
    usual = [Schedule.of(TrainingConfig(lr=0.5, steps=steps)).warmup for steps in (5, 20, 200, 2000)]
    assert usual == [0, 2, 20, 20]


@pytest.mark.parametrize(
    ("shape", "step", "changes", "words"),
    [
        # finished, then lengthened: by hand, cos(π 90/190) = 0.0826 and so 0.1 + 0.9 · 0.5413
        (
            "cosine",
            100,
            {"steps": 200},
            "learning rate: 1.00e-01 in step 100, now 5.87e-01 in step 101, then 1.00e-01 in step 200: 5.9 times "
            "the last, which --schedule constant --lr 0.1 would keep",
        ),
        (
            "wsd",
            100,
            {"steps": 200},
            "learning rate: 1.45e-01 in step 100, now 1.00e+00 in step 101, then 1.23e-01 in step 200: 6.9 times "
            "the last, which --schedule constant --lr 0.145 would keep",
        ),
        # lengthened before it falls, shortened, another peak: said, but nothing rises
        ("wsd", 50, {"steps": 200}, "1.00e+00 in step 50, now 1.00e+00 in step 51, then 1.23e-01 in step 200"),
        ("cosine", 55, {"steps": 60}, "now 1.22e-01 in step 56, then 1.01e-01 in step 60"),
        ("constant", 50, {"lr": 0.5}, "learning rate: 1.00e+00 in step 50, now 5.00e-01 in step 51, then 5.00e-01"),
        ("constant", 50, {"shape": "cosine"}, "1.00e+00 in step 50, now 6.28e-01 in step 51"),
        # in the warm-up a rise is what is planned
        ("constant", 5, {"lr": 2.0}, "5.00e-01 in step 5, now 1.20e+00 in step 6, then 2.00e+00 in step 10, then"),
        # nothing changes in the steps to come
        ("constant", 50, {"steps": 200}, ""),
        ("cosine", 50, {}, ""),
        ("wsd", 50, {"warmup": 20}, ""),
    ],
)
def test_a_changed_schedule_is_said_with_what_the_rate_will_do(shape, step, changes, words):
    before = dataclasses.replace(SCHEDULE, shape=shape)
    line = rate_change(before, dataclasses.replace(before, **changes), step, may_be_constant=True)
    assert line.endswith(words) or words in line
    assert bool(line) == bool(words)
    assert ("would keep" in line) == ("would keep" in words)


def test_a_rising_rate_gives_advice_only_where_it_can_be_followed():
    after = dataclasses.replace(SCHEDULE, shape="wsd", steps=200)
    line = rate_change(dataclasses.replace(SCHEDULE, shape="wsd"), after, 100, may_be_constant=False)
    assert line.startswith("learning rate: 1.45e-01 in step 100, now 1.00e+00") and "would keep" not in line
    line = rate_change(dataclasses.replace(SCHEDULE, lr=0.0), SCHEDULE, 20, may_be_constant=True)
    assert line.startswith("learning rate: 0.00e+00 in step 20, now") and "would keep" not in line


def test_the_schedule_of_a_checkpoint_is_read_from_its_options():
    now = TrainingConfig(lr=0.5, steps=200, warmup_steps=None)
    saved = {"lr": 0.25, "steps": 100, "warmup_steps": None, "schedule": "wsd", "unknown": [1]}
    before = saved_schedule(saved, now)
    assert before == Schedule.of(dataclasses.replace(now, lr=0.25, steps=100, schedule="wsd"))
    assert saved_schedule({}, now) == Schedule.of(now)
    for damaged in ({"steps": "many"}, {"lr": [1]}, {"lr": float("nan")}, {"schedule": 3}, {"decay_share": 7}):
        with pytest.raises(UserError, match=f"--{next(iter(damaged))} "):
            saved_schedule(damaged, now)


@pytest.mark.parametrize(
    "shape, decay, begins", [("wsd", 0.2, 80), ("wsd", 1.0, 10), ("wsd", 0.0, 100), ("cosine", 0.2, 100)]
)
def test_the_decay_begins_with_the_first_step_at_the_peak_that_the_next_falls_from(shape, decay, begins):
    schedule = Schedule(lr=1.0, steps=100, warmup=10, shape=shape, min_ratio=0.1, decay=decay)
    assert schedule.decay_begins == begins
    if shape == "wsd":
        rates = [lr_at(step, schedule) for step in range(10, 100)]
        assert [step for step in range(10, 100) if rates[step - 10] < 1] == list(range(begins + 1, 100))
