"""What live migration and a restart of the server need: the dirty log and the in-flight region."""

import mmap
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.fakeguest.support import FILES, BackgroundLoad, Load, pattern
from virtiofsd_nydus.fakeguest import frontend as vhost
from virtiofsd_nydus.fakeguest.fakeguest import FakeGuest
from virtiofsd_nydus.fakeguest.frontend import VRING_ADDR, Request
from virtiofsd_nydus.fakeguest.fuse_client import GETATTR, pack_request
from virtiofsd_nydus.vmm.servers import NydusDaemon

PAGE = 4096
LOG_ALL = 1 << 26
LOG = struct.Struct("=QQ")
INFLIGHT_REGION = struct.Struct("=QHHHH")  # features, version, descriptors, last batch head, used index
GETATTR_ROOT = pack_request(GETATTR, 2, 1, bytes(16))


@contextmanager
def memory_file(size: int) -> Iterator[int]:
    fd = os.memfd_create("log", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, size)
        yield fd
    finally:
        os.close(fd)


def memory_end(guest: FakeGuest) -> int:
    return max(region.gpa + region.size_bytes for region in guest.memory.regions)


def start_logging(guest: FakeGuest, fd: int, size: int, offset: int = 0) -> None:
    """What QEMU does when migration begins, rings running: the log, the feature, ring addresses with the log flag."""
    guest.front.send(Request.SET_LOG_BASE, LOG.pack(size, offset), [fd])
    guest.front.receive(Request.SET_LOG_BASE)
    guest.front.command(Request.SET_FEATURES, vhost.U64.pack(guest.features | LOG_ALL), (), guest.acks)
    at = guest.memory.user_address
    for queue in guest.queues:
        addresses = VRING_ADDR.pack(
            queue.index, 1, at(queue.desc_gpa), at(queue.used_gpa), at(queue.avail_gpa), queue.used_gpa
        )
        guest.front.command(Request.SET_VRING_ADDR, addresses, (), guest.acks)


def marked_pages(fd: int, size: int) -> set[int]:
    bits = os.pread(fd, size, 0)
    return {i * 8 + bit for i, byte in enumerate(bits) if byte for bit in range(8) if byte & 1 << bit}


