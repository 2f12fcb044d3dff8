"""Which held-out requests a run asks."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from minillm.alignment.preferences.held_out import HeldOut
from tests.minillm.datasets.test_instructions import Numbers

LENGTHS = (2, 20, 60, 70, 130)  # of requests, 3 tokens of the template included


@pytest.fixture
def requests(tmp_path, monkeypatch) -> Path:
    """The bundled corpus with a few held-out requests alone."""
    monkeypatch.chdir(tmp_path)
    path = Path("data/bundled/requests_heldout.jsonl")
    path.parent.mkdir(parents=True)
    rows = [{"prompt": "7 " * (length - 3)} if length > 3 else {"prompt": "7"} for length in LENGTHS]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def held_out(seq_len: int, n_virtual: int = 0, data: str = "data/bundled/preferences_train.jsonl") -> HeldOut:
    training_config = SimpleNamespace(
        data=data, seq_len=seq_len, room=seq_len - n_virtual, template="chat", held_out_questions=lambda: []
    )
    return HeldOut(training_config, Numbers(), None, None)


@pytest.mark.parametrize(
    ("seq_len", "n_asked", "longest_story"),
    [(512, 5, 128), (256, 4, 128), (160, 4, 80), (128, 3, 64), (40, 2, 20), (4, 0, 2), (1, 0, 1)],
)
def test_requests_that_do_not_fit_with_their_answers_are_skipped_and_counted(requests, seq_len, n_asked, longest_story):
    found = held_out(seq_len)
    assert len(found.requests) == n_asked and found.longest_story == longest_story
    assert all(len(prompt.ids) + longest_story <= seq_len for prompt in found.requests)
    said = f"held-out requests: {5 - n_asked} of 5 skipped, since with an answer of {longest_story} tokens they are "
    assert found.summary() == ([f"{said}longer than --seq_len {seq_len}"] if n_asked < 5 else [])


def test_virtual_tokens_take_room_and_other_data_has_no_requests(requests):
    assert len(held_out(256, n_virtual=160).requests) == len(held_out(96).requests) == 2
    assert held_out(128, data="mine.jsonl").requests == held_out(128, data="mine.jsonl").summary() == []


def test_another_length_asks_something_else(requests):
    assert held_out(256).asked != held_out(160).asked
    assert held_out(256).asked == held_out(256).asked
