"""Conversations written out by hand; that transformers writes them alike is in test_tokenizer.py."""

import pytest

from minillm.base.errors import UserError
from minillm.tokenizer.tokenizer import Tokenizer
from minillm.tokenizer.train import train_tokenizer
from tests.minillm.tokenizer.test_tokenizer import CORPUS, train_llama


@pytest.fixture(scope="module")
def ours(tmp_path_factory) -> Tokenizer:
    return train_tokenizer(CORPUS * 20, 480, tmp_path_factory.mktemp("ours"))


def test_chat_template_by_hand(ours):
    hi, yo = ours.encode("Hi"), ours.encode("<s> yo ")
    messages = [
        {"role": "system", "content": ""},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "<s> yo "},
        {"role": "user", "content": "Hi"},
    ]
    ids, learn = ours.encode_chat(messages, add_generation_prompt=True)
    assert ids == [1, 4, 5, *hi, 6, *yo, 2, 5, *hi, 6]
    assert [i for i, learnt in enumerate(learn) if learnt] == list(range(4 + len(hi), 5 + len(hi) + len(yo)))
    assert ours.encode_chat(messages)[0] == ids[:-1]


def test_simple_template_by_hand(ours):
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "yo"},
        {"role": "user", "content": "Ana"},
    ]
    first, yo, ana = ours.encode("Be kind.\nHi"), ours.encode("yo"), ours.encode("Ana")
    ids, learn = ours.encode_chat(messages, template="simple", add_generation_prompt=True)
    assert ids == [*first, 1, *yo, 2, *ana, 1]
    assert learn == [False] * (len(first) + 1) + [True] * (len(yo) + 1) + [False] * (len(ana) + 1)


def test_bad_messages_are_refused(ours):
    foreign = train_llama()
    with pytest.raises(UserError, match="role 'robot'"):
        ours.encode_chat([{"role": "robot", "content": "a"}])
    with pytest.raises(UserError, match="role user: a string"):
        ours.encode_chat([{"role": "user", "content": None}])
    with pytest.raises(UserError, match="template 'nice'"):
        ours.encode_chat([], template="nice")
    with pytest.raises(UserError, match="lacks the role pieces"):
        foreign.encode_chat([], template="chat")
    assert foreign.resolve_template("auto") == "simple"
    assert foreign.pad_id == foreign.eos_id
