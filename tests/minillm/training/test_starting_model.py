import json

import pytest

from minillm.training.starting_model import Start


@pytest.mark.parametrize(
    ("recorded", "of_prompts", "turns"),
    [
        ({"turns": 2}, 1, {"turns": 2}),  # it learns from single questions, and can still follow up
        ({"turns": 1}, 3, {"turns": 3}),
        ({}, 1, {"turns": 1}),  # of pretraining, which shows no conversations
        (None, 1, {}),  # a model of others may know any number
    ],
)
def test_turns_that_a_model_was_taught_before_count_too(tmp_path, recorded, of_prompts, turns):
    if recorded is not None:
        (tmp_path / "resume").mkdir()
        (tmp_path / "resume" / "train_state.json").write_text(json.dumps({"format": 1, "step": 1, **recorded}))
    assert Start(tmp_path, None, None).turns(of_prompts) == turns
