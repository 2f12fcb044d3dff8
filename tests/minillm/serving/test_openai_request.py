"""Bodies as clients send them, and what they ask for."""

import json

import pytest

from minillm.base.options import LARGEST_COUNT
from minillm.generation.sampling import Sampling
from minillm.serving.openai_request import NO_EFFECT, Limits, fields_of, read_chat, read_completion
from minillm.serving.refusal import Refusal

LIMITS = Limits(n=4, texts=12)
HI = [{"role": "user", "content": "hi"}]


def chat(**fields):
    return read_chat(fields_of(json.dumps({"messages": HI} | fields).encode()), LIMITS)


def completion(**fields):
    return read_completion(fields_of(json.dumps({"prompt": "hi"} | fields).encode()), LIMITS)


def test_a_chat_that_says_nothing_more_takes_the_usual():
    asked = chat()
    assert asked.messages == HI and asked.is_chat and asked.prompts == []
    assert (asked.n, asked.max_tokens, asked.stop_strings, asked.log_probs) == (1, None, (), None)
    assert not (asked.streams or asked.includes_usage or asked.echo) and asked.model is None
    usual = Sampling(seed=asked.sampling.seed)
    assert asked.sampling == usual and chat().sampling.seed != usual.seed  # a fresh one each time


def test_null_means_not_given():
    names = ("model", "n", "max_tokens", "temperature", "top_p", "top_k", "stop", "logprobs", "stream", "tools", "seed")
    asked = chat(**dict.fromkeys((*names, "response_format", "presence_penalty", "stream_options", "unheard_of")))
    assert asked.sampling == Sampling(seed=asked.sampling.seed) and asked.n == 1


def test_what_langchain_sends():
    asked = completion(
        **{"prompt": ["hi"], "logprobs": None, "seed": None, "n": 1, "frequency_penalty": 0, "presence_penalty": 0},
        **{"top_p": 1, "max_tokens": 256, "best_of": 1, "logit_bias": {}},
    )
    assert asked.prompts == ["hi"] and asked.max_tokens == 256 and not asked.is_chat
    assert chat(max_completion_tokens=7, stream=False).max_tokens == 7


def test_values_are_taken_over():
    asked = chat(
        **{"model": "tom", "n": 4, "max_tokens": 5, "max_completion_tokens": 6, "stop": ["a", "b"], "stream": True},
        **{"temperature": 2, "top_p": 0.5, "top_k": 3, "min_p": 0.1, "repetition_penalty": 1.1, "seed": 12},
        **{"presence_penalty": -2, "frequency_penalty": 0.5},
        **{"logprobs": True, "top_logprobs": 3, "stream_options": {"include_usage": True}},
    )
    assert (asked.model, asked.n, asked.max_tokens, asked.stop_strings) == ("tom", 4, 6, ("a", "b"))
    assert asked.sampling == Sampling(2, 3, 0.5, 0.1, 1.1, -2, 0.5, 12)
    assert asked.log_probs == 3 and asked.streams and asked.includes_usage
    assert chat(stop="a").stop_strings == ("a",) and chat(top_k=-1).sampling.top_k == 0
    assert chat(logprobs=True).log_probs == 0 and chat(logprobs=False, top_logprobs=0).log_probs is None
    assert chat(seed=-1).sampling.seed == (1 << 64) - 1
    assert completion(logprobs=0).log_probs == 0 and completion(echo=True).echo
    assert completion().max_tokens == 16


@pytest.mark.parametrize("bits", [40, 41, 53, 63])
def test_large_whole_numbers_are_taken_where_they_mean_something(bits):
    """JavaScript sends a seed of 53 bits, others one of 64; and many say a huge number for "as many as there are"."""
    number = (1 << bits) - 1
    for name in ("seed", "max_tokens", "max_completion_tokens", "top_k"):
        for value in (number, number - 1):
            for asked in (chat(**{name: value}), completion(**{name: value})):
                if name == "seed":
                    assert asked.sampling.seed == value
                elif name == "top_k":
                    assert asked.sampling.top_k == min(value, LARGEST_COUNT)
                else:
                    assert asked.max_tokens == value  # of which no more are made than the server's own limit says
    assert chat(seed=(1 << 64) - 1).sampling.seed == (1 << 64) - 1
    assert chat(seed=-(1 << 63)).sampling.seed == 1 << 63


