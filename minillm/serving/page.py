"""The chat page: one file, and the headers under which a browser runs it."""

import base64
import hashlib
import re
from pathlib import Path

PAGE = Path(__file__).with_name("chat.html")


def chat_page() -> tuple[bytes, dict[str, str]]:
    """The bytes of the page, and the headers that belong to them."""
    html = PAGE.read_text(encoding="utf-8").encode()  # line ends as browsers see them, who hash what they see
    headers = {
        "Content-Type": "text/html; charset=utf-8",
        "Content-Security-Policy": content_security_policy(html),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }
    return html, headers


def content_security_policy(html: bytes) -> str:
    """What the page may do, as Content Security Policy Level 3 writes it.

    It runs its own script and style alone, known by their SHA-256, and speaks to this server alone. Text never becomes
    markup: with `require-trusted-types-for` a browser that knows it refuses innerHTML and its like.
    """
    script, style = (_sha256(_inside(html, tag)) for tag in (b"script", b"style"))
    rules = [
        "default-src 'none'",
        f"script-src 'sha256-{script}'",
        f"style-src 'sha256-{style}'",
        "connect-src 'self'",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    ]
    return "; ".join(rules)


def _inside(html: bytes, tag: bytes) -> bytes:
    """What stands between the two ends of the only element with this tag."""
    [text] = re.findall(b"<" + tag + b">(.*?)</" + tag + b">", html, re.DOTALL)
    return text


def _sha256(text: bytes) -> str:
    return base64.b64encode(hashlib.sha256(text).digest()).decode()
