"""The chat page in Chromium: what a user does with it, in front of a server whose answers the test chooses."""

import json
import re
from pathlib import Path
from threading import Event

import pytest

from minillm.datasets import messages
from tests.minillm.serving.chat_page.on_the_page import READY, answers, ask, captions
from tests.minillm.serving.chat_page.stand_in import CutOff, Refused

PHONE = dict(viewport={"width": 360, "height": 700}, has_touch=True, is_mobile=True)


def said(body: dict) -> list[str]:
    """A request's messages, each as "role: content"."""
    return [f"{message['role']}: {message['content']}" for message in body["messages"]]


def counting(body: dict) -> list[str]:
    """An answer that tells how many questions came before."""
    return [f"answer {sum(message['role'] == 'user' for message in body['messages'])}"]


def until(page, condition: str) -> None:
    page.wait_for_function(f"() => {condition}")


# ---- asking


def test_an_answer_is_shown_as_it_comes(server, visit):
    go_on = Event()
    server.answer = lambda body: ["Tom has", go_on, " the ball."]
    page = visit(server.url)
    ask(page, "Who has the ball?", wait=False)
    page.wait_for_selector("text=Tom has")
    assert page.locator(".answer").get_attribute("aria-busy") == "true"
    assert page.locator("#stop").is_visible() and not page.locator("#send").is_visible()
    go_on.set()
    page.wait_for_selector(READY)
    assert answers(page) == ["Tom has the ball."]
    assert page.locator(".answer").get_attribute("aria-busy") == "false"
    assert re.match(r"8 tokens · [\d,.]+ tokens/s · context 40 of 512", captions(page))
    assert page.evaluate("document.activeElement.id") == "question"


def test_the_next_question_goes_with_what_was_said_before(server, visit):
    server.answer = counting
    page = visit(server.url)
    ask(page, "first")
    ask(page, "second")
    assert said(server.asked[1]) == ["user: first", "assistant: answer 1", "user: second"]
    assert server.asked[1]["model"] == "tiny" and server.asked[1]["stream"] is True
    assert answers(page) == ["answer 1", "answer 2"]


@pytest.mark.parametrize("how", ["button", "Escape"])
def test_an_answer_can_be_stopped(server, visit, how):
    server.answer = lambda body: ["All work", Event(), " and no play"]
    page = visit(server.url)
    ask(page, "Go on for ever", wait=False)
    page.wait_for_selector("text=All work")
    if how == "button":
        page.click("#stop")
    else:
        page.keyboard.press("Escape")
    page.wait_for_selector(READY)
    assert server.left.wait(5)
    assert answers(page) == ["All work"] and captions(page) == "stopped"
    server.answer = counting
    ask(page, "And now?")
    assert said(server.asked[1])[1] == "assistant: All work"


def test_an_answer_can_be_given_again(server, visit):
    server.answer = counting
    page = visit(server.url)
    ask(page, "first")
    ask(page, "second")
    assert page.locator("[data-action=again]:visible").count() == 1  # of the last answer alone
    server.answer = lambda body: ["another"]
    page.click("[data-action=again]:visible")
    page.wait_for_selector("text=another")
    assert answers(page) == ["answer 1", "another"]
    assert said(server.asked[2]) == said(server.asked[1])


def test_a_question_can_be_changed_and_asked_again(server, visit):
    server.answer = counting
    page = visit(server.url)
    for question in ("first", "second", "third"):
        ask(page, question)
    page.locator("[data-action=edit]").nth(1).click()
    page.keyboard.press("Escape")  # on second thoughts
    assert page.locator(".said").all_inner_texts() == ["first", "second", "third"]
    page.locator("[data-action=edit]").nth(1).click()
    editor = page.locator(".editor textarea")
    assert editor.input_value() == "second"
    editor.fill("another second")
    editor.press("Enter")
    page.wait_for_selector(".turn:nth-child(2) .caption")
    assert page.locator(".said").all_inner_texts() == ["first", "another second"]
    assert said(server.asked[3]) == ["user: first", "assistant: answer 1", "user: another second"]


def test_enter_sends_shift_enter_does_not(server, visit):
    page = visit(server.url)
    page.fill("#question", "one")
    page.press("#question", "Shift+Enter")
    page.keyboard.type("two")
    assert not server.asked
    page.press("#question", "Enter")
    page.wait_for_selector(READY + " >> nth=0")
    page.wait_for_selector(".caption")
    assert said(server.asked[0]) == ["user: one\ntwo"]
    assert page.input_value("#question") == ""
    page.press("#question", "Enter")  # nothing to send
    assert len(server.asked) == 1


