"""Every fault of the faulty server against a read: the right bytes, or the right cause, within the deadline."""

import hashlib
import time

import pytest

from tests.peers.faulty_server import FAULTS, FaultyServer
from tests.storage.conftest import DATA, read
from virtiofsd_nydus.errors import Cause, Failure
from virtiofsd_nydus.net.failures import RetriableFailure

OFFSET, LENGTH = 1000, 700_003
WANTED = DATA[OFFSET : OFFSET + LENGTH]
DEADLINE_S = 3.0

# A fault that passes: it hits one request, the read must succeed with the right bytes.
PASSING = {
    "delay": [{"seconds": 0.1}, {"seconds": 30}],
    "stall": [{"at_bytes": 300_000, "seconds": 0.1}, {"at_bytes": 300_000, "seconds": 30}],
    "trickle": [{"at_bytes": 100_000, "seconds": 0.02}],
    "truncate": [{"at_bytes": 0}, {"at_bytes": 1}, {"at_bytes": 300_000}, {"at_bytes": LENGTH - 1}],
    "reset": [{"at_bytes": 0}, {"at_bytes": 300_000}],
    "status": [{"status": code} for code in (408, 429, 500, 502, 503, 504)],
    "shift_range": [{"at_bytes": 1}, {"at_bytes": 4096}],
    "mislabel_range": [{"at_bytes": 1}],
    "no_content_range": [{}],
    "short_range": [{"at_bytes": 1}, {"at_bytes": 300_000}],
    "long_body": [{"at_bytes": 1}],
    "wrong_total": [{"at_bytes": 1}],
    "multipart": [{}],
    "chunked": [{}],
    "close": [{}],
    "redirect": [{}],
    "garbage": [{"text": "not http at all\r\n\r\n"}, {"text": ""}],
}
# A fault that stays: the cause it must be told as.
LASTING = {
    "delay": [({"seconds": 30}, Cause.NETWORK)],
    "stall": [({"at_bytes": 0, "seconds": 30}, Cause.NETWORK)],
    "trickle": [({"at_bytes": 1, "seconds": 0.2}, Cause.NETWORK)],
    "truncate": [({"at_bytes": 0}, Cause.NETWORK)],
    "reset": [({"at_bytes": 0}, Cause.NETWORK)],
    "status": [
        ({"status": 503}, Cause.NETWORK),
        ({"status": 401}, Cause.AUTH),
        ({"status": 403}, Cause.AUTH),
        ({"status": 404}, Cause.MISSING),
        ({"status": 418}, Cause.IO),
        ({"status": 204}, Cause.NETWORK),
        ({"status": 400, "text": "Client sent an HTTP request to an HTTPS server.\n"}, Cause.SCHEME),
    ],
    "ignore_range": [({}, Cause.NETWORK)],
    "shift_range": [({"at_bytes": 1}, Cause.NETWORK)],
    "mislabel_range": [({"at_bytes": 1}, Cause.NETWORK)],
    "no_content_range": [({}, Cause.NETWORK)],
    "long_body": [({"at_bytes": 1}, Cause.NETWORK)],
    "multipart": [({}, Cause.NETWORK)],
    "redirect_loop": [({}, Cause.NETWORK)],
    "redirect_bad": [
        ({"text": ""}, Cause.NETWORK),
        ({"text": "ftp://127.0.0.1/x"}, Cause.NETWORK),
        ({"text": "http://127.0.0.1:1/x"}, Cause.NETWORK),
    ],
    "garbage": [
        ({"text": "not http at all\r\n\r\n"}, Cause.NETWORK),
        ({"text": "\x15\x03\x03\x00\x02\x02\x46"}, Cause.SCHEME),
    ],
}


def test_every_fault_is_tried() -> None:
    # corrupt is the digest check's to find, not the backend's: tried below; the others in test_answers.py and
    # test_outage.py
    assert set(PASSING) | set(LASTING) | {"corrupt", "encode", "restatus", "slow_headers"} == set(FAULTS)


@pytest.mark.parametrize(("kind", "fields"), [(kind, fields) for kind in PASSING for fields in PASSING[kind]])
def test_passing_fault(server: FaultyServer, make, kind: str, fields: dict) -> None:
    blob = server.add(DATA)
    backend = make()
    server.inject(kind, **fields)
    began = time.monotonic()
    assert read(backend, blob, OFFSET, LENGTH, deadline=began + DEADLINE_S) == WANTED
    assert time.monotonic() - began < DEADLINE_S


@pytest.mark.parametrize(
    ("kind", "fields", "cause"), [(kind, fields, cause) for kind in LASTING for fields, cause in LASTING[kind]]
)
def test_lasting_fault(server: FaultyServer, make, kind: str, fields: dict, cause: Cause) -> None:
    blob = server.add(DATA)
    backend = make()
    server.inject(kind, times=-1, **fields)
    began = time.monotonic()
    with pytest.raises(Failure) as caught:
        read(backend, blob, OFFSET, LENGTH, deadline=began + DEADLINE_S)
    assert time.monotonic() - began < DEADLINE_S + 0.5
    assert caught.value.cause is cause
    line = str(caught.value)
    assert server.host in line or "127.0.0.1" in line
    assert "\n" not in line
    # Once healed, the same backend serves again.
    server.heal()
    server.stopping.set()
    assert read(backend, blob, OFFSET, LENGTH) == WANTED


def test_corruption_passes_through(server: FaultyServer, make) -> None:
    """The backend knows no digests: the engine, which has them, must see what was sent."""
    blob = server.add(DATA)
    server.inject("corrupt", at_bytes=5)
    got = read(make(), blob, 0, 1000)
    assert got != DATA[:1000]
    assert hashlib.sha256(got[:5] + DATA[5:6] + got[6:]).digest() == hashlib.sha256(DATA[:1000]).digest()


