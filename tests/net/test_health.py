"""Circuit breaker, rate limits, names that do not resolve, headers of the environment."""

import socket
import threading
import time

import pytest

from tests.peers.faulty_server import FaultyServer
from tests.storage.conftest import DATA, read
from virtiofsd_nydus.errors import Cause, Failure
from virtiofsd_nydus.net.failures import RetriableFailure
from virtiofsd_nydus.net.health import Gate, RateLimit
from virtiofsd_nydus.storage.backoff import FIRST_PAUSE_S, LAST_PAUSE_S, QUIET_S, Backoff
from virtiofsd_nydus.storage.factory import create_backend


class Clock:
    """time.monotonic() that moves when told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ahead_s = 0.0
        now = time.monotonic
        monkeypatch.setattr(time, "monotonic", lambda: now() + self.ahead_s)


def test_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    lines: list[str] = []
    gate = Gate("mirror m", 2, 10, 15, lines.append)
    for _ in range(3):  # a success in between: not in a row
        assert gate.enter()
        gate.failed("why")
        assert gate.enter()
        gate.succeeded()
    assert gate.state == "open" and lines == []
    gate.failed("why")
    gate.failed("why else")
    assert gate.state == "shut" and not gate.enter()
    gate.failed("one that was on its way")
    clock.ahead_s += 10.1
    assert gate.state == "probing"
    assert gate.enter() and not gate.enter()  # one probe
    gate.failed("still")
    assert not gate.enter()
    clock.ahead_s += 10.1
    assert gate.state == "shut"  # twice as long, at most 15
    clock.ahead_s += 5
    assert gate.enter()
    gate.succeeded()
    assert gate.enter() and gate.enter()
    assert lines == [
        "mirror m: not asked for a while after 2 failures in a row, the last: why else",
        "mirror m: answers again",
    ]


def test_refusals_between_two_attempts_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """The log folds lines that are the same: an outage must not be ten different ones a second."""
    clock = Clock(monkeypatch)
    gate = Gate("mirror m", 1, 10, 10)
    gate.failed("why")
    said = gate.refusal()
    for _ in range(9):
        clock.ahead_s += 1
        assert not gate.enter() and gate.refusal() == said


def test_a_lost_probe_does_not_shut_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    gate = Gate("x", 1, 1, 1)
    gate.failed("why")
    clock.ahead_s += 1.1
    assert gate.enter() and not gate.enter()
    clock.ahead_s += 61
    assert gate.enter()


def test_health_check_decides() -> None:
    gate = Gate("x", 3, 1, 1)
    gate.trip("no answer")
    assert not gate.enter() and "no answer" in gate.refusal()
    gate.reprieve()
    assert gate.enter() and not gate.enter()
    gate.succeeded()
    gate.reprieve()
    assert gate.enter() and gate.enter()


def test_rate_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    limit = RateLimit(100, 50)
    assert limit.take(50) == 0
    assert limit.take(200) == pytest.approx(2, abs=0.1)
    clock.ahead_s += 1
    assert limit.debt_s() == pytest.approx(1, abs=0.1)
    clock.ahead_s += 100
    assert limit.debt_s() == 0
    assert limit.take(50) == 0 and limit.take(1) > 0  # no more than the burst is saved up


def test_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    lines: list[str] = []
    backoff = Backoff("registry r", lines.append)
    refused = RetriableFailure("r: refused", whole=True)
    pauses = []
    for _ in range(8):
        until_s = backoff.failed("a", refused)
        # Another one that was under way counts once; all blobs wait for the server.
        assert backoff.failed("b", refused) == until_s == backoff.until_s("c")
        pauses.append(until_s - time.monotonic())
        clock.ahead_s += until_s - time.monotonic()
    for number, pause_s in enumerate(pauses):
        longest_s = min(FIRST_PAUSE_S * 2**number, LAST_PAUSE_S)
        assert longest_s / 2 - 0.01 <= pause_s <= longest_s
    assert backoff.state == "shut" and backoff.failures("c") == 8
    assert lines == ["registry r: fetching fails, readers wait and it is asked again: r: refused"]
    backoff.succeeded("c")
    assert backoff.state == "open" and backoff.until_s("a") == 0.0
    assert lines[1:] == ["registry r: answers again"]


def test_backoff_of_one_blob_leaves_others_alone() -> None:
    lines: list[str] = []
    backoff = Backoff("registry r", lines.append)
    backoff.failed("a", RetriableFailure("r: status 500"))
    assert backoff.until_s("a") > time.monotonic() and backoff.until_s("b") == 0.0
    backoff.succeeded("b")
    assert backoff.until_s("a") > 0.0
    backoff.succeeded("a")
    assert backoff.until_s("a") == 0.0
    assert lines == []  # one failure is no state


def test_backoff_heeds_what_the_server_asks_for() -> None:
    backoff = Backoff("registry r")
    assert backoff.failed("a", RetriableFailure("r: status 429", after_s=7, whole=True)) - time.monotonic() > 6


def test_server_that_comes_and_goes_is_told_of_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    lines: list[str] = []
    backoff = Backoff("registry r", lines.append)
    for _ in range(100):
        for _ in range(2):
            backoff.failed("a", RetriableFailure("r: refused", whole=True))
            clock.ahead_s += 0.2
        backoff.succeeded("a")
    assert 100 * 2 * 0.2 / QUIET_S <= len(lines) / 2 <= 100 * 2 * 0.2 / QUIET_S + 1


@pytest.mark.parametrize("status", [401, 403, 404])
def test_refusals_do_not_make_it_wait(server: FaultyServer, make, status: int) -> None:
    blob = server.add(DATA)
    backend = make()
    server.inject("status", status=status, times=-1)
    for _ in range(10):
        with pytest.raises(Failure):
            read(backend, blob, 0, 10)
    server.heal()
    assert read(backend, blob, 0, 10) == DATA[:10]
    assert backend.status()["breaker"] == "open"


def test_meter(server: FaultyServer, make) -> None:
    blob = server.add(DATA)
    backend = make()
    server.inject("status", status=503)
    server.inject("truncate", at_bytes=300_000)
    assert read(backend, blob, 0, 700_000) == DATA[:700_000]
    found = backend.meter.nydusd_metrics()
    assert found["backend_type"] == "registry"
    assert (found["read_count"], found["read_errors"]) == (3, 2)
    assert found["read_amount_total"] == 700_000 + 700_000 + 400_000
    assert found["read_count_block_size_dist"] == [0, 0, 0, 0, 0, 1, 2, 0]
    assert [sum(row) for row in found["read_latency_sizes_dist"]] == found["read_count_block_size_dist"]
    assert sum(found["read_cumulative_latency_millis_dist"]) == found["read_cumulative_latency_millis_total"]
    own = backend.meter.own_metrics()
    assert own.pop("received_bytes") == 700_000 and own.pop("errors_by_cause") == {"network": 2}
    assert not any(own.values())  # what became of the bytes is for the caller that asked for them to say


# ---- names


def test_a_lookup_that_hangs_ends_at_the_deadline(make, monkeypatch: pytest.MonkeyPatch) -> None:
    released = threading.Event()
    asked: list[str] = []

    def getaddrinfo(host, *args, **options):
        asked.append(host)
        released.wait(30)
        raise socket.gaierror(socket.EAI_AGAIN, "no answer")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    backend = make(host="registry.invalid:5000", timeout=30, connect_timeout=30)
    began = time.monotonic()

    def run() -> None:
        with pytest.raises(Failure, match=r"registry\.invalid") as caught:
            read(backend, "0" * 64, 0, 10, deadline=began + 0.5)
        assert caught.value.cause is Cause.NETWORK

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert time.monotonic() - began < 3
    assert asked == ["registry.invalid"]
    released.set()


def test_names_are_kept(server: FaultyServer, make, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    look_up = socket.getaddrinfo
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda host, *rest, **more: asked.append(host) or look_up(host, *rest, **more)
    )
    blob = server.add(DATA)
    server.inject("close", times=-1)
    backend = make(host=server.host.replace("127.0.0.1", "localhost"))
    for _ in range(5):
        assert read(backend, blob, 0, 10) == DATA[:10]
    assert asked == ["localhost"]


def test_a_server_that_moved_is_looked_up_again(server: FaultyServer, make, monkeypatch: pytest.MonkeyPatch) -> None:
    port = int(server.host.rpartition(":")[2])
    found = [("127.0.0.2", 1), ("127.0.0.1", port)]
    answers = [[found[0]], found]
    asked: list[str] = []

    def getaddrinfo(host, *args, **options):
        asked.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", one) for one in answers.pop(0)]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    blob = server.add(DATA)
    server.inject("close", times=-1)
    backend = make(host="registry.invalid", retry_limit=1)
    assert read(backend, blob, 0, 10) == DATA[:10]  # refused once, looked up anew, had from the second address
    lookup = backend._client.resolver()._lookups["registry.invalid", 80]
    assert lookup.addresses[0][4] == ("127.0.0.1", port)
    assert asked == ["registry.invalid"] * 2


@pytest.mark.parametrize("name", ["no-such-name.invalid", "a" * 70 + ".invalid"])
def test_names_that_are_not_there(make, name: str) -> None:
    with pytest.raises(Failure) as caught:
        read(make(host=name, retry_limit=1), "0" * 64, 0, 10, prefetch=True)
    assert caught.value.cause is Cause.NETWORK and "resolve" in str(caught.value)


# ---- headers of the environment


def test_header_environment(server: FaultyServer, make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NYDUS_HEADER_X-Custom", "a value")
    monkeypatch.setenv("NYDUS_HEADER_user-agent", "mine/1")
    monkeypatch.setenv("NYDUS_HEADER_Cookie", "secret-cookie")
    monkeypatch.setenv("NYDUS_HEADER_Bad", "two\nlines-secret")
    lines: list[str] = []
    blob = server.add(DATA)
    with FaultyServer({blob: DATA}) as store:
        server.signatures = store.signatures
        server.inject("redirect", text=store.url, match="GET /v2/")
        backend = create_backend("registry", {"scheme": "http", "host": server.host, "repo": "a/b"}, warn=lines.append)
        assert read(backend, blob, 0, 10) == DATA[:10]
        backend.close()
        ours, other = server.requests[0].headers, store.requests[0].headers
    assert ours["X-Custom"] == other["X-Custom"] == "a value"
    assert ours["User-Agent"] == "mine/1" and ours["Cookie"] == "secret-cookie"
    assert "Cookie" not in other
    assert lines == ["NYDUS_HEADER_Bad: not a valid HTTP header, left out"]