def test_an_input_method_keeps_its_enter(server, visit):
    """While a word is being composed, Enter takes the word; `keyCode` 229 is what Safari says then."""
    page = visit(server.url, locale="zh-CN")
    page.fill("#question", "谁有球")
    for event in ({"isComposing": True}, {"keyCode": 229}):
        page.dispatch_event("#question", "keydown", {"key": "Enter", "bubbles": True, **event})
    assert not server.asked and page.input_value("#question") == "谁有球"
    keyboard = page.context.new_cdp_session(page)
    page.focus("#question")
    keyboard.send("Input.imeSetComposition", {"text": "qiu", "selectionStart": 3, "selectionEnd": 3})
    key = {"key": "Process", "code": "Enter", "windowsVirtualKeyCode": 229}
    keyboard.send("Input.dispatchKeyEvent", {"type": "rawKeyDown", **key})
    keyboard.send("Input.insertText", {"text": "？"})
    assert not server.asked and page.input_value("#question") == "谁有球？"
    page.press("#question", "Enter")
    page.wait_for_selector(".caption")
    assert said(server.asked[0]) == ["user: 谁有球？"]


def test_a_reader_who_scrolled_up_stays_there(server, visit):
    go_on = Event()
    server.answer = lambda body: ["line\n\n" * 60, go_on, "line\n\n" * 60]
    page = visit(server.url)
    ask(page, "Tell much", wait=False)
    until(page, "document.querySelectorAll('.text p').length === 60")
    assert page.evaluate("log.scrollTop + log.clientHeight > log.scrollHeight - 60")  # it follows
    page.evaluate("log.scrollTop = 100")
    go_on.set()
    page.wait_for_selector(READY)
    assert page.evaluate("log.scrollTop") == 100


# ---- models, settings


def test_two_models_answer_side_by_side(server, visit):
    server.answer = lambda body: [f"I am {body['model']}, ", *counting(body)]
    page = visit(server.url)
    page.select_option("#rival", "larger")
    ask(page, "Who are you?")
    assert answers(page) == ["I am tiny, answer 1", "I am larger, answer 1"]
    left, right = (place.bounding_box() for place in page.locator(".answer").all())
    assert left["y"] == right["y"] and left["x"] + left["width"] < right["x"]
    ask(page, "And again?")
    asked = {body["model"]: said(body) for body in server.asked[2:]}
    assert asked["tiny"][1] == "assistant: I am tiny, answer 1"  # each goes on from its own answer
    assert asked["larger"][1] == "assistant: I am larger, answer 1"
    server.answer = lambda body: ["Otherwise"]
    page.locator("[data-action=again]:visible").nth(1).click()
    page.wait_for_selector("text=Otherwise")
    assert answers(page)[2:] == ["I am tiny, answer 2", "Otherwise"]
    assert [body["model"] for body in server.asked[4:]] == ["larger"]


def test_one_of_two_models_fails(server, visit):
    def answer(body):
        if body["model"] == "larger":
            raise Refused(400, "larger has no chat template")
        return ["fine"]

    server.answer = answer
    page = visit(server.url)
    page.select_option("#rival", "larger")
    ask(page, "Who are you?")
    assert answers(page) == ["fine", ""]
    assert page.locator(".error").inner_text() == "larger has no chat template"


def test_a_model_without_a_chat_template_is_not_offered(server, visit):
    server.models.insert(0, {"id": "base", "context_length": 512, "turns": None, "chat": False})
    page = visit(server.url)
    assert page.locator("#model option").all_inner_texts() == ["tiny", "larger"]
    ask(page, "Hello")
    assert server.asked[0]["model"] == "tiny"


def test_settings_are_sent_as_far_as_they_are_given(server, visit):
    page = visit(server.url)
    ask(page, "Hello")
    assert set(server.asked[0]) == {"model", "messages", "stream", "stream_options"}
    page.click("[data-action=openSettings]")
    page.fill("#system", "Be brief.\nBe kind.")
    page.fill("#temperature", "0")
    page.fill("#max_tokens", "20")
    page.fill("#top_p", "1.5")
    page.click("#settings .main")
    assert page.locator("#settings").is_visible()  # 1.5 is no probability
    page.fill("#top_p", "0.9")
    page.click("#settings .main")
    ask(page, "Hello again")
    body = server.asked[1]
    assert said(body)[0] == "system: Be brief.\nBe kind."
    assert (body["temperature"], body["max_tokens"], body["top_p"]) == (0, 20, 0.9)
    assert not {"top_k", "seed", "repetition_penalty"} & set(body)
    page.click("[data-action=openSettings]")
    page.fill("#temperature", "2")
    page.keyboard.press("Escape")  # on second thoughts
    page.click("[data-action=begin]")  # a new conversation takes them over
    ask(page, "Anew")
    assert server.asked[2]["temperature"] == 0 and said(server.asked[2])[0].startswith("system")


