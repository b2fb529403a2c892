"""Logins against servers that answer in odd ways: expired ones, hostile headers, token servers with habits."""

import json
import time

import pytest

from tests.peers.faulty_server import TOKEN_PATH, FaultyServer
from tests.storage.conftest import DATA, read
from virtiofsd_nydus.errors import Cause, Failure
from virtiofsd_nydus.net.documents import parse_json, parse_size
from virtiofsd_nydus.net.login import parse_challenges
from virtiofsd_nydus.storage.factory import create_backend

HOSTILE_CHALLENGES = [
    "a" * 65536,
    "a" * 20000 + "\x00",
    "a-" * 30000 + "(",
    "a " * 32768,
    "a," * 32768,
    "a=" * 32768,
    'a="' * 20000,
    'Basic realm="' + "\\" * 60000,
    'Basic realm="' + "a" * 60000,
    "Basic " + " " * 60000 + "x",
    "-" * 65536,
    "Bearer " + 'a="b\\"' * 10000,
    "Basic realm" + " " * 60000 + "=",
]


@pytest.mark.parametrize("text", HOSTILE_CHALLENGES, ids=range(len(HOSTILE_CHALLENGES)))
def test_challenges_are_read_in_one_pass(text: str) -> None:
    """What takes 20 ms in one pass takes 20 s when each letter is a new beginning."""

    def cost(header: str) -> float:
        began = time.thread_time()
        parse_challenges(header)
        return time.thread_time() - began

    assert min(cost(text) for _ in range(3)) < 1.0


def test_a_text_that_is_nested_too_deeply_is_no_json() -> None:
    with pytest.raises(ValueError, match="nested"):
        parse_json("[" * 200_000)
    with pytest.raises(ValueError):
        parse_json(b'{"a": ' * 200_000)


@pytest.mark.parametrize("text", ["", "-1", "+1", "1.0", " 1", "1_0", "²", "٣", "9" * 5000])
def test_what_is_no_number_of_bytes(text: str) -> None:
    assert parse_size(text) is None


@pytest.mark.parametrize("status", [200, 400, 401, 403, 404, 418, 429, 500])
def test_what_a_mirror_says_never_ends_the_fallback(server: FaultyServer, status: int) -> None:
    """Brackets without end in an error, in a token, in every header with a number."""
    blob = server.add(DATA)
    with FaultyServer({blob: DATA}) as mirror:
        deep = "[" * 4000
        headers = {"WWW-Authenticate": f'Bearer realm="{mirror.url}{TOKEN_PATH}"', "Retry-After": "9" * 5000}
        headers["Content-Range"] = f"bytes 0-{'9' * 5000}/{'9' * 5000}"
        mirror.inject("status", status=status, text=deep, headers=headers, times=-1)
        settings = {"scheme": "http", "host": server.host, "repo": "a/b", "mirrors": [{"host": mirror.url}]}
        backend = create_backend("registry", {**settings, "timeout": 2})
        assert read(backend, blob, 0, 10) == DATA[:10]
        backend.close()
        assert mirror.requests


@pytest.mark.parametrize("name", ["Content-Length", "Content-Range"])
def test_numbers_without_end_are_a_broken_answer(server: FaultyServer, make, name: str) -> None:
    blob = server.add(DATA)
    headers = {name: "9" * 5000 if name == "Content-Length" else f"bytes 0-9/{'9' * 5000}"}
    server.inject("status", status=206, headers=headers, times=-1)
    with pytest.raises(Failure) as caught:
        read(make(), blob, 0, 10)
    assert caught.value.cause is Cause.NETWORK


# ---- logins that expire


class Helper:
    """docker's credential helper, whose answer can be changed, and how often it was asked."""

    def __init__(self, folder, host: str) -> None:
        self.folder = folder
        program = folder / "docker-credential-test"
        program.write_text(f"#!/bin/sh\necho asked >> {folder}/asked\ncat {folder}/answer\n")
        program.chmod(0o755)
        (folder / "config.json").write_text(json.dumps({"credHelpers": {host: "test"}}))

    def answer(self, user: str, secret: str) -> None:
        (self.folder / "answer").write_text(json.dumps({"Username": user, "Secret": secret}))

    @property
    def asked(self) -> int:
        path = self.folder / "asked"
        return path.read_text().count("asked") if path.exists() else 0


