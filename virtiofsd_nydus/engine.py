"""Typed face of the C engine (csrc/vnd.h). No C pointer leaves this module except as an opaque handle.

Light: loaded before the daemon answers RUNNING. Objects are closed explicitly, children before parents; nothing is
left to the garbage collector, because C threads do not wait for it. A closed object's handle is None, which cffi
refuses: what uses it too late gets a TypeError, where a null pointer would end the process.
"""

import errno
import os

from virtiofsd_nydus._engine import ffi as ffi
from virtiofsd_nydus._engine import lib as lib
from virtiofsd_nydus.cffi_types import realize_types
from virtiofsd_nydus.errors import Cause, Failure

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import Any

STRUCTS = realize_types(ffi, lib)  # before any thread is started
ERR_MAX: int = lib.VND_ERR_MAX
SESSION_RAFS: int = lib.VND_SESSION_RAFS
SESSION_MIXED: int = lib.VND_SESSION_MIXED
WAITING_MAX = 1024
FILES_SLACK = 64
INODES_AT_ONCE = 4096
EVENT_WAIT_MS = 1000
SECCOMP_MODES = ("none", "log", "trap", "kill")  # by their numbers in enum vnd_seccomp

_STATS = (
    "fuse_requests",
    "fuse_errors",
    "read_bytes",
    "hits",
    "parked",
    "expired",
    "pool_reads",
    "fetch_jobs",
    "fetched_bytes",
    "fetched_chunks",
    "verified_chunks",
    "digest_failures",
    "prefetch_bytes",
    "ring_errors",
    "oldest_wait_us",
)


def text_of(buffer: "Any") -> str:
    """The NUL-terminated line in a C buffer."""
    line: bytes = ffi.string(buffer)
    return line.decode("utf-8", "replace")


def require(ok: object, err: "Any", cause: "Cause" = Cause.IO) -> None:
    """Raises the engine's own error line unless ok."""
    if not ok:
        raise Failure(text_of(err) or "the engine is out of memory", cause)


def reduce_privileges() -> str:
    """Root gives up what serving does not need, for this thread and all that come after it; a line for what could not
    be given up, or "". After RLIMIT_NOFILE is raised, before any other thread (csrc/vnd.h)."""
    err = ffi.new("char[]", ERR_MAX)
    lib.vnd_privilege_reduce(err, ERR_MAX)
    return text_of(err)


def default_seccomp(otherwise: str) -> str:
    """The mode that the environment asks for (tests run everything in mode trap), else otherwise."""
    mode = os.environ.get("VIRTIOFSD_NYDUS_SECCOMP", "")
    return mode if mode in SECCOMP_MODES else otherwise


class MountStats:
    """vnd_mount_stats: what guests did with one image. Lists are by nydusd's numbers and buckets."""

    __slots__ = (
        "errors",
        "hits",
        "read_bytes",
        "read_latencies",
        "read_latency_us",
        "read_sizes",
        "reads_at_once",
        "reads_waited",
    )

    def __init__(self, raw: "Any") -> None:
        self.hits, self.errors = list(raw.fops.hits), list(raw.fops.errors)
        self.read_sizes, self.read_latencies = list(raw.fops.read_sizes), list(raw.read_latencies)
        self.read_latency_us: int = raw.read_latency_us
        self.read_bytes: int = raw.read_bytes
        self.reads_at_once: int = raw.reads_at_once
        self.reads_waited: int = raw.reads_waited


class FileStats:
    """vnd_file_stats: what one inode was asked for. first_read: seconds and nanoseconds since 1970."""

    __slots__ = ("data_read", "errors", "first_read", "hits", "ino", "read_sizes", "reads")

    def __init__(self, raw: "Any") -> None:
        self.ino: int = raw.ino
        self.data_read: int = raw.data_read
        self.reads: int = raw.reads
        self.first_read: tuple[int, int] = (raw.first_read_s, raw.first_read_ns)
        self.hits, self.errors, self.read_sizes = list(raw.hits), list(raw.errors), list(raw.read_sizes)


class Event:
    """One line that the engine wants said. level is a logging level, time_us CLOCK_REALTIME microseconds."""

    __slots__ = ("cause", "level", "repeated", "text", "time_us")

    def __init__(self, time_us: int, level: int, cause: "Cause", repeated: int, text: str) -> None:
        self.time_us, self.level, self.cause, self.repeated, self.text = time_us, level, cause, repeated, text

    def fields(self) -> "dict[str, object]":
        """What a log line says beside the text."""
        found: dict[str, object] = {}
        if self.cause:
            found["cause"] = self.cause.name.lower()
        if self.repeated:
            found["repeated"] = self.repeated
        return found


