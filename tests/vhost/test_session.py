"""Each vhost-user request, well-formed and not: its reply to the byte, the state it leaves, what a fault costs."""

import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.vhost.conftest import QUEUES, Backend
from virtiofsd_nydus.errors import Cause
from virtiofsd_nydus.fakeguest.frontend import HungUp
from virtiofsd_nydus.vhost import messages as m

PAGE = 4096
MEMORY_BYTES = 1 << 20
USER = 0x7F00_0000_0000
F_VERSION_1, F_EVENT_IDX, F_INDIRECT = 1 << 32, 1 << 29, 1 << 28
FEATURES = F_VERSION_1 | F_EVENT_IDX | F_INDIRECT | m.F_LOG_ALL | m.F_PROTOCOL_FEATURES
REQUESTS = [value for name, value in vars(m).items() if name.startswith(("GET_", "SET_", "ADD_", "REM_", "RESET_"))]


def u64(value: int) -> bytes:
    return m.U64.pack(value)


def region(gpa: int = 0, size: int = MEMORY_BYTES, user: int = USER, offset: int = 0) -> bytes:
    return m.SINGLE_REGION.pack(0, gpa, size, user, offset)


def ask(backend: Backend, request: int, payload: bytes = b"", fds: tuple[int, ...] = ()) -> bytes:
    backend.front.send(request, payload, fds)
    body, got = backend.front.receive(request)
    assert not got
    return body


def acked(backend: Backend, request: int, payload: bytes = b"", fds: tuple[int, ...] = ()) -> bool:
    """Sends with NEED_REPLY: whether it was taken."""
    backend.front.send(request, payload, fds, m.VERSION | m.NEED_REPLY)
    body, got = backend.front.receive(request)
    assert not got
    value: int = m.U64.unpack(body)[0]
    return value == 0


def silent(backend: Backend, request: int, payload: bytes = b"", fds: tuple[int, ...] = ()) -> None:
    """Sends without NEED_REPLY: the next reply is the next question's."""
    backend.front.send(request, payload, fds)
    assert ask(backend, m.GET_QUEUE_NUM) == u64(QUEUES)


def fatal(
    backend: Backend, request: int, payload: bytes = b"", fds: tuple[int, ...] = (), flags: int = m.VERSION
) -> str:
    """Sends; the connection ends with one line."""
    backend.front.send(request, payload, fds, flags)
    with pytest.raises(HungUp):
        backend.front.receive(request)
    failure = backend.end()
    assert failure is not None and failure.cause == Cause.FORMAT
    assert "\n" not in str(failure)
    return str(failure)


@pytest.fixture
def memory() -> Iterator[int]:
    fd = os.memfd_create("memory", os.MFD_CLOEXEC)
    os.ftruncate(fd, MEMORY_BYTES)
    yield fd
    os.close(fd)


@pytest.fixture
def event() -> Iterator[int]:
    fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    yield fd
    os.close(fd)


@pytest.fixture
def ready(backend: Backend, memory: int) -> Backend:
    """Negotiated, with memory and ring 1 set up at its start, neither kicked nor enabled."""
    silent(backend, m.SET_PROTOCOL_FEATURES, u64(m.PROTOCOL_FEATURES))
    silent(backend, m.SET_FEATURES, u64(FEATURES & ~m.F_LOG_ALL))
    assert acked(backend, m.ADD_MEM_REG, region(), (memory,))
    silent(backend, m.SET_VRING_NUM, m.VRING_STATE.pack(1, 16))
    silent(backend, m.SET_VRING_ADDR, m.VRING_ADDR.pack(1, 0, USER, USER + 2 * PAGE, USER + PAGE, 0))
    return backend


# ---- negotiation
def test_features(backend: Backend) -> None:
    assert ask(backend, m.GET_FEATURES) == u64(FEATURES)
    assert ask(backend, m.GET_PROTOCOL_FEATURES) == u64(0xB42B)
    silent(backend, m.SET_OWNER)
    silent(backend, m.SET_FEATURES, u64(FEATURES))
    assert backend.session.state.features == FEATURES
    assert ask(backend, m.GET_MAX_MEM_SLOTS) == u64(509)