def test_every_write_to_the_guest_is_logged(daemon: NydusDaemon) -> None:
    """Pages of replies and of the used ring are marked, those of requests and of other rings are not."""
    with FakeGuest(daemon.socket_path, slot_count=2) as guest:
        guest.fuse.init()
        assert guest.front.get_u64(Request.GET_FEATURES) & LOG_ALL
        size = memory_end(guest) // PAGE // 8 + 1
        with memory_file(PAGE * 8) as fd:
            start_logging(guest, fd, size)
            guest.memory.write(guest.scratch_gpa, GETATTR_ROOT)
            queue = guest.queues[1]
            out = guest.scratch_gpa + 16 * PAGE - 60  # a reply over a page's end
            queue.add([(guest.scratch_gpa, 56, False), (out, 120, True)])
            queue.publish()
            assert queue.pop() == 120
            written = {out // PAGE, out // PAGE + 1, queue.used_gpa // PAGE}
            assert written <= marked_pages(fd, size) <= written | {each.used_gpa // PAGE for each in guest.queues}
            node = guest.fuse.walk("data").nodeid
            before = {
                i: guest.memory.read(i * PAGE, PAGE) for i in range(queue.slot_gpa // PAGE, queue.slot_gpa // PAGE + 44)
            }
            guest.fuse.read(node, 0, 131072)
            changed = {i for i, page in before.items() if guest.memory.read(i * PAGE, PAGE) != page}
            assert len(changed) >= 32
            data = {page for page in changed if (page * PAGE - queue.slot_gpa) >= 0x6000}
            assert data <= marked_pages(fd, size)


def test_logging_begins_and_ends_under_load(guest: FakeGuest) -> None:
    size = memory_end(guest) // PAGE // 8 + 1
    with memory_file(PAGE * 8) as fd, BackgroundLoad(guest.queues[1], Load(guest, depth=4)) as load:
        for _ in range(10):
            start_logging(guest, fd, size)
            load.wait_progress(10)
            assert guest.queues[1].used_gpa // PAGE in marked_pages(fd, size)
            guest.front.command(Request.SET_FEATURES, vhost.U64.pack(guest.features), (), guest.acks)
            load.wait_progress(10)


@pytest.mark.parametrize(
    ("size", "offset", "file_size"),
    [
        (1, 0, PAGE),
        (0, 0, PAGE),
        (PAGE * 2, 0, PAGE),
        (PAGE, PAGE, PAGE),
        (PAGE, (1 << 64) - PAGE, PAGE),
        ((1 << 64) - 1, 0, PAGE),
        (PAGE, 100, 2 * PAGE),
    ],
)
def test_log_that_does_not_fit(daemon: NydusDaemon, size: int, offset: int, file_size: int) -> None:
    """Too small for memory, larger than its file, wrapping: refused, or pages beyond it are left out."""
    guest = FakeGuest(daemon.socket_path)
    try:
        guest.connect()
        guest.start()
        guest.fuse.init()
        with memory_file(file_size) as fd:
            try:
                start_logging(guest, fd, size, offset)
            except (vhost.HungUp, vhost.Refused):
                return
            assert guest.fuse.read_file("odd") == pattern(FILES["odd"][1], FILES["odd"][0])
    finally:
        guest.close()


def test_log_truncated_under_the_daemon(daemon: NydusDaemon) -> None:
    guest = FakeGuest(daemon.socket_path)
    try:
        guest.connect()
        guest.start()
        guest.fuse.init()
        guest.queues[1].timeout_ms = 200
        with memory_file(PAGE * 8) as fd:
            start_logging(guest, fd, memory_end(guest) // PAGE // 8 + 1)
            os.ftruncate(fd, 0)
            try:
                guest.fuse.getattr(1)
            except (OSError, RuntimeError):
                pass
    finally:
        guest.close()


def get_inflight(guest: FakeGuest) -> tuple[bytes, int]:
    """Asks the back-end for a region: its description and descriptor."""
    size = guest.queues[1].size
    guest.front.send(Request.GET_INFLIGHT_FD, vhost.INFLIGHT.pack(0, 0, len(guest.queues), size))
    body, fds = guest.front.receive(Request.GET_INFLIGHT_FD)
    assert len(fds) == 1
    return body, fds[0]


def test_inflight_region_follows_the_ring(daemon: NydusDaemon) -> None:
    guest = FakeGuest(daemon.socket_path, queue_size=128)
    try:
        guest.connect()
        body, fd = get_inflight(guest)
        size, offset, queues, entries = vhost.INFLIGHT.unpack_from(body)
        assert (queues, entries) == (2, 128) and size >= 2 * (16 + 128 * 16)
        assert os.fstat(fd).st_size >= offset + size
        guest.front.command(Request.SET_INFLIGHT_FD, body, [fd], guest.acks)
        guest.start()
        guest.fuse.init()
        for _ in range(3):
            assert guest.fuse.read_file("odd") == pattern(FILES["odd"][1], FILES["odd"][0])
            with mmap.mmap(fd, size + offset) as region:
                at = offset + (16 + 128 * 16 + 63) // 64 * 64
                _, version, count, _, used = INFLIGHT_REGION.unpack_from(region, at)
                assert (version, count, used) == (1, 128, guest.queues[1].used_index())
                assert not any(region[at + 16 + 16 * i] for i in range(128))
        os.close(fd)
    finally:
        guest.close()


@pytest.mark.parametrize("fill", [b"\0", b"\1", b"\xff"], ids=["blank", "ones", "all bits"])
@pytest.mark.parametrize("shrink", [False, True])
def test_inflight_region_of_nonsense(daemon: NydusDaemon, fill: bytes, shrink: bool) -> None:
    """Whatever stands in it, and however short it is: refused or used with care."""
    guest = FakeGuest(daemon.socket_path, queue_size=128)
    try:
        guest.connect()
        guest.queues[1].timeout_ms = 200
        with memory_file(2 * PAGE) as fd:
            os.pwrite(fd, fill * (2 * PAGE), 0)
            payload = vhost.INFLIGHT.pack(2 * PAGE, 0, 2, 128)
            try:
                guest.front.command(Request.SET_INFLIGHT_FD, payload, [fd], guest.acks)
                if shrink:
                    os.ftruncate(fd, 0)
                guest.start()
                guest.fuse.init()
                guest.fuse.getattr(1)
            except (vhost.HungUp, vhost.Refused, OSError, RuntimeError):
                pass
    finally:
        guest.close()
