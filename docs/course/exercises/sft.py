"""Lesson 9, to be filled in; then `pytest docs/course/checks/sft.py`."""

from torch import Tensor


def answer_mask(tokens: Tensor, assistant_id: int, eos_id: int) -> Tensor:
    """Which targets Y = tokens[1:] of a conversation are learned: (T − 1,) bool.

        <s> <|user|> question <|assistant|> answer </s> <|user|> question <|assistant|> answer </s>

    Answer tokens are, and the eos that ends an answer, in every turn; the piece that announces an answer is not.
    tokens: (T,) int64. assistant_id: of <|assistant|>. eos_id: of </s>.
    """
    raise NotImplementedError


# Two micro-batches: one has 2 learned tokens, of 1 nat each, the other 8, of 2 nats each. Is the mean of the two means
# lower than the mean over all tokens, the same, or higher? "lower", "same" or "higher".
MEAN_OF_MEANS = ""

# Which answer's tokens count more in a mean of means than in the mean over all: the short or the long one's?
COUNTS_MORE = ""