def test_ack_only_when_negotiated_and_asked_for(backend: Backend) -> None:
    backend.front.send(m.SET_OWNER, b"", (), m.VERSION | m.NEED_REPLY)  # not negotiated: silence
    assert ask(backend, m.GET_QUEUE_NUM) == u64(QUEUES)
    silent(backend, m.SET_PROTOCOL_FEATURES, u64(m.P_REPLY_ACK))
    silent(backend, m.SET_OWNER)
    assert acked(backend, m.SET_OWNER)
    # A request with an answer of its own gets that one only.
    backend.front.send(m.GET_FEATURES, b"", (), m.VERSION | m.NEED_REPLY)
    assert backend.front.receive(m.GET_FEATURES)[0] == u64(FEATURES)
    assert ask(backend, m.GET_QUEUE_NUM) == u64(QUEUES)


@pytest.mark.parametrize("request_id", [m.SET_FEATURES, m.SET_PROTOCOL_FEATURES])
def test_features_never_offered(backend: Backend, request_id: int) -> None:
    silent(backend, m.SET_PROTOCOL_FEATURES, u64(m.P_REPLY_ACK))
    assert not acked(backend, request_id, u64(1 << 50))
    assert backend.said
    assert "never offered" in fatal(backend, request_id, u64(1 << 50))


def test_rings_enabled_without_the_protocol_bit(backend: Backend) -> None:
    silent(backend, m.SET_FEATURES, u64(F_VERSION_1))
    assert all(ring.enabled for ring in backend.session.state.rings)


# ---- memory
def test_regions_come_and_go(ready: Backend, memory: int) -> None:
    assert not acked(ready, m.ADD_MEM_REG, region(user=USER * 2), (memory,))  # overlaps in the guest
    assert not acked(ready, m.ADD_MEM_REG, region(gpa=MEMORY_BYTES), (memory,))  # in the front-end
    assert not acked(ready, m.ADD_MEM_REG, region(MEMORY_BYTES, PAGE, USER * 2, MEMORY_BYTES), (memory,))
    assert len(ready.session.state.regions) == 1
    assert acked(ready, m.ADD_MEM_REG, region(MEMORY_BYTES, PAGE, USER * 2, 8 * PAGE), (memory,))
    assert len(ready.session.state.regions) == 2
    assert not acked(ready, m.REM_MEM_REG, region(MEMORY_BYTES, PAGE, USER, 0))
    assert acked(ready, m.REM_MEM_REG, region(MEMORY_BYTES, PAGE, USER * 2, 12345), (memory,))  # offset: whatever
    assert [r.gpa for r in ready.session.state.regions] == [0]
    assert ready.failure is None


def test_table_replaces_all(ready: Backend, memory: int) -> None:
    table = struct.pack("=II", 2, 0) + m.REGION.pack(0, PAGE, USER, 0) + m.REGION.pack(PAGE, PAGE, USER * 2, PAGE)
    assert acked(ready, m.SET_MEM_TABLE, table, (memory, memory))
    assert [r.user_addr for r in ready.session.state.regions] == [USER, USER * 2]
    bad = struct.pack("=II", 1, 0) + m.REGION.pack(0, 1 << 40, USER, 0)
    assert not acked(ready, m.SET_MEM_TABLE, bad, (memory,))
    assert len(ready.session.state.regions) == 2
    # Without an acknowledgement the front-end would believe it: the end.
    assert "file" in fatal(ready, m.SET_MEM_TABLE, bad, (memory,))


def count_descriptors(of: os.stat_result) -> int:
    """How many of this process lead to that file. All of them cannot be counted: other tests' threads may still be
    closing theirs."""
    found = 0
    for entry in Path("/proc/self/fd").iterdir():
        try:
            there = entry.stat()
        except OSError:
            continue
        found += (there.st_dev, there.st_ino) == (of.st_dev, of.st_ino)
    return found


def test_no_descriptor_is_kept(backend: Backend, memory: int) -> None:
    file, sock = os.fstat(memory), os.fstat(backend.session_fd)
    silent(backend, m.SET_PROTOCOL_FEATURES, u64(m.P_REPLY_ACK))
    assert (count_descriptors(file), count_descriptors(sock)) == (1, 1)
    for _ in range(3):
        assert acked(backend, m.ADD_MEM_REG, region(), (memory,))
        assert acked(backend, m.REM_MEM_REG, region())
        assert not acked(backend, m.ADD_MEM_REG, region(size=1 << 40), (memory,))
    assert count_descriptors(file) == 1
    fatal(backend, m.SET_OWNER, b"", (memory, memory))
    backend.session.close()
    assert (count_descriptors(file), count_descriptors(sock)) == (1, 0)