# ---- conversations


def test_conversations_outlive_the_page(server, visit):
    server.answer = counting
    page = visit(server.url)
    ask(page, "About cats")
    page.click("[data-action=begin]")
    ask(page, "About dogs")
    page.reload()
    titles = page.locator("#conversations .title")
    assert titles.all_inner_texts() == ["About dogs", "About cats"]
    titles.nth(1).click()
    assert answers(page) == ["answer 1"] and page.title() == "About cats · minillm"
    ask(page, "More cats")
    assert said(server.asked[-1])[0] == "user: About cats"
    assert titles.all_inner_texts() == ["About cats", "About dogs"]


def test_a_conversation_is_deleted_and_brought_back(server, visit):
    page = visit(server.url)
    ask(page, "About cats")
    page.click("[data-action=remove]")
    assert not page.locator("#conversations li").count() and page.locator("#welcome").is_visible()
    assert page.evaluate("Object.keys(localStorage).length") == 0
    page.click("[data-action=undo]")
    assert answers(page) == ["Hello you."]
    page.reload()
    assert page.locator("#conversations .title").all_inner_texts() == ["About cats"]


def test_what_is_exported_can_be_learned(server, visit):
    server.answer = lambda body: [f"{body['model']} 说：好"]
    page = visit(server.url)
    page.click("[data-action=openSettings]")
    page.fill("#system", "Be brief.")
    page.click("#settings .main")
    ask(page, "About cats")
    page.select_option("#rival", "larger")
    ask(page, "More")
    page.click("[data-action=begin]")
    page.select_option("#rival", "")
    ask(page, "About dogs")
    with page.expect_download() as download:
        page.click("[data-action=exportAll]")
    rows = [json.loads(line) for line in Path(download.value.path()).read_text(encoding="utf-8").splitlines()]
    assert download.value.suggested_filename == "minillm-chats.jsonl"
    read = [["/".join(m["content"] for m in talk) for talk in messages.conversations(row)] for row in rows]
    assert sorted(read) == [
        ["Be brief./About cats/tiny 说：好/More/larger 说：好"],
        ["Be brief./About cats/tiny 说：好/More/tiny 说：好"],
        ["Be brief./About dogs/tiny 说：好"],
    ]


def test_an_answer_goes_on_while_another_conversation_is_read(server, visit):
    go_on = Event()
    page = visit(server.url)
    ask(page, "About cats")
    page.click("[data-action=begin]")
    server.answer = lambda body: ["They", go_on, " bark"]
    ask(page, "About dogs", wait=False)
    page.wait_for_selector("text=They")
    page.locator("#conversations .title", has_text="cats").click()
    assert answers(page) == ["Hello you."] and page.locator("#send").is_visible()
    go_on.set()
    page.wait_for_selector("li:not(.running) >> text=dogs")
    assert answers(page) == ["Hello you."]
    page.locator("#conversations .title", has_text="dogs").click()
    assert answers(page) == ["They bark"]


def test_what_was_answered_until_the_page_went_is_kept(server, visit):
    server.answer = lambda body: ["Tom has", Event()]
    page = visit(server.url)
    ask(page, "Who has the ball?", wait=False)
    page.wait_for_selector("text=Tom has")
    page.reload()
    page.click("#conversations .title")
    assert answers(page) == ["Tom has"] and captions(page) == "stopped"


def test_two_tabs_do_not_overwrite_each_other(server, visit):
    page = visit(server.url)
    other = page.context.new_page()
    other.goto(server.url)
    ask(page, "From here")
    ask(other, "From there")
    until(page, "document.querySelectorAll('#conversations li').length === 2")
    page.reload()
    assert sorted(page.locator("#conversations .title").all_inner_texts()) == ["From here", "From there"]


# ---- what goes wrong


def test_an_error_in_the_middle_of_an_answer_is_told(server, visit):
    server.answer = lambda body: ["Tom has", {"error": {"message": "the engine stopped"}}]
    page = visit(server.url)
    ask(page, "Who has the ball?")
    assert answers(page) == ["Tom has"] and captions(page) == "the engine stopped"
    server.answer = counting
    page.click("[data-action=again]:visible")
    page.wait_for_selector("text=answer 1")


