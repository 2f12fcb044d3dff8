"""Many requests at once get what each gets alone: `generate` is the oracle."""

import io
import random
import resource
import sys
import threading
from pathlib import Path

import pytest
import torch

from minillm.base.errors import UserError
from minillm.generation import batching, passes, running
from minillm.generation.batching import Engine, EngineOptions
from minillm.generation.completion import generate
from minillm.generation.requests import Closed, End, PromptRead, QueueFull, Request, Token
from minillm.generation.sampling import Draws, Sampling
from minillm.tuning.adapter import attach
from minillm.tuning.options import TuningConfig
from tests.minillm.model_options import OPTIONS, build


def prompt(length: int, seed: int = 0) -> list[int]:
    return [random.Random(f"{length} {seed}").randrange(50) for _ in range(length)]


def engine(model=None, log=None, **options) -> Engine:
    return Engine(model or build(), EngineOptions(**{"slots": 4, "prefill_chunk": 8, **options}), log=log)


def run(engine: Engine) -> None:
    while engine.step():
        pass


def told(ticket) -> tuple[list[int], str]:
    """The ids and the reason that a ticket's events give; it must have ended."""
    read, *tokens, end = ticket.take()
    assert isinstance(read, PromptRead) and isinstance(end, End) and end == ticket.ended
    return [token.id for token in tokens], end.reason


def alone(model, request: Request) -> tuple[list[int], str]:
    """What `generate` gives for a request, as row `choice` of a batch of the same prompt."""
    rows = [request.prompt] * (request.choice + 1)
    answers = generate(model, rows, request.max_new_tokens, sampling=request.sampling, stop_ids=tuple(request.stop_ids))
    return answers[-1].tokens, answers[-1].reason


def requests(n: int, seed: int = 0) -> list[Request]:
    """Of all kinds: greedy and drawn, with and without filters, short and long, that end by length, stop or context."""
    draw = random.Random(seed)
    made = []
    for number in range(n):
        sampling = draw.choice(
            [
                Sampling(temperature=0),
                Sampling(temperature=0, repetition_penalty=1.3),
                Sampling(temperature=0.9, seed=number),
                Sampling(temperature=1.2, seed=number, top_k=7, repetition_penalty=1.2),
                Sampling(temperature=1.0, seed=3, top_p=0.9, min_p=0.02),
                Sampling(temperature=0, presence_penalty=0.5, frequency_penalty=1.5),
            ]
        )
        made.append(
            Request(
                prompt(draw.randint(1, 40), number),
                draw.choice([1, 5, 20, 60]),
                sampling,
                choice=draw.randint(0, 1),
                stop_ids=draw.choice([(), tuple(range(7, 17))]),
            )
        )
    return made


# ---- the same ids


def staggered(engine: Engine, wanted: list[Request], every: int) -> list:
    """Submit a request each few steps, until all have ended; returns their tickets."""
    tickets = []
    n_steps = 0
    while len(tickets) < len(wanted) or engine.running or engine.waiting:
        if n_steps % every == 0 and len(tickets) < len(wanted):
            tickets.append(engine.submit(wanted[len(tickets)]))
        engine.step()
        n_steps += 1
    return tickets


@pytest.mark.parametrize("name", OPTIONS)
def test_requests_that_come_and_go_get_what_generate_gives_each_alone(name):
    model = build(**OPTIONS[name])
    wanted = requests(12)
    expected = [alone(model, request) for request in wanted]
    for prefill_chunk, every in ((8, 2), (100, 1)):  # long prompts in parts, short ones together
        tickets = staggered(engine(model, slots=6, prefill_chunk=prefill_chunk), wanted, every)
        assert [told(ticket) for ticket in tickets] == expected
    assert {reason for _, reason in expected} == {"length", "stop", "context"}
    stopped = [(ticket.ended, ticket.request) for ticket in tickets if ticket.ended.reason == "stop"]
    assert all(end.last.id in request.stop_ids for end, request in stopped)


