"""KTO's reference point: answers put after other prompts than their own."""

import json

import numpy as np
import pytest
import torch

from minillm.alignment.log_probs import answer_log_probs
from minillm.alignment.preferences import step
from minillm.alignment.preferences.step import summed_u_of_mismatched, z_of
from minillm.datasets.preferences import PreferenceRows


class Constant:
    """A reference by which every token has the log-probability −2."""

    def log_probs(self, batch):
        return -2.0 * batch.mask.float()


def read(home, rows: list[dict]) -> PreferenceRows:
    path = home.path / "labels.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return PreferenceRows([path], home.tokenizer, 60)


def rows_of(prompts: list[str]) -> list[dict]:
    return [{"prompt": prompt, "completion": f"Tom {i}", "label": i % 2 == 0} for i, prompt in enumerate(prompts)]


@pytest.fixture
def seen(monkeypatch) -> list:
    """The texts that were put together: (prompt ids, answer ids)."""
    texts = []
    as_batch = step._as_batch
    monkeypatch.setattr(step, "_as_batch", lambda found, rows: (texts.extend(found), as_batch(found, rows))[1])
    return texts


def test_each_prompt_gets_the_answer_of_the_next_one(home, seen):
    rows = read(home, rows_of(["Who has the ball?", "Who has the cat?", "Who has the apple?", "谁有cat？"]))
    sum_u, count = summed_u_of_mismatched(home.model, Constant(), rows, np.arange(4), range(4))
    assert count == 4
    own = [step._parts(rows, position) for position in range(4)]
    for i, (prompt, answer) in enumerate(seen):
        assert prompt.tolist() == own[i][0].tolist()
        assert answer.tolist() == own[(i + 1) % 4][1].tolist()

    # by hand: one text after the other
    wanted = 0.0
    for prompt, answer in seen:
        ids = np.concatenate([prompt, answer])
        log_p = torch.log_softmax(home.model(torch.from_numpy(ids[None, :-1])).detach(), -1)[0]  # (T, V)
        places = range(len(prompt) - 1, len(ids) - 1)
        wanted += sum(float(log_p[t, ids[t + 1]]) + 2.0 for t in places)
    assert sum_u == pytest.approx(wanted, rel=1e-4)


def test_the_cut_of_a_step_does_not_change_the_sum(home):
    rows = read(home, rows_of([f"Who has the {thing}?" for thing in ("ball", "cat", "apple", "dog", "hat", "cup")]))
    whole = summed_u_of_mismatched(home.model, Constant(), rows, np.arange(6), range(6))
    parts = [summed_u_of_mismatched(home.model, Constant(), rows, np.arange(i, i + 2), range(6)) for i in (0, 2, 4)]
    assert sum(part[0] for part in parts) == pytest.approx(whole[0], rel=1e-5)
    assert sum(part[1] for part in parts) == whole[1] == 6


def test_equal_prompts_are_passed_over(home, seen):
    rows = read(home, rows_of(["Who has the ball?", "Who has the ball?", "Who has the ball?", "Who has the cat?"]))
    _, count = summed_u_of_mismatched(home.model, Constant(), rows, np.arange(4), range(4))
    assert count == 4
    parts = [step._parts(rows, position) for position in range(4)]
    prompts = [tuple(prompt) for prompt, _ in parts]
    (cat,) = [i for i in range(4) if prompts.count(prompts[i]) == 1]
    for prompt, answer in seen:
        answers_of_others = [tuple(parts[i][1]) for i in range(4) if prompts[i] != tuple(prompt)]
        assert tuple(answer) in answers_of_others
    assert sum(tuple(answer) == tuple(parts[cat][1]) for _, answer in seen) == 3


def test_one_prompt_alone_gives_nothing_to_compare(home):
    rows = read(home, rows_of(["Who has the ball?"] * 4))
    found = summed_u_of_mismatched(home.model, Constant(), rows, np.arange(4), range(4))
    assert found == (0.0, 0)
    assert z_of(*found, torch.device("cpu")).item() == 0


def test_positions_beyond_the_end_are_left_out(home):
    rows = read(home, rows_of(["Who has the ball?", "Who has the cat?", "Who has the apple?"]))
    _, count = summed_u_of_mismatched(home.model, Constant(), rows, np.arange(4), range(3))
    assert count == 3


def test_the_model_is_read_without_dropout(home):
    rows = read(home, rows_of(["Who has the ball?", "Who has the cat?"]))
    home.model.train()
    one, other = (summed_u_of_mismatched(home.model, Constant(), rows, np.arange(2), range(2)) for _ in range(2))
    assert one == other
    assert answer_log_probs(home.model, rows.batch(np.arange(2)).batch).isfinite().all()
