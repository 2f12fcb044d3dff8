"""Who gets in: keys, names and origins."""

import openai
import pytest

from minillm.base.errors import UserError
from minillm.serving.door import Door
from minillm.serving.listen import listening_socket
from minillm.serving.refusal import Refusal
from tests.minillm.serving.conftest import running, serve_home

HI = [{"role": "user", "content": "Who?"}]
PAGE = "https://chat.example.org"


def test_a_key_is_asked_for_everywhere_but_at_the_door(home):
    with running([serve_home(home, slots=1)], Door(keys=("right", "other"))) as here:
        for key in ("right", "other"):
            assert here.client(api_key=key).chat.completions.create(model="tom", messages=HI, max_tokens=2).choices
        for key in ("wrong", "righ", "right2", "right,other"):
            with pytest.raises(openai.AuthenticationError) as problem:
                here.client(api_key=key).models.list()
            assert problem.value.code == "invalid_api_key" and problem.value.type == "invalid_request_error"
        for path in ("/v1/models", "/v1/models/tom", "/metrics", "/v1/chat/completions", "/v1/completions"):
            method = "POST" if "completions" in path else "GET"
            status, headers, _ = here.raw(method, path, {} if method == "POST" else None)
            assert status == 401 and headers["WWW-Authenticate"] == "Bearer", path
        for path in ("/", "/health"):
            assert here.raw("GET", path)[0] == 200
        for shown in ("Basic right", "right", "Bearer", "Bearer r\u00efght"):
            assert here.raw("GET", "/v1/models", headers={"Authorization": shown})[0] == 401
        assert here.raw("GET", "/v1/models", headers={"Authorization": "bearer right", "Host": "example.org"})[0] == 200


def test_each_key_has_an_owner_of_its_own():
    """What has been read of a prompt is kept for the same owner alone, so that no other can tell by the time."""
    door = Door(keys=("a", "b"))
    owners = {door.owner({"authorization": f"Bearer {key}"}) for key in "ab"}
    assert len(owners) == 2 and "" not in owners
    assert Door().owner({"host": "localhost:8000"}) == ""


def test_prompts_of_another_key_are_not_in_the_cache(home):
    with running([serve_home(home, slots=2)], Door(keys=("a", "b"))) as here:

        def n_cached(key: str) -> int:
            asked = {"model": "tom", "messages": HI, "max_tokens": 2, "temperature": 0}
            usage = here.client(api_key=key).chat.completions.create(**asked).usage
            return usage.prompt_tokens_details.cached_tokens

        assert n_cached("a") == 0 and n_cached("a") > 0 and n_cached("b") == 0 and n_cached("b") > 0


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8000", "127.0.0.1:1", "127.9.9.9", "[::1]:8000"])
def test_without_a_key_this_machine_may_ask(host):
    assert Door().owner({"host": host}) == ""
    assert Door().owner({"host": host, "origin": f"http://{host}"}) == ""


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "evil.example"},
        {"host": "127.0.0.1.evil.example"},
        {"host": "192.168.0.1"},
        {"host": "[::1"},
        {"host": "localhost", "origin": "https://evil.example"},
        {"host": "localhost", "origin": "http://localhost.evil.example"},
        {"host": "localhost", "origin": "null"},
    ],
)
def test_without_a_key_pages_of_others_may_not_ask(headers):
    """A browser that is lured to a page would otherwise ask this server in its name."""
    with pytest.raises(Refusal) as refused:
        Door().owner(headers)
    assert refused.value.status == 403
    assert Door(keys=("k",)).owner(headers | {"authorization": "Bearer k"})  # with a key, the key decides


def test_scripts_of_one_other_origin_may_read_answers_if_told_so(home):
    with running([serve_home(home, slots=1)], Door(cors=PAGE)) as here:
        asked = {"Origin": PAGE, "Access-Control-Request-Method": "POST"}
        asked["Access-Control-Request-Headers"] = "authorization,content-type"
        status, headers, _ = here.raw("OPTIONS", "/v1/chat/completions", headers=asked)
        assert status == 204 and headers["Access-Control-Allow-Origin"] == PAGE and headers["Vary"] == "Origin"
        assert headers["Access-Control-Allow-Headers"] == "authorization,content-type"
        status, headers, _ = here.raw("GET", "/v1/models", headers={"Origin": PAGE})
        assert status == 200 and headers["Access-Control-Allow-Origin"] == PAGE
        assert headers["Access-Control-Allow-Credentials"] is None

        evil = asked | {"Origin": "https://evil.example"}
        status, headers, _ = here.raw("OPTIONS", "/v1/chat/completions", headers=evil)
        assert status == 405 and headers["Access-Control-Allow-Origin"] is None
        status, headers, _ = here.raw("GET", "/v1/models", headers={"Origin": "https://evil.example"})
        assert status == 403 and headers["Access-Control-Allow-Origin"] is None


def test_without_cors_no_origin_is_named(here):
    for headers in ({"Origin": "http://localhost:3000"}, {}):
        status, answered, _ = here.raw("GET", "/v1/models", headers=headers)
        assert status == 200 and not [name for name in answered if name.lower().startswith("access-control")]


def test_cors_for_any_origin():
    door = Door(keys=("k",), cors="*")
    assert door.cors_headers({"origin": PAGE})["Access-Control-Allow-Origin"] == "*"


@pytest.mark.parametrize(
    "cors",
    [
        *("chat.example.org", "https://chat.example.org/", "https://a b", "ftp://a", "https://", "https://[::1"),
        *("https://Chat.example.org", "HTTP://a", "https://a:443", "http://a:80", "https://u@a", "https://a:99999"),
        "https://\u732b.cn",
    ],
)
def test_an_origin_that_is_none(cors):
    with pytest.raises(UserError, match="--cors"):
        Door(cors=cors)


@pytest.mark.parametrize("key", ["", "a b", "schlüssel", "a\n"])
def test_a_key_that_no_client_can_send(key):
    with pytest.raises(UserError, match="--api_key"):
        Door(keys=(key,))


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_an_address_that_others_reach_needs_a_key(host):
    with pytest.raises(UserError, match="needed: --api_key"):
        listening_socket(host, 0, has_key=False)
    listening_socket(host, 0, has_key=True).close()


def test_localhost_is_the_address_that_clients_try_first():
    with listening_socket("localhost", 0, has_key=False) as listener:
        assert listener.getsockname()[0] == "127.0.0.1"


def test_an_address_that_cannot_be_listened_at():
    with listening_socket("127.0.0.1", 0, has_key=False) as first:
        port = first.getsockname()[1]
        with pytest.raises(UserError, match=rf"--port {port}: cannot listen there .*; choose another, --port 0"):
            listening_socket("127.0.0.1", port, has_key=False)
    with pytest.raises(UserError, match=r"--host nowhere\.invalid"):
        listening_socket("nowhere.invalid", 0, has_key=True)
