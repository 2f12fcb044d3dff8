"""Text on the chat page: Markdown becomes elements; what a model, a user or the storage says never becomes code."""

import json
from threading import Event

import pytest

from tests.minillm.serving.chat_page.on_the_page import READY, ask, captions
from tests.minillm.serving.chat_page.stand_in import Refused

MARKDOWN = {
    "two\nlines\n\nparagraphs": "<p>two<br>lines</p><p>paragraphs</p>",
    "**a** *b* _c_ ~~d~~ `e`": "<p><strong>a</strong> <em>b</em> <em>c</em> <del>d</del> <code>e</code></p>",
    "**重要**：是*这个*。": "<p><strong>重要</strong>：是<em>这个</em>。</p>",
    "**a *b* c**": "<p><strong>a <em>b</em> c</strong></p>",
    "2*3*4, 2 * 3 * 4, snake_case_name, \\*a\\*": "<p>2*3*4, 2 * 3 * 4, snake_case_name, *a*</p>",
    "**open, *open, `open, [open](": "<p>**open, *open, `open, [open](</p>",
    "``a ` b`` and `**c**`": "<p><code>a ` b</code> and <code>**c**</code></p>",
    "# One\n### Three #\nbelow": "<h3>One</h3><h5>Three</h5><p>below</p>",
    "#no": "<p>#no</p>",
    "a\n\n---\n\nb": "<p>a</p><hr><p>b</p>",
    "> a\n> > b\n\nc": "<blockquote><p>a</p><blockquote><p>b</p></blockquote></blockquote><p>c</p>",
    "- a\n- b\n\n  more b\n- c": "<ul><li><p>a</p></li><li><p>b</p><p>more b</p></li><li><p>c</p></li></ul>",
    "3. a\n   - b\n4. c": '<ol start="3"><li><p>a</p><ul><li><p>b</p></li></ul></li><li><p>c</p></li></ol>',
    "- a\n  1. b\n     - c\n- d": (
        '<ul><li><p>a</p><ol start="1"><li><p>b</p><ul><li><p>c</p></li></ul></li></ol></li><li><p>d</p></li></ul>'
    ),
    "text\n- a\n\nafter": "<p>text</p><ul><li><p>a</p></li></ul><p>after</p>",
    "- a\n1. b": '<ul><li><p>a</p></li></ul><ol start="1"><li><p>b</p></li></ol>',
    "1990. A year": '<ol start="1990"><li><p>A year</p></li></ol>',
    "-5 is less than -3": "<p>-5 is less than -3</p>",
    "| a | b |\n|---|:-:|\n| `1` | x \\| y |\nafter": (
        '<div class="table"><table><thead><tr><th>a</th><th>b</th></tr></thead>'
        "<tbody><tr><td><code>1</code></td><td>x | y</td></tr></tbody></table></div><p>after</p>"
    ),
    "a | b\nc | d": "<p>a | b<br>c | d</p>",
    "": "",
    "\n\n": "",
}


def rendered(page, text: str) -> str:
    """What the page's `markdown` makes of a text, without what it adds to links and to the head of code."""
    return page.evaluate(
        """text => {
            const place = document.createElement("div");
            place.append(markdown(text));
            for (const head of place.querySelectorAll("figcaption button")) head.remove();
            for (const pre of place.querySelectorAll("pre")) pre.removeAttribute("tabindex");
            for (const name of ["title", "target", "rel"])
                for (const link of place.querySelectorAll("a")) link.removeAttribute(name);
            return place.innerHTML;
        }""",
        text,
    )


def code(kind: str, text: str) -> str:
    return f'<figure class="code"><figcaption><span>{kind}</span></figcaption><pre><code>{text}</code></pre></figure>'


