"""`proxy` in front of a backend: squid as the real one, and the faulty server as one that goes wrong."""

import hashlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.peers.faulty_server import FaultyServer
from tests.peers.registry import LocalRegistry
from tests.peers.squid import Squid
from tests.storage.conftest import DATA, read
from tests.storage.test_real_registry import BLOB, settings_for, store_blob
from virtiofsd_nydus.errors import Cause, Failure
from virtiofsd_nydus.storage.factory import create_backend

OWN = {"X-Dragonfly-Error-Type": "proxy"}


def wait_until(condition: Callable[[], object], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.01)  # between two polls; the deadline decides


@pytest.fixture
def peer() -> Iterator[FaultyServer]:
    """The forward proxy: a cache that has the blob itself."""
    with FaultyServer({hashlib.sha256(DATA).hexdigest(): DATA}) as peer:
        yield peer


@pytest.fixture
def behind(server: FaultyServer, peer: FaultyServer, make):
    """A registry backend that goes by peer."""
    server.add(DATA)

    def behind(retry_limit: int = 3, timeout: float = 0.6, **proxy):
        return make(proxy={"url": peer.url, **proxy}, retry_limit=retry_limit, timeout=timeout)

    return behind


def test_requests_go_by_the_proxy(server: FaultyServer, peer: FaultyServer, behind) -> None:
    backend = behind()
    assert read(backend, BLOB, 5, 10) == DATA[5:15]
    assert read(backend, BLOB, 5, 10, prefetch=True) == DATA[5:15]
    assert server.requests == []
    assert [one.path for one in peer.requests] == [f"http://{server.host}/v2/a/b/blobs/sha256:{BLOB}"] * 2
    demand, prefetch = (one.headers for one in peer.requests)
    assert demand["X-Dragonfly-Priority"] == "6" and "X-Dragonfly-Prefetch" not in demand
    assert prefetch["X-Dragonfly-Priority"] == "3" and prefetch["X-Dragonfly-Prefetch"] == "true"
    assert demand["X-Dragonfly-Use-P2P"] == prefetch["X-Dragonfly-Use-P2P"] == "true"


def test_logins_never_go_by_the_proxy(server: FaultyServer, peer: FaultyServer, behind) -> None:
    server.token_user = ""
    peer.inject(
        "status",
        status=401,
        match="GET http",
        headers={"WWW-Authenticate": f'Bearer realm="{server.url}/token",service="s"'},
    )
    assert read(behind(), BLOB, 5, 10) == DATA[5:15]
    assert [one.path.partition("?")[0] for one in server.requests] == ["/token"]
    assert len(peer.requests) == 2 and peer.requests[1].authorization == "Bearer token0"


@pytest.mark.parametrize(
    "fault",
    [
        {"kind": "status", "status": 500},
        {"kind": "status", "status": 502, "headers": OWN},
        {"kind": "reset"},
        {"kind": "delay", "seconds": 30},
    ],
)
def test_fallback(server: FaultyServer, peer: FaultyServer, behind, fault: dict) -> None:
    """A proxy that is unwell costs one attempt at most, not the read."""
    peer.inject(times=-1, **fault)
    backend = behind(retry_limit=1)
    assert read(backend, BLOB, 5, 10) == DATA[5:15]
    assert len(server.requests) == 1
    assert not any(name.startswith("X-Dragonfly") for name in server.requests[0].headers)


@pytest.mark.parametrize(
    "fault",
    [
        {"kind": "status", "status": 500, "headers": OWN},
        {"kind": "reset"},
        {"kind": "status", "status": 429, "headers": OWN},
        {"kind": "delay", "seconds": 30},
    ],
)
def test_without_fallback_the_last_retry_goes_round_it(
    server: FaultyServer, peer: FaultyServer, behind, fault: dict
) -> None:
    peer.inject(times=-1, **fault)
    backend = behind(retry_limit=2, fallback=False, timeout=0.3)
    assert read(backend, BLOB, 5, 10) == DATA[5:15]
    assert len(server.requests) == 1 and server.requests[0].path == f"/v2/a/b/blobs/sha256:{BLOB}"
    # 429: the next attempt already
    if fault["kind"] != "delay":  # which is recorded when it is over
        assert len(peer.requests) == (1 if fault.get("status") == 429 else 2)


def test_prefetch_gives_way_to_a_limit(server: FaultyServer, peer: FaultyServer, behind) -> None:
    peer.inject("status", status=429, headers=OWN, times=-1)
    with pytest.raises(Failure, match="429") as caught:
        read(behind(), BLOB, 0, 10, prefetch=True)
    assert caught.value.cause is Cause.NETWORK
    assert len(peer.requests) == 1 and server.requests == []


