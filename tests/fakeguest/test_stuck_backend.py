"""Reads that wait for a registry that does not answer: nothing else waits, and every way to end is bounded."""

import contextlib
import json
import os
import select
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from virtiofsd_nydus._fakeguest import ffi, lib

from tests.fakeguest.support import Image, assert_alive, build_image, open_fds, pattern, wait_until
from tests.peers.gate import GateRegistry
from virtiofsd_nydus.fakeguest import frontend as vhost
from virtiofsd_nydus.fakeguest.fakeguest import FakeGuest, NoAnswer
from virtiofsd_nydus.fakeguest.frontend import Request
from virtiofsd_nydus.fakeguest.fuse_client import GETATTR, INIT, INIT_IN, OUT_HEADER, READ, READ_IN, pack_request
from virtiofsd_nydus.vmm.servers import NydusDaemon

WARM = (21, 65536)  # seed, size
COLD = (22, 24 << 20)  # far larger than what is fetched around a wanted chunk at first
BLOCK = 65536
STOP_MOST_S = 2.0  # the drain is bounded by 200 ms; the rest is this machine
DEADLINE_MS = 1500


@dataclass
class Stuck:
    gate: GateRegistry
    daemon: NydusDaemon
    guest: FakeGuest
    node: int

    def submit_cold(self, slot: int = 0, at: int = 20 << 20) -> None:
        request = pack_request(READ, 2 + 2 * slot, self.node, READ_IN.pack(0, at, BLOCK, 0, 0, 0, 0))
        self.guest.queues[1].submit(request, 0, BLOCK, slot)

    def assert_cold(self, reply: bytes, at: int = 20 << 20) -> None:
        assert OUT_HEADER.unpack_from(reply)[:2] == (16 + BLOCK, 0)
        assert reply[16:] == cold_bytes(at)

    def park(self) -> None:
        """Closes the gate and leaves one read waiting behind it."""
        self.gate.close()
        self.submit_cold()
        self.gate.wait_asked()


def cold_bytes(at: int) -> bytes:
    buffer = ffi.new("uint8_t[]", BLOCK)
    lib.fg_pattern_fill(buffer, BLOCK, at, COLD[0])
    return bytes(ffi.buffer(buffer, BLOCK))


@pytest.fixture(scope="module")
def cold_image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    base = tmp_path_factory.mktemp("cold")
    (base / "tree").mkdir()
    (base / "tree" / "warm").write_bytes(pattern(WARM[1], WARM[0]))
    (base / "tree" / "data").write_bytes(pattern(COLD[1], COLD[0]))
    return build_image(base / "tree", base / "out")


@pytest.fixture
def start(cold_image: Image, tmp_path: Path) -> Iterator[Callable[..., Stuck]]:
    """Starts a daemon on a gate; its guest has mounted and read "warm"."""
    guests: list[FakeGuest] = []
    with GateRegistry(cold_image.blob_dir) as gate:
        config = {
            "version": 2,
            "id": "stuck",
            "cache": {"type": "blobcache", "filecache": {"work_dir": str(tmp_path)}},
            "backend": {"type": "registry", "registry": {"scheme": "http", "host": gate.host, "repo": "stuck"}},
        }
        (tmp_path / "config.json").write_text(json.dumps(config))
        options = ["--bootstrap", str(cold_image.bootstrap), "--config", str(tmp_path / "config.json")]
        daemon: NydusDaemon | None = None

        def begin(deadline_ms: int = 0) -> Stuck:
            nonlocal daemon
            extra = ["--read-deadline-ms", str(deadline_ms)] if deadline_ms else []
            daemon = NydusDaemon([*options, *extra])
            daemon.__enter__()
            guest = FakeGuest(daemon.socket_path, slot_count=16)
            guests.append(guest)
            guest.connect()
            guest.start()
            guest.fuse.init()
            for _ in range(10):  # the first fetch waits for late imports, on a slow machine past a deadline
                with contextlib.suppress(OSError):
                    guest.fuse.read_file("warm")
                    break
            assert guest.fuse.read_file("warm") == pattern(WARM[1], WARM[0])
            return Stuck(gate, daemon, guest, guest.fuse.walk("data").nodeid)

        try:
            yield begin
            assert daemon is not None
            assert_alive(daemon)
        finally:
            gate.open()
            for guest in guests:
                guest.close()
            if daemon is not None:
                daemon.__exit__(None, None, None)