@pytest.mark.parametrize("options", [dict(tune="prefix", n_virtual=6), dict(tune="prompt"), dict(tune="lora")])
def test_an_adapter_counts_and_its_virtual_tokens_stand_before_every_text(options):
    model = build()
    adapter = attach(model, TuningConfig(**options), keep_base=False)
    with torch.no_grad():
        for parameter in adapter.parameters().values():
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    wanted = requests(8)
    tickets = staggered(engine(model), wanted, every=3)
    assert [told(ticket) for ticket in tickets] == [alone(model, request) for request in wanted]


def test_a_request_alone_beside_others_and_late_is_the_same():
    model = build()
    request = Request(prompt(11), 40, Sampling(temperature=1.0, seed=9))
    expected = alone(model, request)
    single = engine(model)
    ticket = single.submit(request)
    run(single)
    assert told(ticket) == expected

    crowd = engine(model, slots=16)
    first = crowd.submit(request)
    others = [crowd.submit(other) for other in requests(15)]
    late = []
    while crowd.step():
        if crowd.counters()["steps"] == 7:
            late.append(crowd.submit(request))
    assert told(first) == told(*late) == expected
    assert all(told(other) for other in others)


def test_a_recorded_step_computes_rows_beyond_those_in_use_without_a_trace(monkeypatch):
    """As on a GPU, where steps are recorded for 1, 2, 4, 8 rows; 3 rows take the step of 4."""
    monkeypatch.setattr(passes, "is_recorded", lambda cache: True)
    model = build()
    wanted = requests(14, seed=5)
    its = engine(model, slots=7, prefill_chunk=4)
    sizes = set()
    its.passes._recorded = Sizes(sizes)
    tickets = staggered(its, wanted, every=2)
    assert [told(ticket) for ticket in tickets] == [alone(model, request) for request in wanted]
    assert sizes <= {1, 2, 4, 7} and len(sizes) > 2
    assert its.slots.cache.lengths.tolist() == its.slots.cache.host_lengths.tolist()


class Sizes(dict):
    """A dict that notes its keys in a set."""

    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def __setitem__(self, key, value):
        self.seen.add(key)
        super().__setitem__(key, value)


# ---- who waits for whom


def test_a_long_prompt_does_not_hold_up_the_others():
    its = engine(prefill_chunk=8)
    short = its.submit(Request(prompt(3), 30))
    its.step()
    long = its.submit(Request(prompt(33), 5))
    for _ in range(4):  # 32 of its tokens
        short.take()
        its.step()
        assert len(short.take()) == 1 and not long.take()
    its.step()
    assert [type(event) for event in long.take()] == [PromptRead, Token, Token]


def test_short_prompts_share_a_step():
    its = engine(prefill_chunk=8)
    tickets = [its.submit(Request(prompt(4, i), 5)) for i in range(3)]
    its.step()
    assert [len(ticket.take()) for ticket in tickets] == [3, 3, 0]
    its.step()
    assert [len(ticket.take()) for ticket in tickets] == [1, 1, 3]


def test_first_come_first_served_and_one_too_many_is_refused():
    its = engine(slots=2, max_waiting=3)
    tickets = [its.submit(Request(prompt(5, i), 10)) for i in range(5)]
    with pytest.raises(QueueFull, match="5 requests wait"):
        its.submit(Request(prompt(5), 10))
    with pytest.raises(QueueFull):
        its.submit_all([Request(prompt(5), 10)] * 6)
    begun = []
    while its.step():
        begun += [number for number, ticket in enumerate(tickets) if number not in begun and ticket.take()]
    assert begun == [0, 1, 2, 3, 4]
    counters = its.counters()
    assert counters["refused"] == 7 and counters["requests"] == 5 and counters["free_slots"] == 2


