"""What --reward means: functions, learned reward models, and sums of both."""

import json
import shutil

import pytest
import torch

from minillm.alignment.reward_model import last_scores, load_reward_model, text_lengths
from minillm.alignment.rewards import Rewards
from minillm.alignment.rollouts import Rollouts
from minillm.base.errors import UserError
from minillm.checkpoint import huggingface
from minillm.datasets.batch import Batch
from minillm.datasets.prompts import Prompt
from minillm.tokenizer.tokenizer import Tokenizer
from minillm.tokenizer.train import train_tokenizer
from tests.minillm.model_options import build


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory) -> list[Tokenizer]:
    folder = tmp_path_factory.mktemp("tokenizers")
    texts = ["the cat sees the dog", "a bird hears the river"], ["one two three four five six seven eight"]
    return [train_tokenizer(lines * 20, 362, folder / str(number)) for number, lines in enumerate(texts)]


@pytest.fixture(scope="module")
def reward_folder(tokenizers, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reward")
    model = build(vocab_size=400, score_head=True)
    huggingface.save_model(model, folder, special_ids=tokenizers[0].special_ids)
    tokenizers[0].save(folder)
    return folder


def rolled(tokenizer: Tokenizer, answers: list[str]) -> tuple[Rollouts, list[Prompt]]:
    """Two answers to each of two prompts, the last one cut."""
    prompts = [Prompt(i, [1, 4, *tokenizer.encode(q), 5], q, {"answer": "the dog"}) for i, q in enumerate("ab")]
    ids = [tokenizer.encode(text) for text in answers]
    texts = [[*prompts[i // 2].ids, *tokens, *([2] if i < 3 else [])] for i, tokens in enumerate(ids)]
    width = max(map(len, texts))
    tokens = torch.tensor([text + [3] * (width - len(text)) for text in texts])
    mask = torch.zeros(4, width - 1, dtype=torch.bool)
    for row, text in enumerate(texts):
        mask[row, len(prompts[row // 2].ids) - 1 : len(text) - 1] = True
    batch = Batch(tokens[:, :-1], tokens[:, 1:], mask)
    ended = torch.tensor([True, True, True, False])
    return Rollouts(batch, torch.zeros(4, width - 1), ids, ended, torch.tensor([0, 0, 1, 1])), prompts


ANSWERS = ["the dog", "the cat", "the dog.", "a bird"]


def test_functions_see_texts_and_rows(tokenizers):
    rewards = Rewards("0.5*exact,0.25*length:7", tokenizers[0])
    assert rewards(*rolled(tokenizers[0], ANSWERS)).tolist() == pytest.approx([0.75, 0.25, 0.5 + 0.25 * 6 / 7, 0.25])


def test_a_folder_is_a_reward_model_read_at_the_last_token(tokenizers, reward_folder):
    answers, prompts = rolled(tokenizers[0], ANSWERS)
    model = load_reward_model(reward_folder)
    with torch.no_grad():
        scores = last_scores(model, answers.batch, text_lengths(answers.batch))
    alone = Rewards(str(reward_folder), tokenizers[0])(answers, prompts)
    torch.testing.assert_close(alone, scores)
    rewards = Rewards(f"2*{reward_folder},0.5*exact", tokenizers[0])
    assert rewards.remarks() == [f"{reward_folder}: records no scale of its scores, so they are the reward as they are"]
    both = rewards(answers, prompts)
    torch.testing.assert_close(both, 2 * scores + torch.tensor([0.5, 0, 0.5, 0]))


def test_scores_that_are_no_numbers_end_the_run(tokenizers, reward_folder):
    """NaN in one advantage is NaN in every weight of the policy."""
    rewards = Rewards(f"{reward_folder},0.5*exact", tokenizers[0])
    with torch.no_grad():
        rewards.models[0][1].model.score.weight[0, 0] = float("nan")
    with pytest.raises(
        UserError, match=f"{reward_folder}: this reward model gives an answer the score nan: its weights"
    ):
        rewards(*rolled(tokenizers[0], ANSWERS))


def test_a_recorded_scale_by_which_nothing_can_be_divided_is_refused(tokenizers, reward_folder, tmp_path):
    """As of a reward model that gives every answer the same score."""
    folder = shutil.copytree(reward_folder, tmp_path / "reward")
    (folder / "resume").mkdir()
    state = {"format": 1, "step": 1, "score_scale": {"mean": 2.0, "std": 0.0}}
    (folder / "resume" / "train_state.json").write_text(json.dumps(state))
    with pytest.raises(
        UserError, match=r"reward: this reward model gives all answers of .* the same score, 2; train it"
    ):
        Rewards(str(folder), tokenizers[0])


def test_what_is_no_reward_is_refused(tokenizers, reward_folder, tmp_path):
    with pytest.raises(UserError, match="another tokenizer"):
        Rewards(str(reward_folder), tokenizers[1])
    with pytest.raises(UserError, match="with its answer may have 99999"):
        Rewards(str(reward_folder), tokenizers[0], longest=99_999)
    policy = tmp_path / "policy"
    policy.mkdir()
    huggingface.save_model(build(vocab_size=400), policy, special_ids=tokenizers[0].special_ids)
    tokenizers[0].save(policy)
    with pytest.raises(UserError, match=str(policy)):
        Rewards(str(policy), tokenizers[0])
    with pytest.raises(UserError, match="absent"):
        Rewards("absent/folder", tokenizers[0])
