"""The daemon itself: one engine, one mount table, sockets and fetch threads, and the order they start and stop in.

Ready before connected: start() opens the sockets and is RUNNING before anything talks to a network or imports what
takes long; a thread does that afterwards (docs/architecture.md, start-up).
"""

import os
import select
import signal
import socket
import threading
import time

from virtiofsd_nydus import __version__
from virtiofsd_nydus import log as logs
from virtiofsd_nydus.daemon import metrics
from virtiofsd_nydus.daemon.api import ApiError, ApiServer, not_ready, unexpected, unsupported
from virtiofsd_nydus.daemon.prefetch import Prefetch, check_list
from virtiofsd_nydus.engine import SESSION_MIXED, SESSION_RAFS, Engine, Passthrough, Rafs, Store, Vfs
from virtiofsd_nydus.errors import Failure
from virtiofsd_nydus.net.health import RateLimit
from virtiofsd_nydus.storage.config import ImageConfig, parse_config
from virtiofsd_nydus.storage.pump import FetchPump
from virtiofsd_nydus.version import version_info
from virtiofsd_nydus.vhost.device import EngineDevice
from virtiofsd_nydus.vhost.server import VhostServer

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from virtiofsd_nydus.storage.backend import Backend

# nydusd's words, which clients match on
ALREADY_MOUNTED = "object or filesystem already exists"
NOT_MOUNTED = "object or filesystem doesn't exist"
ERRORS_MAX, ERRORS_MAX_BYTES = 500, 51200  # nydusd's bounds of its error events
QUEUES = 5  # hiprio and up to four request queues; the front-end uses as many as it has
STOP_TIMEOUT_S = 2.0  # how long a fetch thread stuck in its backend may hold up the end
LATE_TIMEOUT_S = 10.0  # how long what is loaded after RUNNING may, on a busy machine
SWITCH_INTERVAL_S = 0.0005  # a busy Python thread must not starve the fetch threads


def _shown_time(seconds: float) -> str:
    """As nydusd writes a time."""
    return f"{time.strftime('%Y-%m-%d %H:%M:%S', time.gmtime(seconds))}.{int(seconds % 1 * 1e9):09d} +00:00:00"


class Mount:
    """One image in the mount table."""

    __slots__ = (
        "_identity",
        "backend",
        "config",
        "image",
        "mounted_at",
        "path",
        "prefetch",
        "prefetch_files",
        "prefetch_limit",
        "serial",
        "source",
        "store",
    )

    def __init__(
        self,
        path: str,
        source: str,
        image: Rafs,
        store: Store,
        config: ImageConfig,
        backend: "Backend",
        serial: int,
        prefetch: Prefetch,
    ) -> None:
        self.path, self.source, self.image, self.store = path, source, image, store
        self.config, self.backend, self.serial, self.prefetch = config, backend, serial, prefetch
        self.prefetch_files: list[str] | None = None  # instead of what the image's table names
        self._identity = _identity(source)
        self.mounted_at = time.time()
        self.prefetch_limit = _rate_limit(config)

    def is_of(self, source: str) -> bool:
        """Whether that bootstrap is the one mounted here, in this file or in another of the same bytes."""
        import filecmp

        try:
            if _identity(self.source) != self._identity:
                return False  # overwritten since: what is mounted cannot be compared any more
            return _identity(source) == self._identity or filecmp.cmp(self.source, source, shallow=False)
        except OSError:
            return False


def _identity(path: str) -> "tuple[int, ...]":
    found = os.stat(path)  # noqa: PTH116
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _rate_limit(config: ImageConfig) -> RateLimit | None:
    rate = config.prefetch_bandwidth_bytes_s
    return RateLimit(rate) if rate else None


class Share:
    """One host directory in the mount table."""

    __slots__ = ("directory", "mounted_at", "path", "source")

    def __init__(self, path: str, source: str, directory: Passthrough) -> None:
        self.path, self.source, self.directory = path, source, directory
        self.mounted_at = time.time()