@pytest.mark.parametrize("steps", [0, 1, 4], ids=["waiting", "its prompt is read", "writing"])
def test_a_cancelled_request_ends_before_the_next_step(steps):
    model = build()
    its = engine(model, slots=1, prefill_chunk=16)
    first = its.submit(Request(prompt(40), 20))
    second_request = Request(prompt(9), 4)
    second = its.submit(second_request)
    for _ in range(steps):
        its.step()
    n_events = len(first.take())
    assert (n_events > 0) == (steps == 4)
    first.cancel()
    first.cancel()
    its.step()
    assert first.take() == [End("cancelled")]
    assert its.running and [type(event) for event in second.take()] == [PromptRead, Token, Token]
    run(its)
    first.cancel()  # of no effect now
    assert not its.step() and first.take() == []
    assert its.counters()["cancelled"] == 1 and its.counters()["free_slots"] == 1


def test_a_request_ends_after_its_time(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(batching.time, "monotonic", lambda: now[0])
    its = engine(slots=1, time_limit=5.0)
    writing = its.submit(Request(prompt(4), 50))
    its.step()
    now[0] += 3
    waiting = its.submit(Request(prompt(4), 50))
    now[0] += 2.5
    its.step()
    assert writing.ended == End("timeout", "the request took more than 5 seconds")
    assert waiting.ended is None
    now[0] += 3
    its.step()
    assert waiting.ended.reason == "timeout" and its.counters()["free_slots"] == 1


# ---- prefixes


def test_equal_prefixes_are_read_once():
    model = build()
    its = engine(model, slots=3)
    system = prompt(20)
    request = Request([*system, 1, 2, 3], 10)
    ticket = its.submit(request)
    run(its)
    answer, _ = told(ticket)

    # the next turn of a conversation, the same prompt again, and another that begins alike
    for following, n_cached in (
        ([*request.prompt, *answer, 4], 23 + 9),  # the last new token was never read
        (request.prompt, 22),  # one is computed
        ([*system, 9, 9], 20),
    ):
        ticket = its.submit(Request(following, 10))
        run(its)
        (read, *_) = events = ticket.take()
        assert read.n_cached == n_cached
        assert [event.id for event in events[1:-1]] == alone(model, Request(following, 10))[0]
    assert its.counters()["cached_prompt_tokens"] == 32 + 22 + 20


def test_a_prefix_is_taken_from_a_text_that_goes_on():
    model = build()
    its = engine(model)
    wanted = [Request([*prompt(20), number], 15) for number in range(4)]
    tickets = [its.submit(request) for request in wanted]
    run(its)
    n_cached = []
    for ticket, request in zip(tickets, wanted, strict=True):
        read, *tokens, _ = ticket.take()
        n_cached.append(read.n_cached)
        assert [token.id for token in tokens] == alone(model, request)[0]
    assert n_cached == [0, 20, 20, 20]


def test_a_conversation_s_slot_is_kept_where_another_text_shares_little_of_it():
    its = engine(slots=2)
    first = its.submit(Request([*prompt(5), *prompt(30, 1)], 5))
    run(its)
    its.submit(Request([*prompt(5), 9], 5))
    run(its)
    again = its.submit(Request([*first.request.prompt, 7], 5))
    run(its)
    assert again.take()[0].n_cached == 35


def test_prefixes_are_not_shared_between_owners():
    its = engine()
    counted = []
    for owner in ("a", "b", "a"):
        ticket = its.submit(Request(prompt(20), 3, owner=owner))
        run(its)
        counted.append(ticket.take()[0].n_cached)
    assert counted == [0, 0, 19]


# ---- log-probabilities


def test_log_probabilities_are_those_of_one_pass_over_the_whole_text():
    model = build()
    its = engine(model, prefill_chunk=7)
    others = [its.submit(Request(prompt(6, i), 30)) for i in range(2)]
    sampling = Sampling(temperature=0.7, top_k=5, repetition_penalty=1.5)
    for log_probs, of_prompt in ((3, True), (0, False), (1000, True)):
        request = Request(prompt(20), 12, sampling, log_probs=log_probs, prompt_log_probs=of_prompt)
        ticket = its.submit(request)
        run(its)
        read, *tokens, _ = ticket.take()
        text = [*request.prompt, *(token.id for token in tokens)]
        with torch.no_grad():
            expected = torch.log_softmax(model(torch.tensor([text]))[0], -1)  # (T, V)
        given = [token.log_probs for token in tokens]
        if of_prompt:
            assert read.log_probs[0] is None and read.n_cached == 0
            given = read.log_probs[1:] + given
        else:
            assert read.log_probs is None
        first = len(text) - len(given)
        for position, its_log_probs in enumerate(given, first):
            row = expected[position - 1]
            assert its_log_probs.chosen == pytest.approx(row[text[position]].item(), abs=1e-4)
            best, ids = row.topk(min(log_probs, 50))
            assert [i for i, _ in its_log_probs.top] == ids.tolist()
            assert [p for _, p in its_log_probs.top] == pytest.approx(best.tolist(), abs=1e-4)
    assert all(event.log_probs is None for other in others for event in other.take()[:-1])


# ---- faults


def test_what_is_not_finite_ends_one_request_and_leaves_no_trace():
    model = build(tie_embeddings=False)
    with torch.no_grad():
        model.embed_tokens.weight[49] = float("nan")
    lines = []
    its = engine(model, lines.append, slots=2)
    wanted = [Request([1, 2, 3], 25), Request([4, 49, 5], 10), Request([4, 6, 5], 10), Request([4, 6, 5, 7, 1], 30)]
    tickets = [its.submit(request) for request in wanted]
    run(its)
    bad = tickets.pop(1)
    _, end = bad.take()
    assert end.reason == "error" and end.message.startswith("the model's logits are not finite after 0 new tokens")
    del wanted[1]
    assert [told(ticket) for ticket in tickets] == [alone(model, request) for request in wanted]
    assert its.counters()["failed"] == len(lines) == 1


@pytest.mark.parametrize("n_tokens", [1, 8], ids=["in a step", "in a prompt"])
def test_running_out_of_memory_ends_those_it_concerns(n_tokens, monkeypatch):
    model = build()
    lines = []
    its = engine(model, lines.append)
    first = its.submit(Request(prompt(5), 20))
    its.step()
    second = its.submit(Request(prompt(8), 20))
    hidden = model.hidden

    def fails(tokens, cache):
        if tokens.shape[1] == n_tokens:
            raise torch.OutOfMemoryError("out of memory. Tried to allocate\nmore")
        return hidden(tokens, cache=cache)

    monkeypatch.setattr(model, "hidden", fails)
    its.step()
    monkeypatch.undo()
    error = End("error", "out of memory. Tried to allocate")
    assert second.ended == error and first.ended == (error if n_tokens == 1 else None)
    third = its.submit(Request(prompt(8), 20))
    run(its)
    assert told(third) == alone(model, third.request)
    if n_tokens == 8:
        assert told(first) == alone(model, first.request)
    assert its.counters()["free_slots"] == 4


def test_a_request_for_whose_numbers_there_is_no_memory_ends_alone(monkeypatch):
    model = build()
    lines = []
    its = engine(model, lines.append, slots=2)

    def draws(sampling, *arguments):
        if sampling.seed == 13:
            raise MemoryError("no room")
        return Draws(sampling, *arguments)

    monkeypatch.setattr(running, "Draws", draws)
    wanted = [Request(prompt(5, i), 9, Sampling(seed=seed)) for i, seed in enumerate([1, 13, 2, 13, 3])]
    tickets = its.submit_all(wanted[:4])
    run(its)
    tickets.append(its.submit(wanted[4]))
    run(its)
    for ticket in tickets:
        if ticket.request.sampling.seed == 13:
            assert ticket.take() == [End("error", "no room")]
        else:
            assert told(ticket) == alone(model, ticket.request)
    assert its.counters()["free_slots"] == 2 == len(lines)


def test_a_log_that_nobody_reads_any_more_costs_no_other_request(monkeypatch):
    """As with `2>&1 | tee serve.log` once tee has ended. The engine's log is standard error unless told otherwise."""

    class Gone(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    model = build()
    its = engine(model)
    monkeypatch.setattr(sys, "stderr", Gone())
    lost = its.submit(Request(prompt(5), 4))
    with monkeypatch.context() as patch:
        patch.setattr(model, "hidden", lambda *_, **__: 1 / 0)
        its.step()
    assert lost.ended == End("error", "division by zero") and its.counters()["free_slots"] == 4
    other = its.submit(Request(prompt(5), 4))
    run(its)
    assert told(other) == alone(model, other.request)


def test_a_listener_that_fails_loses_its_request_alone():
    lines = []
    its = engine(log=lines.append)

    def fails():
        raise RuntimeError("gone")

    lost = its.submit(Request(prompt(4), 20), fails)
    kept = its.submit(Request(prompt(4), 20))
    run(its)
    assert lost.ended.reason == "cancelled" and kept.ended.reason == "length" and "gone" in lines[0]


@pytest.mark.parametrize(
    "request_, message",
    [
        (Request([], 5), "is empty"),
        (Request(prompt(3), 0), "must be at least 1"),
        (Request([1, 50], 5), "holds ids from 1 to 50"),
        (Request(prompt(32), 5), "32 tokens leave no room for a new one in the context of 32"),
        (Request(prompt(3), 5, prompt_log_probs=True), "say by log_probs how many"),
    ],
)
def test_wrong_requests_are_refused_before_they_wait(request_, message):
    its = engine(context=32)
    with pytest.raises(UserError, match=message):
        its.submit(request_)
    assert its.counters()["requests"] == 0


def test_models_that_write_no_text_here_are_refused():
    with pytest.raises(UserError, match="--context 65: the model's is 64"):
        engine(context=65)
    model = build()
    model.give_score_head(0)
    with pytest.raises(UserError, match="gives scores and no tokens"):
        engine(model)
    model = build()
    model.reshard = None
    with pytest.raises(UserError, match="sharded"):
        engine(model)


# ---- a thread of its own


def test_threads_ask_and_the_engine_s_own_thread_answers():
    model = build()
    its = engine(model)
    its.start()
    wanted = requests(12)
    answers = {}
    calls = []

    def ask(number: int) -> None:
        ticket = its.submit(wanted[number], lambda: calls.append(number))
        _, *tokens, end = ticket.events()
        answers[number] = [token.id for token in tokens], end.reason

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [answers[number] for number in range(12)] == [alone(model, request) for request in wanted]
    assert set(calls) == set(range(12))
    its.close()
    with pytest.raises(Closed):
        its.submit(wanted[0])
    assert not its._thread.is_alive()


def test_a_fault_of_the_engine_itself_leaves_nobody_waiting(monkeypatch):
    lines = []
    its = engine(log=lines.append, slots=1)
    take = its.slots.take
    monkeypatch.setattr(its.slots, "take", lambda *arguments, **options: 1 / 0)
    tickets = its.submit_all([Request(prompt(5, i), 20) for i in range(3)])
    its.start()
    for ticket in tickets:
        *_, end = ticket.events()
        assert end == End("error", "division by zero")
    its.slots.take = take
    *_, end = its.submit(Request(prompt(5), 20)).events()
    assert end.reason == "length"
    its.close()


def break_after(its, n_calls: int, monkeypatch) -> None:
    """Let a device fail after so many of the calls that touch it, and each time from then on."""
    calls = []

    def guarded(call):
        def touches(*arguments, **options):
            calls.append(call)
            if len(calls) > n_calls:
                raise RuntimeError("CUDA error: an illegal memory access was encountered")
            return call(*arguments, **options)

        return touches

    cache = its.slots.cache
    for owner, names in (
        (its.passes, ("read", "next")),
        (its.slots, ("take", "activate", "release", "forget")),
        (cache, ("begin_row", "swap_rows")),
        (batching, ("pick_each",)),
        (running, ("Draws",)),
    ):
        for name in names:
            monkeypatch.setattr(owner, name, guarded(getattr(owner, name)))


def assert_nobody_waits(its, tickets) -> None:
    """The engine's thread has ended, and with it every request; no more are taken."""
    its._thread.join(20)
    assert not its._thread.is_alive()
    for ticket in tickets:
        ends = [event for event in ticket.take() if isinstance(event, End)]
        assert ends == [ticket.ended]  # one, and no second
    with pytest.raises(Closed, match=r"the engine has stopped: .*; start the server again"):
        its.submit(Request(prompt(5), 5))
    its.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("n_calls", range(0, 120, 5))
def test_a_device_that_fails_for_good_leaves_nobody_waiting(n_calls, monkeypatch):
    """Wherever it begins: in a prompt, a step, where a request gets a slot, or where one ends and another follows."""
    lines = []
    its = engine(log=lines.append, slots=2)
    break_after(its, n_calls, monkeypatch)
    tickets = its.submit_all([Request(prompt(5 + i, i), 4 + 3 * i) for i in range(6)])
    its.start()
    assert_nobody_waits(its, tickets)
    assert "CUDA error" in lines[-1] and its.fault == lines[-1]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("what", ["log", "step"])
def test_whatever_ends_the_engine_s_thread_ends_its_requests(what, monkeypatch):
    """A full disk under the log, or an exception that is no fault."""
    its = engine(slots=1)

    def fails(*_):
        raise OSError("no space left") if what == "log" else KeyboardInterrupt

    if what == "log":
        monkeypatch.setattr(its.slots, "take", lambda *arguments: 1 / 0)
    monkeypatch.setattr(its, what, fails)
    tickets = its.submit_all([Request(prompt(5, i), 20) for i in range(3)])
    its.start()
    assert_nobody_waits(its, tickets)


def test_closing_lets_requests_end_or_ends_them():
    its = engine(slots=1)
    tickets = [its.submit(Request(prompt(5, i), 20)) for i in range(3)]
    its.close()
    assert [ticket.ended.reason for ticket in tickets] == ["length"] * 3

    its = engine(slots=1)
    tickets = [its.submit(Request(prompt(5, i), 20)) for i in range(3)]
    its.step()
    its.close(drain=False)
    assert [ticket.ended.reason for ticket in tickets] == ["closed"] * 3


def test_all_memory_is_taken_at_the_start():
    its = engine(slots=3, context=40)
    # keys and values, 2 layers, 3 rows, 40 tokens, 2 heads of 8 numbers in 4 bytes
    assert its.cache_bytes == 2 * 2 * 3 * 40 * 2 * 8 * 4
    storages = [tensor.data_ptr() for tensor in its.slots.cache.keys]
    for request in requests(10):
        if len(request.prompt) < 40:
            its.submit(request)
    run(its)
    assert [tensor.data_ptr() for tensor in its.slots.cache.keys] == storages
    assert its.slots.n_bytes == its.cache_bytes


@pytest.mark.slow
def test_memory_stays_flat_over_a_thousand_requests():
    its = engine(slots=8)
    pages = Path("/proc/self/statm")

    def serve(n: int, seed: int) -> int:
        for request in requests(n, seed):
            while its.counters()["waiting"] > 20:
                its.step()
            its.submit(request)
        run(its)
        return int(pages.read_text().split()[1]) * resource.getpagesize()

    before = serve(300, 0)
    after = serve(1000, 1)
    assert after - before < 2 << 20
