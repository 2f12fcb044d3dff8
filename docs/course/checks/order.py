"""Whether the exercises of lesson 7 are solved."""

import pytest


@pytest.mark.parametrize("n", [1, 2, 5, 64, 1000])
def test_every_window_is_found_where_it_is_read(answers, experiment, n):
    order = [experiment.permute(position, n, key=7) for position in range(n)]
    assert sorted(order) == list(range(n))
    assert [answers.unpermute(window, n, 7, experiment.mixed) for window in order] == list(range(n))


def test_an_order_too_long_to_be_stored(answers, experiment):
    n = 10**15 + 1
    assert experiment.permute(answers.unpermute(12345, n, 3, experiment.mixed), n, 3) == 12345


def test_predictions(answers):
    def outcome(batch_size: int) -> str:
        read = [position for step in range(1000) for position in range(8 * step, 8 * step + 8)]
        for step in range(1000, 4000):
            read += range(batch_size * step, batch_size * step + batch_size)
        if len(set(read)) < len(read):
            return "twice"
        return "neither" if set(read) == set(range(max(read) + 1)) else "left out"

    assert outcome(8) == "neither"
    assert outcome(16) == answers.LARGER_BATCHES
    assert outcome(4) == answers.SMALLER_BATCHES