def test_markdown(server, visit):
    page = visit(server.url)
    cases = MARKDOWN | {
        "a\n```python\nif a &lt; b:\n\n    c = *d*\n```\nb": (
            "<p>a</p>" + code("python", "if a &amp;lt; b:\n\n    c = *d*") + "<p>b</p>"
        ),
        "~~~\n```\n~~~": code("", "```"),
        "````md\n```\nx\n```\n````": code("md", "```\nx\n```"),
        "```\nnever closed\n\n<b>": code("", "never closed\n\n&lt;b&gt;"),
        "- a\n  ```\n  b\n    c\n  ```\n- d": "<ul><li><p>a</p>" + code("", "b\n  c") + "</li><li><p>d</p></li></ul>",
        "[a](https://b.org/c_(d)?e=1&f) x": '<p><a href="https://b.org/c_(d)?e=1&amp;f">a</a> x</p>',
        "See https://b.org/c, or (http://d.org).": (
            '<p>See <a href="https://b.org/c">https://b.org/c</a>, or (<a href="http://d.org">http://d.org</a>).</p>'
        ),
        "[**a** http://x.org](https://b.org)": '<p><a href="https://b.org">**a** http://x.org</a></p>',
        "[**a**](https://b.org)": '<p><a href="https://b.org"><strong>a</strong></a></p>',
        "见https://b.org/路。": '<p>见<a href="https://b.org/路">https://b.org/路</a>。</p>',
    }
    for text, expected in cases.items():
        assert rendered(page, text) == expected, text


def test_long_and_deep_texts_are_drawn_at_once(server, visit):
    page = visit(server.url)
    for text in (
        "> " * 3000 + "a",
        "- " * 3000 + "a",
        "a" + "*" * 8000,
        "`a" * 4000,
        "[a](" * 2000,
        "**a " * 2000,
        "|" * 8000,
    ):
        assert len(page.evaluate("text => { const d = markdown(text); return d.textContent; }", text)) > 0
    lines = "\n".join(f"- item {number}\n  more" for number in range(2000))
    assert page.evaluate("text => markdown(text).querySelectorAll('li').length", lines) == 2000


ATTACKS = [
    "<img src=x onerror=attacked=1>",
    "<script>attacked=1</script>",
    "</p><svg onload=attacked=1>",
    "</textarea><script>attacked=1</script>",
    "</title><script>attacked=1</script>",
    '"><iframe srcdoc="<script>parent.attacked=1</script>">',
    "[x](javascript:attacked=1)",
    "[x](JaVaScRiPt:attacked=1)",
    "[x](java\u0000script:attacked=1)",
    "[x](\u0001javascript:attacked=1)",
    "[x](data:text/html,<script>attacked=1</script>)",
    "[x](//evil.example/a)",
    "[x](vbscript:attacked)",
    "![x](https://evil.example/track.png)",
    '[x](https://evil.example/" onmouseover="attacked=1)',
    '[<img src=x onerror=attacked=1>](https://evil.example/ "<img src=x onerror=attacked=1>")',
    "`<img src=x onerror=attacked=1>`",
    "| <img src=x onerror=attacked=1> |\n|---|\n| <script>attacked=1</script> |",
    "{{constructor.constructor('attacked=1')()}}",
    "```<img src=x onerror=attacked=1>\n<script>attacked=1</script>",
]
SAFE_TAGS = "P BR STRONG EM DEL CODE PRE FIGURE FIGCAPTION SPAN BUTTON svg use H3 H4 H5 H6 HR UL OL LI BLOCKQUOTE A DIV"
SAFE_TAGS += " TABLE THEAD TBODY TR TH TD"


def nothing_happened(page) -> None:
    """No attack ran, no text became an element of its own, and each link leads to the web."""
    page.wait_for_timeout(100)
    assert page.evaluate("typeof attacked") == "undefined"
    tags = page.evaluate("[...document.querySelectorAll('.text *')].map(item => item.tagName)")
    assert set(tags) <= set(SAFE_TAGS.split())
    assert (
        page.locator("script").count() == 1
        and not page.locator("img, iframe, object, embed, base, meta[http-equiv]").count()
    )
    links = page.evaluate("[...document.querySelectorAll('a')].map(link => [link.protocol, link.rel, link.target])")
    assert all(link in (["https:", "noopener noreferrer nofollow", "_blank"],) for link in links)
    handlers = (
        "[...document.querySelectorAll('*')].flatMap(i => i.getAttributeNames()).filter(n => /^on|^style$/.test(n))"
    )
    assert page.evaluate(handlers) == []


