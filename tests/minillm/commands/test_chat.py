from types import SimpleNamespace

from minillm.commands import chat as chat_command
from minillm.generation import completion, load


def test_chat_answers_remembers_and_forgets(home, call, monkeypatch):
    prompts = []
    stream = completion.stream

    def noted(model, tokenizer, ids, *args, **options):
        prompts.append(ids)
        return stream(model, tokenizer, ids, *args, **options)

    monkeypatch.setattr(completion, "stream", noted)
    options = ["--max_new_tokens", "5", "--temperature", "0"]
    status, out, _ = call("chat", *options, typed="Who?\nTom?\n/new\nWho?\n\n")
    assert status == 0 and out.startswith("out/sft/step-00000003")
    first, second, third = prompts
    chat = home.tokenizer.encode_chat
    assert first == third == chat([{"role": "user", "content": "Who?"}], add_generation_prompt=True)[0]
    assert second[: len(first)] == first and len(second) > len(first)
    prompts.clear()
    _, out, _ = call("chat", "--system", "Tom.", *options, typed="Who has the ball?\n" * 6)
    assert "earlier messages forgotten" in out
    system = chat([{"role": "system", "content": "Tom."}])[0]
    assert all(ids[: len(system)] == system and len(ids) <= 32 for ids in prompts)


def test_chat_shows_single_questions_to_a_model_that_was_taught_so(call, monkeypatch):
    """Or as many as --turns says, whatever it was taught."""
    monkeypatch.setattr(chat_command, "trained_with", lambda folder: {"turns": 1})
    shown = []

    def noted(model, tokenizer, ids, *args, **options):
        shown.append(tokenizer.decode(ids))
        yield "Yes."
        return SimpleNamespace(reason="stop")

    monkeypatch.setattr(completion, "stream", noted)
    for options, last in (([], "Ann"), (["--turns", "2"], "AnnMia"), (["--turns", "9"], "AnnMiaTom")):
        shown.clear()
        status, out, _ = call("chat", "--system", "S.", *options, typed="Tom?\nMia?\nAnn?\n\n")
        assert status == 0 and ("taught single questions" in out) == (not options)
        assert all("S." in text for text in shown)
        asked = ["".join(name for name in ("Ann", "Mia", "Tom") if f"{name}?" in text) for text in shown]
        assert asked == ["Tom", "MiaTom" if options else "Mia", last]


def test_chat_says_that_a_model_of_texts_does_not_answer(call, monkeypatch):
    """Other folders, such as a downloaded one, say nothing of their training."""
    for trained, said in (({}, False), ({"config": {"template": "auto"}}, False), ({"config": {"lr": 1e-3}}, True)):
        monkeypatch.setattr(chat_command, "trained_with", lambda folder, trained=trained: trained)
        status, out, _ = call("chat", "--max_new_tokens", "2", typed="Who?\n\n")
        assert status == 0 and ("teaches it to answer" in out) == said


def test_chat_remembers_no_blank_answer(call, monkeypatch):
    """As where Ctrl-C comes before the first piece: some templates refuse a message without text."""
    shown = []

    def interrupted(model, tokenizer, ids, *args, **options):
        shown.append(tokenizer.decode(ids))
        if len(shown) == 1:
            raise KeyboardInterrupt
        yield " \n" if len(shown) == 2 else "Yes."
        return SimpleNamespace(reason="stop")

    monkeypatch.setattr(completion, "stream", interrupted)
    status, _, err = call("chat", typed="Tom?\nMia?\nAnn?\nWho?\n\n")
    assert status == 0, err
    assert [[name for name in ("Tom", "Mia", "Ann", "Who") if name in text] for text in shown] == [
        ["Tom"],
        ["Mia"],
        ["Ann"],
        ["Ann", "Who"],
    ]


def test_chat_draws_each_answer_anew_and_a_whole_chat_alike_by_its_seed(call):
    """A question asked again, here in a conversation of its own, gets another answer."""
    asked = "Who?\n/new\n" * 6

    def chat(*options) -> list[str]:
        out = call("chat", "--max_new_tokens", "6", *options, typed=asked)[1]
        return [line for line in out.removeprefix(out.splitlines()[0]).split("> ") if line.strip()]

    first = chat("--temperature", "2")
    assert len(first) == 6 and len(set(first)) == 6
    assert chat("--temperature", "2") == first != chat("--temperature", "2", "--seed", str((1 << 64) - 1))
    assert len(set(chat("--temperature", "0"))) == 1


def test_chat_goes_on_after_a_line_that_is_too_long(call, monkeypatch):
    """And remembers what was said before it."""
    shown, stream = [], completion.stream

    def noted(model, tokenizer, ids, *args, **options):
        shown.append(ids)
        return stream(model, tokenizer, ids, *args, **options)

    monkeypatch.setattr(completion, "stream", noted)
    options = ["--max_new_tokens", "2", "--temperature", "0"]
    status, out, _ = call("chat", *options, typed="Who?\n" + "Tom " * 200 + "\nMia?\n")
    assert status == 0 and out.count("> ") == 4 and out.count("tokens fill the context of 64") == 1
    with_it = list(shown)
    shown.clear()
    call("chat", *options, typed="Who?\nMia?\n")
    assert with_it == shown and len(shown) == 2 and len(shown[1]) > len(shown[0])


def test_what_is_too_long_may_be_the_system_message(call):
    long = "Tom " * 200
    for system, typed, is_named in ((long, "Who?\n", True), ("Tom.", long + "\n", True), ("", long + "\n", False)):
        status, out, _ = call("chat", "--system", system, typed=typed)
        assert status == 0 and "say it in fewer words" in out and ("shorten --system" in out) == is_named


def test_chat_goes_on_after_a_line_that_is_not_utf_8(call):
    status, out, _ = call("chat", "--max_new_tokens", "2", typed=b"Who?\n\xff\xfe?\nTom?\n")
    assert status == 0 and out.count("> ") == 4 and out.count("is not UTF-8") == 1


def test_without_a_model_the_next_step_is_named(call, tmp_path, monkeypatch):
    monkeypatch.setattr(load, "DEFAULT_RUNS", (str(tmp_path / "a"), str(tmp_path / "b")))
    status, _, err = call("chat")
    assert status == 2 and "train_pretrain.py" in err