def test_a_connection_that_breaks_is_told(server, visit):
    seen = Event()

    def answer(body):
        yield from ("Tom has", seen)
        raise CutOff

    server.answer = answer
    page = visit(server.url)
    ask(page, "Who has the ball?", wait=False)
    page.wait_for_selector("text=Tom has")
    seen.set()
    page.wait_for_selector(READY)
    assert answers(page) == ["Tom has"] and captions(page) == "The connection ended before the answer did."


def test_a_busy_and_a_vanished_server_are_told(server, visit):
    def busy(body):
        raise Refused(503, "queue full")

    server.answer = busy
    page = visit(server.url)
    ask(page, "Hello")
    assert "cannot answer at the moment. (queue full)" in captions(page)
    page.context.set_offline(True)
    with page.expect_event("requestfailed"):
        page.click("[data-action=again]:visible")
    page.wait_for_selector("text=cannot be reached")
    page.context.set_offline(False)
    server.answer = counting
    page.click("[data-action=again]:visible")
    page.wait_for_selector("text=answer 1")


def test_the_earliest_turns_are_left_out_when_the_context_is_full(server, visit):
    def answer(body):
        if len(body["messages"]) > 3:
            raise Refused(400, "600 tokens of 512", "context_length_exceeded")
        return counting(body)

    server.answer = answer
    page = visit(server.url)
    for question in ("first", "second", "third"):
        ask(page, question)
    assert said(server.asked[-2])[0] == "user: first"  # refused
    assert said(server.asked[-1]) == ["user: second", "assistant: answer 2", "user: third"]
    assert "not shown the first 1 questions" in captions(page)
    ask(page, "fourth")
    assert said(server.asked[-1])[0] == "user: third" and "first 2 questions" in captions(page)


def test_room_for_an_answer_is_made_before_the_context_is_full(server, visit):
    server.answer, server.total = counting, 300  # of 512
    page = visit(server.url)
    ask(page, "first")
    ask(page, "second")
    assert said(server.asked[1]) == ["user: second"]
    assert "first 1 questions" in captions(page)


def test_a_question_too_long_by_itself_is_told(server, visit):
    def answer(body):
        raise Refused(400, "600 tokens of 512", "context_length_exceeded")

    server.answer = answer
    page = visit(server.url)
    ask(page, "word " * 600)
    assert "too long" in captions(page) and "600 tokens of 512" in captions(page)


def test_what_cut_an_answer_is_told(server, visit):
    server.answer = lambda body: ["Once upon", {"finish_reason": "length"}]
    page = visit(server.url)
    ask(page, "Tell a story")
    assert "the longest answer allowed is reached" in captions(page)
    server.total = 512
    page.click("[data-action=again]:visible")
    page.wait_for_selector("text=the context of 512 tokens is full")


def test_a_model_of_single_questions_is_asked_them_alone(server, visit):
    server.models[0]["turns"] = 1
    page = visit(server.url)
    ask(page, "first")
    assert "single questions" not in captions(page)
    ask(page, "second")
    assert said(server.asked[1]) == ["user: second"] and "single questions" in captions(page)


def test_a_model_sees_as_many_questions_as_it_is_told(server, visit):
    server.answer = counting
    page = visit(server.url)
    page.click("[data-action=openSettings]")
    page.fill("#turns", "2")
    page.click("#settings .main")
    for question in ("first", "second", "third"):
        ask(page, question)
    assert said(server.asked[2]) == ["user: second", "assistant: answer 2", "user: third"]
    assert "turns" not in server.asked[2] and "not shown" not in captions(page)


def test_a_server_with_a_key_is_given_it(server, visit):
    server.key = "secret"
    page = visit(server.url)
    page.wait_for_selector("#key-dialog[open]")
    assert page.inner_text("#key-title") == "This server asks for a key"
    page.fill("#key", "guess")
    page.keyboard.press("Enter")
    page.wait_for_selector("text=refused this key")
    page.fill("#key", "secret")
    page.keyboard.press("Enter")
    page.wait_for_selector("#welcome >> text=tiny")
    ask(page, "Hello")
    assert answers(page) == ["Hello you."]
    assert "secret" not in page.evaluate("JSON.stringify(localStorage)")
    page.reload()
    page.wait_for_selector("#welcome >> text=tiny")  # it is still known in this tab


