"""Reads RAFS bootstraps through the engine's own reader (csrc/rafs/rafs.c): for `check`, the converter and tests.

Names and link targets are str as os.fsdecode makes them (surrogateescape), so that any byte survives. No C pointer
leaves this module.
"""

import errno
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from virtiofsd_nydus.engine import BlobInfo, Engine, Rafs, Store, ffi, lib
from virtiofsd_nydus.errors import Cause, Failure

_DIRENTS = 128
_CHUNKS = 256
_PREFETCH_MAX = 1 << 16
_FAULT_BYTES = 256  # room for one line of vnd_rafs_check; longer ones are rare


@dataclass(frozen=True, slots=True)
class Attr:
    """What stat(2) shows. rdev is the kernel's encoding of a device number (see os_device)."""

    ino: int
    size_bytes: int
    mtime_s: int
    mtime_nsec: int
    mode: int
    nlink: int
    uid: int
    gid: int
    rdev: int

    @property
    def mtime_ns(self) -> int:
        return self.mtime_s * 1_000_000_000 + self.mtime_nsec

    @property
    def os_device(self) -> int:
        """rdev as os.stat gives it."""
        return os.makedev(self.rdev >> 8 & 0xFFF, self.rdev & 0xFF | self.rdev >> 12 & 0xFFF00)


@dataclass(frozen=True, slots=True)
class DirEntry:
    name: str
    ino: int
    type: int  # DT_*


@dataclass(frozen=True, slots=True)
class Entry:
    """One name of the tree. path is absolute, "/" for the root. Hard links come once per name, with one ino."""

    path: str
    attr: Attr


@dataclass(frozen=True, slots=True)
class Chunk:
    """One chunk of a file. digest is None (and csize_bytes, coff 0) where the bootstrap has no record of it."""

    file_off: int
    blob_index: int
    chunk_index: int
    coff: int
    csize_bytes: int
    uoff: int
    usize_bytes: int
    flags: int
    digest: bytes | None


@dataclass(frozen=True, slots=True)
class Info:
    """Facts of the superblock; names and units are vnd_rafs_info's."""

    fs_version: int
    chunk_size_bytes: int
    flags: int
    inode_count: int
    blob_count: int
    prefetch_count: int
    root_ino: int
    block_size_bytes: int
    meta_blkaddr: int
    chunk_table_offset: int
    chunk_table_size_bytes: int
    blob_table_offset: int
    blob_table_size_bytes: int
    prefetch_table_offset: int
    prefetch_table_size_bytes: int


