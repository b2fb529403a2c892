"""A cache directory seen from outside, for people: what lies in it, what is left over, whether its bytes are right.

Reads Nydus's files (ID.blob.data or, compressed, ID.blob.raw; ID.blob.data.chunk_map; docs/rafs-format.md 6) and our
side files (csrc/cache/cache.h says how they are laid out). Safe beside running daemons: nothing is written, and only
files that no daemon has open are removed.
"""

import errno
import fcntl
import mmap
import os
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from virtiofsd_nydus.errors import Cause, Failure

T = TypeVar("T")

SIDE_DIR = ".virtiofsd-nydus"
DATA_SUFFIX = ".blob.data"
STORED_SUFFIX = ".blob.raw"
MAP_SUFFIX = ".blob.data.chunk_map"
META_SUFFIX = ".blob.meta"
SIDE_SUFFIX = ".vnd"
STORED_SIDE_SUFFIX = ".raw.vnd"
MAP_HEADER_BYTES = 4096
STALE_TMP_S = 60.0  # a side file is made whole within milliseconds: an older unfinished one has no maker any more
READ_MAX_BYTES = 256 << 20  # no chunk is larger

# csrc/cache/cache.h: struct side_header, struct side_bound
_HEADER = struct.Struct("=8sII40sQQQQQQII")
_HEADER_BYTES = 4096
_EPOCH_OFFSET = 88
_BOUND = struct.Struct("=32sQII")
_MAGIC = b"VNDSIDE\1"
_VERSION = 1
_NO_DIGEST = bytes(32)
# csrc/cache/claim.h
_CLAIM_INIT = 1 << 41
_CLAIM_ATTACH = (1 << 41) + 1
_FLOCK = struct.Struct("hhqqi4x")


@dataclass(frozen=True, slots=True, order=True)
class Kept:
    """One data file of a cache directory. compressed: it holds the blob's chunks as they are stored.

    id: the blob's id; ID.NAME where another table of the same blob had the files of that name (csrc/cache/cache.h).
    """

    id: str
    compressed: bool = False

    @property
    def blob_id(self) -> str:
        return self.id.partition(".")[0]

    @property
    def data_name(self) -> str:
        return self.id + (STORED_SUFFIX if self.compressed else DATA_SUFFIX)

    @property
    def side_name(self) -> str:
        return self.id + (STORED_SIDE_SUFFIX if self.compressed else SIDE_SUFFIX)


@dataclass(frozen=True, slots=True)
class BlobUse:
    """One data file's share of a cache directory.

    size_bytes: of the whole blob, as the file holds it; disk_bytes: what its files take. chunks: of the blob, None
    while no daemon of ours has noted it. trusted: chunks whose digest was found right (T), durable: those of them that
    are known to outlive a power cut; marked: chunks that Nydus's chunk map says are there (R). None: no such file, or
    not of this data file.
    """

    id: str
    compressed: bool
    size_bytes: int
    disk_bytes: int
    chunks: int | None
    trusted: int | None
    durable: int | None
    marked: int | None
    meta_bytes: int | None


@dataclass(slots=True)
class Verdict:
    """What verify found in one blob. unknown: chunks that are there and for which no digest is known."""

    id: str
    right: int = 0
    unknown: int = 0
    bytes: int = 0
    faults: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Bound:
    """What a chunk is bound to: the bytes [offset, offset + len_bytes) of the data file, decoded if decode, are
    usize_bytes and have this digest."""

    digest: bytes
    offset: int
    len_bytes: int
    usize_bytes: int
    decode: bool