class Engine:
    """One engine: everything in C hangs off it.

    read_deadline_ms: a guest read that misses ends in EIO after it.
    seccomp: what becomes of a system call that a serving thread must not make: one of SECCOMP_MODES.
    poll_us: how long a queue's thread looks for requests before it sleeps, at most; 0: it sleeps at once.
    """

    def __init__(
        self,
        *,
        read_deadline_ms: int = 0,
        pool_threads: int = 0,
        sync_interval_ms: int = 0,
        poll_us: int = 0,
        allow_unverified: bool = False,
        seccomp: str = "",
    ) -> None:
        self.seccomp = seccomp or default_seccomp("none")
        cfg = ffi.new(
            "vnd_engine_cfg *",
            {
                "read_deadline_ms": read_deadline_ms,
                "pool_threads": pool_threads,
                "sync_interval_ms": sync_interval_ms,
                "poll_us": poll_us,
                "allow_unverified": allow_unverified,
                "seccomp": SECCOMP_MODES.index(self.seccomp),
            },
        )
        self.handle = lib.vnd_engine_new(cfg)
        if self.handle == ffi.NULL:
            raise Failure("cannot start the engine: out of memory or threads", Cause.IO)
        self._event = ffi.new("vnd_event *")

    def next_event(self, timeout_ms: int) -> Event | None:
        """The next line, None after timeout_ms without one. One caller. Raises EOFError once shut down."""
        ev = self._event
        rc: int = lib.vnd_event_next(self.handle, ev, timeout_ms)
        if rc == 0:
            return Event(ev.time_us, ev.level, Cause(ev.cause), ev.repeated, text_of(ev.text))
        if rc == -errno.ESHUTDOWN:
            raise EOFError
        return None

    def events(self) -> "Iterator[Event]":
        """Every line from here on, until the engine is shut down and the last one was given. One caller."""
        while True:
            try:
                event = self.next_event(EVENT_WAIT_MS)
            except EOFError:
                return
            if event is not None:
                yield event

    def waiting_events(self) -> "Iterator[Event]":
        """The lines that wait now; of an engine that was shut down, too. One caller."""
        try:
            while (event := self.next_event(0)) is not None:
                yield event
        except EOFError:
            return

    def stats(self) -> dict[str, int]:
        """Counters since start, by the names of vnd_stats."""
        out = ffi.new("vnd_stats *")
        lib.vnd_engine_stats(self.handle, out)
        return {name: getattr(out, name) for name in _STATS}

    def waiting(self) -> "list[tuple[int, int, int, int]]":
        """Requests that wait for data: (nodeid, opcode, unique, microseconds so far), WAITING_MAX at most."""
        out = ffi.new("vnd_waiting[]", WAITING_MAX)
        count: int = lib.vnd_engine_waiting(self.handle, out, WAITING_MAX)
        return [(one.nodeid, one.opcode, one.unique, one.wait_us) for one in out[0:count]]

    def prefetch_pending(self, tag: int) -> bool:
        """Whether anything of the tag is queued or being fetched."""
        return bool(lib.vnd_prefetch_pending(self.handle, tag))

    def cancel_prefetch(self, tag: int) -> None:
        lib.vnd_prefetch_cancel(self.handle, tag)

    def shutdown(self) -> None:
        """Ends the waits of the fetch and log threads; free devices first. Idempotent."""
        lib.vnd_engine_shutdown(self.handle)

    def close(self) -> None:
        """Frees it; stores, images and devices must be closed and all threads out of it."""
        handle, self.handle = self.handle, None
        if handle is not None:
            lib.vnd_engine_free(handle)


class Store:
    """One cache directory. compressed: chunks are kept as their blobs store them, where that is possible."""

    def __init__(self, engine: Engine, work_dir: str, *, compressed: bool = False) -> None:
        err = ffi.new("char[]", ERR_MAX)
        self.handle = lib.vnd_store_open(engine.handle, os.fsencode(work_dir), compressed, err, ERR_MAX)
        require(self.handle != ffi.NULL, err)

    def close(self) -> None:
        handle, self.handle = self.handle, None
        if handle is not None:
            lib.vnd_store_free(handle)