def test_cold_read_delays_no_warm_one(start: Callable[..., Stuck]) -> None:
    stuck = start()
    stuck.park()
    begin, queue = time.monotonic(), stuck.guest.queues[1]
    for _ in range(50):
        queue.submit(pack_request(GETATTR, 4, 1, bytes(16)), 104, 0, 1)
        assert queue.reap(2000)[0] == 1
    assert time.monotonic() - begin < 5
    stuck.gate.open()
    slot, reply = queue.reap()
    assert slot == 0
    stuck.assert_cold(reply)


def test_other_guest_reads_on_while_one_waits(start: Callable[..., Stuck]) -> None:
    stuck = start()
    stuck.park()
    with FakeGuest(stuck.daemon.socket_path) as other:
        other.fuse.init()
        for _ in range(20):
            assert other.fuse.read_file("warm") == pattern(WARM[1], WARM[0])
    stuck.gate.open()
    stuck.assert_cold(stuck.guest.queues[1].reap()[1])


def test_all_that_wait_are_answered(start: Callable[..., Stuck]) -> None:
    stuck = start()
    stuck.gate.close()
    places = {slot: (16 << 20) + slot * BLOCK * 3 for slot in range(16)}
    for slot, at in places.items():
        stuck.submit_cold(slot, at)
    stuck.gate.wait_asked()
    with pytest.raises(NoAnswer):
        stuck.guest.queues[1].reap(50)
    stuck.gate.open()
    for _ in places:
        slot, reply = stuck.guest.queues[1].reap()
        stuck.assert_cold(reply, places[slot])


def test_deadline_is_an_error(start: Callable[..., Stuck]) -> None:
    stuck = start(DEADLINE_MS)
    stuck.park()
    begin = time.monotonic()
    reply = stuck.guest.queues[1].reap()[1]
    took = time.monotonic() - begin
    assert OUT_HEADER.unpack(reply)[1] == -5
    assert DEADLINE_MS / 1000 - 0.5 < took < DEADLINE_MS / 1000 + 2
    stuck.gate.open()
    for _ in range(5):  # the fetch that was given up may still be in the way of the next
        stuck.submit_cold()
        reply = stuck.guest.queues[1].reap()[1]
        if OUT_HEADER.unpack_from(reply)[1] == 0:
            break
    stuck.assert_cold(reply)


def test_ring_stop_is_bounded_and_resumes(start: Callable[..., Stuck]) -> None:
    """QEMU's stop and cont with a read that waits: no error for the guest, the answer comes after cont."""
    stuck = start()
    stuck.park()
    guest, queue = stuck.guest, stuck.guest.queues[1]
    begin, used = time.monotonic(), queue.used_index()
    bases = guest.stop()
    assert time.monotonic() - begin < STOP_MOST_S
    before = guest.memory.read(queue.slot_gpa, 0x20000)
    stuck.gate.open()
    with pytest.raises(NoAnswer):
        queue.reap(300)
    assert queue.used_index() == used
    assert guest.memory.read(queue.slot_gpa, 0x20000) == before, "written to after the ring stopped"
    for each, base in zip(guest.queues, bases, strict=True):
        guest.send_ring(each, base)
        guest.enable(each)
    stuck.assert_cold(queue.reap()[1])


def test_pause_holds_answers_back(start: Callable[..., Stuck]) -> None:
    stuck = start()
    stuck.park()
    queue = stuck.guest.queues[1]
    for each in stuck.guest.queues:
        stuck.guest.enable(each, False)
    used = queue.used_index()
    stuck.gate.open()
    with pytest.raises(NoAnswer):
        queue.reap(300)
    assert queue.used_index() == used
    for each in stuck.guest.queues:
        stuck.guest.enable(each)
    stuck.assert_cold(queue.reap()[1])


