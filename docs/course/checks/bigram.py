"""Whether the exercises of lesson 1 are solved."""

import numpy as np


def test_trigram_of_a_text_that_can_be_counted_by_hand(answers):
    train = np.array([0, 1, 2, 0, 1, 3, 0, 1])
    p_two = np.full((4, 4), 0.25)
    found = answers.trigram(train, np.array([0, 1, 2, 2]), p_two, prior=2.0)
    # 0 1 came twice with something after it, once with 2; 1 2 came once, and 2 never came after it
    np.testing.assert_allclose(found, [(1 + 0.5) / (2 + 2), (0 + 0.5) / (1 + 2)])


def test_trigram_is_better_than_bigram_on_the_corpus(answers, experiment, small_corpus):
    train, val = (experiment.tokens_of(small_corpus, split) for split in ("train", "val"))
    p_two = experiment.bigram(train[:-1], train[1:], experiment.unigram(train, train.max() + 1))
    two, three = p_two[val[1:-1], val[2:]], answers.trigram(train, val, p_two, prior=2.0)
    assert -np.log(three).mean() < -np.log(two).mean() - 0.3


def test_predictions(answers, experiment, small_corpus):
    train, val = (experiment.tokens_of(small_corpus, split) for split in ("train", "val"))
    vocab_size, tenth = train.max() + 1, train[: len(train) // 10]

    def nats(counted: np.ndarray, read: np.ndarray) -> float:
        p_two = experiment.bigram(counted[:-1], counted[1:], experiment.unigram(counted, vocab_size))
        return -np.log(p_two[read[:-1], read[1:]]).mean()

    def change(before: float, after: float) -> str:
        return "falls" if after < before - 0.01 else "rises" if after > before + 0.01 else "stays"

    assert change(nats(train, tenth), nats(tenth, tenth)) == answers.ON_THE_TENTH
    assert change(nats(train, val), nats(tenth, val)) == answers.ON_VALIDATION
