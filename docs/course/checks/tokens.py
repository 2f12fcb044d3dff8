"""Whether the exercises of lesson 2 are solved."""

import numpy as np

WORDS = {"low": 5, "lower": 2, "newest": 6, "widest": 3}


def test_merges_that_can_be_counted_by_hand(answers):
    # e s and s t come 9 times, then es t 9 times, then l o and o w 7 times
    assert answers.learn_merges(WORDS, 4) == [("e", "s"), ("es", "t"), ("l", "o"), ("lo", "w")]


def test_merges_end_when_every_word_is_one_piece(answers):
    merges = answers.learn_merges({"aaab": 1, "ab": 2}, 50)
    assert len(merges) == 3 and answers.encode("aaab", merges) == ["aaab"]


def test_a_new_word_is_cut_by_what_was_learned(answers):
    assert answers.encode("lowest", answers.learn_merges(WORDS, 4)) == ["low", "est"]


def test_predictions(answers, experiment, small_corpus, tmp_path):
    train, val = (experiment.texts_of(small_corpus, split) for split in ("train", "val"))
    nats_a_token, nats = [], []
    for size in (400, 1000):
        tokenizer = experiment.train_tokenizer(train[:500], size, tmp_path / str(size))
        x, y = experiment.pairs_of(experiment.one_row(tokenizer, train[:500]), tokenizer.bos_id)
        val_x, val_y = experiment.pairs_of(experiment.one_row(tokenizer, val), tokenizer.bos_id)
        p_two = experiment.bigram(x, y, experiment.unigram(y, size))
        losses = -np.log(p_two[val_x, val_y])
        nats_a_token.append(losses.mean())
        nats.append(losses.sum())  # of one text, so the bits per byte go with it

    def change(before: float, after: float) -> str:
        return "falls" if after < before * 0.99 else "rises" if after > before * 1.01 else "stays"

    assert change(*nats_a_token) == answers.NATS_A_TOKEN
    assert change(*nats) == answers.BITS_PER_BYTE