class Service:
    """The daemon. Construct, start(), wait(), stop()."""

    def __init__(
        self,
        log: logs.Log,
        *,
        instance_id: str | None = None,
        supervisor: str | None = None,
        read_deadline_ms: int = 0,
        allow_unverified: bool = False,
    ) -> None:
        self.log = log
        self.state = "INIT"
        self._id, self._supervisor = instance_id, supervisor
        self._exit_reader, self._exit_writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)  # a byte: end wait()
        self._lock = threading.Lock()  # mounts and unmounts, one at a time
        self._mounts: dict[str, Mount] = {}
        self._prefetch_tag = 0  # of the last mount; 0 is the engine's own
        self._late: list[Mount] | None = []  # mounts whose prefetch begins after RUNNING; None: it has begun
        self._shares: dict[str, Share] = {}
        self._changes: dict[str, dict[str, str]] = {}  # by mount point, what hot changes gave
        self._errors: list[str] = []  # the last ERRORS_MAX, of _error_count
        self._error_count = 0
        self.engine = Engine(read_deadline_ms=read_deadline_ms, allow_unverified=allow_unverified)
        self.pump = FetchPump(self.engine)
        self._vfs: Vfs | None = None
        self._vhost: VhostServer | None = None
        self._api: ApiServer | None = None
        self._log_thread: threading.Thread | None = None

    # ---- life

    def start(
        self,
        *,
        sock: str | None,
        fd: int | None,
        apisock: str | None,
        bootstrap: str | None,
        config: ImageConfig | None,
        mountpoint: str = "/",
        prefetch_files: "list[str] | None" = None,
        shared_dir: str | None = None,
        api_listener: socket.socket | None = None,
    ) -> None:
        """Returns RUNNING, or raises Failure with nothing left behind but what stop() removes. api_listener: apisock's,
        where it is made already."""
        import sys

        sys.setswitchinterval(SWITCH_INTERVAL_S)
        self._vfs = vfs = Vfs(self.engine, SESSION_RAFS if bootstrap else SESSION_MIXED)
        if bootstrap:
            assert config is not None
            self._mount(mountpoint, bootstrap, config, prefetch_files=prefetch_files)
        if shared_dir:
            self._mount_share(mountpoint, shared_dir)
        self._vhost = VhostServer(
            lambda: EngineDevice(self.engine, vfs, QUEUES), path=sock, fd=fd, say=self.log.say, ended=self.request_exit
        )
        if apisock:
            self._api = ApiServer(apisock, self, api_listener)
        self._vhost.start()
        self.state = "RUNNING"
        if self._api:
            self._api.start()
        self.log.say(logs.INFO, "running", socket=sock or f"fd {fd}", version=__version__)
        self._start_late()

    def _start_late(self) -> None:
        self._log_thread = threading.Thread(target=self._after_start, name="log", daemon=True)
        self._log_thread.start()

    def catch_signals(self) -> None:
        """From here on SIGTERM and SIGINT end wait(), also one that comes before it. Main thread only."""
        # The interpreter's own handler writes to the pipe at once. A Python handler runs when the main thread comes
        # round to it, which it does not if the signal came just before it went to sleep on a lock.
        signal.set_wakeup_fd(self._exit_writer, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)

    def wait(self) -> None:
        """Until SIGTERM, SIGINT or an exit request. Main thread only."""
        self.catch_signals()
        select.select([self._exit_reader], [], [])

    def request_exit(self) -> None:
        """From any thread."""
        try:
            os.write(self._exit_writer, b"\0")
        except BlockingIOError:  # full of such bytes
            pass

    def exit_by_api(self) -> None:
        """PUT exit: ends the process; host mounts stay."""
        self.request_exit()

    # What only a host mount has (daemon/host.py)

    def start_by_api(self) -> None:
        raise unexpected("Start")

    def send_fd(self) -> None:
        raise unsupported()

    def take_over(self) -> None:
        raise unexpected("Takeover")

    def _mounts_changed(self) -> None:
        pass

    def _close_host(self) -> None:
        pass

    def stop(self) -> None:
        """Ends everything in the order that leaves no pointer behind: queues, jobs, mounts, engine."""
        was_running, self.state = self.state == "RUNNING", "STOPPED"
        if self._api:
            self._api.close()
        self._close_host()
        if self._vhost:
            self._vhost.close()
        for mount in self._mounts.values():
            mount.prefetch.cancel()
        self.engine.shutdown()
        threads_left = False
        if self._log_thread:  # first: it may be about to start fetch threads
            self._log_thread.join(LATE_TIMEOUT_S)
            threads_left = self._log_thread.is_alive()
        threads_left |= not self.pump.join(STOP_TIMEOUT_S)
        if was_running:  # a start that failed is told in one line, by whoever asked for it
            self.log.say(logs.INFO, "stopped")
        self.log.close()
        if threads_left:
            os._exit(0)  # a fetch thread sits in a dead network: the cache is safe at any moment, so just go
        if self._vfs:
            self._vfs.close()
        for mount in self._mounts.values():
            mount.image.close()
            mount.store.close()
            mount.backend.close()
        self._mounts.clear()
        for share in self._shares.values():
            share.directory.close()
        self._shares.clear()
        self.engine.close()

    def _after_start(self) -> None:
        """What would cost start-up time: the fetch threads' imports and the log's. Then says the engine's lines."""
        self.pump.start()
        self._load_backends()
        self.log.activate()
        with self._lock:
            late, self._late = self._late or [], None
            for mount in late:
                self._begin_prefetch(mount)
        while True:
            try:
                event = self.engine.next_event(1000)
            except EOFError:
                return
            if event is not None:
                if event.level >= logs.ERROR:
                    self._note_error(event.text)
                fields: dict[str, object] = {}
                if event.cause:
                    fields["cause"] = event.cause.name.lower()
                if event.repeated:
                    fields["repeated"] = event.repeated
                self.log.say(event.level, event.text, **fields)

    @staticmethod
    def _load_backends() -> None:
        """What the first mount over the API would wait 10 ms for, of a registry 50 ms."""
        import virtiofsd_nydus.storage.factory
        import virtiofsd_nydus.storage.localfs
        import virtiofsd_nydus.storage.registry  # noqa: F401

    # ---- mounts

    def mount_rafs(
        self, path: str, source: str, config_text: str, prefetch_files: "list[object] | None" = None
    ) -> None:
        """API mount. A session that began with a bootstrap is complete: its INIT answers hold for rafs only."""
        config = parse_config(config_text, f"configuration of mount {path}")
        files = None if prefetch_files is None else check_list(prefetch_files, f"mount {path}")
        with self._lock:
            self._mount(path, source, config, prefetch_files=files)

    def _mount(
        self, path: str, source: str, config: ImageConfig, serial: int = 0, prefetch_files: "list[str] | None" = None
    ) -> None:
        """serial: the number it had in a process that this one goes on for."""
        if not path.startswith("/"):
            raise Failure(f"mountpoint {path!r} is not absolute")
        if path in self._mounts or path in self._shares:
            raise Failure(ALREADY_MOUNTED)
        if self._vfs is None:
            raise not_ready()  # it waits for a predecessor's mounts
        backend = self._make_backend(config)
        try:
            os.makedirs(config.work_dir, exist_ok=True)  # noqa: PTH103
        except OSError as error:
            raise Failure(f"cannot make cache directory {config.work_dir}: {error.strerror}") from error
        store = Store(self.engine, config.work_dir, compressed=config.cache_compressed)
        try:
            image = Rafs(self.engine, source, store)
        except Failure:
            store.close()
            raise
        image.set_amplify(config.amplify_bytes)
        if serial:
            self._vfs.next_serial = serial
        self._prefetch_tag += 1
        mount = Mount(
            path,
            source,
            image,
            store,
            config,
            backend,
            self._vfs.next_serial,
            Prefetch(self.engine, image, source, self._prefetch_tag),
        )
        mount.prefetch_files = prefetch_files
        image.count_files(metrics.counts_files(mount))
        for blob in image.blobs():
            self.pump.add_backend(blob.key, backend, mount.prefetch_limit)
        try:
            self._vfs.mount_rafs(path, image)
        except OSError as error:
            self._release(mount)
            raise Failure(f"cannot mount at {path}: {error.strerror}") from error
        self._mounts[path] = mount
        self._mounts_changed()
        kept = self._changes.get(path) or (self._changes.get(config.id) if config.id else None)
        if kept:
            self._change_backend(mount, kept)
        self._schedule_prefetch(mount)

    def _schedule_prefetch(self, mount: Mount) -> None:
        if self._late is None:
            self._begin_prefetch(mount)
        else:
            self._late.append(mount)

    def _make_backend(self, config: ImageConfig) -> "Backend":
        from virtiofsd_nydus.storage.factory import create_backend

        for line in config.warnings:
            self.log.say(logs.WARNING, line)
        return create_backend(
            config.backend_type, config.backend_config, warn=lambda line: self.log.say(logs.WARNING, line)
        )

    @staticmethod
    def _begin_prefetch(mount: Mount) -> None:
        """What the configuration wants; a list that was given is fetched even where the configuration says nothing."""
        config = mount.config
        if config.prefetch or mount.prefetch_files:
            mount.prefetch.start(mount.prefetch_files, then_all=config.prefetch_all)

    def remount(self, path: str, source: str, config_text: str, prefetch_files: "list[object] | None" = None) -> None:
        """A changed image or configuration at the same place. With the image that is there the guest notices nothing;
        what it has open of another goes stale."""
        config = parse_config(config_text, f"configuration of mount {path}")
        files = None if prefetch_files is None else check_list(prefetch_files, f"mount {path}")
        with self._lock:
            if path in self._shares:
                raise Failure("filesystem type mismatch, expect RAFS")
            old = self._mounts.get(path)
            if old is None:
                raise Failure(NOT_MOUNTED)
            assert self._vfs is not None
            Rafs(self.engine, source).close()  # what cannot be opened must not cost the guest what it has
            if config.work_dir == old.config.work_dir and old.is_of(source):
                self._reconfigure(old, source, config, files)
                return
            self._vfs.umount(path)
            del self._mounts[path]
            try:
                self._mount(path, source, config, prefetch_files=files)
            except (Failure, OSError):
                self._vfs.mount_rafs(path, old.image)
                self._mounts[path] = old
                raise
            self._release(old)

    def _reconfigure(self, mount: Mount, source: str, config: ImageConfig, prefetch_files: "list[str] | None") -> None:
        """Same image, same cache: only where its blobs come from and what is prefetched change."""
        backend, limit = self._make_backend(config), _rate_limit(config)
        for blob in mount.image.blobs():
            self.pump.add_backend(blob.key, backend, limit)
            self.pump.remove_backend(blob.key, mount.backend, mount.prefetch_limit)
        old, mount.backend, mount.prefetch_limit = mount.backend, backend, limit
        old.close()
        mount.source, mount.config, mount.prefetch_files = source, config, prefetch_files
        mount.mounted_at = time.time()
        mount.image.count_files(metrics.counts_files(mount))
        mount.prefetch.cancel()
        self._prefetch_tag += 1
        mount.prefetch = Prefetch(self.engine, mount.image, source, self._prefetch_tag)
        if self._late is None or mount not in self._late:
            self._schedule_prefetch(mount)

    def mount_share(self, path: str, source: str) -> None:
        """API mount of a host directory, read-write. Refused where the session's answers hold for images only."""
        with self._lock:
            self._mount_share(path, source)

    def _mount_share(self, path: str, source: str) -> None:
        if self._vfs is None:
            raise not_ready()
        if self._vfs.kind != SESSION_MIXED:
            raise unsupported()
        if path in self._mounts or path in self._shares:
            raise Failure(ALREADY_MOUNTED)
        # Kata's runtime-rs gives its writable directory of host mounts: the guest has no business at its top
        kata_top = path == "/containers" and source.rstrip("/").endswith("/rw")
        directory = Passthrough(self.engine, source, keep_top=kata_top)
        try:
            self._vfs.mount_passthrough(path, directory)
        except OSError as error:
            directory.close()
            raise Failure(f"cannot mount at {path}: {error.strerror}") from error
        self._shares[path] = Share(path, source, directory)
        self._mounts_changed()
        self.log.say(logs.INFO, "host directory mounted", mountpoint=path, source=source)

    def umount(self, path: str) -> None:
        with self._lock:
            mount, share = self._mounts.get(path), self._shares.get(path)
            if mount is None and share is None:
                raise Failure(NOT_MOUNTED)
            assert self._vfs is not None
            try:
                self._vfs.umount(path)
            except OSError as error:
                raise Failure(f"cannot unmount {path}: {error.strerror}") from error
            if mount is not None:
                del self._mounts[path]
                self._changes.pop(path, None)
                self._release(mount)
            if share is not None:
                del self._shares[path]
                share.directory.close()
            self._mounts_changed()
            for left in self._shares.values():  # the host unmounts the container's directories next
                left.directory.drop_idle()

    def _release(self, mount: Mount) -> None:
        mount.prefetch.cancel()
        if self._late is not None and mount in self._late:
            self._late.remove(mount)
        for blob in mount.image.blobs():
            self.pump.remove_backend(blob.key, mount.backend, mount.prefetch_limit)
        mount.image.close()
        mount.store.close()
        mount.backend.close()

    # ---- answers

    def note_fault(self, text: str) -> None:
        """A fault of this program's own, for the log and the API's events."""
        self._note_error(text)
        self.log.say(logs.ERROR, text)

    def _note_error(self, text: str) -> None:
        self._error_count += 1
        self._errors.append(time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime()) + f" - {text}")
        del self._errors[:-ERRORS_MAX]

    def events(self) -> "dict[str, Any]":
        errors = list(self._errors)
        return {
            "max_errors": ERRORS_MAX,
            "total_errors": self._error_count,
            "max_size": ERRORS_MAX_BYTES,
            "total_size": sum(map(len, errors)),
            "errors": errors,
        }

    def superblock(self, path: str) -> "dict[str, Any]":
        """The facts of the image there, by nydusd's names. Raises Failure where none is mounted."""
        with self._lock:
            if path in self._shares:
                raise Failure("filesystem type mismatch, expect RAFS")
            mount = self._mounts.get(path)
            if mount is None:
                raise Failure(NOT_MOUNTED)
            info = mount.image.info()
        v6 = info["fs_version"] == 6
        forever = {"secs": 365 * 24 * 3600, "nanos": 0}
        return {
            "magic": 0xE0F5E1E2 if v6 else 0x52414653,
            "version": 0x600 if v6 else 0x500,
            "sb_size": 128 + 1024 if v6 else 8192,
            "root_inode": info["root_ino"],
            "chunk_size": info["chunk_size_bytes"],
            "batch_size": 0,
            "inodes_count": info["inode_count"],
            "flags": {"bits": info["flags"]},
            "inode_table_entries": 0,
            "inode_table_offset": 0,
            "blob_table_size": info["blob_table_size_bytes"],
            "blob_table_offset": info["blob_table_offset"],
            "extended_blob_table_offset": 0,
            "extended_blob_table_entries": 0,
            "blob_device_table_count": 0,
            "blob_device_table_offset": 0,
            "prefetch_table_offset": info["prefetch_table_offset"],
            "prefetch_table_entries": info["prefetch_count"],
            "attr_timeout": forever,
            "entry_timeout": forever,
            "is_chunk_dict": False,
            "meta_blkaddr": info["meta_blkaddr"],
            "root_nid": info["root_ino"] & 0xFFFF,
            "chunk_table_offset": info["chunk_table_offset"],
            "chunk_table_size": info["chunk_table_size_bytes"],
        }

    def daemon_info(self) -> "dict[str, Any]":
        with self._lock:
            mounts = list(self._mounts.values())
            shares = list(self._shares.values())
        return {
            "version": version_info(),
            "id": self._id,
            "supervisor": self._supervisor,
            "state": self.state,
            "backend_collection": {
                mount.path: {
                    "backend_type": "Rafs",
                    "mountpoint": mount.path,
                    "mounted_time": _shown_time(mount.mounted_at),
                    "config": mount.config.public(),
                }
                for mount in mounts
            }
            | {
                share.path: {
                    "backend_type": "PassthroughFs",
                    "mountpoint": share.path,
                    "mounted_time": _shown_time(share.mounted_at),
                    "config": None,
                }
                for share in shares
            },
        }

    def prefetch_progress(self) -> "dict[str, Any]":
        """Mountpoint -> how far its prefetch is."""
        with self._lock:
            return {mount.path: mount.prefetch.progress() for mount in self._mounts.values()}

    def find_mount(self, wanted: str | None) -> Mount | None:
        """The mount that the `id` of a query names."""
        with self._lock:
            return metrics.find_mount(self._mounts, wanted)

    def mount_metrics(self, kind: str, wanted: str | None) -> object:
        """A document of nydusd's metrics: kind is one of metrics.DOCUMENTS, wanted the `id` of the query. Raises
        LookupError where that names no mount."""
        with self._lock:  # an image that is being unmounted has no numbers any more
            mount = metrics.find_mount(self._mounts, wanted)
            if mount is None:
                raise LookupError(wanted)
            return metrics.DOCUMENTS[kind](mount)

    def inflight_metrics(self) -> "list[dict[str, int]] | None":
        return metrics.inflight_metrics(self.engine.waiting())

    def prometheus_text(self) -> str:
        from virtiofsd_nydus.daemon.prometheus import prometheus_text

        with self._lock:
            return prometheus_text(self._mounts.values(), self.engine.stats(), self.engine.waiting())

    def change_config(self, wanted: str | None, changes: "dict[str, str]") -> None:
        """Hot change of a mount's login or proxy, from its next request on. What names no mount is kept for one that
        comes. Raises ApiError or Failure for what cannot be; nothing is changed then."""
        from virtiofsd_nydus.storage.factory import HOT_KEYS

        if not all(key in HOT_KEYS for key in changes):
            raise ApiError(500, "Configure(ResponsePayloadType)")
        with self._lock:
            mount = metrics.find_mount(self._mounts, wanted)
            if mount is not None:
                self._change_backend(mount, changes)
            self._changes.setdefault(mount.path if mount else wanted or "", {}).update(changes)

    def _change_backend(self, mount: Mount, changes: "dict[str, str]") -> None:
        from virtiofsd_nydus.storage.factory import change_backend

        unused = change_backend(mount.backend, changes)
        self.log.say(
            logs.INFO,
            "configuration changed",
            mountpoint=mount.path,
            keys=", ".join(sorted(changes)),
            **{"without effect": ", ".join(unused)} if unused else {},
        )

    def changed_config(self, wanted: str | None) -> "dict[str, str]":
        """Key -> value that change_config gave."""
        with self._lock:
            mount = metrics.find_mount(self._mounts, wanted)
            return dict(self._changes.get(mount.path if mount else wanted or "", {}))

    def stats(self) -> "dict[str, Any]":
        """Counters of the engine, and readiness of each mounted blob."""
        with self._lock:
            blobs = {}
            for mount in self._mounts.values():
                for blob in mount.image.blobs():
                    ready, total = mount.image.ready_chunks(blob.index)
                    blobs[blob.id] = {
                        "ready_chunks": ready,
                        "chunks": total or blob.chunk_count,
                        "compressed_bytes": blob.compressed_size_bytes,
                        "uncompressed_bytes": blob.uncompressed_size_bytes,
                    }
            backends = {
                mount.path: {"type": mount.backend.kind, **mount.backend.status(), **mount.backend.meter.own_metrics()}
                for mount in self._mounts.values()
            }
            shares = {share.path: share.directory.stats() for share in self._shares.values()}
        return {"engine": self.engine.stats(), "blobs": blobs, "backends": backends, "shares": shares}