class SideFile:
    """A mapped side file. Raises ValueError for a file that is none."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as stream:
            status = os.fstat(stream.fileno())
            if status.st_size < _HEADER_BYTES:
                raise ValueError(f"{path.name} is no side file")
            self._map = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        (magic, version, self.chunks, boot_id, _, self.ino, _, self.size_bytes, _, _, self.retired, _) = (
            _HEADER.unpack_from(self._map)
        )
        self._bits_bytes = (self.chunks + 63) // 64 * 8
        self._bound_at = (_HEADER_BYTES + 2 * self._bits_bytes + 4095) // 4096 * 4096
        if (magic, version) != (_MAGIC, _VERSION) or len(self._map) < self._bound_at + self.chunks * _BOUND.size:
            self._map.close()
            raise ValueError(f"{path.name} is no side file")
        self._same_boot = boot_id.rstrip(b"\0") == _boot_id()

    def close(self) -> None:
        self._map.close()

    @property
    def epoch(self) -> int:
        """Odd while chunks are being invalidated."""
        return int.from_bytes(self._map[_EPOCH_OFFSET : _EPOCH_OFFSET + 8], "little")

    def durable(self) -> int:
        """The map D as a number: bit i is chunk i."""
        at = _HEADER_BYTES + self._bits_bytes
        return int.from_bytes(self._map[at : at + self._bits_bytes], "little")

    def trusted(self) -> int:
        """The map T; after a reboot only what is durable counts."""
        bits = int.from_bytes(self._map[_HEADER_BYTES : _HEADER_BYTES + self._bits_bytes], "little")
        return bits if self._same_boot else bits & self.durable()

    def is_trusted(self, index: int) -> bool:
        return bool(self._map[_HEADER_BYTES + index // 8] >> index % 8 & 1)

    def bound(self, index: int) -> Bound | None:
        digest, offset, length, state = _BOUND.unpack_from(self._map, self._bound_at + index * _BOUND.size)
        return Bound(digest, offset, length, state >> 2 or length, bool(state & 2)) if state else None


class CacheDir:
    """A cache directory; only: of these blobs alone. Raises Failure when there is none."""

    def __init__(self, path: Path, only: set[str] | None = None) -> None:
        if not path.is_dir():
            raise Failure(f"{path}: no such cache directory", Cause.IO)
        self.path = path
        self._only = only

    def kept(self) -> list[Kept]:
        files = [one.name for one in self.path.iterdir() if not one.is_symlink() and one.is_file()]
        return sorted(
            [
                Kept(name.removesuffix(suffix), suffix == STORED_SUFFIX)
                for name in files
                for suffix in (DATA_SUFFIX, STORED_SUFFIX)
                if name.endswith(suffix) and self._is_wanted(name)
            ]
        )

    def _is_wanted(self, name: str) -> bool:
        return self._only is None or name.partition(".")[0] in self._only

    def find(self, wanted: str) -> list[Kept]:
        """The files of the blob whose id begins with wanted, those named after a table of chunks too (ID.NAME)."""
        found = [one for one in self.kept() if one.id.startswith(wanted)]
        ids = {one.blob_id for one in found}
        if not found:
            raise Failure(f"{self.path}: no blob {wanted!r} in this cache", Cause.MISSING)
        if len(ids) > 1:
            raise Failure(f"{self.path}: {wanted!r} begins the ids of {len(ids)} blobs", Cause.MISSING)
        return found

    def use(self, kept: Kept) -> BlobUse | None:
        """None: the file was removed meanwhile."""
        try:
            data = (self.path / kept.data_name).stat()
        except FileNotFoundError:
            return None
        chunks = trusted = durable = None
        blob_id = kept.id
        with self._side(kept) as side:
            if side is not None:
                chunks, trusted, durable = side.chunks, side.trusted().bit_count(), side.durable().bit_count()
        marked = self._marked(blob_id)
        disk = data.st_blocks * 512
        for beside in (
            self.path / f"{blob_id}{MAP_SUFFIX}",
            self.path / f"{blob_id}{META_SUFFIX}",
            self.path / SIDE_DIR / kept.side_name,
        ):
            disk += _status(beside, lambda status: status.st_blocks * 512) or 0
        return BlobUse(
            blob_id,
            kept.compressed,
            data.st_size,
            disk,
            chunks,
            trusted,
            durable,
            None if marked is None else marked.bit_count(),
            _status(self.path / f"{blob_id}{META_SUFFIX}", lambda status: status.st_size),
        )

    def uses(self) -> list[BlobUse]:
        return [found for one in self.kept() if (found := self.use(one)) is not None]

    # ---- left-overs

    def collect(self, *, dry_run: bool = False, now: float | None = None) -> list[Path]:
        """Removes what is left over; returns the paths. Files named after a table, where those of the blob's own name
        are gone: programs that remove a blob's files by its id do not know of them. Side files whose blob is gone, and
        unfinished ones whose maker is gone."""
        side_dir = self.path / SIDE_DIR
        now = time.time() if now is None else now
        kept = self.kept()
        there = {one.id for one in kept}
        gone = [
            path
            for one in kept
            if one.blob_id != one.id and one.blob_id not in there
            for path in self._sweep_named(one, dry_run)
        ]
        for one in sorted(side_dir.iterdir()) if side_dir.is_dir() else ():
            if one.name.endswith(".tmp"):
                changed = _status(one, lambda status: status.st_mtime)
                stale = changed is not None and now - changed > STALE_TMP_S
                if stale and not dry_run:
                    one.unlink(missing_ok=True)
            else:
                stale = one.name.endswith(SIDE_SUFFIX) and self._sweep_side(one, dry_run)
            if stale:
                gone.append(one)
        return gone

    def _sweep_named(self, kept: Kept, dry_run: bool) -> list[Path]:
        """The files of one NAME, unless a daemon has them open. Without a side file that is not known: they stay."""
        side = self.path / SIDE_DIR / kept.side_name
        files = [self.path / kept.data_name, self.path / f"{kept.id}{MAP_SUFFIX}", side]
        with _unused(side) as unused:
            if not unused:
                return []
            files = [one for one in files if one.exists()]
            for one in files if not dry_run else ():
                one.unlink(missing_ok=True)
            return files

    def _sweep_side(self, path: Path, dry_run: bool) -> bool:
        compressed = path.name.endswith(STORED_SIDE_SUFFIX)
        blob_id = path.name.removesuffix(STORED_SIDE_SUFFIX if compressed else SIDE_SUFFIX)
        data = self.path / Kept(blob_id, compressed).data_name
        if data.exists():
            return False
        with _unused(path) as unused:  # else a daemon reads on in the file that was removed
            if not unused or data.exists():
                return False
            if not dry_run:
                path.unlink()
            return True

    # ---- are the bytes right

    def verify(self, kept: Kept) -> Verdict:
        """Hashes every chunk that is there, by our map or by Nydus's, and compares with what it is bound to. A chunk
        that is invalidated meanwhile is left out."""
        verdict = Verdict(kept.id)
        marked = self._marked(kept.id) or 0
        try:
            data = os.open(self.path / kept.data_name, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return verdict
        try:
            with self._side(kept) as side:
                if side is None:
                    verdict.unknown = marked.bit_count()
                    return verdict
                for index in _bits(side.trusted() | marked & (1 << side.chunks) - 1):
                    self._verify_chunk(verdict, side, data, index)
        finally:
            os.close(data)
        return verdict

    @staticmethod
    def _verify_chunk(verdict: Verdict, side: SideFile, data: int, index: int) -> None:
        for _ in range(2):
            epoch, bound = side.epoch, side.bound(index)
            if bound is None or bound.digest == _NO_DIGEST or not 0 < bound.len_bytes <= READ_MAX_BYTES:
                verdict.unknown += 1
                return
            trusted = side.is_trusted(index)
            found = _read(data, bound.offset, bound.len_bytes)
            if any(_digest_right(plain, bound.digest) for plain in _decoded(found, bound)):
                verdict.right += 1
                verdict.bytes += bound.usize_bytes
                return
            if not epoch & 1 and side.epoch == epoch:
                who = "trusted" if trusted else "marked in Nydus's chunk map"
                verdict.faults.append(f"chunk {index}, {bound.len_bytes} bytes at {bound.offset}, {who}: wrong bytes")
                return

    # ---- files

    @contextmanager
    def _side(self, kept: Kept) -> "Iterator[SideFile | None]":
        """The side file, if there is one and it speaks of the present data file."""
        side = None
        try:
            side = SideFile(self.path / SIDE_DIR / kept.side_name)
        except (OSError, ValueError):
            pass
        ino = _status(self.path / kept.data_name, lambda status: status.st_ino)
        try:
            yield side if side is not None and side.ino == ino and not side.retired else None
        finally:
            if side is not None:
                side.close()

    def _marked(self, blob_id: str) -> int | None:
        """Nydus's chunk map, bit i for chunk i; None without one."""
        try:
            raw = (self.path / f"{blob_id}{MAP_SUFFIX}").read_bytes()
        except OSError:
            return None
        if len(raw) <= MAP_HEADER_BYTES:
            return None
        return int.from_bytes(raw[MAP_HEADER_BYTES:].translate(_REVERSED), "little")


