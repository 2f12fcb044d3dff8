"""What a user does on the chat page, and sees."""

READY = "#send:visible"  # no answer is under way


def ask(page, question: str, wait: bool = True) -> None:
    """Type a question and send it; then wait for the end of the answer."""
    page.fill("#question", question)
    page.press("#question", "Enter")
    if wait:
        page.wait_for_selector(READY)


def answers(page) -> list[str]:
    """The texts of all answers on the page."""
    return page.locator(".answer .text").all_inner_texts()


def captions(page) -> str:
    """What stands below the last answer."""
    return "\n".join(page.locator(".turn").last.locator(".caption, .error").all_inner_texts())
