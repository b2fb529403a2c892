"""Logins: challenges, tokens and their renewal, one fetch for many threads, and lines that never hold a secret."""

import base64
import json
import threading

import pytest

from tests.peers.faulty_server import TOKEN_PATH, FaultyServer
from tests.storage.conftest import DATA, read
from virtiofsd_nydus.errors import Cause, Failure, UsageFailure
from virtiofsd_nydus.oci.auth import Credentials, find_docker_credentials, parse_challenges, parse_creds

SECRET = "the-secret-word"
AUTH = base64.b64encode(f"someone:{SECRET}".encode()).decode()


def token_calls(server: FaultyServer) -> list[str]:
    return [one.method for one in server.requests if one.path.startswith(TOKEN_PATH)]


@pytest.mark.parametrize(("text", "expected"), [
    ('Bearer realm="https://a/t?x=1,2",service="s",scope="repository:a/b:pull,push"',
     [("bearer", {"realm": "https://a/t?x=1,2", "service": "s", "scope": "repository:a/b:pull,push"})]),
    ('Basic realm="x"', [("basic", {"realm": "x"})]),
    ("Negotiate, Basic realm=x", [("negotiate", {}), ("basic", {"realm": "x"})]),
    (r'Basic realm="a \"b\" c", BEARER realm="r" , service = "s"',
     [("basic", {"realm": 'a "b" c'}), ("bearer", {"realm": "r", "service": "s"})]),
    ("", []), ("=,=", []),
])
def test_parse_challenges(text: str, expected: list) -> None:
    assert parse_challenges(text) == expected


def test_anonymous_token(server: FaultyServer, make) -> None:
    server.token_user = ""
    blob = server.add(DATA)
    backend = make()
    for _ in range(3):
        assert read(backend, blob, 0, 10) == DATA[:10]
    assert token_calls(server) == ["GET"]
    assert [one.status for one in server.requests] == [401, 200, 206, 206, 206]


def test_login_token(server: FaultyServer, make) -> None:
    server.token_user = f"someone:{SECRET}"
    blob = server.add(DATA)
    assert read(make(auth=AUTH), blob, 0, 10) == DATA[:10]
    assert token_calls(server) == ["POST"]


def test_get_where_post_is_unknown(server: FaultyServer, make) -> None:
    server.token_user = f"someone:{SECRET}"
    server.token_uses = 1
    server.inject("status", status=404, match=f"POST {TOKEN_PATH}", times=-1)
    blob = server.add(DATA)
    backend = make(auth=AUTH)
    for _ in range(3):
        assert read(backend, blob, 0, 10) == DATA[:10]
    # POST is tried once, that it is unknown is remembered
    assert token_calls(server) == ["POST", "GET", "GET", "GET"]


def test_token_is_renewed_when_refused(server: FaultyServer, make) -> None:
    server.token_user = ""
    server.token_uses = 2
    blob = server.add(DATA)
    backend = make()
    for _ in range(5):
        assert read(backend, blob, 0, 10) == DATA[:10]
    assert len(token_calls(server)) == 3


def test_token_is_renewed_before_its_end(server: FaultyServer, make, monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    server.token_user = ""
    blob = server.add(DATA)
    backend = make()
    assert read(backend, blob, 0, 10) == DATA[:10]
    now = time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: now() + 290)     # of 300 s
    assert read(backend, blob, 0, 10) == DATA[:10]
    assert len(token_calls(server)) == 2
    assert [one.status for one in server.requests].count(401) == 1