def test_messages_become_roles_and_texts():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "developer", "content": "S"}, {"role": "user", "content": parts, "name": "Ann"}]
    asked = chat(messages=[*messages, {"role": "assistant", "content": "", "tool_calls": None}, *HI])
    assert [(m["role"], m["content"]) for m in asked.messages] == [
        *[("system", "S"), ("user", "ab"), ("assistant", ""), ("user", "hi")]
    ]


def test_prompts_of_four_forms():
    for prompt, prompts in (("a", ["a"]), ("", [""]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]])):
        assert completion(prompt=prompt).prompts == prompts
    assert completion(prompt=[[1, 2], [3]]).prompts == [[1, 2], [3]]


IMAGE = {"type": "image_url", "image_url": {"url": "data:"}}
WRONG_CHATS = [
    ("messages", {"messages": None}),
    ("messages", {"messages": "hi"}),
    ("messages", {"messages": []}),
    ("messages", {"messages": ["hi"]}),
    ("messages", {"messages": [*HI, {"role": "assistant", "content": "a"}]}),
    ("messages[0].role", {"messages": [{"role": "robot", "content": "a"}]}),
    ("messages[0].role", {"messages": [{"content": "a"}]}),
    ("messages[0].role", {"messages": [{"role": ["user"], "content": "a"}]}),
    ("messages[1].role", {"messages": [*HI, {"role": "tool", "content": "a", "tool_call_id": "1"}]}),
    ("messages[0].content", {"messages": [{"role": "user", "content": None}]}),
    ("messages[0].content", {"messages": [{"role": "user", "content": 3}]}),
    ("messages[0].content[1]", {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, IMAGE]}]}),
    ("messages[0].content[0]", {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}),
    ("messages[0].tool_calls", {"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}, *HI]}),
    ("max_tokens", {"max_tokens": 0}),
    ("max_tokens", {"max_tokens": -1}),
    ("max_tokens", {"max_tokens": True}),
    ("max_completion_tokens", {"max_completion_tokens": 1.5}),
    ("temperature", {"temperature": -1}),
    ("temperature", {"temperature": 3}),
    ("temperature", {"temperature": "hot"}),
    ("top_p", {"top_p": 1.1}),
    ("top_k", {"top_k": -2}),
    ("min_p", {"min_p": 2}),
    ("repetition_penalty", {"repetition_penalty": 0}),
    ("seed", {"seed": 1.5}),
    ("seed", {"seed": 1 << 64}),
    ("seed", {"seed": -(1 << 63) - 1}),
    ("max_tokens", {"max_tokens": 1 << 63}),
    ("top_k", {"top_k": 1 << 63}),
    ("n", {"n": 0}),
    ("n", {"n": 1000}),
    ("stop", {"stop": ""}),
    ("stop", {"stop": ["a", ""]}),
    ("stop", {"stop": 3}),
    ("stop", {"stop": ["a"] * 17}),
    ("stream", {"stream": "yes"}),
    ("stream_options", {"stream_options": 1}),
    ("model", {"model": 3}),
    ("logprobs", {"logprobs": 3}),
    ("top_logprobs", {"top_logprobs": 3}),
    ("top_logprobs", {"top_logprobs": 21, "logprobs": True}),
    ("tools", {"tools": [{"type": "function"}]}),
    ("tool_choice", {"tool_choice": "required"}),
    ("response_format", {"response_format": {"type": "json_object"}}),
    ("presence_penalty", {"presence_penalty": 2.1}),
    ("presence_penalty", {"presence_penalty": "much"}),
    ("frequency_penalty", {"frequency_penalty": -2.5}),
    ("frequency_penalty", {"frequency_penalty": True}),
    ("logit_bias", {"logit_bias": {"5": 1}}),
    ("modalities", {"modalities": ["audio"]}),
    ("repeat_penalty", {"repeat_penalty": 1.3}),
    ("prompt", {"prompt": "hi"}),
    ("echo", {"echo": True}),
    ("messages[0].function_call", {"messages": [{"role": "assistant", "content": "", "function_call": {"name": "f"}}]}),
]


@pytest.mark.parametrize("param, fields", WRONG_CHATS)
def test_what_is_wrong_in_a_chat_is_named(param, fields):
    with pytest.raises(Refusal) as refused:
        chat(**fields)
    assert (refused.value.status, refused.value.param) == (400, param)
    assert refused.value.message.startswith(f"{param}: ")


WRONG_COMPLETIONS = [
    ("prompt", {"prompt": None}),
    ("prompt", {"prompt": []}),
    ("prompt", {"prompt": {}}),
    ("prompt", {"prompt": [1, "a"]}),
    ("prompt", {"prompt": ["a"] * 13}),
    ("prompt", {"prompt": ["a"] * 4, "n": 4}),
    ("prompt[1]", {"prompt": [[1], []]}),
    ("prompt[0]", {"prompt": [["a"]]}),
    ("logprobs", {"logprobs": True}),
    ("suffix", {"suffix": "end"}),
    ("best_of", {"best_of": 2}),
    ("messages", {"messages": HI}),
    ("top_logprobs", {"top_logprobs": 3}),
]


@pytest.mark.parametrize("param, fields", WRONG_COMPLETIONS)
def test_what_is_wrong_in_a_completion_is_named(param, fields):
    with pytest.raises(Refusal) as refused:
        completion(**fields)
    assert (refused.value.status, refused.value.param) == (400, param)


def test_what_asks_for_nothing_is_accepted():
    nothing = {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "frequency_penalty": 0.0}
    assert chat(**nothing, user="u", metadata={}, chat_id="1", stream_options={"include_usage": True}).n == 1


BODIES = [b"", b"  ", b"{", b"[]", b"3", b"null", b'{"a": NaN}', b'{"a": 1, "a": 2}', b"\xff{}", b'{"a": "\\ud800"}']


@pytest.mark.parametrize("body", [*BODIES, b"[" * 100_000, b'{"a":' * 70 + b"1" + b"}" * 70])
def test_a_body_that_is_no_json_object_is_refused(body):
    with pytest.raises(Refusal) as refused:
        fields_of(body)
    assert refused.value.status == 400 and "get a whole copy" not in refused.value.message


ODD = [None, True, False, 0, 1, -1, 3, 1.5, 1e300, -0.0, 1 << 70, "", "a", "none", [], {}, [[]], [{}], [None], ["a", 1]]
ODD += [[1, True], [1.5], {"a": 1}, {"type": "text"}, {"include_usage": 3}, [{"role": "user"}], "x" * 2000, [1 << 70]]
ODD += [[{"role": "user", "content": [{"type": "text"}]}], [{"role": {}, "content": "a"}], [{"role": None}], ["a"] * 40]


def test_whatever_a_field_holds_it_is_accepted_or_refused():
    """Anything else would be the server's fault, a 500, and be sent again."""
    names = [*NO_EFFECT, *("model", "messages", "prompt", "n", "max_tokens", "max_completion_tokens", "temperature")]
    names += ["top_p", "top_k", "min_p", "repetition_penalty", "seed", "stop", "stream", "stream_options", "logprobs"]
    names += ["presence_penalty", "frequency_penalty"]
    names += ["top_logprobs", "echo", "unheard_of"]
    n_accepted = n_refused = 0
    for ask in (chat, completion):
        for name in names:
            for value in ODD:
                try:
                    ask(**{name: value})
                    n_accepted += 1
                except Refusal as refusal:
                    assert refusal.status == 400 and len(refusal.message) < 300
                    n_refused += 1
    assert n_accepted > 300 and n_refused > 300
