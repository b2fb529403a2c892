"""A host directory that does not answer delays nothing but requests for itself: the image beside it is read, on the
same queue, and other files of the share are written."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakeguest.support import assert_alive, build_image
from tests.fuse.host import has_fuse
from tests.passthrough.gate_fs import GateFs
from tests.passthrough.test_api import connect_api
from virtiofsd_nydus.fakeguest import fuse_client as fc
from virtiofsd_nydus.fakeguest.fakeguest import FakeGuest
from virtiofsd_nydus.fakeguest.fuse_client import OUT_HEADER, pack_request
from virtiofsd_nydus.vmm.servers import NydusDaemon

WARM_READS = 2000
# More than the threads that may wait, so that some requests wait for one of those
STUCK = 12


class Shared:
    """An image at /a and a share at /containers of one daemon; below the share, a file system with a gate."""

    def __init__(self, daemon: NydusDaemon, guest: FakeGuest, gate: GateFs, source: Path) -> None:
        self.daemon, self.guest, self.gate, self.source = daemon, guest, gate, source
        self.fuse = guest.fuse
        self.image_file = self.fuse.walk("a/warm").nodeid
        top = self.fuse.walk("containers").nodeid
        self.slow = self.fuse.lookup(self.fuse.lookup(top, b"remote").nodeid, b"slow").nodeid
        self.handle = self.fuse.open_flags(self.slow, os.O_RDWR)
        self.top = top

    def submit(self, opcode: int, body: bytes, out_fixed: int, data_bytes: int, slot: int) -> None:
        request = pack_request(opcode, 1_000_000 + 2 * slot, self.slow, body)
        self.guest.queues[1].submit(request, out_fixed, data_bytes, slot)

    def submit_write(self, slot: int, offset: int, data: bytes) -> None:
        self.submit(fc.WRITE, fc.WRITE_IN.pack(self.handle, offset, len(data), 0, 0, 0, 0) + data, 8, 0, slot)


@pytest.fixture
def shared(tmp_path: Path, source: Path) -> Iterator[Shared]:
    reason = has_fuse()
    if reason:
        pytest.skip(reason)
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "warm").write_bytes(b"warm" * 1024)
    image = build_image(tmp_path / "tree", tmp_path / "out")
    (source / "remote").mkdir()
    config = json.dumps(
        {
            "device": {
                "backend": {"type": "localfs", "config": {"dir": str(image.blob_dir)}},
                "cache": {"type": "blobcache", "config": {"work_dir": str(tmp_path / "cache")}},
            },
            "mode": "direct",
        }
    )
    with GateFs(source / "remote") as gate, NydusDaemon([], die_with_parent=True) as daemon:
        api = connect_api(daemon)
        assert api.mount("/a", "rafs", image.bootstrap, config)[0] == 204
        assert api.mount("/containers", "passthrough_fs", source)[0] == 204
        with FakeGuest(daemon.socket_path, queue_size=128, slot_count=STUCK + 1, slot_data_bytes=1 << 16) as guest:
            guest.fuse.init()
            yield Shared(daemon, guest, gate, source)
            gate.open()
        assert_alive(daemon)


def collect(shared: Shared, count: int) -> dict[int, bytes]:
    replies = {}
    for _ in range(count):
        slot, reply = shared.guest.queues[1].reap()
        assert OUT_HEADER.unpack_from(reply)[1] == 0, (slot, OUT_HEADER.unpack_from(reply))
        replies[slot] = reply[16:]
    return replies


def test_a_stuck_write_delays_no_image_read(shared: Shared) -> None:
    """Were it served by the queue's thread, not one of these reads would come back."""
    shared.gate.close()
    shared.submit_write(1, 0, b"after!")
    shared.gate.wait_kept()
    queue = shared.guest.queues[1]
    for i in range(WARM_READS):
        request = pack_request(fc.READ, 2 + 2 * i, shared.image_file, fc.READ_IN.pack(0, 0, 4096, 0, 0, 0, 0))
        queue.submit(request, 0, 4096, 0)
        slot, reply = queue.reap()
        assert slot == 0 and reply[16:] == b"warm" * 1024
    shared.gate.open()
    assert collect(shared, 1)[1][:4] == (6).to_bytes(4, "little")
    assert bytes(shared.gate.data) == b"after!"


def test_more_stuck_than_threads(shared: Shared) -> None:
    shared.gate.close()
    # In turns: a guest has six threads at most, and the kernel asks for one write of a file at a time
    for slot in range(1, STUCK // 2 + 1):
        shared.submit_write(slot, 100 * slot, bytes([slot]) * 50)
        shared.submit(fc.READ, fc.READ_IN.pack(shared.handle, 0, 6, 0, 0, 0, 0), 0, 6, STUCK // 2 + slot)
    shared.gate.wait_kept(2)
    queue = shared.guest.queues[1]
    request = pack_request(fc.READ, 2, shared.image_file, fc.READ_IN.pack(0, 0, 4096, 0, 0, 0, 0))
    queue.submit(request, 0, 4096, 0)
    assert queue.reap()[1][16:] == b"warm" * 1024
    shared.gate.open()
    replies = collect(shared, STUCK)
    assert all(replies[slot] == b"before" for slot in range(STUCK // 2 + 1, STUCK + 1))
    for slot in range(1, STUCK // 2 + 1):
        assert shared.gate.data[100 * slot : 100 * slot + 50] == bytes([slot]) * 50


def test_a_guest_that_goes_leaves_no_request_behind(shared: Shared) -> None:
    """The guest resets with a request that is stuck; another mounts at once and is served."""
    shared.gate.close()
    shared.submit_write(1, 0, b"stuck")
    shared.gate.wait_kept()
    with FakeGuest(shared.daemon.socket_path, queue_size=64) as second:
        second.fuse.init()
        assert second.fuse.read_file("a/warm") == b"warm" * 1024
        entry, handle = second.fuse.create(second.fuse.walk("containers").nodeid, b"local")
        assert second.fuse.write(entry.nodeid, handle, 0, b"local") == 5
        second.fuse.fsync(entry.nodeid, handle)
        second.fuse.syncfs()
    shared.gate.open()
    collect(shared, 1)
    assert (shared.source / "local").read_bytes() == b"local"


def test_long_calls_leave_the_queue(source: Path, fuse: fc.FuseClient) -> None:
    """Those that always do give what they give at once: sync, space, copies, large truncations."""
    entry, handle = fuse.create(fc.ROOT, b"f")
    data = os.urandom(1 << 20)
    for i in range(8):
        fuse.write(entry.nodeid, handle, i << 20, data)
    other, to = fuse.create(fc.ROOT, b"g")
    assert fuse.copy_file_range(fc.Place(entry.nodeid, handle, 0), fc.Place(other.nodeid, to, 0), 3 << 20) == 3 << 20
    assert (source / "g").read_bytes() == data * 3
    fuse.fsync(entry.nodeid, handle)
    fuse.fallocate(entry.nodeid, handle, 0, 0, 16 << 20)
    assert (source / "f").stat().st_size == 16 << 20
    assert fuse.setattr(entry.nodeid, fc.Change(valid=fc.SET_SIZE, size=10)).size == 10
    assert (source / "f").read_bytes() == data[:10]
    for i in range(8):
        fuse.write(entry.nodeid, handle, i << 20, data)
    fuse.open_flags(entry.nodeid, os.O_WRONLY | os.O_TRUNC)
    assert (source / "f").stat().st_size == 0
    with pytest.raises(OSError, match=r"\[Errno 9\]"):
        fuse.fsync(entry.nodeid, 12345)