def test_a_key_that_is_not_given_can_be_given_later(server, visit):
    server.key = "secret"
    page = visit(server.url)
    page.wait_for_selector("#key-dialog[open]")
    page.keyboard.press("Escape")
    page.click("#notice >> text=Try again")
    page.fill("#key", "secret")
    page.click("#key-dialog .main")
    page.wait_for_selector("#welcome >> text=tiny")


def test_storage_that_is_full_is_told(server, visit):
    page = visit(server.url)
    page.evaluate("localStorage.setItem('much', 'x'.repeat(5 * 1024 * 1024 - 200))")
    ask(page, "Hello " * 100)
    assert answers(page) == ["Hello you."]
    assert "could not store" in page.inner_text("#notice")


# ---- how it looks and speaks


def test_it_speaks_the_language_of_the_browser(server, visit):
    server.answer = lambda body: list("小明有三个苹果，吃掉一个，还剩两个。🍎")  # events are cut inside characters
    page = visit(server.url, locale="zh-CN")
    assert page.get_attribute("html", "lang") == "zh-CN"
    assert page.get_attribute("#question", "placeholder") == "输入问题"
    ask(page, "还剩几个？")
    assert answers(page) == ["小明有三个苹果，吃掉一个，还剩两个。🍎"]
    assert "8 个 token" in captions(page)
    page.click("text=English")
    assert page.get_attribute("#send", "aria-label") == "Send" and "8 tokens" in captions(page)
    page.reload()
    assert page.get_attribute("#question", "placeholder") == "Ask something"


def test_it_is_as_dark_as_the_system_or_as_it_is_told(server, visit):
    page = visit(server.url, color_scheme="dark")

    def brightness() -> int:
        return int(re.search(r"\d+", page.evaluate("getComputedStyle(document.body).backgroundColor"))[0])

    assert brightness() < 60
    page.emulate_media(color_scheme="light")
    assert brightness() > 200
    page.click("[data-action=turnShade]")
    page.click("[data-action=turnShade]")
    assert page.inner_text("#shade-button") == "Dark" and brightness() < 60
    page.reload()
    assert brightness() < 60


def test_a_phone_shows_all_of_it(server, visit):
    wide = "```\n" + "x" * 200 + "\n```\n\n" + "y" * 200 + "\n\n| a | b |\n|---|---|\n| " + "z" * 90 + " | 2 |\n"
    server.answer = lambda body: [wide]
    server.models[0]["id"] = "a-model-with-a-name-that-is-quite-long/step-00000500"
    page = visit(server.url, **PHONE)
    page.select_option("#rival", "larger")
    ask(page, "w" * 200)
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    for place in page.locator("button:visible, select:visible, textarea:visible, .answer").all():
        box = place.bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 360, place
    first, second = (place.bounding_box() for place in page.locator(".answer").all())
    assert second["y"] > first["y"] + first["height"]  # below, not beside
    assert not page.locator("aside").is_visible()
    page.tap("#side-button")
    page.tap("#conversations .title")
    assert not page.locator("aside").is_visible()


def test_all_that_can_be_used_has_a_name(server, visit):
    page = visit(server.url)
    ask(page, "Hello")
    page.click("[data-action=openSettings]")
    nameless = page.evaluate(
        """() => [...document.querySelectorAll("button, select, input, textarea, [role=log], aside, nav, dialog")]
            .filter(item => !(item.ariaLabel || item.labels?.[0]?.textContent.trim() || item.textContent.trim()))
            .map(item => item.outerHTML)"""
    )
    assert nameless == []
    assert page.locator("#log").get_attribute("role") == "log"
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.dataset.action") == "openSettings"


def test_the_keyboard_reaches_everything(server, visit):
    page = visit(server.url)
    ask(page, "Hello")
    reached = set()
    for _ in range(30):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.dataset.action ?? document.activeElement.id"))
    wanted = {"begin", "open", "remove", "exportOne", "exportAll", "turnLanguage", "turnShade", "openSettings"}
    assert wanted | {"model", "rival", "edit", "again", "copyAnswer", "question"} <= reached


def test_copying(server, visit):
    server.answer = lambda body: ["Run **this**:\n\n```sh\nls -l\n```"]
    page = visit(server.url, permissions=["clipboard-read", "clipboard-write"])
    ask(page, "How?")
    for action, text in (
        ("copyCode", "ls -l"),
        ("copyAnswer", "Run **this**:\n\n```sh\nls -l\n```"),
        ("copyQuestion", "How?"),
    ):
        page.click(f"[data-action={action}]")
        page.wait_for_selector("#notice >> text=Copied")
        assert page.evaluate("navigator.clipboard.readText()") == text
