"""Logins: challenges, tokens and their renewal, one fetch for many threads, and lines that never hold a secret."""

import base64
import json
import threading

import pytest

from tests.peers.faulty_server import TOKEN_PATH, FaultyServer
from tests.storage.conftest import DATA, read
from virtiofsd_nydus.errors import Cause, Failure, UsageFailure
from virtiofsd_nydus.net.credentials import Credentials, find_docker_credentials, parse_creds
from virtiofsd_nydus.net.login import parse_challenges

SECRET = "the-secret-word"
AUTH = base64.b64encode(f"someone:{SECRET}".encode()).decode()


def token_calls(server: FaultyServer) -> list[str]:
    return [one.method for one in server.requests if one.path.startswith(TOKEN_PATH)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            'Bearer realm="https://a/t?x=1,2",service="s",scope="repository:a/b:pull,push"',
            [("bearer", {"realm": "https://a/t?x=1,2", "service": "s", "scope": "repository:a/b:pull,push"})],
        ),
        ('Basic realm="x"', [("basic", {"realm": "x"})]),
        ("Negotiate, Basic realm=x", [("negotiate", {}), ("basic", {"realm": "x"})]),
        (
            r'Basic realm="a \"b\" c", BEARER realm="r" , service = "s"',
            [("basic", {"realm": 'a "b" c'}), ("bearer", {"realm": "r", "service": "s"})],
        ),
        ("", []),
        ("=,=", []),
    ],
)
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
    monkeypatch.setattr(time, "monotonic", lambda: now() + 290)  # of 300 s
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

    for _ in range(2):  # the second round with tokens that are worn out for all at once
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
    backend = make(registry_token="mine", timeout=10)
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
    server.inject(
        "status", status=status, times=-1, text=f"no {SECRET}", headers={"WWW-Authenticate": 'Basic realm="x"'}
    )
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
    (tmp_path / "config.json").write_text(
        json.dumps(
            {
                "auths": {
                    "a:5000": {"auth": AUTH},
                    "https://index.docker.io/v1/": {"username": "hub", "password": "p"},
                    "b": {},
                }
            }
        )
    )
    found = find_docker_credentials("a:5000")
    assert found is not None and (found.username, found.password) == ("someone", SECRET)
    hub = find_docker_credentials("docker.io")
    assert hub is not None and hub.username == "hub"
    assert find_docker_credentials("b") is None
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(Failure, match=r"config\.json"):
        find_docker_credentials("a:5000")


# ---- renewal ahead of time


def test_tokens_are_renewed_while_there_is_traffic(server: FaultyServer, make, monkeypatch: pytest.MonkeyPatch) -> None:
    """No read meets an old token, and without reads nothing is renewed."""
    import time

    from virtiofsd_nydus.net import login

    server.token_user = ""
    server.token_life_s = 2
    monkeypatch.setattr(login, "IDLE_S", 3.0)
    blob = server.add(DATA)
    backend = make(timeout=5)
    until = time.monotonic() + 5
    while time.monotonic() < until:
        assert read(backend, blob, 0, 10) == DATA[:10]
        time.sleep(0.05)  # the traffic
    assert [one.status for one in server.requests].count(401) == 1
    assert len(token_calls(server)) >= 3
    until = time.monotonic() + 10
    while backend.session.auth._renewer is not None and time.monotonic() < until:
        time.sleep(0.05)  # between two polls; the deadline decides
    assert backend.session.auth._renewer is None
    assert read(backend, blob, 0, 10) == DATA[:10]


def test_a_login_that_stops_to_work_is_said_once(server: FaultyServer) -> None:
    from virtiofsd_nydus.storage.factory import create_backend

    lines: list[str] = []
    server.token_user = f"someone:{SECRET}"
    server.token_uses = 1
    blob = server.add(DATA)
    backend = create_backend(
        "registry", {"scheme": "http", "host": server.host, "repo": "a/b", "auth": AUTH}, warn=lines.append
    )
    assert read(backend, blob, 0, 10) == DATA[:10]
    assert backend.status()["login"] == "ok" and lines == []
    server.token_user = "someone:other"
    for _ in range(5):
        with pytest.raises(Failure):
            read(backend, blob, 0, 10)
    assert backend.status()["login"] == "refused" and len(lines) == 1 and SECRET not in lines[0]
    backend.set_credentials(Credentials("someone", "other"))
    assert read(backend, blob, 0, 10) == DATA[:10]
    assert backend.status()["login"] == "ok"
    backend.close()


