"""Who may ask: keys, and which pages of other sites a browser may let in.

Without a key the server listens on this machine alone. There a browser is the one who could be abused: any page that
it shows may send requests to 127.0.0.1, and under a name that is made to point there (DNS rebinding) read the answers.
So without a key the names of both ends must be this machine's.
"""

import hmac
import ipaddress
from dataclasses import dataclass
from urllib.parse import urlsplit

from minillm.base.errors import UserError
from minillm.serving.refusal import Refusal


@dataclass(frozen=True)
class Door:
    """keys: any one of them lets in; none: all who come from this machine. cors: the one foreign origin ("*": any)."""

    keys: tuple[str, ...] = ()
    cors: str | None = None

    def __post_init__(self):
        if self.cors not in (None, "*") and origin_of(self.cors) != self.cors:
            written = origin_of(self.cors) or "https://chat.example.org"
            raise UserError(f"--cors {self.cors}: not an origin as browsers write it, such as {written}, or *")
        for key in self.keys:
            if not key.isascii() or not key.isprintable() or " " in key or not key:
                raise UserError(
                    "--api_key or MINILLM_API_KEY: letters, digits and signs of ASCII alone, without spaces"
                )

    def owner(self, headers: dict[str, str]) -> str:
        """Whose request it is: a name for the key that it shows, "" where none is needed. Raises `Refusal`."""
        if not self.keys:
            self._check_names(headers)
            return ""
        kind, _, shown = headers.get("authorization", "").partition(" ")
        found = ""
        for number, key in enumerate(self.keys):  # all of them, each in constant time
            is_same = hmac.compare_digest(shown.strip().encode(), key.encode())
            if is_same and kind.lower() == "bearer":
                found = f"key {number}"
        if not found:
            what = "wrong" if shown else "missing"
            raise Refusal(401, f"the API key is {what}: send Authorization: Bearer KEY", code="invalid_api_key")
        return found

    def _check_names(self, headers: dict[str, str]) -> None:
        """Refuse what a page of another site makes a browser send."""
        host = headers.get("host", "localhost")
        if not is_this_machine(host_of(f"//{host}")):
            raise Refusal(403, f"host {host!r:.80}: without an API key this server answers to the name localhost alone")
        origin = headers.get("origin")
        if origin and not self.allows(origin) and not is_this_machine(host_of(origin)):
            raise Refusal(403, f"origin {origin!r:.80}: allow it by --cors, or set an API key")

    def allows(self, origin: str) -> bool:
        """Whether scripts of this foreign origin may read answers."""
        return self.cors is not None and self.cors in ("*", origin)

    def cors_headers(self, headers: dict[str, str]) -> dict[str, str]:
        """What an answer says to a browser (https://fetch.spec.whatwg.org/#http-cors-protocol); never credentials."""
        if self.cors is None:
            return {}
        if not self.allows(headers.get("origin", "")):
            return {"Vary": "Origin"}
        return {"Vary": "Origin", "Access-Control-Allow-Origin": self.cors}

    def preflight(self, headers: dict[str, str]) -> dict[str, str] | None:
        """What the question says that a browser asks before a request; None if it is not answered."""
        if "access-control-request-method" not in headers or not self.allows(headers.get("origin", "")):
            return None
        return {
            "Access-Control-Allow-Methods": "GET, POST",
            "Access-Control-Allow-Headers": headers.get("access-control-request-headers", "authorization"),
            "Access-Control-Max-Age": "600",
        }


USUAL_PORTS = {"http": 80, "https": 443}  # which browsers leave out


def origin_of(address: str) -> str:
    """The origin of an address as browsers write it: scheme, host, port unless it is the usual one; "" if it is none.

    https://html.spec.whatwg.org/#ascii-serialisation-of-an-origin
    """
    try:
        parts = urlsplit(address)
        port = parts.port
    except ValueError:
        return ""
    host = parts.hostname
    if parts.scheme not in USUAL_PORTS or not host or not host.isascii() or " " in host:
        return ""
    if ":" in host:
        host = f"[{host}]"
    return f"{parts.scheme}://{host}" + (f":{port}" if port and port != USUAL_PORTS[parts.scheme] else "")


def host_of(address: str) -> str:
    """The name or number of the host in an address; "" if there is none."""
    try:
        return urlsplit(address).hostname or ""
    except ValueError:
        return ""


def is_this_machine(host: str) -> bool:
    """Whether a name or number means this machine and can mean no other."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