def test_refusals_are_told_apart(server: FaultyServer, peer: FaultyServer, behind) -> None:
    """403 of the proxy ends the read at once and names the proxy; 403 without its mark is the registry's."""
    peer.inject("status", status=403, headers=OWN)
    with pytest.raises(Failure, match="the proxy, not the registry") as caught:
        read(behind(), BLOB, 0, 10)
    assert caught.value.cause is Cause.AUTH and peer.host in str(caught.value)
    peer.inject("status", status=403)
    with pytest.raises(Failure, match="refused to pull a/b") as caught:
        read(behind(), BLOB, 0, 10)
    assert caught.value.cause is Cause.AUTH and server.host in str(caught.value)
    peer.inject("status", status=429, times=1)  # the registry's: a retry by the same way
    assert read(behind(), BLOB, 0, 10) == DATA[:10]
    assert server.requests == []


def test_a_dead_proxy_is_left_aside_and_probed(server: FaultyServer, peer: FaultyServer, behind) -> None:
    peer.inject("reset", times=3)
    backend = behind(check_interval=1)
    for _ in range(10):
        assert read(backend, BLOB, 5, 10) == DATA[5:15]
    # Three failures, then nothing more is tried
    assert len(peer.requests) == 3 and len(server.requests) == 10
    assert backend.status()["proxy"]["state"] == "shut"
    wait_until(lambda: backend.status()["proxy"]["state"] == "probing")
    assert read(backend, BLOB, 5, 10) == DATA[5:15]
    assert len(peer.requests) == 4 and len(server.requests) == 10
    assert backend.status()["proxy"]["state"] == "open"


def test_ping(server: FaultyServer, peer: FaultyServer, behind) -> None:
    """While the health check fails nothing goes by the proxy; when it is well again one request is the probe."""
    peer.inject("status", status=500, match="GET /ping", times=-1)
    backend = behind(check_interval=0.05, ping_url=f"{peer.url}/ping")
    assert read(backend, BLOB, 5, 10) == DATA[5:15]
    wait_until(lambda: backend.status()["proxy"]["state"] == "shut")
    server.requests.clear()
    assert read(backend, BLOB, 5, 10) == DATA[5:15]
    assert len(server.requests) == 1
    peer.heal()
    peer.inject("status", status=200, match="GET /ping", times=-1)
    wait_until(lambda: backend.status()["proxy"]["state"] == "probing")
    assert read(backend, BLOB, 5, 10) == DATA[5:15]
    assert len(server.requests) == 1
    assert backend.status()["proxy"]["state"] == "open"


def test_checks_rest_without_traffic(peer: FaultyServer, behind) -> None:
    backend = behind(check_interval=0.02, check_pause_elapsed=0.1, ping_url=f"{peer.url}/ping")
    read(backend, BLOB, 5, 10)
    wait_until(lambda: backend._client.proxy._checker is None)
    pings = sum(one.path == "/ping" for one in peer.requests)
    assert pings >= 1
    read(backend, BLOB, 5, 10)
    wait_until(lambda: sum(one.path == "/ping" for one in peer.requests) > pings)


def test_use_http(peer: FaultyServer, make) -> None:
    backend = make(scheme="https", host="registry.invalid", proxy={"url": peer.url, "use_http": True})
    assert read(backend, BLOB, 5, 10) == DATA[5:15]
    assert peer.requests[0].path == f"http://registry.invalid/v2/a/b/blobs/sha256:{BLOB}"


def test_what_was_not_the_images_goes_round_it(server: FaultyServer, peer: FaultyServer, behind) -> None:
    peer.inject("corrupt", at_bytes=0, times=-1)
    backend = behind()
    assert read(backend, BLOB, 5, 10) != DATA[5:15]
    backend.distrust(BLOB)
    assert read(backend, BLOB, 5, 10) == DATA[5:15]
    assert len(server.requests) == 1


def test_a_proxy_without_ranges_is_gone_round(server: FaultyServer, peer: FaultyServer, behind) -> None:
    peer.inject("ignore_range", times=-1)
    assert read(behind(), BLOB, 5, 10) == DATA[5:15]
    assert len(server.requests) == 1


# ---- the real one


@pytest.fixture(scope="module")
def squid(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Squid]:
    with Squid(tmp_path_factory.mktemp("squid")) as squid:
        yield squid


