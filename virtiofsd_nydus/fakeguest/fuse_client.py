"""A FUSE client over a fake guest's queue: the requests a guest kernel would send, one at a time."""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

IN_HEADER = struct.Struct("=IIQQIIIHH")
OUT_HEADER = struct.Struct("=IiQ")
ATTR = struct.Struct("=QQQQQQIIIIIIIIII")
ENTRY = struct.Struct("=QQQQII")
DIRENT = struct.Struct("=QQII")
READ_IN = struct.Struct("=QQIIQII")
STATFS = struct.Struct("=QQQQQIIII24x")
SETATTR_IN = struct.Struct("=IIQQQQQQIIIIIIII")
WRITE_IN = struct.Struct("=QQIIQII")
INIT_IN = struct.Struct("=IIIII44x")
INIT_OUT = struct.Struct("=IIIIHHIIHHIIH22x")

LOOKUP, FORGET, GETATTR, READLINK, OPEN, READ, STATFS_OP, RELEASE = 1, 2, 3, 5, 14, 15, 17, 18
GETXATTR, LISTXATTR, FLUSH, INIT, OPENDIR, READDIR, RELEASEDIR = 22, 23, 25, 26, 27, 28, 29
ACCESS, DESTROY, BATCH_FORGET, READDIRPLUS, LSEEK = 34, 38, 42, 44, 46
SETATTR, SYMLINK, MKNOD, MKDIR, UNLINK, RMDIR, RENAME, LINK, WRITE = 4, 6, 8, 9, 10, 11, 12, 13, 16
FSYNC, SETXATTR, REMOVEXATTR, FSYNCDIR, CREATE, FALLOCATE, RENAME2 = 20, 21, 24, 30, 35, 43, 45
COPY_FILE_RANGE, SYNCFS, TMPFILE = 47, 50, 51
# valid bits of SETATTR
SET_MODE, SET_UID, SET_GID, SET_SIZE, SET_ATIME, SET_MTIME, SET_FH = 1, 2, 4, 8, 16, 32, 64
SET_ATIME_NOW, SET_MTIME_NOW, SET_KILL_SUIDGID = 128, 256, 2048
WRITE_CACHE, WRITE_KILL_SUIDGID = 1, 4

ROOT = 1
INIT_EXT = 1 << 30
# What a 6.1 guest offers (traced): flags in the low word, flags2 in the high one
GUEST_FLAGS = 0xB_7BFF_FFFB


@dataclass(frozen=True, slots=True)
class Attr:
    ino: int
    size: int
    blocks: int
    atime: int
    mtime: int
    ctime: int
    atime_nsec: int
    mtime_nsec: int
    ctime_nsec: int
    mode: int
    nlink: int
    uid: int
    gid: int
    rdev: int
    blksize: int
    flags: int


@dataclass(frozen=True, slots=True)
class Entry:
    nodeid: int
    generation: int
    entry_valid_s: int
    attr_valid_s: int
    attr: Attr


@dataclass(frozen=True, slots=True)
class DirEntry:
    ino: int
    next_off: int
    type: int
    name: bytes
    entry: Entry | None = None  # READDIRPLUS; None where the server gave node 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What SETATTR sets: the members that valid (SET_...) names. handle: of an open file, 0: none."""

    valid: int
    mode: int = 0
    uid: int = 0
    gid: int = 0
    size: int = 0
    atime_ns: int = 0
    mtime_ns: int = 0
    handle: int = 0


class Place(NamedTuple):
    """A byte of an open file."""

    nodeid: int
    handle: int
    offset: int


@dataclass(frozen=True, slots=True)
class InitReply:
    major: int
    minor: int
    max_readahead: int
    flags: int
    max_background: int
    max_write: int
    max_pages: int
    map_alignment: int


class Channel(Protocol):
    """What carries requests: see fakeguest.Queue."""

    def call(self, request: bytes, out_fixed: int, data_bytes: int) -> bytes: ...


