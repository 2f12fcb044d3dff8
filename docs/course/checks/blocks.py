"""Whether the exercises of lesson 14 are solved."""

import pytest
import torch


@pytest.mark.parametrize("width", [1, 8, 13, 100])
def test_softmax_is_that_of_torch(answers, width):
    x = torch.randn(5, width, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(answers.softmax(x), x.softmax(1))


def test_columns_beyond_the_width_add_nothing(answers):
    found = answers.softmax(torch.tensor([[-50.0, -50.0, -50.0]]))  # zeros there would outweigh these
    torch.testing.assert_close(found, torch.full((1, 3), 1 / 3))


def test_large_scores_do_not_overflow(answers):
    found = answers.softmax(torch.tensor([[1e4, 1e4, 0.0]]))
    torch.testing.assert_close(found, torch.tensor([[0.5, 0.5, 0.0]]))


def test_predictions(answers, experiment):
    q, v = torch.ones(2, 4), torch.arange(8.0)[:, None].expand(8, 4)

    def what_comes(empty: slice) -> str:
        k = torch.zeros(8, 4)
        k[empty] = float("-inf")  # so are the scores
        found = experiment.attention(q, k, v, block=4)
        seen = torch.ones(8, dtype=torch.bool)
        seen[empty] = False
        return "nan" if found.isnan().any() else "right" if torch.allclose(found, v[seen].mean(0)) else "wrong"

    assert what_comes(slice(0, 4)) == answers.EMPTY_BLOCK_FIRST
    assert what_comes(slice(4, 8)) == answers.EMPTY_BLOCK_LAST
