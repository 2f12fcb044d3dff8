"""pairs: of a model's own answers to each prompt the best and the worst, by a reward, as a file for train_dpo.py."""

import json

import pytest

from minillm.base import files
from minillm.checkpoint import huggingface
from minillm.commands.pairs import pair
from minillm.datasets.preferences import PreferenceRows
from minillm.datasets.prompts import Prompt
from minillm.model.config import ModelConfig
from minillm.model.transformer import Transformer

COUNT_E = """
def count(prompts, answers, rows):
    return [answer.count("e") * row["worth"] for answer, row in zip(answers, rows)]
"""
ASKED = ("pairs", "--data", "prompts.jsonl", "--reward", "judge.py:count", "--out", "own.jsonl")
DRAWN = ("--n", "64", "--max_new_tokens", "36", "--prompts_at_once", "2")


@pytest.fixture
def prompts(home):
    """Prompts, of which the last is worth nothing, so that none of its answers is better than another."""
    talk = [{"role": "user", "content": "Tom?"}, {"role": "assistant", "content": "Yes."}]
    talk.append({"role": "user", "content": "And Anna?"})
    rows = [{"prompt": f"Tom {n}", "worth": 1} for n in range(3)]
    rows += [{"messages": talk, "worth": 1}, {"prompt": "Peter", "worth": 0}]
    (home.path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (home.path / "judge.py").write_text(COUNT_E)
    return rows


def test_the_best_and_the_worst_of_the_models_own_answers(home, prompts, call):
    status, _, err = call(*ASKED, *DRAWN)
    assert status == 0, err
    rows = [json.loads(line) for line in (home.path / "own.jsonl").read_text().splitlines()]
    assert rows and f"{len(rows)} pairs" in err
    questions = [row["prompt"] for row in prompts[:3]] + [prompts[3]["messages"]]
    assert all(row["prompt"] in questions for row in rows)
    for row in rows:
        assert row["chosen"].count("e") == row["chosen_reward"] > row["rejected_reward"] == row["rejected"].count("e")
    assert PreferenceRows(home.path / "own.jsonl", home.tokenizer, 128).n_pairs == len(rows)  # as train_dpo.py reads it


def test_the_same_seed_gives_the_same_pairs_however_many_are_asked_at_once(home, prompts, call):
    assert call(*ASKED, *DRAWN)[0] == 0
    two_at_once = (home.path / "own.jsonl").read_bytes()
    assert call(*ASKED, *DRAWN[:-1], "5")[0] == 0
    assert (home.path / "own.jsonl").read_bytes() == two_at_once
    status, _, err = call(*ASKED, *DRAWN, "--seed", "4")
    assert status == 0, err
    assert (home.path / "own.jsonl").read_bytes() != two_at_once


def test_equal_and_empty_answers_make_no_pair():
    prompt = Prompt(0, [1], "a", {}, ({"role": "user", "content": "a"},))
    assert list(pair(prompt, [(0.5, "x"), (0.5, "y")])) == []
    assert list(pair(prompt, [(0.5, "x"), (0.9, " ")])) == []
    assert list(pair(prompt, [])) == []
    (row,) = pair(prompt, [(0.5, "x"), (0.9, "y"), (0.9, "z"), (0.1, "w")])
    assert (row["chosen"], row["rejected"]) == ("y", "w") and "family" not in row
    (row,) = pair(prompt._replace(row={"family": "story"}), [(0.5, "x"), (0.9, "y")])
    assert row["family"] == "story"  # by which train_dpo.py knows what not to replay


def test_answers_that_are_all_alike_are_an_error_and_write_nothing(home, prompts, call):
    (home.path / "judge.py").write_text("def count(prompts, answers, rows):\n    return [1.0] * len(answers)\n")
    (home.path / "own.jsonl").unlink(missing_ok=True)
    status, _, err = call(*ASKED, *DRAWN)
    assert status == 2 and "had different rewards" in err and not (home.path / "own.jsonl").exists()


def test_a_context_without_room_for_a_prompt_is_said(prompts, call):
    status, _, err = call(*ASKED, "--max_new_tokens", "64")
    assert status == 2 and "--max_new_tokens 64: the model's context has 64 tokens" in err


def test_what_cannot_be_written_or_drawn_is_refused_before_anything_is_asked(home, prompts, call, monkeypatch):
    monkeypatch.setattr("minillm.commands.pairs.roll_out", None)
    (home.path / "folder").mkdir()
    (home.path / "folder" / "file").touch()
    for out, said in (("folder", "is a folder; give the name of a file"), ("folder/file/own.jsonl", "file is a file")):
        status, _, err = call(*ASKED[:-1], out)
        assert status == 2 and said in err
    status, _, err = call(*ASKED, "--seed", "-1")
    assert status == 2 and "--seed -1: must be at least 0" in err
    assert not list(home.path.rglob("*.tmp-*"))


@pytest.mark.parametrize(("stop", "status"), [("ValueError('odd')", 2), ("KeyboardInterrupt", 130)])
def test_what_was_made_before_it_stopped_is_kept_beside(home, prompts, call, stop, status):
    """A reward that fails at a later prompt, or Ctrl-C; a file that is there already stays as it is."""
    assert call(*ASKED, *DRAWN)[0] == 0
    whole = (home.path / "own.jsonl").read_text()
    failing = COUNT_E.replace("):\n", f"):\n    if 'Peter' in prompts: raise {stop}\n")
    (home.path / "judge.py").write_text(failing)
    given = call(*ASKED, *DRAWN)
    assert given[0] == status and "pairs made before it stopped; own.jsonl is as it was" in given[2]
    kept = (home.path / "own.part.jsonl").read_text()
    assert kept and whole.startswith(kept) and (home.path / "own.jsonl").read_text() == whole

    # at once: there is nothing to keep
    (home.path / "own.part.jsonl").unlink()
    (home.path / "judge.py").write_text(f"def count(prompts, answers, rows):\n    raise {stop}\n")
    assert call(*ASKED, *DRAWN)[0] == status and not (home.path / "own.part.jsonl").exists()


def test_a_reward_model_must_read_the_longest_there_can_be_and_no_more(home, prompts, call):
    """The policy's context is 64, the reward model's 50; the longest prompt has some 20 tokens."""
    scorer = Transformer(ModelConfig(vocab_size=400, dim=32, n_layers=1, n_heads=4, max_seq_len=50, score_head=True))

    def fill(folder):
        huggingface.save_model(scorer, folder)
        home.tokenizer.save(folder)

    files.write_folder(home.path / "out" / "short" / "step-00000001", fill)
    asked = ("pairs", "--data", "prompts.jsonl", "--reward", "out/short", "--out", "own.jsonl", "--n", "64")
    _, _, err = call(*asked, "--max_new_tokens", "30")
    longest = int(err.partition("the longest has ")[2].partition(";")[0])
    assert 10 < longest < 30
    status, _, err = call(*asked, "--max_new_tokens", str(50 - longest))
    assert "reads at most" not in err and (status == 0 or "had different rewards" in err), err
    status, _, err = call(*asked, "--max_new_tokens", str(51 - longest))
    assert status == 2 and "the reward model reads at most 50 tokens, and a prompt with its answer may have 51" in err
    assert err.rstrip().endswith("lower --max_new_tokens")