@pytest.fixture
def helper(server: FaultyServer, tmp_path, monkeypatch: pytest.MonkeyPatch) -> Helper:
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return Helper(tmp_path, server.host)


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize("kind", ["basic", "bearer"])
def test_an_expired_login_is_asked_for_anew(server: FaultyServer, make, helper: Helper, kind: str, status: int) -> None:
    server.expired_status = status
    helper.answer("someone", "first")
    if kind == "basic":
        server.basic_user = "someone:first"
    else:
        server.token_user = "someone:first"
    blob = server.add(DATA)
    backend = make(timeout=10)
    assert read(backend, blob, 0, 10) == DATA[:10]
    assert helper.asked == 1
    server.tokens.clear()
    helper.answer("someone", "second")
    if kind == "basic":
        server.basic_user = "someone:second"
    else:
        server.token_user = "someone:second"
    assert read(backend, blob, 0, 10) == DATA[:10]
    assert helper.asked == 2


def test_a_preset_token_that_expires_with_403_gives_way_to_a_login(server: FaultyServer, make) -> None:
    server.token_user = ""
    server.expired_status = 403
    blob = server.add(DATA)
    backend = make(registry_token="old")
    assert read(backend, blob, 0, 10) == DATA[:10]


def test_a_right_that_lacks_is_not_asked_for_at_each_read(server: FaultyServer, make, helper: Helper) -> None:
    """A 403 that stays costs one login, not one a read."""
    server.basic_user = "someone:first"
    helper.answer("someone", "first")
    blob = server.add(DATA)
    backend = make(timeout=10)
    assert read(backend, blob, 0, 10) == DATA[:10]
    server.inject("status", status=403, times=-1)
    for _ in range(5):
        with pytest.raises(Failure, match="may not pull") as caught:
            read(backend, blob, 0, 10)
        assert caught.value.cause is Cause.AUTH
    assert helper.asked == 2


def test_a_token_is_not_used_beyond_its_end(server: FaultyServer, make, monkeypatch: pytest.MonkeyPatch) -> None:
    """No request carries a token whose time is over, though the server would still take it."""
    server.token_user = ""
    blob = server.add(DATA)
    backend = make(timeout=10)
    assert read(backend, blob, 0, 10) == DATA[:10]
    first = server.requests[-1].authorization
    now = time.monotonic
    for later_s in (301, 86401):  # its 300 s are over
        with monkeypatch.context() as patch:
            patch.setattr(time, "monotonic", lambda later_s=later_s: now() + later_s)
            server.requests.clear()
            assert read(backend, blob, 0, 10) == DATA[:10]
            assert first not in [one.authorization for one in server.requests]


@pytest.mark.parametrize("through", [True, False])
def test_a_mirror_with_auth_through_gets_the_login_that_docker_keeps(
    server: FaultyServer, helper: Helper, through: bool
) -> None:
    helper.answer("someone", "first")
    blob = server.add(DATA)
    with FaultyServer({blob: DATA}) as mirror:
        mirror.basic_user = server.basic_user = "someone:first"
        settings = {"scheme": "http", "host": server.host, "repo": "a/b", "timeout": 10}
        backend = create_backend("registry", {**settings, "mirrors": [{"host": mirror.url, "auth_through": through}]})
        assert read(backend, blob, 0, 10) == DATA[:10]
        backend.close()
        assert [one.status for one in mirror.requests] == ([401, 206] if through else [401])


# ---- token servers


@pytest.mark.parametrize("habit", ["page", "redirect to a page", "404", "500 once"])
def test_a_token_server_that_does_not_know_post(server: FaultyServer, make, habit: str) -> None:
    import base64

    server.token_user = "someone:secret-word"
    blob = server.add(DATA)
    post = f"POST {TOKEN_PATH}"
    if habit == "page":
        server.inject("status", status=200, text="<html>log in</html>", match=post, times=-1)
    elif habit == "redirect to a page":
        server.inject("redirect_bad", text="/login", match=post, times=-1)
    elif habit == "404":
        server.inject("status", status=404, match=post, times=-1)
    else:
        server.inject("status", status=500, match=post)
    backend = make(auth=base64.b64encode(b"someone:secret-word").decode(), timeout=10)
    assert read(backend, blob, 0, 10) == DATA[:10]


def test_a_token_server_that_has_moved(server: FaultyServer, make) -> None:
    """The redirect is followed; a login does not go along to another host."""
    import base64

    blob = server.add(DATA)
    server.token_user = "someone:secret-word"
    server.inject("status", status=404, match=f"POST {TOKEN_PATH}", times=-1)
    server.inject("redirect_bad", text=f"/moved{TOKEN_PATH}", match=f"GET {TOKEN_PATH}")
    backend = make(auth=base64.b64encode(b"someone:secret-word").decode(), timeout=10)
    assert read(backend, blob, 0, 10) == DATA[:10]
    with FaultyServer() as other:
        server.tokens.clear()
        server.inject("redirect_bad", text=f"{other.url}{TOKEN_PATH}", match=f"GET {TOKEN_PATH}", times=-1)
        with pytest.raises(Failure):
            read(backend, blob, 0, 10)
        assert other.requests and all(not one.authorization for one in other.requests)
