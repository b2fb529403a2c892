"""Tables that outgrow memory lie in files without names. They are written once and read now and then.

An image can have millions of inodes, and what is known of each must be kept until its bootstrap is written. Such tables
are arenas: memory while they are small, from HELD_BYTES on a mapped file, whose pages relieve() lets go of. They then
remain in the page cache, which the kernel takes back as it needs to, and come back when they are touched.
"""

import mmap
import os
import tempfile
import threading
import weakref
from collections.abc import Callable

START_BYTES = 4 << 10
HELD_BYTES = 256 << 10
# relieve() does nothing while the process uses less memory than this.
RESIDENT_BYTES = 176 << 20
# relieve() is called once in this many records made or visited.
RELIEVE_EVERY = 1 << 14
# Bytes given to a consumer at a time.
PIECE_BYTES = 1 << 20

_mapped: "weakref.WeakSet[Arena]" = weakref.WeakSet()
_mapped_lock = threading.Lock()


class Arena:
    """Zeroed memory that grows. data, words and quads are views of all of it, as bytes, 32-bit and 64-bit numbers; they
    are made anew when it grows, so a caller keeps none over that. used: bytes taken by append. directory: of the file
    (default: TMPDIR)."""

    __slots__ = ("__weakref__", "_directory", "_fd", "_map", "data", "quads", "used", "words")

    data: memoryview
    words: "memoryview[int]"
    quads: "memoryview[int]"

    def __init__(self, directory: "str | os.PathLike[str] | None" = None, size: int = 0) -> None:
        self._directory = directory
        self._fd: int | None = None
        self._map: mmap.mmap | None = None
        self.used = 0
        self._set_views(memoryview(bytearray(START_BYTES)))
        self.reserve(size)

    def _set_views(self, data: memoryview) -> None:
        self.data, self.words, self.quads = data, data.cast("I"), data.cast("Q")

    def reserve(self, size: int) -> None:
        """Makes room for size bytes in all. Raises OSError where the file's disk is full."""
        capacity = len(self.data)
        if size <= capacity:
            return
        while capacity < size:
            capacity *= 2
        if capacity <= HELD_BYTES:
            grown = bytearray(capacity)
            grown[: len(self.data)] = self.data
            self._set_views(memoryview(grown))
            return
        old = self.data if self._fd is None else None
        if self._fd is None:
            with tempfile.TemporaryFile(dir=self._directory, prefix="virtiofsd-nydus-", buffering=0) as file:
                self._fd = os.dup(file.fileno())
            weakref.finalize(self, os.close, self._fd)
        # Not only its length: a page that finds no room on the disk later is SIGBUS.
        os.posix_fallocate(self._fd, 0, capacity)
        self._map = mmap.mmap(self._fd, capacity)
        self._set_views(memoryview(self._map))
        if old is not None:
            self.data[: len(old)] = old
            with _mapped_lock:
                _mapped.add(self)

    def append(self, data: bytes | bytearray | memoryview) -> int:
        """Appends data and returns its offset."""
        offset = self.used
        end = offset + len(data)
        if end > len(self.data):
            self.reserve(end)
        self.data[offset:end] = data
        self.used = end
        return offset

    def view(self) -> memoryview:
        """What is used."""
        return self.data[: self.used]

    def relieve(self) -> None:
        if self._map is not None:
            self._map.madvise(mmap.MADV_DONTNEED)


def relieve() -> None:
    """Lets go of the memory that all spilled arenas occupy, if this process takes much; nothing is lost, but to touch
    it again costs a fault for each page."""
    if not _mapped or _resident_bytes() < RESIDENT_BYTES:
        return
    with _mapped_lock:
        arenas = list(_mapped)
    for arena in arenas:
        arena.relieve()


def _resident_bytes() -> int:
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[1]) * mmap.PAGESIZE


def copy_pieces(data: "bytes | bytearray | memoryview", take: Callable[[memoryview], object]) -> None:
    """Hands all of data over in pieces, valid during the call, so that no more of a spilled arena is in memory."""
    view = memoryview(data)
    for start in range(0, len(view), PIECE_BYTES):
        take(view[start : start + PIECE_BYTES])
        if start % (16 * PIECE_BYTES) == 0:
            relieve()
