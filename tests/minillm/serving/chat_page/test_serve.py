"""The chat page in front of the server that it belongs to, with a small model of random weights."""

import json

from minillm.serving.door import Door
from tests.minillm.serving.chat_page.on_the_page import READY, answers, ask, captions
from tests.minillm.serving.conftest import running, serve_home


def address(here) -> str:
    return f"http://127.0.0.1:{here.port}/"


def stored_answers(page) -> list[str]:
    """The texts of the only conversation's answers, as they came."""
    [stored] = page.evaluate("Object.entries(localStorage).filter(([k]) => k.includes('/')).map(([, text]) => text)")
    return [turn["answers"][0]["text"] for turn in json.loads(stored)["turns"]]


def be_greedy(page, tokens: int) -> None:
    page.click("[data-action=openSettings]")
    page.fill("#temperature", "0")
    page.fill("#max_tokens", str(tokens))
    page.click("#settings .main")


def test_a_conversation_until_the_context_is_full(home, visit):
    with running([serve_home(home, slots=4)]) as here:
        page = visit(address(here))
        page.wait_for_selector("#welcome >> text=a context of 64 tokens")
        be_greedy(page, 12)
        messages = []
        for question in home.texts[:2]:
            ask(page, question)
            messages.append({"role": "user", "content": question})
            body = {"messages": messages, "temperature": 0, "max_tokens": 12}
            status, answer = here.post("/v1/chat/completions", body)
            messages.append(answer["choices"][0]["message"])
            assert status == 200 and stored_answers(page)[-1] == messages[-1]["content"]
            if "not shown" in captions(page):
                break
        for _ in range(4):
            ask(page, home.texts[2])
        assert "not shown the first" in captions(page) and not page.locator(".error").count()
        ask(page, "word " * 100)
        assert "too long" in captions(page)
        here.until(lambda: here.is_idle)


def test_an_answer_that_is_stopped_frees_its_slot(home, visit):
    with running([serve_home(home, slots=1)], starts=False) as here:
        page = visit(address(here))
        be_greedy(page, 40)
        ask(page, home.texts[0], wait=False)
        here.until(lambda: here.engine.waiting)
        for _ in range(6):
            here.engine.step()
        page.wait_for_selector(".answer .text > *")
        page.keyboard.press("Escape")
        page.wait_for_selector(READY)
        here.until(lambda: here.engine.step() or here.is_idle)
        assert captions(page) == "stopped"
        here.engine.start()
        ask(page, home.texts[1])
        assert len(answers(page)) == 2 and "tokens" in captions(page)


def test_two_models_and_a_key(home, visit):
    with running([serve_home(home, "one"), serve_home(home, "two")], Door(keys=("secret",))) as here:
        page = visit(address(here))
        page.fill("#key", "secret")
        page.keyboard.press("Enter")
        page.wait_for_selector("#welcome >> text=one")
        be_greedy(page, 8)
        page.select_option("#rival", "two")
        ask(page, home.texts[0])
        first, second = answers(page)  # the same weights
        assert first == second and first