def pack_request(
    opcode: int,
    unique: int,
    nodeid: int,
    body: bytes = b"",
    length: int | None = None,
    owner: tuple[int, int] = (0, 0),
) -> bytes:
    """A whole request; length overrides what the header claims. owner: user and group id of the process that asks."""
    size = IN_HEADER.size + len(body) if length is None else length
    return IN_HEADER.pack(size, opcode, unique, nodeid, *owner, 1, 0, 0) + body


def parse_entry(data: bytes) -> Entry:
    nodeid, generation, entry_valid, attr_valid, _, _ = ENTRY.unpack_from(data)
    return Entry(nodeid, generation, entry_valid, attr_valid, Attr(*ATTR.unpack_from(data, ENTRY.size)))


def parse_dirents(data: bytes, plus: bool) -> list[DirEntry]:
    """Entries of a READDIR or READDIRPLUS reply; ValueError where one is cut or not padded."""
    entries, at = [], 0
    while at < len(data):
        entry = parse_entry(data[at:]) if plus else None
        at += ENTRY.size + ATTR.size if plus else 0
        ino, off, namelen, kind = DIRENT.unpack_from(data, at)
        name = data[at + DIRENT.size : at + DIRENT.size + namelen]
        at += (DIRENT.size + namelen + 7) // 8 * 8
        if len(name) != namelen or at > len(data):
            raise ValueError(f"directory entry cut at {at} of {len(data)} bytes")
        entries.append(DirEntry(ino, off, kind, name, entry if entry and entry.nodeid else None))
    return entries


