"""A browser and a server for the tests of the chat page: one for all tests of a file, a fresh profile for each."""

import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.minillm.serving.chat_page.stand_in import StandIn

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
ARGUMENTS = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking")
ARGUMENTS += ("--disable-component-update", "--disable-sync")


@pytest.fixture(scope="module")
def browser():
    """Chromium of this machine, driven by playwright; without one of them the tests are skipped.

    It ends with the file: as long as the driver is there no other test of this process could run an event loop.
    """
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"no browser here: none of {', '.join(BROWSERS)} is installed")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def stand_in_server() -> Iterator[StandIn]:
    server = StandIn()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def server(stand_in_server) -> StandIn:
    """The stand-in as it is before any test changed it."""
    stand_in_server.reset()
    return stand_in_server


@pytest.fixture
def visit(browser):
    """visit(url, **how) opens the page in a fresh profile, see `visited`; at the end all must have gone well."""
    visits = []

    def open_page(url: str, **how):
        visits.append(visited(browser, url, **how))
        return visits[-1].__enter__()

    yield open_page
    for visit in reversed(visits):
        visit.__exit__(None, None, None)


@contextmanager
def visited(browser, url: str, stored: dict | None = None, refuses: bool = False, **how):
    """A page at that address, its models known. stored: what the browser's storage holds before.

    At the end no error may have come from its script and no request may have gone elsewhere. refuses: the browser must
    have refused something by the page's policy.
    """
    how = {"locale": "en-US", "viewport": {"width": 1280, "height": 800}, **how}
    context = browser.new_context(**how)
    context.set_default_timeout(20_000)
    page = context.new_page()
    errors, elsewhere = [], []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda line: line.type == "error" and errors.append(line.text))
    page.on("request", lambda request: request.url.startswith((url, "data:")) or elsewhere.append(request.url))
    if stored:
        page.goto(url + "v1/models")
        page.evaluate("stored => Object.entries(stored).forEach(([k, v]) => localStorage.setItem(k, v))", stored)
    page.goto(url)
    page.wait_for_selector("#model option, #key-dialog[open]", state="attached")
    yield page
    context.close()
    # what the server refused, or did not answer at all, is no fault of the script
    errors = [error for error in errors if not error.startswith("Failed to load resource")]
    refusals = [error for error in errors if re.search("Content Security Policy|requires 'Trusted", error)]
    assert refusals == errors
    assert bool(refusals) == refuses
    assert not elsewhere