# Nydus puts the first chunk of a byte into its highest bit
_REVERSED = bytes(int(f"{value:08b}"[::-1], 2) for value in range(256))


def _boot_id() -> bytes:
    return Path("/proc/sys/kernel/random/boot_id").read_bytes().strip()


def _status(path: Path, read: Callable[[os.stat_result], T]) -> T | None:
    try:
        return read(path.lstat())
    except OSError:
        return None


def _lock(fd: int, at: int) -> bool:
    """An exclusive lock of one byte, with the open file; False: another process has it."""
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, at, 1, 0))
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        raise
    return True


@contextmanager
def _unused(side: Path) -> "Iterator[bool]":
    """Whether the side file is there and no daemon has it open. None comes in meanwhile, for the daemons' own locks are
    held: one that waits for them finds the file gone and makes another."""
    try:
        fd = os.open(side, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        yield False
        return
    try:
        yield _lock(fd, _CLAIM_INIT) and _lock(fd, _CLAIM_ATTACH) and _same_file(fd, side)
    finally:
        os.close(fd)  # lets go of the locks


def _same_file(fd: int, path: Path) -> bool:
    ino = _status(path, lambda status: (status.st_dev, status.st_ino))
    status = os.fstat(fd)
    return ino == (status.st_dev, status.st_ino)


def _bits(value: int) -> Iterator[int]:
    raw = value.to_bytes((value.bit_length() + 7) // 8, "little")
    for at, byte in enumerate(raw):
        for bit in range(8):
            if byte >> bit & 1:
                yield at * 8 + bit


def _read(fd: int, offset: int, length: int) -> bytes:
    """Shorter at the end of the file."""
    pieces = []
    while length and (piece := os.pread(fd, length, offset)):
        pieces.append(piece)
        offset, length = offset + len(piece), length - len(piece)
    return b"".join(pieces)


def _decoded(data: bytes, bound: Bound) -> Iterator[bytes]:
    """A chunk's bytes; the side file does not say by which of Nydus's codecs a compressed one is to be decoded."""
    if not bound.decode:
        yield data
        return
    import lz4.block
    import zstandard

    codecs: tuple[Callable[[bytes, int], bytes], ...] = (
        lambda raw, size: zstandard.ZstdDecompressor().decompress(raw, max_output_size=size),
        lambda raw, size: lz4.block.decompress(raw, uncompressed_size=size),
        lambda raw, size: zlib.decompressobj(wbits=31).decompress(raw, size),
    )
    for decode in codecs:
        with suppress(zstandard.ZstdError, lz4.block.LZ4BlockError, zlib.error, ValueError):
            yield decode(data, bound.usize_bytes)


def _digest_right(data: bytes, digest: bytes) -> bool:
    """The side file does not say which of Nydus's two digesters it was."""
    import hashlib

    import blake3

    return bool(blake3.blake3(data).digest() == digest or hashlib.sha256(data).digest() == digest)