class Bootstrap:
    """An opened bootstrap, or a data blob that holds one.

    blob_id: real id of a single inlined blob. With a store its files can be read while a FetchPump serves the engine's
    jobs. Without engine it makes one of its own. image: what path holds, where it is opened already; the caller's.
    Raises Failure (FORMAT, IO, DIGEST); calls raise OSError with the reader's errno (EIO: the image is malformed
    there). Close it before store and engine.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        blob_id: str | None = None,
        engine: Engine | None = None,
        store: Store | None = None,
        image: Rafs | None = None,
    ) -> None:
        self.path = os.fspath(path)
        self._own_engine = Engine() if engine is None else None
        self._owns_image = image is None
        try:
            self.image = image or Rafs(engine or self._own_engine, self.path, store, blob_id)  # type: ignore[arg-type]
        except BaseException:
            self._close_engine()
            raise
        self._handle: Any = self.image.handle
        self.info = Info(**self.image.info())

    def __enter__(self) -> "Bootstrap":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        if self._owns_image:
            self.image.close()
        self._handle = None
        self._close_engine()

    def _close_engine(self) -> None:
        if self._own_engine is not None:
            self._own_engine.shutdown()
            self._own_engine.close()
            self._own_engine = None

    @property
    def blobs(self) -> list[BlobInfo]:
        return self.image.blobs()

    @property
    def root_ino(self) -> int:
        return self.info.root_ino

    def getattr(self, ino: int) -> Attr:
        raw = ffi.new("vnd_attr *")
        _ensure(lib.vnd_rafs_getattr(self._handle, ino, raw))
        return Attr(
            raw.ino, raw.size_bytes, raw.mtime_s, raw.mtime_nsec, raw.mode, raw.nlink, raw.uid, raw.gid, raw.rdev
        )

    def lookup(self, dir_ino: int, name: str) -> int:
        """Inode of one name in a directory. FileNotFoundError."""
        ino = ffi.new("uint64_t *")
        _ensure(lib.vnd_rafs_lookup(self._handle, dir_ino, os.fsencode(name), ino))
        return int(ino[0])

    def resolve(self, path: str) -> int:
        """Inode of a path from the root; symlinks are not followed."""
        ino = self.root_ino
        for name in path.split("/"):
            if name:
                ino = self.lookup(ino, name)
        return ino

    def listdir(self, dir_ino: int) -> list[DirEntry]:
        """Entries in the image's order, without "." and ".."."""
        raw = ffi.new("vnd_dirent[]", _DIRENTS)
        found: list[DirEntry] = []
        off = 0
        while got := _ensure(lib.vnd_rafs_readdir(self._handle, dir_ino, off, raw, _DIRENTS)):
            off = raw[got - 1].next_off
            for k in range(got):
                name = os.fsdecode(ffi.string(raw[k].name))
                if name not in (".", ".."):
                    found.append(DirEntry(name, raw[k].ino, raw[k].type))
        return found

    def walk(self) -> Iterator[Entry]:
        """Every name, parents before children, directories depth first in the image's order. Failure (FORMAT) when a
        directory is its own ancestor or in the tree twice."""
        seen = {self.root_ino}
        todo = [("", self.root_ino)]
        yield Entry("/", self.getattr(self.root_ino))
        while todo:
            parent, dir_ino = todo.pop()
            below = []
            for one in self.listdir(dir_ino):
                attr = self.getattr(one.ino)
                path = f"{parent}/{one.name}"
                yield Entry(path, attr)
                if stat.S_ISDIR(attr.mode):
                    if one.ino in seen:
                        raise Failure(f"{self.path}: directory {path} is in the tree twice", Cause.FORMAT)
                    seen.add(one.ino)
                    below.append((path, one.ino))
            todo.extend(reversed(below))

    def readlink(self, ino: int) -> str:
        buf = ffi.new("char[4096]")
        size = _ensure(lib.vnd_rafs_readlink(self._handle, ino, buf, 4096))
        return os.fsdecode(bytes(ffi.buffer(buf, size)))

    def xattrs(self, ino: int) -> dict[str, bytes]:
        names = _sized(lambda buf, size: lib.vnd_rafs_listxattr(self._handle, ino, buf, size))
        found = {}
        for raw in names.split(b"\0"):
            if raw:
                found[os.fsdecode(raw)] = self._xattr(ino, raw)
        return found

    def _xattr(self, ino: int, name: bytes) -> bytes:
        return _sized(lambda buf, size: lib.vnd_rafs_getxattr(self._handle, ino, name, buf, size))

    def chunks(self, ino: int) -> Iterator[Chunk]:
        """Chunks of a regular file in file order."""
        raw = ffi.new("vnd_chunk_info[]", _CHUNKS)
        first = 0
        while got := _ensure(lib.vnd_rafs_chunks(self._handle, ino, first, raw, _CHUNKS)):
            first += got
            for k in range(got):
                c = raw[k]
                digest = bytes(ffi.buffer(c.digest)) if c.digest_known else None
                yield Chunk(
                    c.file_off,
                    c.blob_index,
                    c.chunk_index,
                    c.coff,
                    c.csize_bytes,
                    c.uoff,
                    c.usize_bytes,
                    c.flags,
                    digest,
                )

    def read(self, ino: int, offset: int = 0, length: int | None = None) -> bytes:
        """File bytes, verified, through the store; blocks until they are there. None: to the end."""
        if length is None:
            length = max(0, self.getattr(ino).size_bytes - offset)
        return self.image.read(ino, offset, length)

    def prefetch(self) -> list[int]:
        """Inodes that the image asks to prefetch."""
        inos = ffi.new("uint64_t[]", min(max(self.info.prefetch_count, 1), _PREFETCH_MAX))
        got = _ensure(lib.vnd_rafs_prefetch(self._handle, inos, len(inos)))
        return [int(inos[k]) for k in range(got)]

    def check(self, max_faults: int = 100) -> list[str]:
        """Walks everything: one line per fault, at most max_faults of them. The digests of RAFS v5's inodes are not
        looked at: list_wrong_digests (reader/digests.py) does that."""
        room = max_faults * _FAULT_BYTES
        out = ffi.new("char[]", room)
        count = _ensure(lib.vnd_rafs_check(self._handle, max_faults, out, room))
        raw: bytes = ffi.string(out)
        text = raw.decode("utf-8", "replace")
        lines = text.split("\n") if text else []
        if count > len(lines):
            lines.append(f"and {count - len(lines)} more faults")
        return lines

    def digest(self, ino: int) -> bytes | None:
        """The digest that RAFS v5 stores of an inode; None in other images."""
        out = ffi.new("uint8_t[32]")
        rc = lib.vnd_rafs_digest(self._handle, ino, out)
        if rc == -errno.ENODATA:
            return None
        _ensure(rc)
        return bytes(ffi.buffer(out))


def _ensure(rc: int) -> int:
    if rc < 0:
        raise OSError(-rc, os.strerror(-rc))
    return rc


def _sized(call: "Callable[[Any, int], int]") -> bytes:
    """Asks a C call for the length, then for the bytes."""
    size = _ensure(call(ffi.NULL, 0))
    if not size:
        return b""
    buf = ffi.new("char[]", size)
    got = _ensure(call(buf, size))
    if got != size:
        raise OSError(errno.EIO, "changed while it was read")
    return bytes(ffi.buffer(buf, size))