# ---- rings
def test_ring_starts_and_stops(ready: Backend, event: int) -> None:
    silent(ready, m.SET_VRING_BASE, m.VRING_STATE.pack(1, 7))
    silent(ready, m.SET_VRING_ERR, u64(1), (event,))
    assert acked(ready, m.SET_VRING_KICK, u64(1), (event,))
    assert acked(ready, m.SET_VRING_ENABLE, m.VRING_STATE.pack(1, 0))
    assert ask(ready, m.GET_VRING_BASE, m.VRING_STATE.pack(1, 0)) == m.VRING_STATE.pack(1, 7)
    assert not ready.session.state.rings[1].started
    assert ask(ready, m.GET_VRING_BASE, m.VRING_STATE.pack(0, 0)) == m.VRING_STATE.pack(0, 0)


def test_call_is_signalled_after_a_swap(ready: Backend, event: int) -> None:
    kick = os.eventfd(0)
    assert acked(ready, m.SET_VRING_CALL, u64(1), (event,))
    with pytest.raises(BlockingIOError):
        os.eventfd_read(event)  # nothing runs yet
    assert acked(ready, m.SET_VRING_KICK, u64(1), (kick,))
    assert acked(ready, m.SET_VRING_CALL, u64(1), (event,))
    assert os.eventfd_read(event) == 1
    assert acked(ready, m.SET_VRING_CALL, u64(1 | m.VRING_NO_FD))
    assert ready.session.state.rings[1].call_fd == -1
    os.close(kick)


@pytest.mark.parametrize("what", ["size", "place", "alignment"])
def test_ring_that_cannot_start_costs_the_ring_only(ready: Backend, event: int, what: str) -> None:
    err = os.eventfd(0, os.EFD_NONBLOCK)
    silent(ready, m.SET_VRING_ERR, u64(1), (err,))
    if what == "size":
        silent(ready, m.SET_VRING_NUM, m.VRING_STATE.pack(1, 12))
    else:
        desc = USER + MEMORY_BYTES if what == "place" else USER + 8
        silent(ready, m.SET_VRING_ADDR, m.VRING_ADDR.pack(1, 0, desc, USER + 2 * PAGE, USER + PAGE, 0))
    silent(ready, m.SET_VRING_KICK, u64(1), (event,))
    assert os.eventfd_read(err) == 1
    assert any("ring 1" in line for line in ready.said)
    assert not acked(ready, m.SET_VRING_KICK, u64(1), (event,))
    assert ask(ready, m.GET_VRING_BASE, m.VRING_STATE.pack(1, 0))
    os.close(err)


def test_base_out_of_place(ready: Backend, event: int) -> None:
    assert not acked(ready, m.SET_VRING_BASE, m.VRING_STATE.pack(1, 65536))
    assert acked(ready, m.SET_VRING_KICK, u64(1), (event,))
    assert not acked(ready, m.SET_VRING_BASE, m.VRING_STATE.pack(1, 3))


@pytest.mark.parametrize("request_id", [m.SET_VRING_NUM, m.SET_VRING_BASE, m.SET_VRING_ENABLE])
def test_ring_that_is_none(ready: Backend, request_id: int) -> None:
    assert not acked(ready, request_id, m.VRING_STATE.pack(QUEUES, 1))
    assert f"ring {QUEUES}" in fatal(ready, request_id, m.VRING_STATE.pack(QUEUES, 1))


def test_base_of_a_ring_that_is_none_has_no_answer(ready: Backend) -> None:
    fatal(ready, m.GET_VRING_BASE, m.VRING_STATE.pack(99, 0), (), m.VERSION | m.NEED_REPLY)


def test_reset(ready: Backend, event: int) -> None:
    assert acked(ready, m.SET_VRING_KICK, u64(1), (event,))
    assert acked(ready, m.SET_VRING_ENABLE, m.VRING_STATE.pack(1, 1))
    assert acked(ready, m.RESET_OWNER)
    assert not ready.session.state.rings[1].enabled and ready.session.state.rings[1].started
    assert acked(ready, m.RESET_DEVICE)
    assert not ready.session.state.is_running()
    assert acked(ready, m.SET_VRING_KICK, u64(1), (event,))