class BlobInfo:
    """One entry of an image's blob table; key identifies the store's blob in jobs (0 without a store)."""

    __slots__ = (
        "chunk_count",
        "chunk_size_bytes",
        "ci_compressor",
        "ci_csize_bytes",
        "ci_offset",
        "ci_usize_bytes",
        "compressed_size_bytes",
        "compressor",
        "digester",
        "features",
        "id",
        "index",
        "key",
        "prefetch_end",
        "uncompressed_size_bytes",
    )

    def __init__(self, raw: "Any", key: int) -> None:
        self.id = text_of(raw.id)
        self.key = key
        self.index: int = raw.index
        self.chunk_size_bytes: int = raw.chunk_size_bytes
        self.chunk_count: int = raw.chunk_count
        self.compressor: int = raw.compressor
        self.digester: int = raw.digester
        self.features: int = raw.features
        self.compressed_size_bytes: int = raw.compressed_size_bytes
        self.uncompressed_size_bytes: int = raw.uncompressed_size_bytes
        self.ci_offset: int = raw.ci_offset  # of blob.meta in the blob, v6
        self.ci_csize_bytes: int = raw.ci_csize_bytes
        self.ci_usize_bytes: int = raw.ci_usize_bytes
        self.ci_compressor: int = raw.ci_compressor
        self.prefetch_end: int = raw.prefetch_end  # v5: stored bytes up to here are to be fetched at mount