def test_what_a_model_says_stays_text(server, visit):
    page = visit(server.url)
    server.answer = lambda body: [body["messages"][-1]["content"]]
    for attack in ATTACKS:
        ask(page, attack)
    text = page.locator("#log").inner_text()
    assert text.count("<img src=x onerror=attacked=1>") >= 6 and "javascript:attacked=1" in text
    assert page.locator(".text a").count() == 3  # those that lead to the web
    nothing_happened(page)
    for button in page.locator(".text a").all():
        assert button.get_attribute("href").startswith("https://evil.example/")
    page.locator("#conversations .title").hover()
    nothing_happened(page)
    assert page.title().startswith(ATTACKS[0])


def test_what_the_server_says_stays_text(server, visit):
    server.models[0]["id"] = ATTACKS[0]
    server.models[0]["context_length"] = 512
    page = visit(server.url)
    page.wait_for_selector("#welcome >> text=onerror")

    def answer(body):
        raise Refused(400, ATTACKS[1])

    server.answer = answer
    ask(page, "Hello")
    assert captions(page) == ATTACKS[1]
    server.answer = lambda body: ["a", {"error": {"message": ATTACKS[2]}}]
    ask(page, "Hello")
    assert captions(page) == ATTACKS[2]
    nothing_happened(page)


def test_what_the_storage_holds_stays_text(server, visit):
    attack = ATTACKS[0]
    answer = {"model": attack, "text": attack, "end": attack, "error": attack, "tokens": attack, "forgotten": attack}
    bad = {"id": attack, "models": [attack, attack], "system": attack, "sampling": {"seed": attack, attack: attack}}
    bad |= {"changed": 5, "turns": [{"question": attack, "answers": [answer, answer, answer]}]}
    odd = [{"turns": [None, 3, {"answers": "x"}], "models": 7, "sampling": None}, {}, {"turns": {"length": 3}}]
    stored = {f"minillm.chat/{number}": json.dumps(value) for number, value in enumerate([bad, *odd])}
    stored |= {
        "minillm.chat/null": "null",
        "minillm.chat/torn": '{"id": "torn',
        f"minillm.chat/{attack}": json.dumps(bad),
    }
    stored |= {"minillm.language": attack, "minillm.shade": attack}
    page = visit(server.url, stored=stored)
    assert "2 stored conversations could not be read" in page.inner_text("#notice")
    assert page.locator("#conversations li").count() == 5
    for number in range(5):
        page.locator("#conversations .title").nth(number).click()
        nothing_happened(page)
    page.click("[data-action=openSettings]")
    nothing_happened(page)
    assert page.evaluate("localStorage.getItem('minillm.chat/torn')") == '{"id": "torn'  # left as it is


@pytest.mark.parametrize("attempt", ["innerHTML", "inline script", "inline handler", "elsewhere"])
def test_the_browser_would_refuse_another_way(server, visit, attempt):
    """The policy holds even if the page had a hole."""
    code = {
        "innerHTML": "log.innerHTML = '<b>x</b>'",
        "inline script": "const s = document.createElement('script'); s.append('attacked=1'); document.body.append(s)",
        "inline handler": "log.setAttribute('onclick', 'attacked=1'); log.click()",
        "elsewhere": "await fetch('https://example.org/')",
    }[attempt]
    page = visit(server.url, refuses=True)
    page.evaluate(f"async () => {{ try {{ {code} }} catch (error) {{ }} }}")
    assert page.evaluate("typeof attacked") == "undefined" and not page.locator("#log b").count()


def test_what_is_selected_stays_selected_while_text_comes(server, visit):
    go_on = Event()
    server.answer = lambda body: ["first\n\nsecond", go_on, " and more"]
    page = visit(server.url)
    ask(page, "Hello", wait=False)
    page.wait_for_selector("text=second")
    page.evaluate("getSelection().selectAllChildren(document.querySelector('.text p'))")
    go_on.set()
    page.wait_for_selector(READY)
    assert page.locator(".text").inner_text() == "first\n\nsecond and more"
    assert page.evaluate("getSelection().toString()") == "first"