@pytest.mark.peer
@pytest.mark.parametrize("variant", [{}, {"auth": "htpasswd"}, {"auth": "token"}, {"tls": True}])
def test_squid(tmp_path: Path, squid: Squid, variant: dict) -> None:
    with LocalRegistry(tmp_path / "registry", **variant) as registry:
        store_blob(registry)
        before = len(squid.requests())
        backend = create_backend("registry", settings_for(registry, proxy={"url": squid.url, "fallback": False}))
        assert read(backend, BLOB, 12345, 300_000) == DATA[12345:312345]
        assert backend.status()["proxy"] == {"state": "open", "used": 2 if "auth" in variant else 1, "passed_by": 0}
        backend.close()  # a tunnel is logged when it ends
        wait_until(lambda: len(squid.requests()) > before)
        line = squid.requests()[-1]
        assert line == (
            f"CONNECT {registry.host}"
            if registry.tls
            else f"GET http://{registry.host}/v2/team/image/blobs/sha256:{BLOB}"
        )


@pytest.mark.peer
def test_squid_denies(server: FaultyServer, squid: Squid, make) -> None:
    server.add(DATA)
    with pytest.raises(Failure, match="the proxy, not the registry") as caught:
        read(make(repo="denied/b", proxy={"url": squid.url, "fallback": False}), BLOB, 0, 10)
    assert caught.value.cause is Cause.AUTH


@pytest.mark.peer
def test_squid_dies_and_comes_back(server: FaultyServer, squid: Squid, make) -> None:
    server.add(DATA)
    backend = make(proxy={"url": squid.url, "check_interval": 0.2}, timeout=5)
    assert read(backend, BLOB, 5, 10) == DATA[5:15]
    squid.stop()
    for _ in range(5):
        assert read(backend, BLOB, 5, 10) == DATA[5:15]
    assert backend.status()["proxy"]["used"] == 1
    squid.start()

    def by_proxy() -> bool:
        assert read(backend, BLOB, 5, 10) == DATA[5:15]
        return backend.status()["proxy"]["used"] > 1

    wait_until(by_proxy)


# ---- Dragonfly's peer daemon


@pytest.mark.parametrize(
    ("kind", "own"), [("proxy", True), ("dfdaemon", True), ("Dfdaemon", True), ("backend", False), ("", False)]
)
def test_whose_error_it_is(server: FaultyServer, peer: FaultyServer, behind, kind: str, own: bool) -> None:
    """An error of the peer's own counts against it; one of the registry's, passed on, does not."""
    backend = behind()
    headers = {"X-Dragonfly-Error-Type": kind} if kind else {}
    peer.inject("status", status=500, headers=headers, times=3)
    for _ in range(3):
        assert read(backend, BLOB, 5, 10) == DATA[5:15]  # from the registry
    assert len(server.requests) == 3
    assert (backend.status()["proxy"]["state"] == "open") is not own


def test_what_a_peer_had_already_is_counted(server: FaultyServer, peer: FaultyServer, behind) -> None:
    backend = behind()
    task = {"X-Dragonfly-Task-ID": "one", "X-Dragonfly-Task-Download-Finished": "false"}
    peer.inject("restatus", status=206, headers=task)
    assert read(backend, BLOB, 5, 10) == DATA[5:15]
    peer.inject("restatus", status=206, headers={**task, "X-Dragonfly-Task-Download-Finished": "true"}, times=2)
    for _ in range(3):
        assert read(backend, BLOB, 5, 10) == DATA[5:15]
    assert backend.status()["proxy"]["p2p"] == {"answers": 3, "hits": 2}
    assert peer.requests[0].headers["X-Dragonfly-Enable-Task-ID-Based-Blob-Digest"] == "true"


def test_a_peer_as_a_mirror(server: FaultyServer, peer: FaultyServer, make) -> None:
    """X-Dragonfly-Registry makes a mirror one: it is told what a peer is told, and counted."""
    server.add(DATA)
    mirror = {"host": peer.url, "headers": {"X-Dragonfly-Registry": server.url}, "failure_limit": 2}
    backend = make(mirrors=[mirror])
    done = {"X-Dragonfly-Task-ID": "one", "X-Dragonfly-Task-Download-Finished": "true"}
    peer.inject("restatus", status=206, headers=done)
    assert read(backend, BLOB, 5, 10) == DATA[5:15]
    sent = peer.requests[0].headers
    assert sent["X-Dragonfly-Registry"] == server.url and sent["X-Dragonfly-Priority"] == "6"
    assert sent["X-Dragonfly-Enable-Task-ID-Based-Blob-Digest"] == "true"
    assert backend.status()["p2p"] == {"answers": 1, "hits": 1} and backend.piece_bytes == 4 << 20
    for kind, state in (("backend", "open"), ("dfdaemon", "shut")):
        peer.inject("status", status=500, headers={"X-Dragonfly-Error-Type": kind}, times=2)
        for _ in range(2):
            assert read(backend, BLOB, 5, 10) == DATA[5:15]
        assert (backend.status()["mirrors"][peer.host] == "open") is (state == "open"), kind
    plain = make(mirrors=[{"host": peer.url}])
    assert plain.piece_bytes == 0
