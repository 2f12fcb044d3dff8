import gc
import weakref

import pytest

from minillm.base.errors import UserError
from minillm.commands import serve


class Listener:
    def getsockname(self):
        return "127.0.0.1", 8000


@pytest.fixture
def started(monkeypatch):
    """What the command would serve, without listening."""
    apps = []

    class Server:
        def run(self, sockets):
            apps[-1].is_run = True

    monkeypatch.setattr(serve, "listening_socket", lambda host, port, has_key: Listener())
    monkeypatch.setattr(serve, "build_server", lambda app, drain_s, log: apps.append(app) or Server())
    monkeypatch.delenv(serve.KEY_VARIABLE, raising=False)
    yield apps
    for app in apps:
        for model in app.models.values():
            model.engine.close(drain=False)
    gc.unfreeze()


def test_serve_says_what_is_served_and_where(call, started):
    status, out, _ = call("serve", "--slots", "2", "--context", "32", "--max_new_tokens", "9")
    assert status == 0 and started[0].is_run
    first, last = out.splitlines()
    assert first.startswith("sft: out/sft/step-00000003 (") and "context 32, 2 slots, cache 0.0 MiB" in first
    assert last.startswith("http://127.0.0.1:8000 (chat page), http://127.0.0.1:8000/v1 (OpenAI's API);")
    (model,) = started[0].models.values()
    assert (model.name, model.most_tokens, model.engine.context, model.no_chat) == ("sft", 9, 32, "")
    assert started[0].door.keys == ()


def test_keys_come_from_the_command_line_or_the_environment(call, started, monkeypatch):
    monkeypatch.setenv(serve.KEY_VARIABLE, "one two")
    _, out, _ = call("serve")
    assert started[-1].door.keys == ("one", "two") and "with a key" in out and "two" not in out
    call("serve", "--api_key", "three", "--cors", "https://chat.example.org")
    assert started[-1].door.keys == ("three",) and started[-1].door.cors == "https://chat.example.org"


@pytest.mark.parametrize("text", ["", " \n"])
def test_a_blank_key_in_the_environment_opens_no_door(call, started, monkeypatch, text):
    monkeypatch.setenv(serve.KEY_VARIABLE, text)
    status, _, err = call("serve")
    assert status == 2 and f"{serve.KEY_VARIABLE}: is set, but to no key" in err and not started
    status, _, _ = call("serve", "--api_key", "one")
    assert status == 0 and started[-1].door.keys == ("one",)


def test_models_have_the_names_that_are_given(call, started, home):
    call("serve", "--model", "a=out/sft", "out/sft", "out/sft/step-00000003")
    assert "two models have the name sft" in call("serve", "--model", "out/sft", "out/sft/step-00000003")[2]
    status, out, _ = call("serve", "--model", "a=out/sft", "out/sft")
    assert status == 0 and [*started[-1].models] == ["a", "sft"] and out.startswith("a: out/sft/step-00000003")
    first, second = (model.engine.model for model in started[-1].models.values())
    n_bytes = sum(weight.nbytes for weight in first.parameters())
    assert f"{n_bytes / 2**20:.1f} MiB of them shared" in out.splitlines()[1]
    assert [w.data_ptr() for w in first.parameters()] == [w.data_ptr() for w in second.parameters()]
    for text, parts in (
        ("out/sft", ("", "out/sft")),
        ("tom=out/sft", ("tom", "out/sft")),
        ("runs/a=1", ("", "runs/a=1")),
        (None, ("", None)),
    ):
        assert serve.split_name(text) == parts
    odd = home.path / "a=b"
    odd.mkdir()
    assert serve.split_name(str(odd)) == ("", str(odd))
    for wrong in ("=out/sft", " =out/sft", "tom=", "to\x1bm=out/sft"):
        with pytest.raises(UserError, match="NAME=FOLDER"):
            serve.split_name(wrong)


def test_a_name_is_never_empty_or_one_that_only_means_a_place(home, monkeypatch):
    step = home.path / "out" / "sft" / "step-00000003"
    link = home.path / "tom"
    link.symlink_to(step)
    for here, given, name in (
        (step, ".", "sft"),
        (step, "./", "sft"),
        (step.parent, "step-00000003", "sft"),
        (step.parent, ".", "sft"),
        (home.path / "out", "sft/step-00000003/..", "sft"),
        (home.path / "out", "../out/sft", "sft"),
        (home.path, "tom", "tom"),
        (link, ".", "sft"),
    ):
        monkeypatch.chdir(here)
        assert [name for name, _ in serve.named_folders((given,))] == [name], given
    for odd in ("a\x1bb", " "):
        (home.path / odd).symlink_to(step)
        with pytest.raises(UserError, match=r"its name .* is none to ask for; give NAME=FOLDER"):
            serve.named_folders((str(home.path / odd),))


def test_a_model_that_was_taught_single_questions_says_so(call, started, monkeypatch):
    monkeypatch.setattr(serve, "trained_with", lambda folder: {"turns": 1})
    _, out, _ = call("serve")
    assert "taught single questions" in out and started[-1].models["sft"].entry["turns"] == 1


def test_a_model_that_was_taught_texts_alone_says_so(call, started, monkeypatch):
    monkeypatch.setattr(serve, "trained_with", lambda folder: {"config": {"lr": 1e-3}})
    _, out, _ = call("serve")
    assert "goes on with them rather than answers" in out


def test_what_cannot_be_served_is_one_line(call, started):
    for options, words in (
        (["--context", "65"], "--context 65"),
        (["--model", "nowhere"], "nowhere"),
        (["--cors", "example.org"], "--cors example.org"),
        (["--api_key", "a b"], "--api_key"),
    ):
        status, _, err = call("serve", *options)
        assert status == 2 and words in err and len(err.splitlines()) == 1
    assert not started


def test_what_is_missing_is_named_with_its_extra(call, started, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    status, _, err = call("serve")
    assert status == 2 and 'pip install -e ".[serve]"' in err


def test_what_is_logged_commands_no_terminal(call, started, capsys):
    call("serve")
    started[-1].log("a fault: \x1b]52;c;\u202e")
    assert capsys.readouterr().err == "a fault: \\x1b]52;c;\\u202e\n"


def test_garbage_is_found_soon_however_much_is_loaded():
    class Thing:
        pass

    loaded = [[] for _ in range(1_000_000)]
    try:
        serve.set_apart_what_stays()
        thing = Thing()
        thing.itself = thing
        gc.collect(1)  # it has been there for long
        is_there = weakref.ref(thing)
        del thing
        made = [[] for _ in range(100_000)]
        assert is_there() is None
        assert len(loaded) > len(made)
    finally:
        gc.unfreeze()