def test_no_password_in_clear_beside_tls(server: FaultyServer, make, tmp_path) -> None:
    """A registry behind TLS that names a token server without it gets neither password nor token request."""
    from tests.peers.registry import make_certificate

    make_certificate(tmp_path, "tls")
    blob = server.add(DATA)
    with FaultyServer({blob: DATA}, tls=(tmp_path / "tls.pem", tmp_path / "tls.key")) as secure:
        secure.inject(
            "status",
            status=401,
            times=-1,
            headers={"WWW-Authenticate": f'Bearer realm="{server.url}/token",service="s"'},
        )
        settings = {"scheme": "https", "host": secure.host, "ca_cert_files": [str(tmp_path / "tls.pem")], "timeout": 5}
        with pytest.raises(Failure, match="without TLS") as caught:
            read(make(auth=AUTH, **settings), blob, 0, 10)
        assert caught.value.cause is Cause.AUTH
        assert server.requests == []
        secure.heal()
        secure.token_user = f"someone:{SECRET}"  # its own realm is https
        assert read(make(auth=AUTH, **settings), blob, 0, 10) == DATA[:10]


# ---- docker's configuration


@pytest.fixture
def docker(tmp_path, monkeypatch: pytest.MonkeyPatch):
    """Writes docker's config.json and a credential helper named `test` that knows logins and notes who asks."""
    import os
    import sys

    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    def docker(config: dict, logins: dict | None = None, broken: str = "") -> None:
        (tmp_path / "config.json").write_text(json.dumps(config))
        helper = tmp_path / "docker-credential-test"
        helper.write_text(
            f"#!{sys.executable}\nimport json, sys\nassert sys.argv[1:] == ['get']\nserver = sys.stdin.read().strip()\n"
            f"open({str(tmp_path / 'asked')!r}, 'a').write(server + '\\n')\nlogins = {logins or {}!r}\n"
            f"if {broken!r}:\n    print({broken!r}); sys.exit(1)\n"
            "if server not in logins:\n    print('credentials not found in native keychain'); sys.exit(1)\n"
            "print(json.dumps({'ServerURL': server, 'Username': logins[server][0], 'Secret': logins[server][1]}))\n"
        )
        helper.chmod(0o755)

    return docker


def test_credential_helpers(docker) -> None:
    docker(
        {"credHelpers": {"a:5000": "test"}, "auths": {"a:5000": {}, "b": {"auth": AUTH}}},
        {"a:5000": ["me", "word"], "c": ["<token>", "tok"]},
    )
    found = find_docker_credentials("a:5000")
    assert found is not None and (found.username, found.password) == ("me", "word")
    found = find_docker_credentials("b")
    assert found is not None and found.username == "someone"
    docker({"credsStore": "test", "auths": {"b": {"auth": AUTH}}}, {"c": ["<token>", "tok"]})
    found = find_docker_credentials("c")
    assert found is not None and (found.username, found.identity_token) == ("", "tok")
    found = find_docker_credentials("b")  # the store knows nothing: the file does
    assert found is not None and found.username == "someone"
    docker({"credHelpers": {"a": "missing-one"}})
    with pytest.raises(Failure, match="docker-credential-missing-one is not installed"):
        find_docker_credentials("a")
    docker({"credHelpers": {"a": "../x"}})
    with pytest.raises(Failure, match="without /"):
        find_docker_credentials("a")
    docker({"credHelpers": {"a": "test"}}, broken="the vault is locked")
    with pytest.raises(Failure, match="the vault is locked"):
        find_docker_credentials("a")


def test_the_backend_asks_docker_at_each_login(server: FaultyServer, make, docker) -> None:
    """Short-lived logins: what the helper gave an hour ago is not what is sent."""
    server.token_user = f"someone:{SECRET}"
    server.token_uses = 1
    blob = server.add(DATA)
    docker({"credHelpers": {server.host: "test"}}, {server.host: ["someone", SECRET]})
    backend = make()
    assert read(backend, blob, 0, 10) == DATA[:10]
    server.token_user = "someone:newer"
    docker({"credHelpers": {server.host: "test"}}, {server.host: ["someone", "newer"]})
    assert read(backend, blob, 0, 10) == DATA[:10]
    docker({"credHelpers": {server.host: "test"}}, broken="the vault is locked")
    with pytest.raises(Failure, match="vault is locked") as caught:
        read(backend, blob, 0, 10)
    assert caught.value.cause is Cause.AUTH


def test_docker_is_not_asked_where_the_login_is_given(server: FaultyServer, make, docker, tmp_path) -> None:
    server.token_user = f"someone:{SECRET}"
    blob = server.add(DATA)
    docker({"credHelpers": {server.host: "test"}}, {server.host: ["other", "x"]})
    assert read(make(auth=AUTH), blob, 0, 10) == DATA[:10]
    assert not (tmp_path / "asked").exists()
