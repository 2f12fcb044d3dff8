"""Whether the exercises of lesson 9 are solved."""

import torch

from minillm.datasets import InstructionRows
from minillm.tokenizer import Tokenizer

BOS, EOS, USER, ASSISTANT = 1, 2, 3, 4


def test_two_turns_by_hand(answers):
    tokens = torch.tensor([BOS, USER, 10, 11, ASSISTANT, 20, 21, EOS, USER, 12, ASSISTANT, 22, EOS])
    y = [USER, 10, 11, ASSISTANT, 20, 21, EOS, USER, 12, ASSISTANT, 22, EOS]
    learned = [20, 21, EOS, 22, EOS]
    mask = answers.answer_mask(tokens, ASSISTANT, EOS)
    assert mask.tolist() == [False, False, False, False, True, True, True, False, False, False, True, True]
    assert [token for token, is_learned in zip(y, mask.tolist(), strict=True) if is_learned] == learned


def test_it_is_the_mask_that_training_uses(answers, small_corpus):
    tokenizer = Tokenizer.load(small_corpus)
    rows = InstructionRows(small_corpus / "sft_heldout.jsonl", tokenizer, 128, packing=False)
    batch = rows.batch(range(8))
    (assistant_id,) = set(batch.x[:, 1:][batch.mask[:, 1:] & ~batch.mask[:, :-1]].tolist())  # read before an answer
    for tokens, mask in zip(batch.tokens(), batch.mask, strict=True):
        end = int(mask.nonzero().max()) + 2
        found = answers.answer_mask(tokens[:end], assistant_id, tokenizer.eos_id)
        assert torch.equal(found, mask[: end - 1])


def test_predictions(answers):
    short, long = torch.full((2,), 1.0, requires_grad=True), torch.full((8,), 2.0, requires_grad=True)
    means = (short.mean() + long.mean()) / 2
    whole = torch.cat((short, long)).mean()
    assert ("lower" if means < whole else "higher" if means > whole else "same") == answers.MEAN_OF_MEANS
    means.backward()
    assert ("short" if short.grad[0] > 1 / 10 > long.grad[0] else "long") == answers.COUNTS_MORE