def test_reboot_drops_what_waits(start: Callable[..., Stuck]) -> None:
    """Fresh rings see no entry of the old guest's request."""
    stuck = start()
    stuck.park()
    begin = time.monotonic()
    stuck.guest.reboot()
    assert time.monotonic() - begin < STOP_MOST_S
    stuck.guest.fuse.init()
    stuck.gate.open()
    assert stuck.guest.fuse.read(stuck.node, 20 << 20, BLOCK) == cold_bytes(20 << 20)
    for _ in range(20):
        stuck.guest.fuse.getattr(1)  # any stray used entry would be told
    assert stuck.guest.queues[1].used_index() == 22


def test_init_again_drops_what_waits(start: Callable[..., Stuck]) -> None:
    stuck = start()
    stuck.park()
    guest, queue = stuck.guest, stuck.guest.queues[1]
    queue.submit(pack_request(INIT, 100, 0, INIT_IN.pack(7, 38, 0, 0, 0)), 64, 0, 1)
    assert queue.reap()[0] in (0, 1)
    stuck.gate.open()
    slot, reply = queue.reap()
    if slot == 0:
        assert len(reply) in (0, 16)
    assert guest.fuse.getattr(1)


def test_hang_up_while_it_waits(start: Callable[..., Stuck]) -> None:
    stuck = start()
    idle = open_fds(stuck.daemon)
    stuck.park()
    stuck.guest.front.close()
    wait_until(lambda: open_fds(stuck.daemon) < idle, "the hung-up guest's descriptors are closed", 5)
    stuck.gate.open()
    with FakeGuest(stuck.daemon.socket_path) as other:
        other.fuse.init()
        assert other.fuse.read(other.fuse.walk("data").nodeid, 20 << 20, BLOCK) == cold_bytes(20 << 20)


def test_end_while_it_waits(start: Callable[..., Stuck]) -> None:
    """SIGTERM with a read that waits for a dead registry ends the daemon soon."""
    stuck = start()
    stuck.park()
    begin = time.monotonic()
    stuck.daemon.process.terminate()
    assert stuck.daemon.process.wait(10) == 0
    assert time.monotonic() - begin < 6
    start()  # the next one, on the same cache


def test_live_head_offered_again(start: Callable[..., Stuck]) -> None:
    """The head of a request in flight comes again: a violation, the queue is lost."""
    stuck = start()
    stuck.park()
    queue = stuck.guest.queues[1]
    head_at = queue.avail_gpa + 4 + 2 * ((queue.avail_index() - 1) % queue.size)
    head = int.from_bytes(stuck.guest.memory.read(head_at, 2), "little")
    poller = select.poll()
    poller.register(queue.err_fd, select.POLLIN)
    queue.offer([head])
    assert poller.poll(5000), "the error descriptor was not signalled"
    stuck.gate.open()
    stuck.guest.reboot()
    stuck.guest.fuse.init()
    assert stuck.guest.fuse.read(stuck.node, 20 << 20, BLOCK) == cold_bytes(20 << 20)


def test_reply_memory_goes_while_it_waits(start: Callable[..., Stuck]) -> None:
    """A parked request holds no host address: its memory is gone when the bytes come, so it is answered by nothing."""
    stuck = start()
    guest, queue = stuck.guest, stuck.guest.queues[1]
    fd = os.memfd_create("dimm", os.MFD_CLOEXEC)
    os.ftruncate(fd, 1 << 20)
    region = vhost.pack_single_region((1 << 40, 1 << 20, 1 << 45, 0))
    guest.front.command(Request.ADD_MEM_REG, region, [fd], True)
    stuck.gate.close()
    request = pack_request(READ, 2, stuck.node, READ_IN.pack(0, 20 << 20, BLOCK, 0, 0, 0, 0))
    guest.memory.write(guest.scratch_gpa, request)
    queue.add([(guest.scratch_gpa, len(request), False), (1 << 40, BLOCK + 16, True)])
    queue.publish()
    stuck.gate.wait_asked()
    guest.front.command(Request.REM_MEM_REG, region, [], True)
    stuck.gate.open()
    assert queue.pop() == 0
    assert os.pread(fd, 1 << 20, 0) == bytes(1 << 20)
    os.close(fd)
    assert guest.fuse.getattr(1)