# ---- recovery, migration, reverse channel
@pytest.mark.parametrize("size", [20, 24])
def test_inflight_region(ready: Backend, event: int, size: int) -> None:
    wanted = m.INFLIGHT.pack(0, 0, QUEUES, 16).ljust(size, b"\0")
    ready.front.send(m.GET_INFLIGHT_FD, wanted)
    body, fds = ready.front.receive(m.GET_INFLIGHT_FD)
    bytes_, offset, queues, entries = m.INFLIGHT.unpack_from(body)
    assert (len(body), offset, queues, entries) == (size, 0, QUEUES, 16)
    assert bytes_ == os.fstat(fds[0]).st_size == QUEUES * 320 + 256
    assert acked(ready, m.SET_INFLIGHT_FD, body, (fds[0],))
    assert acked(ready, m.SET_VRING_KICK, u64(1), (event,))
    # features, version, entries: the ring took possession of its own part, and of no other
    assert os.pread(fds[0], 12, 320)[8:] == struct.pack("=HH", 1, 16)
    assert os.pread(fds[0], 12, 0)[8:] == bytes(4)
    assert not acked(ready, m.SET_INFLIGHT_FD, body, (fds[0],))  # not while it runs
    os.close(fds[0])


def test_inflight_region_refused(ready: Backend, memory: int) -> None:
    for queues, entries, size in (
        (0, 16, PAGE),
        (QUEUES, 0, PAGE),
        (QUEUES, 4096, 1 << 20),
        (QUEUES, 64, 64),
        (QUEUES, 16, 1 << 40),
    ):
        assert not acked(ready, m.SET_INFLIGHT_FD, m.INFLIGHT.pack(size, 0, queues, entries), (memory,))
    fatal(ready, m.GET_INFLIGHT_FD, m.INFLIGHT.pack(0, 0, 0, 16), (), m.VERSION | m.NEED_REPLY)


