"""A deadline ends everything that a read can wait for, whatever the server does and by whichever way it is reached."""

import threading
import time

import pytest

from tests.peers.faulty_server import FaultyServer
from tests.peers.sick_server import KINDS, SickServer
from tests.storage.conftest import DATA, read
from virtiofsd_nydus.errors import Cause, Failure
from virtiofsd_nydus.storage.factory import create_backend

BLOB = "a" * 64
# Every limit but the deadline is far off: only the deadline can end a read in time.
PATIENT = {"timeout": 60, "connect_timeout": 60, "retry_limit": 3}
DEADLINE_S = 1.0
# A read that is not ended takes a minute; one that is ends at the deadline, on a busy machine somewhat later.
ENDED_S = 15.0


def end_of_read(kind: str, settings: dict) -> tuple[float, Failure]:
    """Seconds that a read with a deadline took, and how it failed. It runs aside: one that hangs does not hang the
    test."""
    backend = create_backend(kind, {**PATIENT, **settings})
    began_s = time.monotonic()
    failures: list[Failure] = []

    def run() -> None:
        try:
            read(backend, BLOB, 0, 4096, deadline=began_s + DEADLINE_S)
        except Failure as failure:
            failures.append(failure)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(ENDED_S)
    took_s = time.monotonic() - began_s
    backend.close()
    assert not thread.is_alive(), "the read goes on beyond its deadline"
    return took_s, failures[0]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "tls"])
@pytest.mark.parametrize("way", ["registry", "s3", "http-proxy"])
def test_a_deadline_ends_every_wait(kind: str, way: str) -> None:
    with SickServer(kind) as server:
        settings = {
            "registry": {"scheme": "http", "host": server.host, "repo": "a/b"},
            "s3": {"scheme": "http", "endpoint": server.host, "bucket_name": "b", "region": "r"},
            "http-proxy": {"addr": f"http://{server.host}"},
        }[way]
        took_s, failure = end_of_read(way, settings)
    assert failure.cause is Cause.NETWORK
    assert took_s < ENDED_S


@pytest.mark.parametrize("kind", ["deaf", "mute", "tls"])
def test_a_deadline_ends_a_tls_handshake(kind: str) -> None:
    with SickServer(kind) as server:
        _, failure = end_of_read("registry", {"scheme": "https", "host": server.host, "repo": "a/b"})
    assert failure.cause is Cause.NETWORK


@pytest.mark.parametrize("kind", ["deaf", "mute", "headers", "error"])
def test_a_deadline_ends_a_wait_for_a_proxy(kind: str) -> None:
    with SickServer(kind) as server:
        settings = {
            "scheme": "http",
            "host": "registry.invalid",
            "repo": "a/b",
            "proxy": {"url": f"http://{server.host}", "fallback": False},
        }
        _, failure = end_of_read("registry", settings)
    assert failure.cause is Cause.NETWORK


@pytest.mark.parametrize("kind", ["deaf", "mute", "headers", "body", "error"])
def test_a_deadline_ends_a_wait_for_a_token_server(kind: str, server: FaultyServer) -> None:
    with SickServer(kind) as sick:
        challenge = f'Bearer realm="http://{sick.host}/token",service="s"'
        server.inject("status", status=401, times=-1, headers={"WWW-Authenticate": challenge})
        _, failure = end_of_read("registry", {"scheme": "http", "host": server.host, "repo": "a/b"})
    assert failure.cause in (Cause.NETWORK, Cause.AUTH)


def test_a_deadline_ends_a_wait_for_a_credential_helper(
    server: FaultyServer, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    helper = tmp_path / "docker-credential-slow"
    helper.write_text("#!/bin/sh\nexec sleep 60\n")
    helper.chmod(0o755)
    (tmp_path / "config.json").write_text('{"credsStore": "slow"}')
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    server.inject("status", status=401, times=-1, headers={"WWW-Authenticate": 'Basic realm="r"'})
    _, failure = end_of_read("registry", {"scheme": "http", "host": server.host, "repo": "a/b"})
    assert failure.cause is Cause.AUTH


def test_headers_that_trickle_end_within_one_answers_time_without_a_deadline(server: FaultyServer) -> None:
    """The next attempt comes long before the read's deadline: a server that trickles once costs one time limit."""
    blob = server.add(DATA)
    with SickServer("headers") as sick:
        settings = {"scheme": "http", "host": server.host, "repo": "a/b", "timeout": 0.5, "connect_timeout": 0.5}
        backend = create_backend("registry", {**settings, "mirrors": [{"host": f"http://{sick.host}"}]})
        began_s = time.monotonic()
        assert read(backend, blob, 0, 10) == DATA[:10]
        assert time.monotonic() - began_s < ENDED_S
        backend.close()


def test_a_connection_that_is_used_again_has_its_whole_time(server: FaultyServer) -> None:
    """The short waits of a read near its deadline do not stay with the connection."""
    blob = server.add(DATA)
    settings = {"scheme": "http", "host": server.host, "repo": "a/b", "timeout": 20, "connect_timeout": 20}
    backend = create_backend("registry", settings)
    assert read(backend, blob, 0, 10, deadline=time.monotonic() + 0.9) == DATA[:10]
    server.inject("delay", seconds=1.5)
    assert read(backend, blob, 0, 10) == DATA[:10]
    assert [one.status for one in server.requests] == [206, 206]
    backend.close()