class Rafs:
    """An opened bootstrap. store None: metadata only. blob_id: real id of an inlined single blob."""

    def __init__(self, engine: Engine, bootstrap: str, store: Store | None = None, blob_id: str | None = None) -> None:
        err = ffi.new("char[]", ERR_MAX)
        cause = ffi.new("int *")
        self.handle = lib.vnd_rafs_open(
            engine.handle,
            os.fsencode(bootstrap),
            ffi.NULL if blob_id is None else blob_id.encode(),
            ffi.NULL if store is None else store.handle,
            cause,
            err,
            ERR_MAX,
        )
        require(self.handle != ffi.NULL, err, Cause(cause[0]))
        self._info = ffi.new("vnd_rafs_info *")
        lib.vnd_rafs_info_get(self.handle, self._info)

    def info(self) -> dict[str, int]:
        """The superblock's facts, by the names of vnd_rafs_info."""
        return {name: getattr(self._info, name) for name, _ in ffi.typeof("vnd_rafs_info").fields}

    def blobs(self) -> list[BlobInfo]:
        found = []
        raw = ffi.new("vnd_blob_info *")
        for index in range(self._info.blob_count):
            if lib.vnd_rafs_blob_info(self.handle, index, raw) == 0:
                key = int(ffi.cast("uintptr_t", lib.vnd_rafs_blob(self.handle, index)))
                found.append(BlobInfo(raw, key))
        return found

    def stats(self) -> "MountStats":
        """What guests did with it, since it was opened."""
        out = ffi.new("vnd_mount_stats *")
        lib.vnd_rafs_stats(self.handle, out)
        return MountStats(out)

    def count_files(self, on: bool) -> None:
        """Whether single inodes are counted too, from now on."""
        lib.vnd_rafs_count_files(self.handle, on)

    def file_stats(self) -> "list[FileStats]":
        """Counts of each inode that an operation succeeded on. An inode may have several entries, one for each thread
        that served it."""
        count: int = lib.vnd_rafs_file_stats(self.handle, ffi.NULL, 0)
        room = count + FILES_SLACK  # what is new meanwhile
        out = ffi.new("vnd_file_stats[]", room)
        count = min(room, lib.vnd_rafs_file_stats(self.handle, out, room))
        return [FileStats(one) for one in out[0:count]]

    def latest_read(self) -> set[int]:
        """Inodes that were read since the last call."""
        found: set[int] = set()
        out = ffi.new("uint64_t[]", INODES_AT_ONCE)
        while count := lib.vnd_rafs_latest_read(self.handle, out, INODES_AT_ONCE):
            found.update(out[0:count])
        return found

    def bootstrap_digest(self) -> str:
        """SHA-256 of the bootstrap as it is mapped, in hexadecimal. Reads all of it."""
        out = ffi.new("uint8_t[32]")
        if lib.vnd_rafs_bootstrap_digest(self.handle, out):
            raise Failure("the bootstrap's digest cannot be made", Cause.IO)
        return bytes(ffi.buffer(out)).hex()

    def ready_map(self, index: int) -> tuple[int, bytes]:
        """Chunks of a blob and which are ready: chunk i is bit i % 8 of byte i // 8. (0, b"") while its chunk table is
        unknown."""
        blob = lib.vnd_rafs_blob(self.handle, index)
        count: int = lib.vnd_blob_ready_map(blob, ffi.NULL, 0)
        bits = ffi.new("uint8_t[]", (count + 7) // 8)
        lib.vnd_blob_ready_map(blob, bits, len(bits))
        return count, bytes(ffi.buffer(bits))

    def set_amplify(self, count: int) -> None:
        """How far a miss is extended, compressed bytes; 0 = not at all."""
        for index in range(self._info.blob_count):
            blob = lib.vnd_rafs_blob(self.handle, index)
            if blob != ffi.NULL:
                lib.vnd_blob_set_amplify(blob, count)

    def prefetch_blob(self, index: int, tag: int = 0) -> None:
        """Asks for every chunk of a blob, behind all demand."""
        blob = lib.vnd_rafs_blob(self.handle, index)
        if blob != ffi.NULL:
            lib.vnd_prefetch(blob, 0, 0, tag)

    def prefetch_chunks(self, index: int, first: int, count: int, tag: int) -> None:
        """Prefetches chunks [first, first + count)."""
        blob = lib.vnd_rafs_blob(self.handle, index)
        if blob != ffi.NULL and count:
            lib.vnd_prefetch(blob, first, count, tag)

    def chunks_before(self, index: int, end: int) -> int:
        """Chunks [0, this) hold all that begin before byte end of the stored blob; 0 while its table is unknown."""
        count: int = lib.vnd_blob_chunks_before(lib.vnd_rafs_blob(self.handle, index), end)
        return count

    def open_data(self, index: int) -> int:
        """A descriptor, the caller's, of the cache file with the blob's bytes; -1: there is none."""
        fd: int = lib.vnd_blob_data_file(lib.vnd_rafs_blob(self.handle, index))
        return max(fd, -1)

    def ready_range(self, index: int, first: int, count: int) -> tuple[int, int]:
        """(ready, total) of chunks [first, first + count) of a blob; total is 0 while its chunk table is unknown."""
        total = ffi.new("uint64_t *")
        ready: int = lib.vnd_blob_ready_range(lib.vnd_rafs_blob(self.handle, index), first, count, total)
        return ready, total[0]

    def ready_chunks(self, index: int) -> tuple[int, int]:
        """(ready, total) chunks of a blob; total is 0 while its chunk table is unknown."""
        total = ffi.new("uint64_t *")
        ready: int = lib.vnd_blob_ready(lib.vnd_rafs_blob(self.handle, index), total)
        return ready, total[0]

    def read(self, ino: int, offset: int, length: int) -> bytes:
        """File bytes through the same path as a guest's; blocks until they are there."""
        buf = ffi.new("uint8_t[]", length)
        got: int = lib.vnd_rafs_read(self.handle, ino, offset, buf, length)
        if got < 0:
            raise OSError(-got, os.strerror(-got))
        return bytes(ffi.buffer(buf, got))

    def close(self) -> None:
        """Frees it; it must be mounted nowhere."""
        handle, self.handle = self.handle, None
        if handle is not None:
            lib.vnd_rafs_free(handle)


def create_ledger() -> int:
    """Memory for what a host directory must not lose with its process: a descriptor, the caller's. Raises Failure."""
    fd: int = lib.vnd_ledger_create()
    if fd < 0:
        raise Failure(f"no memory that outlives the process: {os.strerror(-fd)}", Cause.IO)
    return fd


class Disk:
    """An image as one flat disk and as its devices, as EROFS reads them. The image must outlive it."""

    def __init__(self, image: Rafs) -> None:
        err = ffi.new("char[]", ERR_MAX)
        self.handle = lib.vnd_disk_new(image.handle, err, ERR_MAX)
        require(self.handle != ffi.NULL, err, Cause.FORMAT)
        self.size_bytes: int = lib.vnd_disk_bytes(self.handle)

    def close(self) -> None:
        """Frees it; it must be mounted nowhere, and no device may have it. Idempotent."""
        handle, self.handle = self.handle, None
        if handle is not None:
            lib.vnd_disk_free(handle)


class Passthrough:
    """A host directory as a read-write file system. keep_top: nothing is made or removed in it itself."""

    def __init__(self, engine: Engine, source: str, *, keep_top: bool = False) -> None:
        err = ffi.new("char[]", ERR_MAX)
        self.handle = lib.vnd_passthrough_new(
            engine.handle, os.fsencode(source), lib.VND_PASSTHROUGH_KEEP_TOP if keep_top else 0, err, ERR_MAX
        )
        require(self.handle != ffi.NULL, err)

    def keep(self, fd: int, owners: "Iterable[int]") -> int:
        """Before it is mounted: keeps what another process must find again in the memory that create_ledger made, and
        goes on with what was left there for these front-ends. How many open files could not be opened again. fd stays
        the caller's."""
        numbers = list(owners)
        err = ffi.new("char[]", ERR_MAX)
        lost: int = lib.vnd_passthrough_keep(self.handle, fd, numbers, len(numbers), err, ERR_MAX)
        if lost < 0:
            raise Failure(text_of(err) or os.strerror(-lost), Cause.IO)
        return lost

    def drop_idle(self) -> None:
        """Closes every descriptor that no open file needs: the host may want to unmount what lies below."""
        lib.vnd_passthrough_drop_idle(self.handle)

    def stats(self) -> dict[str, int]:
        """Counts, by the names of vnd_passthrough_stats."""
        out = ffi.new("vnd_passthrough_stats *")
        lib.vnd_passthrough_stats_get(self.handle, out)
        return {name: getattr(out, name) for name in ("inodes", "files", "cached_fds")}

    def close(self) -> None:
        """Frees it; it must be mounted nowhere."""
        handle, self.handle = self.handle, None
        if handle is not None:
            lib.vnd_passthrough_free(handle)


class Vfs:
    """The mount table that the sessions of a daemon share. kind: SESSION_RAFS or SESSION_MIXED."""

    def __init__(self, engine: Engine, kind: int) -> None:
        self.kind = kind
        self.handle = lib.vnd_vfs_new(engine.handle, kind)
        if self.handle == ffi.NULL:
            raise Failure("cannot make the mount table: out of memory", Cause.IO)

    def mount_rafs(self, path: str, image: Rafs) -> None:
        self._check(lib.vnd_vfs_mount_rafs(self.handle, path.encode(), image.handle), path)

    def mount_disk(self, path: str, disk: Disk) -> None:
        self._check(lib.vnd_vfs_mount_disk(self.handle, path.encode(), disk.handle), path)

    def mount_passthrough(self, path: str, directory: Passthrough) -> None:
        self._check(lib.vnd_vfs_mount_passthrough(self.handle, path.encode(), directory.handle), path)

    def umount(self, path: str) -> None:
        """Returns once no request is inside it."""
        self._check(lib.vnd_vfs_umount(self.handle, path.encode()), path)

    @property
    def next_serial(self) -> int:
        """The number the next mount gets; inode numbers hold it."""
        serial: int = lib.vnd_vfs_next_serial(self.handle)
        return serial

    @next_serial.setter
    def next_serial(self, serial: int) -> None:
        if lib.vnd_vfs_set_next_serial(self.handle, serial):
            raise Failure(f"mount number {serial} is out of order", Cause.FORMAT)

    def directories(self) -> list[tuple[int, int, str]]:
        """(inode number, its parent's, name) of each directory that only leads to mounts, ascending."""
        found: list[tuple[int, int, str]] = []
        raw = ffi.new("vnd_directory *")
        while lib.vnd_vfs_directory(self.handle, len(found), raw) == 0:
            found.append((raw.ino, raw.parent, os.fsdecode(ffi.string(raw.name))))
        return found

    def restart(self) -> None:
        """While nothing is mounted: numbers of mounts and directories begin anew. Raises OSError."""
        self._check(lib.vnd_vfs_restart(self.handle), "/")

    def add_directory(self, ino: int, parent: int, name: str) -> None:
        """Makes one of directories() again, with its number. Raises OSError."""
        raw = ffi.new("vnd_directory *", {"ino": ino, "parent": parent, "name": os.fsencode(name)})
        self._check(lib.vnd_vfs_add_directory(self.handle, raw), name)

    @staticmethod
    def _check(rc: int, path: str) -> None:
        if rc:
            raise OSError(-rc, os.strerror(-rc), path)

    def close(self) -> None:
        handle, self.handle = self.handle, None
        if handle is not None:
            lib.vnd_vfs_free(handle)
