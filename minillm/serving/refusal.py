"""A request that gets no answer, in the form that OpenAI's clients read: {"error": {message, type, param, code}}.

Clients send a request again (twice) after 408, 409, 429 and every 5xx, unless `x-should-retry: false` says that it is
of no use. So a request that is wrong never gets such a status, and only a full queue asks to be tried again.
"""

RETRY_AFTER_S = 1  # of a full queue: it moves on within a few answers


class Refusal(Exception):
    """Why a request is not answered. status: of HTTP; param: the field that is wrong; code: a word for programs."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code

    @property
    def body(self) -> dict:
        """The answer's JSON, or that of an event in a stream that has begun."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """What the answer says beside its body."""
        if self.status == 401:
            return {"WWW-Authenticate": "Bearer"}
        if self.status == 503:
            return {"Retry-After": str(RETRY_AFTER_S)}
        if self.status == 408 or self.status >= 500:
            return {"x-should-retry": "false"}
        return {}


def wrong(param: str, message: str) -> Refusal:
    """A request whose field `param` cannot be used as it is."""
    return Refusal(400, f"{param}: {message}", param=param)


def too_long(n_tokens: int, context: int, param: str, at_least: bool = False) -> Refusal:
    """A prompt of `n_tokens` tokens (at_least: or more) that leaves no room for an answer in the context."""
    more = "at least " if at_least else ""
    message = (
        f"{param}: {more}{n_tokens:,} tokens, but the model's context is {context:,} tokens, of which an answer needs "
        "at least one; shorten it"
    )
    return Refusal(400, message, param=param, code="context_length_exceeded")