class FuseClient:
    """Requests raise OSError with the server's errno. unique numbers are even, as the kernel's. uid, gid: who asks."""

    uid = gid = 0

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.unique = 0

    def request(self, opcode: int, nodeid: int, body: bytes = b"", out_fixed: int = 0, data_bytes: int = 0) -> bytes:
        """Reply without its header."""
        self.unique += 2
        request = pack_request(opcode, self.unique, nodeid, body, owner=(self.uid, self.gid))
        reply = self.channel.call(request, out_fixed, data_bytes)
        if not reply:
            raise OSError(5, f"no reply to opcode {opcode}")
        error = OUT_HEADER.unpack_from(reply)[1]
        if error:
            raise OSError(-error, f"opcode {opcode} on node {nodeid}")
        return reply[OUT_HEADER.size :]

    def send_without_reply(self, opcode: int, nodeid: int, body: bytes) -> None:
        self.unique += 2
        reply = self.channel.call(pack_request(opcode, self.unique, nodeid, body), -1, 0)
        if reply:
            raise OSError(71, f"opcode {opcode} was answered")

    def init(self, major: int = 7, minor: int = 38, flags: int = GUEST_FLAGS) -> InitReply:
        body = INIT_IN.pack(major, minor, 131072, flags & 0xFFFF_FFFF, flags >> 32)
        reply = self.request(INIT, 0, body, INIT_OUT.size)
        major, minor, readahead, low, background, _, max_write, _, pages, align, high, *_ = INIT_OUT.unpack(reply)
        all_flags = low | (high << 32 if low & INIT_EXT else 0)
        return InitReply(major, minor, readahead, all_flags, background, max_write, pages, align)

    def lookup(self, parent: int, name: bytes) -> Entry:
        return parse_entry(self.request(LOOKUP, parent, name + b"\0", ENTRY.size + ATTR.size))

    def forget(self, nodeid: int, count: int = 1) -> None:
        self.send_without_reply(FORGET, nodeid, struct.pack("=Q", count))

    def getattr(self, nodeid: int) -> Attr:
        return Attr(*ATTR.unpack_from(self.request(GETATTR, nodeid, bytes(16), 16 + ATTR.size), 16))

    def readlink(self, nodeid: int) -> bytes:
        return self.request(READLINK, nodeid, data_bytes=4096)

    def open(self, nodeid: int, directory: bool = False) -> int:
        """File handle; 0 where the server does without open (ENOSYS)."""
        try:
            reply = self.request(OPENDIR if directory else OPEN, nodeid, bytes(8), 16)
        except OSError as error:
            if error.errno == 38:
                return 0
            raise
        handle: int = struct.unpack_from("=Q", reply)[0]
        return handle

    def read(self, nodeid: int, offset: int, size: int, handle: int = 0) -> bytes:
        return self.request(READ, nodeid, READ_IN.pack(handle, offset, size, 0, 0, 0, 0), 0, size)

    def read_all(self, nodeid: int, block_bytes: int = 131072) -> bytes:
        """The whole file, to the first short read."""
        handle, parts, offset = self.open(nodeid), [], 0
        while True:
            part = self.read(nodeid, offset, block_bytes, handle)
            parts.append(part)
            offset += len(part)
            if len(part) < block_bytes:
                return b"".join(parts)

    def readdir(self, nodeid: int, plus: bool = True, size: int = 4096) -> Iterator[DirEntry]:
        """All entries, a reply of size bytes at a time."""
        handle, offset = self.open(nodeid, directory=True), 0
        while True:
            body = READ_IN.pack(handle, offset, size, 0, 0, 0, 0)
            entries = parse_dirents(self.request(READDIRPLUS if plus else READDIR, nodeid, body, 0, size), plus)
            if not entries:
                break
            yield from entries
            offset = entries[-1].next_off
        if handle:
            self.release(nodeid, handle, directory=True)

    def getxattr(self, nodeid: int, name: bytes, size: int = 4096) -> bytes:
        return self.request(GETXATTR, nodeid, struct.pack("=II", size, 0) + name + b"\0", 0 if size else 8, size)

    def listxattr(self, nodeid: int, size: int = 4096) -> list[bytes]:
        names = self.request(LISTXATTR, nodeid, struct.pack("=II", size, 0), 0, size)
        return names.split(b"\0")[:-1]

    def statfs(self) -> tuple[int, ...]:
        """blocks, bfree, bavail, files, ffree, bsize, namelen, frsize, padding."""
        return STATFS.unpack(self.request(STATFS_OP, ROOT, b"", STATFS.size))

    def lseek(self, nodeid: int, offset: int, whence: int, handle: int = 0) -> int:
        reply = self.request(LSEEK, nodeid, struct.pack("=QQII", handle, offset, whence, 0), 8)
        place: int = struct.unpack("=Q", reply)[0]
        return place

    def access(self, nodeid: int, mask: int) -> None:
        self.request(ACCESS, nodeid, struct.pack("=II", mask, 0))

    def walk(self, path: str) -> Entry:
        """Looks up a path from the root, following no links. FileNotFoundError also where the answer is node 0."""
        entry = Entry(ROOT, 0, 0, 0, self.getattr(ROOT))
        for name in path.encode().split(b"/"):
            if name:
                entry = self.lookup(entry.nodeid, name)
                if entry.nodeid == 0:
                    raise FileNotFoundError(2, "no such entry", path)
        return entry

    def read_file(self, path: str) -> bytes:
        return self.read_all(self.walk(path).nodeid)

    # ---- on a read-write mount: names are one component, below the node of a directory

    def open_flags(self, nodeid: int, flags: int, kill: bool = False, directory: bool = False) -> int:
        reply = self.request(OPENDIR if directory else OPEN, nodeid, struct.pack("=II", flags, int(kill)), 16)
        handle: int = struct.unpack_from("=Q", reply)[0]
        return handle

    def release(self, nodeid: int, handle: int, directory: bool = False) -> None:
        self.request(RELEASEDIR if directory else RELEASE, nodeid, struct.pack("=QIIQ", handle, 0, 0, 0))

    def flush(self, nodeid: int, handle: int) -> None:
        self.request(FLUSH, nodeid, struct.pack("=QIIQ", handle, 0, 0, 0))

    def fsync(self, nodeid: int, handle: int, data_only: bool = False, directory: bool = False) -> None:
        self.request(FSYNCDIR if directory else FSYNC, nodeid, struct.pack("=QII", handle, int(data_only), 0))

    def syncfs(self) -> None:
        self.request(SYNCFS, ROOT, bytes(8))

    def write(self, nodeid: int, handle: int, offset: int, data: bytes, flags: int = 0, write_flags: int = 0) -> int:
        head = WRITE_IN.pack(handle, offset, len(data), write_flags, 0, flags, 0)
        written: int = struct.unpack_from("=I", self.request(WRITE, nodeid, head + data, 8))[0]
        return written

    def create(
        self, parent: int, name: bytes, mode: int = 0o644, flags: int = 2, kill: bool = False, opcode: int = CREATE
    ) -> tuple[Entry, int]:
        """The new entry and its open file."""
        body = struct.pack("=IIII", flags, mode | 0o100000, 0, int(kill)) + name + b"\0"
        reply = self.request(opcode, parent, body, ENTRY.size + ATTR.size + 16)
        return parse_entry(reply), struct.unpack_from("=Q", reply, ENTRY.size + ATTR.size)[0]

    def mkdir(self, parent: int, name: bytes, mode: int = 0o755) -> Entry:
        return self._entry(MKDIR, parent, struct.pack("=II", mode, 0) + name + b"\0")

    def mknod(self, parent: int, name: bytes, mode: int, rdev: int = 0) -> Entry:
        return self._entry(MKNOD, parent, struct.pack("=IIII", mode, rdev, 0, 0) + name + b"\0")

    def symlink(self, parent: int, name: bytes, target: bytes) -> Entry:
        return self._entry(SYMLINK, parent, name + b"\0" + target + b"\0")

    def link(self, nodeid: int, parent: int, name: bytes) -> Entry:
        return self._entry(LINK, parent, struct.pack("=Q", nodeid) + name + b"\0")

    def unlink(self, parent: int, name: bytes) -> None:
        self.request(UNLINK, parent, name + b"\0")

    def rmdir(self, parent: int, name: bytes) -> None:
        self.request(RMDIR, parent, name + b"\0")

    def rename(self, parent: int, name: bytes, new_parent: int, new_name: bytes, flags: int | None = None) -> None:
        """RENAME; RENAME2 with flags."""
        names = name + b"\0" + new_name + b"\0"
        if flags is None:
            self.request(RENAME, parent, struct.pack("=Q", new_parent) + names)
        else:
            self.request(RENAME2, parent, struct.pack("=QII", new_parent, flags, 0) + names)

    def setattr(self, nodeid: int, change: Change) -> Attr:
        (atime_s, atime_ns), (mtime_s, mtime_ns) = (
            divmod(t, 1_000_000_000) for t in (change.atime_ns, change.mtime_ns)
        )
        body = SETATTR_IN.pack(
            change.valid | (SET_FH if change.handle else 0),
            0,
            change.handle,
            change.size,
            0,
            atime_s,
            mtime_s,
            0,
            atime_ns,
            mtime_ns,
            0,
            change.mode,
            0,
            change.uid,
            change.gid,
            0,
        )
        return Attr(*ATTR.unpack_from(self.request(SETATTR, nodeid, body, 16 + ATTR.size), 16))

    def setxattr(self, nodeid: int, name: bytes, value: bytes, flags: int = 0) -> None:
        self.request(SETXATTR, nodeid, struct.pack("=II", len(value), flags) + name + b"\0" + value)

    def removexattr(self, nodeid: int, name: bytes) -> None:
        self.request(REMOVEXATTR, nodeid, name + b"\0")

    def fallocate(self, nodeid: int, handle: int, mode: int, offset: int, length: int) -> None:
        self.request(FALLOCATE, nodeid, struct.pack("=QQQII", handle, offset, length, mode, 0))

    def copy_file_range(self, source: Place, target: Place, length: int) -> int:
        body = struct.pack("=QQQQQQQ", source.handle, source.offset, *target, length, 0)
        copied: int = struct.unpack_from("=I", self.request(COPY_FILE_RANGE, source.nodeid, body, 8))[0]
        return copied

    def _entry(self, opcode: int, parent: int, body: bytes) -> Entry:
        return parse_entry(self.request(opcode, parent, body, ENTRY.size + ATTR.size))