def test_dirty_log(ready: Backend, event: int) -> None:
    log = os.memfd_create("log", os.MFD_CLOEXEC)
    os.ftruncate(log, PAGE)
    assert ask(ready, m.SET_LOG_BASE, m.LOG.pack(MEMORY_BYTES // PAGE // 8, 0), (log,)) == u64(0)
    assert acked(ready, m.SET_FEATURES, u64(FEATURES))
    assert acked(ready, m.SET_VRING_ADDR, m.VRING_ADDR.pack(1, 1, USER, USER + 2 * PAGE, USER + PAGE, 2 * PAGE))
    assert acked(ready, m.SET_VRING_KICK, u64(1), (event,))
    assert acked(ready, m.SET_VRING_ENABLE, m.VRING_STATE.pack(1, 1))
    assert acked(ready, m.SET_VRING_ENABLE, m.VRING_STATE.pack(1, 0))  # the queue has slept: avail_event written
    assert os.pread(log, 1, 0) == b"\x04"
    assert "dirty log" in fatal(ready, m.SET_LOG_BASE, m.LOG.pack(1 << 30, 0), (log,))
    os.close(log)


def test_reverse_channel_is_kept_open(backend: Backend) -> None:
    read, write = os.pipe()
    silent(backend, m.SET_BACKEND_REQ_FD, b"", (write,))
    silent(backend, m.SET_BACKEND_REQ_FD, b"", (write,))
    os.close(write)
    os.set_blocking(read, False)
    with pytest.raises(BlockingIOError):
        os.read(read, 1)  # still open at the other end
    backend.close()
    assert os.read(read, 1) == b""
    os.close(read)


def test_in_the_order_of_cloud_hypervisor(backend: Backend, memory: int, event: int) -> None:
    """Acknowledgements for everything, a memory table, an in-flight region before the addresses, pause by ENABLE 0."""
    silent(backend, m.SET_OWNER)
    assert ask(backend, m.GET_FEATURES) == u64(FEATURES)
    wanted = m.P_MQ | m.P_REPLY_ACK | m.P_INFLIGHT_SHMFD | m.P_CONFIGURE_MEM_SLOTS
    silent(backend, m.SET_PROTOCOL_FEATURES, u64(wanted))
    assert ask(backend, m.GET_QUEUE_NUM) == u64(QUEUES)
    assert acked(backend, m.SET_FEATURES, u64(FEATURES & ~m.F_LOG_ALL))
    table = struct.pack("=II", 1, 0) + m.REGION.pack(0, MEMORY_BYTES, USER, 0)
    assert acked(backend, m.SET_MEM_TABLE, table, (memory,))
    for ring in range(2):
        assert acked(backend, m.SET_VRING_NUM, m.VRING_STATE.pack(ring, 16))
    backend.front.send(m.GET_INFLIGHT_FD, m.INFLIGHT.pack(0, 0, 2, 16), (), m.VERSION | m.NEED_REPLY)
    body, fds = backend.front.receive(m.GET_INFLIGHT_FD)
    assert acked(backend, m.SET_INFLIGHT_FD, body, (fds[0],))
    for ring in range(2):
        at = USER + ring * 4 * PAGE
        assert acked(backend, m.SET_VRING_ADDR, m.VRING_ADDR.pack(ring, 0, at, at + 2 * PAGE, at + PAGE, 0))
        assert acked(backend, m.SET_VRING_BASE, m.VRING_STATE.pack(ring, 0))
        assert acked(backend, m.SET_VRING_CALL, u64(ring), (event,))
        assert acked(backend, m.SET_VRING_KICK, u64(ring), (event,))
    for enable in (1, 0, 1):
        for ring in range(2):
            assert acked(backend, m.SET_VRING_ENABLE, m.VRING_STATE.pack(ring, enable))
    assert all(ring.started and ring.enabled for ring in backend.session.state.rings[:2])
    os.close(fds[0])
    assert not backend.said


# ---- what is no message
@pytest.mark.parametrize("request_id", [0, 5000])
def test_unknown_request(ready: Backend, request_id: int) -> None:
    assert not acked(ready, request_id, b"12345678")
    assert "not known" in fatal(ready, request_id)


@pytest.mark.parametrize("request_id", REQUESTS)
@pytest.mark.parametrize("size", [1, 7, 39])
def test_wrong_size(ready: Backend, request_id: int, size: int) -> None:
    """Requests without a payload take any, all others theirs only."""
    empty = {
        m.GET_FEATURES,
        m.SET_OWNER,
        m.RESET_OWNER,
        m.GET_PROTOCOL_FEATURES,
        m.GET_QUEUE_NUM,
        m.RESET_DEVICE,
        m.GET_MAX_MEM_SLOTS,
    }
    if request_id in empty or request_id == m.SET_LOG_FD:
        ready.front.send(request_id, bytes(size), (), m.VERSION | m.NEED_REPLY)
        ready.front.receive(request_id)
    else:
        fatal(ready, request_id, bytes(size), (), m.VERSION | m.NEED_REPLY)


@pytest.mark.parametrize(
    ("request_id", "payload", "count"),
    [
        (m.ADD_MEM_REG, region(), 0),
        (m.ADD_MEM_REG, region(), 2),
        (m.SET_MEM_TABLE, struct.pack("=II", 0, 0), 1),
        (m.SET_VRING_KICK, u64(1), 0),
        (m.SET_VRING_CALL, u64(1), 2),
        (m.SET_LOG_BASE, m.LOG.pack(8, 0), 0),
        (m.SET_INFLIGHT_FD, m.INFLIGHT.pack(8, 0, 1, 1), 0),
        (m.GET_FEATURES, b"", 1),
        (m.SET_OWNER, b"", 33),
    ],
)
def test_wrong_descriptors(ready: Backend, memory: int, request_id: int, payload: bytes, count: int) -> None:
    assert "descriptor" in fatal(ready, request_id, payload, (memory,) * count, m.VERSION | m.NEED_REPLY)


def test_hang_up_is_no_failure(ready: Backend) -> None:
    assert ready.end() is None


@pytest.mark.parametrize("part", [b"\1", m.HEADER.pack(m.SET_FEATURES, m.VERSION, 8), m.HEADER.pack(1, 1, 8) + b"x"])
def test_hang_up_in_a_message(ready: Backend, part: bytes) -> None:
    ready.front.send_raw(part)
    assert "hung up" in str(ready.end())
