"""`block`: an image as a virtio-blk disk. The fake guest's rings read it; the host's own EROFS judges the bytes."""

import os
import stat
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.keeper.conftest import Image, KeptDaemon
from virtiofsd_nydus.fakeguest.fakeguest import FakeGuest, Queue, default_regions, ffi, lib
from virtiofsd_nydus.fakeguest.frontend import Request
from virtiofsd_nydus.fuse import mounts
from virtiofsd_nydus.kernelmount.erofs import FSTYPE

SECTOR = 512
IN, OUT, FLUSH, GET_ID, DISCARD = 0, 1, 4, 8, 11
OK, IOERR, UNSUPP = 0, 1, 2
POISON = 0xEE  # what stands where the device may write
P_CONFIG = 1 << 9
F_RO = 1 << 5
READ_BYTES = 1 << 20
MAIN = (sys.executable, "-m", "virtiofsd_nydus.cli.main")
MEMORY = default_regions(32 << 20)


class BlockDaemon(KeptDaemon):
    verb = "block"


class Disk:
    """A driver of one queue: a request at a time, in the guest's scratch memory."""

    def __init__(self, guest: FakeGuest, queue: int = 1) -> None:
        self.guest, self.queue = guest, guest.queues[queue]
        self.header = guest.scratch_gpa
        self.data = guest.memory.allocate(4 << 20)
        self.table = guest.memory.allocate(64 << 10)

    @property
    def sectors(self) -> int:
        return struct.unpack_from("<Q", self.config(0, 8))[0]  # type: ignore[no-any-return]

    def config(self, offset: int, size: int) -> bytes:
        front = self.guest.front
        front.send(Request.GET_CONFIG, struct.pack("=III", offset, size, 0) + bytes(size))
        body, _ = front.receive(Request.GET_CONFIG)
        return body[12:]

    def request(
        self, kind: int, sector: int, size: int, *, header: bytes | None = None, cuts: int = 1, status: bool = True
    ) -> tuple[int, bytes, int]:
        """Sends one request with size bytes of room in `cuts` descriptors: status (POISON: none was written), data,
        used length."""
        memory, head = self.guest.memory, header
        if head is None:
            head = struct.pack("<IIQ", kind, 0, sector)
        memory.write(self.header, head)
        memory.write(self.data, bytes([POISON]) * (size + 1))
        each = max(1, -(-size // cuts))
        parts = [(self.data + at, min(each, size - at), 1) for at in range(0, size, each)]
        segments = [(self.header, len(head), 0), *parts] if head else parts
        if status:
            segments.append((self.data + size, 1, 1))
        add(self.queue, segments, self.table)
        used = self.queue.pop()
        answer = memory.read(self.data, size + 1)
        return answer[size], answer[:size], used

    def read(self, sector: int, size: int, cuts: int = 1) -> bytes:
        status, data, used = self.request(IN, sector, size, cuts=cuts)
        assert (status, used) == (OK, size + 1)
        return data

    def read_all(self) -> bytes:
        total, parts = self.sectors * SECTOR, []
        for at in range(0, total, READ_BYTES):
            parts.append(self.read(at // SECTOR, min(READ_BYTES, total - at)))
        return b"".join(parts)


def add(queue: Queue, segments: "list[tuple[int, int, int]]", table: int) -> None:
    raw = ffi.new("fg_segment[]", segments)
    queue.check(lib.fg_queue_add(queue.handle, raw, len(segments), table if len(segments) > 1 else 0, 0))
    queue.publish()


@pytest.fixture
def daemon(image: Image) -> Iterator[BlockDaemon]:
    with BlockDaemon(image.options) as running:
        yield running
        running.check_alive()


@pytest.fixture
def disk(daemon: BlockDaemon) -> Iterator[Disk]:
    with FakeGuest(daemon.socket_path, request_queues=2, queue_size=64, regions=MEMORY) as guest:
        yield Disk(guest)


def test_the_disk_holds_the_image(disk: Disk, image: Image, tmp_path: Path) -> None:
    """The bootstrap comes first, each file's bytes lie on a block. EROFS of this host finds the tree on it."""
    found = disk.read_all()
    bootstrap = image.bootstrap.read_bytes()
    assert found[: len(bootstrap)] == bootstrap
    for name, data in image.files.items():
        at = found.find(data)
        assert at > 0 and at % 4096 == 0, name
    if os.geteuid() or not mounts.knows_filesystem(FSTYPE):
        return
    flat, where = tmp_path / "flat", tmp_path / "mnt"
    flat.write_bytes(found)
    where.mkdir()
    mounts.mount(str(flat), str(where), FSTYPE, mounts.MS_RDONLY, "")
    try:
        assert {one.name: one.read_bytes() for one in where.iterdir()} == image.files
        assert all(stat.S_ISREG(one.stat().st_mode) for one in where.iterdir())
    finally:
        subprocess.run(["umount", str(where)], check=True)


def test_reads_of_any_cut(disk: Disk) -> None:
    """Whatever the cut into descriptors, and whatever sector a read begins at, the bytes are the same."""
    whole = disk.read(0, 2 << 20)
    last = disk.sectors
    for sector, size, cuts in ((0, 512, 1), (1, 4096, 8), (3, 1536, 200), (7, 1 << 20, 60), (1025, 1 << 20, 255)):
        assert disk.read(sector, size, cuts) == whole[sector * SECTOR : sector * SECTOR + size]
    assert len(disk.read(last - 1, SECTOR)) == SECTOR
    assert disk.read(last, 0) == b""


def test_two_queues_serve_one_disk(disk: Disk) -> None:
    other = Disk(disk.guest, 2)
    hiprio = Disk(disk.guest, 0)  # a queue as the others
    assert disk.read(8, 8192) == other.read(8, 8192) == hiprio.read(8, 8192)


def test_what_a_device_says_of_itself(disk: Disk) -> None:
    front = disk.guest.front
    assert front.get_u64(Request.GET_PROTOCOL_FEATURES) & P_CONFIG
    assert front.get_u64(Request.GET_FEATURES) & F_RO
    whole = disk.config(0, 60)  # as QEMU 7.2 asks
    assert struct.unpack_from("<I", whole, 20)[0] == SECTOR
    assert struct.unpack_from("<H", whole, 34)[0] == 5
    assert disk.config(8, 52) == whole[8:]
    for offset, size in ((250, 10), (300, 1), (0xFFFFFFFF, 2)):  # beyond its end: told by an empty answer
        front.send(Request.GET_CONFIG, struct.pack("=III", offset, size, 0) + bytes(size))
        assert front.receive(Request.GET_CONFIG)[0] == b""
    status, name, used = disk.request(GET_ID, 0, 20)
    assert (status, name.rstrip(b"\0"), used) == (OK, b"nydus", 21)
    assert disk.request(FLUSH, 0, 0)[0] == OK


def test_the_config_space_is_offered_for_disks_alone(image: Image) -> None:
    """QEMU 7.1 to 8.0 crash where a device of virtio-fs offers it."""
    with KeptDaemon(image.options) as daemon, FakeGuest(daemon.socket_path) as guest:
        assert not guest.front.get_u64(Request.GET_PROTOCOL_FEATURES) & P_CONFIG


HOSTILE = [
    ("a write", OUT, 0, SECTOR, IOERR),
    ("a discard", DISCARD, 0, 0, IOERR),
    ("a type that is none", 77, 0, SECTOR, UNSUPP),
    ("half a sector", IN, 0, 100, IOERR),
    ("a sector and a byte", IN, 0, SECTOR + 1, IOERR),
    ("a sector beyond the end", IN, "end", SECTOR, IOERR),
    ("across the end", IN, "last", 2 * SECTOR, IOERR),
    ("the last sector that there can be", IN, (1 << 64) - 1, SECTOR, IOERR),
    ("a sector whose byte is 2^64", IN, 1 << 55, SECTOR, IOERR),
    ("a sector whose byte is 2^64 minus one", IN, (1 << 55) - 1, SECTOR, IOERR),
    ("an id without room", GET_ID, 0, 19, IOERR),
]


@pytest.mark.parametrize("what, kind, sector, size, expected", HOSTILE, ids=[one[0] for one in HOSTILE])
def test_requests_that_cannot_be_done(
    disk: Disk, what: str, kind: int, sector: "int | str", size: int, expected: int
) -> None:
    """Each gets its status, no byte of data is written, and the queue serves on."""
    at = {"end": disk.sectors, "last": disk.sectors - 1}.get(str(sector), sector)
    status, data, used = disk.request(kind, int(at), size)
    assert status == expected and data == bytes([POISON]) * size
    assert used == (1 if size == 0 else 0)
    disk.read(0, 4096)


def test_requests_that_are_none(disk: Disk) -> None:
    """A header cut short or missing, no room for the status, more than a request may have: the queue serves on."""
    assert disk.request(IN, 0, SECTOR, header=b"\0" * 15)[0] == IOERR
    assert disk.request(IN, 0, SECTOR, header=b"")[0] == IOERR
    assert disk.request(IN, 0, 0, status=False)[::2] == (POISON, 0)
    big = [(disk.header, 16, 0), *[(disk.data, 1 << 20, 1)] * 17, (disk.data + (1 << 20), 1, 1)]
    add(disk.queue, big, disk.table)
    assert disk.queue.pop() == 0
    assert disk.guest.memory.read(disk.data + (1 << 20), 1) == bytes([IOERR])
    outside = [(disk.header, 16, 0), (1 << 40, 4096, 1), (disk.data, 1, 1)]
    add(disk.queue, outside, disk.table)
    disk.queue.pop()
    disk.read(0, 4096)


def test_a_worker_dies_and_the_disk_goes_on(disk: Disk, daemon: BlockDaemon) -> None:
    before = disk.read_all()
    for _ in range(3):
        daemon.kill_worker()
        assert disk.read_all() == before


def test_its_image_cannot_be_taken_away(disk: Disk, daemon: BlockDaemon) -> None:
    status, answer = daemon.call("DELETE", "/api/v1/mount?mountpoint=/")
    assert status == 500 and "block device" in str(answer)
    disk.read(0, 4096)


@pytest.mark.parametrize(
    "words, why",
    [(["--fs-version", "5"], "RAFS v5"), (["--fs-version", "6", "--chunk-size", "4K"], "")],
    ids=["v5", "v6"],
)
def test_which_images_are_disks(image: Image, tmp_path: Path, words: "list[str]", why: str) -> None:
    """What cannot be one is refused by name, before a guest can connect."""
    boot = tmp_path / "boot"
    command = ["build", *words, "--bootstrap", str(boot), "--blob-dir", str(tmp_path / "blobs"), str(image.tree)]
    subprocess.run([*MAIN, *command], check=True, capture_output=True)
    options = ["--bootstrap", str(boot), "--localfs-dir", str(tmp_path / "blobs")]
    if why:
        daemon = ["block", "--sock", str(tmp_path / "sock"), *options]
        done = subprocess.run([*MAIN, *daemon], capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 1 and why in done.stderr
        return
    with BlockDaemon(options) as daemon, FakeGuest(daemon.socket_path, regions=MEMORY) as guest:
        found = Disk(guest).read_all()
        assert all(data in found for data in image.files.values())


def test_no_image_no_device() -> None:
    done = subprocess.run(
        [*MAIN, "block", "--sock", "/nowhere/s"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and "--bootstrap" in done.stderr