def test_one_token_for_many_threads(server: FaultyServer, make) -> None:
    server.token_user = ""
    blob = server.add(DATA)
    backend = make(timeout=10)
    start = threading.Barrier(8)
    failed: list[BaseException] = []

    def run() -> None:
        try:
            start.wait(10)
            assert read(backend, blob, 0, 10) == DATA[:10]
        except BaseException as error:
            failed.append(error)

    for _ in range(2):      # the second round with tokens that are worn out for all at once
        threads = [threading.Thread(target=run) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert not failed
        with server.lock:
            server.tokens = dict.fromkeys(server.tokens, 0)
    assert len(token_calls(server)) == 2
    # the first round: one 401 for all; the second: one each at most
    assert [one.status for one in server.requests].count(401) <= 1 + 8


def test_preset_token(server: FaultyServer, make) -> None:
    server.token_user = ""
    server.tokens["mine"] = 1
    blob = server.add(DATA)
    backend = make(registry_token="mine")
    assert read(backend, blob, 0, 10) == DATA[:10]
    assert token_calls(server) == []
    assert read(backend, blob, 0, 10) == DATA[:10]
    assert token_calls(server) == ["GET"]


def test_stale_header_without_challenge(server: FaultyServer, make) -> None:
    """Harbor: 401 to a stale token says nothing, 401 to no token says what is wanted."""
    server.token_user = ""
    blob = server.add(DATA)
    server.inject("status", status=401)
    assert read(make(registry_token="stale"), blob, 0, 10) == DATA[:10]
    assert [one.status for one in server.requests] == [401, 401, 200, 206]


@pytest.mark.parametrize("status", [401, 403])
def test_refusals_name_user_host_and_cure(server: FaultyServer, make, status: int) -> None:
    blob = server.add(DATA)
    server.inject("status", status=status, times=-1, text=f"no {SECRET}",
                  headers={"WWW-Authenticate": 'Basic realm="x"'})
    with pytest.raises(Failure) as caught:
        read(make(auth=AUTH), blob, 0, 10)
    line = str(caught.value)
    assert caught.value.cause is Cause.AUTH
    assert "'someone'" in line and server.host in line and "a/b" in line
    assert SECRET not in line and AUTH not in line
    with pytest.raises(Failure, match="docker login") as caught:
        read(make(), blob, 0, 10)
    assert caught.value.cause is Cause.AUTH


def test_wrong_password(server: FaultyServer, make) -> None:
    server.token_user = "someone:other"
    blob = server.add(DATA)
    with pytest.raises(Failure, match="login of user 'someone' refused") as caught:
        read(make(auth=AUTH), blob, 0, 10)
    assert caught.value.cause is Cause.AUTH
    assert SECRET not in str(caught.value)


def test_a_refused_login_is_not_hammered(server: FaultyServer, make, monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    server.token_user = "someone:other"
    blob = server.add(DATA)
    backend = make(auth=AUTH)
    for _ in range(5):
        with pytest.raises(Failure, match="login of user 'someone' refused") as caught:
            read(backend, blob, 0, 10)
        assert caught.value.cause is Cause.AUTH
    assert token_calls(server) == ["POST", "GET"]
    now = time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: now() + 11)
    server.token_user = f"someone:{SECRET}"
    assert read(backend, blob, 0, 10) == DATA[:10]
    # new credentials are tried at once
    server.token_user, server.tokens = "someone:other", {}
    with pytest.raises(Failure):
        read(backend, blob, 0, 10)
    backend.set_credentials(Credentials("someone", "other"))
    assert read(backend, blob, 0, 10) == DATA[:10]


def test_token_server_trouble_is_network(server: FaultyServer, make) -> None:
    server.token_user = ""
    blob = server.add(DATA)
    server.inject("status", status=503, match=TOKEN_PATH)
    assert read(make(), blob, 0, 10) == DATA[:10]
    server.inject("status", status=503, match=TOKEN_PATH, times=-1)
    server.tokens.clear()
    with pytest.raises(Failure, match="token server") as caught:
        read(make(), blob, 0, 10)
    assert caught.value.cause is Cause.NETWORK


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"token": 5}', '{"token": "a\\nb"}', "not json"])
def test_token_answers_that_are_none(server: FaultyServer, make, text: str) -> None:
    server.token_user = ""
    blob = server.add(DATA)
    server.inject("status", status=200, text=text, match=TOKEN_PATH, times=-1)
    with pytest.raises(Failure) as caught:
        read(make(), blob, 0, 10)
    assert caught.value.cause is Cause.AUTH


def test_credentials_hide_their_secret() -> None:
    assert SECRET not in repr(Credentials("someone", SECRET))
    for text in ("x", ":y", ""):
        with pytest.raises(UsageFailure) as caught:
            parse_creds(text)
        assert "y" not in str(caught.value).replace("expected", "")


def test_docker_config(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    assert find_docker_credentials("a:5000") is None
    (tmp_path / "config.json").write_text(json.dumps({"auths": {
        "a:5000": {"auth": AUTH}, "https://index.docker.io/v1/": {"username": "hub", "password": "p"}, "b": {}}}))
    found = find_docker_credentials("a:5000")
    assert found is not None and (found.username, found.password) == ("someone", SECRET)
    hub = find_docker_credentials("docker.io")
    assert hub is not None and hub.username == "hub"
    assert find_docker_credentials("b") is None
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(Failure, match=r"config\.json"):
        find_docker_credentials("a:5000")