def test_resumes_from_the_last_good_byte(server: FaultyServer, make) -> None:
    blob = server.add(DATA)
    for at_bytes in (300_000, 200_000):
        server.inject("truncate", at_bytes=at_bytes)
    assert read(make(), blob, OFFSET, LENGTH) == WANTED
    starts = [first for first, _ in server.ranges(blob)]
    assert starts == [OFFSET, OFFSET + 300_000, OFFSET + 500_000]


def test_many_cuts_are_survived_while_bytes_arrive(server: FaultyServer, make) -> None:
    blob = server.add(DATA)
    server.inject("truncate", at_bytes=256 << 10, times=-1)
    data = server.blobs[blob] = DATA * 3
    assert read(make(), blob, 0, len(data)) == data


def test_one_read_is_one_attempt(server: FaultyServer, make) -> None:
    """What is to be waited for is the caller's: the fetch threads have other work meanwhile."""
    blob = server.add(DATA)
    server.inject("status", status=503, headers={"Retry-After": "9"}, times=-1)
    with pytest.raises(RetriableFailure, match="503") as caught:
        list(make().read_range(blob, 0, 10))
    assert caught.value.after_s == 9
    assert len(server.requests) == 1


def test_stale_connection_is_replaced_at_once(server: FaultyServer, make) -> None:
    blob = server.add(DATA)
    server.inject("reset", times=1)
    assert b"".join(map(bytes, make().read_range(blob, 0, 10))) == DATA[:10]
    server.inject("reset", times=2)
    with pytest.raises(RetriableFailure):
        list(make().read_range(blob, 0, 10))


def test_attempts_of_a_patient_reader(server: FaultyServer, make) -> None:
    blob = server.add(DATA)
    server.inject("status", status=503, times=-1)
    with pytest.raises(Failure, match="gave up after 4 attempts"):
        read(make(), blob, 0, 10)
    assert len(server.requests) == 4


def test_deadline_beats_the_time_limits(server: FaultyServer, make) -> None:
    blob = server.add(DATA)
    server.inject("delay", seconds=30, times=-1)
    began = time.monotonic()
    with pytest.raises(Failure) as caught:
        read(make(timeout=30, connect_timeout=30), blob, 0, 10, deadline=began + 0.3)
    assert time.monotonic() - began < 1.0
    assert caught.value.cause is Cause.NETWORK


def test_the_deadline_ends_a_wait_within_the_body(server: FaultyServer, make) -> None:
    """Pieces at 0, 1.2 and 2.4 s: the wait for the third is cut short, though no single wait is long."""
    blob = server.add(DATA)
    server.inject("trickle", at_bytes=100, seconds=1.2, times=-1)
    began = time.monotonic()
    with pytest.raises(Failure) as caught:
        read(make(timeout=30), blob, 0, 1000, deadline=began + 1.5)
    assert time.monotonic() - began < 2.2
    assert caught.value.cause is Cause.NETWORK


def test_deadline_in_the_past_sends_nothing(server: FaultyServer, make) -> None:
    blob = server.add(DATA)
    with pytest.raises(Failure) as caught:
        read(make(), blob, 0, 10, deadline=time.monotonic() - 1)
    assert caught.value.cause is Cause.NETWORK
    assert server.requests == []


def test_retry_after_is_heeded_within_the_deadline(server: FaultyServer, make) -> None:
    blob = server.add(DATA)
    server.inject("status", status=429, headers={"Retry-After": "20"})
    began = time.monotonic()
    with pytest.raises(Failure, match="no time left") as caught:
        read(make(), blob, 0, 10, deadline=began + 2)
    assert caught.value.cause is Cause.NETWORK
    assert time.monotonic() - began < 1


def test_close_ends_waits(server: FaultyServer, make) -> None:
    import threading

    blob = server.add(DATA)
    server.inject("status", status=429, headers={"Retry-After": "25"}, times=-1)
    backend = make()
    caught: list[Failure] = []

    def run() -> None:
        try:
            read(backend, blob, 0, 10)
        except Failure as failure:
            caught.append(failure)

    thread = threading.Thread(target=run)
    thread.start()
    deadline = time.monotonic() + 5
    while not server.requests and time.monotonic() < deadline:
        time.sleep(0.01)
    backend.close()
    thread.join(5)
    assert not thread.is_alive()
    assert caught[0].cause is Cause.NETWORK


def test_read_past_the_end_says_so(server: FaultyServer, make) -> None:
    blob = server.add(DATA)
    for offset, length in ((len(DATA) - 5, 10), (len(DATA) + 5, 1)):
        with pytest.raises(Failure, match=f"has {len(DATA)} bytes") as caught:
            read(make(), blob, offset, length)
        assert caught.value.cause is Cause.FORMAT


def test_whole_blob_without_range_support(server: FaultyServer, make) -> None:
    blob = server.add(DATA)
    server.inject("ignore_range", times=-1)
    assert read(make(), blob, 0, len(DATA)) == DATA


def test_a_dead_registry_is_found_out_by_all_at_once(server: FaultyServer, make) -> None:
    """The first request is alone on its way, for the login's sake; those behind it do not queue up one by one."""
    import threading

    blob = server.add(DATA)
    server.inject("delay", seconds=60, times=-1)
    backend = make(timeout=0.5, retry_limit=1)
    began = time.monotonic()

    def run() -> None:
        with pytest.raises(Failure) as caught:
            read(backend, blob, 0, 10)
        assert caught.value.cause is Cause.NETWORK

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    # two attempts, after one of the first
    assert time.monotonic() - began < 3.5
