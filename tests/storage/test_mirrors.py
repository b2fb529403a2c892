"""`mirrors` of a registry: asked first, left aside when they fail, never the reason that a read fails."""

import time
from collections.abc import Iterator

import pytest

from tests.net.test_auth import AUTH, SECRET
from tests.peers.faulty_server import FaultyServer
from tests.storage.conftest import DATA, read


@pytest.fixture
def mirror() -> Iterator[FaultyServer]:
    with FaultyServer() as mirror:
        yield mirror


@pytest.fixture
def mirrored(server: FaultyServer, mirror: FaultyServer, make):
    def mirrored(more: dict | None = None, **settings):
        return make(mirrors=[{"host": mirror.url, **(more or {})}], **settings)

    return mirrored


def test_the_mirror_is_asked_first(server: FaultyServer, mirror: FaultyServer, mirrored) -> None:
    blob = server.add(DATA)
    mirror.add(DATA)
    backend = mirrored({"headers": {"X-Registry": "here"}}, auth=AUTH)
    assert read(backend, blob, 5, 10) == DATA[5:15]
    assert server.requests == []
    assert mirror.requests[0].headers["X-Registry"] == "here"
    assert mirror.requests[0].authorization == ""


def test_what_it_lacks_is_had_from_the_registry(server: FaultyServer, mirror: FaultyServer, mirrored) -> None:
    blob = server.add(DATA)
    backend = mirrored()
    for _ in range(3):
        assert read(backend, blob, 5, 10) == DATA[5:15]
    assert len(mirror.requests) == 1 and len(server.requests) == 3
    assert backend.status()["mirrors"] == {mirror.host: "open"}


@pytest.mark.parametrize(
    "fault",
    [
        {"kind": "status", "status": 503},
        {"kind": "reset"},
        {"kind": "delay", "seconds": 30},
        {"kind": "truncate", "at_bytes": 0},
        {"kind": "truncate", "at_bytes": 50_000},
        {"kind": "ignore_range"},
        {"kind": "shift_range", "at_bytes": 5},
        {"kind": "no_content_range"},
        {"kind": "status", "status": 401},
        {"kind": "status", "status": 403},
        {"kind": "garbage", "text": "no http\r\n\r\n"},
        {"kind": "redirect_loop"},
    ],
)
def test_a_faulty_mirror_fails_no_read(server: FaultyServer, mirror: FaultyServer, mirrored, fault: dict) -> None:
    blob = server.add(DATA)
    mirror.add(DATA)
    mirror.inject(times=-1, **fault)
    assert read(mirrored(retry_limit=1), blob, 5, 100_000, deadline=time.monotonic() + 5) == DATA[5:100_005]


def test_a_dead_mirror_is_left_aside_and_probed(
    server: FaultyServer, mirror: FaultyServer, mirrored, monkeypatch: pytest.MonkeyPatch
) -> None:
    blob = server.add(DATA)
    mirror.add(DATA)
    mirror.inject("reset", match="GET /v2/", times=2)
    mirror.inject("status", status=200, match="GET /ping", times=-1)
    backend = mirrored({"failure_limit": 2, "health_check_interval": 5, "ping_url": f"{mirror.url}/ping"})
    for _ in range(5):
        assert read(backend, blob, 5, 10) == DATA[5:15]
    assert len(mirror.requests) == 2 and len(server.requests) == 5
    assert backend.status()["mirrors"] == {mirror.host: "shut"}
    now = time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: now() + 5.1)
    for _ in range(2):
        assert read(backend, blob, 5, 10) == DATA[5:15]
    assert [one.path for one in mirror.requests[2:]][:2] == ["/ping", f"/v2/a/b/blobs/sha256:{blob}"]
    assert len(server.requests) == 5 and backend.status()["mirrors"] == {mirror.host: "open"}


def test_bytes_that_were_not_the_images(server: FaultyServer, mirror: FaultyServer, mirrored) -> None:
    blob = server.add(DATA)
    mirror.add(DATA)
    mirror.inject("corrupt", times=-1)
    backend = mirrored()
    assert read(backend, blob, 5, 10) != DATA[5:15]
    backend.distrust(blob)
    assert read(backend, blob, 5, 10) == DATA[5:15]


def test_the_login_goes_to_a_mirror_only_where_told(server: FaultyServer, mirror: FaultyServer, mirrored) -> None:
    blob = server.add(DATA)
    mirror.add(DATA)
    mirror.token_user = f"someone:{SECRET}"
    assert read(mirrored(auth=AUTH), blob, 5, 10) == DATA[5:15]
    assert len(server.requests) == 1
    assert SECRET not in str(mirror.requests)
    server.requests.clear()
    assert read(mirrored({"auth_through": True}, auth=AUTH), blob, 5, 10) == DATA[5:15]
    assert server.requests == []
