"""The daemon's mounts: images and shared host directories, by mount point, and the changes of that table.

Locks: _lock is held for moments only, and never while something waits for storage, the network or a guest's request.
_numbering is taken before it.
A change (mount, remount, umount) holds its mount point instead (_changing): only changes of the same one wait for it.
"""

import os
import threading
import time
from contextlib import contextmanager

from virtiofsd_nydus import log as logs
from virtiofsd_nydus.daemon.answers import ApiError, not_ready, unsupported
from virtiofsd_nydus.daemon.prefetch import Prefetch, check_list
from virtiofsd_nydus.engine import SESSION_MIXED, Passthrough, Rafs, Vfs
from virtiofsd_nydus.errors import Cause, Failure
from virtiofsd_nydus.oci import layers
from virtiofsd_nydus.oci.serve import is_reference, read_mount_config, resolve_mount
from virtiofsd_nydus.storage.config import ImageConfig, parse_config
from virtiofsd_nydus.storage.opened import OpenedImage, make_origin
from virtiofsd_nydus.vhost.messages import close_fd

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from typing import Any

    from virtiofsd_nydus.storage.backend import Backend
    from virtiofsd_nydus.storage.pump import FetchPump

layers.install()
# nydusd's words, which clients match on
ALREADY_MOUNTED = "object or filesystem already exists"
NOT_MOUNTED = "object or filesystem doesn't exist"
SERIAL_MAX = 0xFFFF
WRONG_TYPE = "filesystem type mismatch, expect RAFS"


class MountRecord:
    """A mount as bytes, for a process that goes on with it. fds: a share's directory, borrowed."""

    __slots__ = ("body", "fds")

    def __init__(self, body: "dict[str, Any]", fds: "list[int]") -> None:
        self.body, self.fds = body, fds


class Forgetful:
    """No memory of the mount table beyond this process: what a MountTable has until it is given another.

    Each call returns when it is remembered, and is made before a client or a guest can know of the change.
    """

    def reserve(self, kind: int, serial: int) -> None:
        """A mount will have this number, which no other may have after it."""

    def put(self, record: MountRecord) -> None:
        """This is mounted now."""

    def new_ledger(self) -> int:
        """Memory for what a share must not lose with this process: a descriptor, the caller's; -1: it may."""
        return -1

    def drop(self, path: str) -> None:
        """Nothing is mounted there any more."""

    def changed_configs(self, changes: "dict[str, dict[str, str]]") -> None:
        """All hot changes so far."""


class ImageMount:
    """What to mount: an image at path. prefetch_files: instead of what the image's own table names."""

    __slots__ = ("config", "path", "prefetch_files", "source")

    def __init__(
        self, path: str, source: str, config: ImageConfig, prefetch_files: "Iterable[object] | None" = None
    ) -> None:
        self.path, self.source, self.config = path, source, config
        self.prefetch_files = None if prefetch_files is None else check_list(prefetch_files, f"mount {path}")


def read_mount(path: str, source: str, config_text: str, prefetch_files: "list[object] | None") -> ImageMount:
    """What an API call asks to mount. A reference to an image is resolved here and now, by the network. Raises
    Failure."""
    where = f"configuration of mount {path}"
    if is_reference(source):
        config = read_mount_config(config_text, where)
        lines: list[str] = []
        source = resolve_mount(source, config, lines.append)
        config.warnings += lines
        return ImageMount(path, source, config, prefetch_files)
    return ImageMount(path, source, parse_config(config_text, where), prefetch_files)


class Mount:
    """One image in the mount table."""

    __slots__ = (
        "_digest",
        "_identity",
        "config",
        "mounted_at",
        "opened",
        "path",
        "prefetch",
        "prefetch_files",
        "serial",
        "source",
    )

    def __init__(self, wanted: ImageMount, opened: OpenedImage, prefetch: Prefetch) -> None:
        self.path, self.source, self.config = wanted.path, wanted.source, wanted.config
        self.prefetch_files = wanted.prefetch_files
        self.opened, self.prefetch = opened, prefetch
        self.serial = 0  # until the mount table gives it one
        self._identity = _identity(wanted.source)
        self._digest = ""
        self.mounted_at = time.time()

    def digest(self) -> str:
        """SHA-256 of the bootstrap, in hexadecimal; read once. Inside held(), or for a mount that stays."""
        if not self._digest:
            self._digest = self.image.bootstrap_digest()
        return self._digest

    @property
    def image(self) -> Rafs:
        return self.opened.rafs

    @property
    def backend(self) -> "Backend":
        return self.opened.origin.backend

    def is_of(self, source: str) -> bool:
        """Whether that bootstrap is the one mounted here, in this file or in another of the same bytes."""
        import filecmp

        try:
            if _identity(self.source) != self._identity:
                return False  # overwritten since: what is mounted cannot be compared any more
            return _identity(source) == self._identity or filecmp.cmp(self.source, source, shallow=False)
        except OSError:
            return False

    def counts_files(self) -> bool:
        """Whether its configuration asks for numbers of single files."""
        config = self.config
        return config.iostats_files or config.access_pattern or config.latest_read_files

    def record(self) -> MountRecord:
        """All that another process needs to mount it again at the same number."""
        return MountRecord(
            {
                "type": "rafs",
                "path": self.path,
                "source": os.path.abspath(self.source),  # noqa: PTH100
                "serial": self.serial,
                "config": {name: getattr(self.config, name) for name in ImageConfig.__slots__},
                "prefetch_files": self.prefetch_files,
                "mounted_at": self.mounted_at,
            },
            [],
        )


def _identity(path: str) -> "tuple[int, ...]":
    found = os.stat(path)  # noqa: PTH116
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


class Share:
    """One host directory in the mount table."""

    __slots__ = ("directory", "mounted_at", "path", "serial", "source")

    def __init__(self, path: str, source: str, directory: Passthrough, serial: int) -> None:
        self.path, self.source, self.directory, self.serial = path, source, directory, serial
        self.mounted_at = time.time()

    def record(self, ledger: int) -> MountRecord:
        """All that another process needs to mount it again at the same number, with the memory it keeps."""
        return MountRecord(
            {
                "type": "share",
                "path": self.path,
                "source": os.path.abspath(self.source),  # noqa: PTH100
                "serial": self.serial,
                "mounted_at": self.mounted_at,
            },
            [ledger] if ledger >= 0 else [],
        )


def read_config(record: "dict[str, Any]") -> ImageConfig:
    """The configuration of a record. Raises KeyError or TypeError where it is damaged."""
    config = ImageConfig("", {}, "")
    for name in ImageConfig.__slots__:
        setattr(config, name, record["config"].get(name, getattr(config, name)))
    return config


class MountTable:
    """All mounts of a daemon. changed is called after each change, from the thread that made it.

    open() makes it usable; until then a mount is refused as not ready. close() after all that serves it has ended.
    """

    def __init__(self, pump: "FetchPump", log: logs.Log, changed: "Callable[[], None]") -> None:
        self.vfs: Vfs | None = None
        self._pump, self._engine, self._log, self._changed = pump, pump.engine, log, changed
        self._lock = threading.Lock()
        self._numbering = threading.Lock()  # a mount's number is read and used up in one step
        self._changeable = threading.Condition(self._lock)
        self._closing = False
        self._busy: set[str] = set()  # mount points that a change holds
        self._mounts: dict[str, Mount] = {}
        self._pinned = False
        self._shares: dict[str, Share] = {}
        self._kept: dict[str, dict[str, str]] = {}  # what hot changes gave, by mount point or id
        self.memory: Forgetful = Forgetful()
        self._prefetch_tag = 0  # of the last mount; 0 is the engine's own
        self._late: list[Mount] | None = []  # mounts whose prefetch begins after RUNNING; None: it has begun

    # ---- life

    def open(self, kind: int) -> Vfs:
        """Makes the engine's table. kind: SESSION_RAFS or SESSION_MIXED."""
        self.vfs = Vfs(self._engine, kind)
        return self.vfs

    def begin_prefetch(self) -> None:
        """Starts what waited for RUNNING; from here on a mount's prefetch begins with it."""
        with self._lock:
            late, self._late = self._late or [], None
            for mount in late:
                _start_prefetch(mount)

    def cancel_prefetch(self) -> None:
        """Ends the prefetch of all mounts."""
        for mount in self.images():
            mount.prefetch.cancel()

    def umount_all(self) -> None:
        """Unmounts all: the table is as before open()."""
        for mount in self.images():
            self.umount(mount.path)
        self._close_vfs()

    def end_changes(self, within_s: float) -> bool:
        """Refuses every change from here on. Returns whether the changes under way ended within that time: close()
        must not be called else."""
        with self._changeable:
            self._closing = True
            return self._changeable.wait_for(lambda: not self._busy, within_s)

    def close(self) -> None:
        """Frees everything, the engine's table first. Nothing may serve it, and the fetch threads have ended."""
        self._close_vfs()
        for mount in self._mounts.values():
            mount.opened.close()
        self._mounts.clear()
        for share in self._shares.values():
            share.directory.close()
        self._shares.clear()

    def _close_vfs(self) -> None:
        if self.vfs:
            self.vfs.close()
            self.vfs = None

    # ---- looking

    def images(self) -> list[Mount]:
        """The mounted images, in the order of their mounts."""
        with self._lock:
            return list(self._mounts.values())

    def shares(self) -> list[Share]:
        """The shared directories, in the order of their mounts."""
        with self._lock:
            return list(self._shares.values())

    @contextmanager
    def held(self) -> "Iterator[tuple[list[Mount], list[Share]]]":
        """The mounts, none of which is freed inside the context. For reading counters, nothing that waits."""
        with self._lock:
            yield list(self._mounts.values()), list(self._shares.values())

    def find(self, wanted: str | None) -> Mount | None:
        """The mount that the `id` of a query names."""
        return find_mount(self.images(), wanted)

    def require_image(self, path: str) -> Mount:
        """The image mounted at path. Raises Failure in nydusd's words. Not for a thread that is inside held()."""
        with self._lock:
            if path in self._shares:
                raise Failure(WRONG_TYPE)
            mount = self._mounts.get(path)
        if mount is None:
            raise Failure(NOT_MOUNTED)
        return mount

    # ---- changes

    @contextmanager
    def _changing(self, path: str) -> "Iterator[Vfs]":
        """Holds a mount point, so that changes of it come one after the other."""
        with self._changeable:
            while path in self._busy:
                self._changeable.wait()
            if self.vfs is None or self._closing:
                raise not_ready()
            self._busy.add(path)
        try:
            yield self.vfs
        finally:
            self._end_change(path)

    def _end_change(self, path: str) -> None:
        with self._changeable:
            self._busy.discard(path)
            self._changeable.notify_all()

    def mount_image(self, wanted: ImageMount, serial: int = 0) -> None:
        """Mounts an image. serial: the number it had in a process that this one goes on for."""
        if not wanted.path.startswith("/"):
            raise Failure(f"mountpoint {wanted.path!r} is not absolute")
        with self._changing(wanted.path) as vfs:
            self._require_free(wanted.path)
            self._add_image(vfs, wanted, serial)

    def _require_free(self, path: str) -> None:
        with self._lock:
            if path in self._mounts or path in self._shares:
                raise Failure(ALREADY_MOUNTED)

    def _add_image(self, vfs: Vfs, wanted: ImageMount, serial: int = 0) -> None:
        """Mounts an image at a mount point that the caller holds."""
        config = wanted.config
        origin = make_origin(config, self._warn)
        try:
            os.makedirs(config.work_dir, exist_ok=True)  # noqa: PTH103
        except OSError as error:
            origin.backend.close()
            raise Failure(f"cannot make cache directory {config.work_dir}: {error.strerror}") from error
        opened = OpenedImage(
            self._pump,
            wanted.source,
            origin,
            work_dir=config.work_dir,
            compressed=config.cache_compressed,
            digest=config.bootstrap_digest,
        )
        # Behind a peer daemon of Dragonfly a smaller range costs a whole piece all the same.
        piece_bytes = getattr(origin.backend, "piece_bytes", 0) if config.amplify_bytes else 0
        opened.rafs.set_amplify(max(config.amplify_bytes, piece_bytes))
        try:
            mount = Mount(wanted, opened, self._new_prefetch(opened, wanted.source))
            mount.image.count_files(mount.counts_files())
            with self._numbering:
                if serial:
                    vfs.next_serial = serial
                mount.serial = vfs.next_serial
                self.memory.reserve(vfs.kind, mount.serial)
                vfs.mount_rafs(wanted.path, opened.rafs)
            with self._lock:
                self._mounts[wanted.path] = mount
            self.memory.put(mount.record())
        except OSError as error:
            opened.close()
            raise Failure(f"cannot mount at {wanted.path}: {error.strerror}") from error
        except BaseException:
            opened.close()
            raise
        self._changed()
        kept = self._kept.get(wanted.path) or (self._kept.get(config.id) if config.id else None)
        if kept:
            self._change_backend(mount, kept)
        self._schedule_prefetch(mount)

    def _new_prefetch(self, opened: OpenedImage, source: str) -> Prefetch:
        with self._lock:
            self._prefetch_tag += 1
            return Prefetch(self._engine, opened.rafs, source, self._prefetch_tag)

    def _schedule_prefetch(self, mount: Mount) -> None:
        with self._lock:
            if self._late is not None:
                if mount not in self._late:
                    self._late.append(mount)
                return
        _start_prefetch(mount)

    def _warn(self, line: str) -> None:
        self._log.say(logs.WARNING, line)

    def remount(self, wanted: ImageMount) -> None:
        """Puts a changed image or configuration at the same place. With the image that is there the guest notices
        nothing; what it has open of another goes stale."""
        path = wanted.path
        self.require_image(path)
        self._require_loose(path)
        with self._changing(path) as vfs:
            old = self.require_image(path)
            Rafs(self._engine, wanted.source).close()  # what cannot be opened must not cost the guest what it has
            if wanted.config.work_dir == old.config.work_dir and old.is_of(wanted.source):
                self._reconfigure(old, wanted)
                return
            vfs.umount(path)
            with self._lock:
                del self._mounts[path]
            try:
                self._add_image(vfs, wanted)
            except (Failure, OSError):
                vfs.mount_rafs(path, old.image)
                with self._lock:
                    self._mounts[path] = old
                raise
            self._release(old)

    def _reconfigure(self, mount: Mount, wanted: ImageMount) -> None:
        """Same image, same cache: only where its blobs come from and what is prefetched change."""
        mount.opened.change_origin(make_origin(wanted.config, self._warn))
        mount.source, mount.config, mount.prefetch_files = wanted.source, wanted.config, wanted.prefetch_files
        mount.mounted_at = time.time()
        mount.image.count_files(mount.counts_files())
        mount.prefetch.cancel()
        mount.prefetch = self._new_prefetch(mount.opened, wanted.source)
        self.memory.put(mount.record())
        self._schedule_prefetch(mount)

    def mount_share(
        self, path: str, source: str, serial: int = 0, ledger: int = -1, owners: "Iterable[int]" = ()
    ) -> None:
        """Mounts a host directory, read-write. Refused where the session's answers hold for images only. serial,
        ledger: the number it had and the memory it kept in a process that this one goes on for; owners: the front-ends
        that are there still. The descriptor stays the caller's."""
        with self._changing(path) as vfs:
            if vfs.kind != SESSION_MIXED:
                raise unsupported()
            self._require_free(path)
            # Kata's runtime-rs gives its writable directory of host mounts: the guest has no business at its top
            kata_top = path == "/containers" and source.rstrip("/").endswith("/rw")
            directory = Passthrough(self._engine, source, keep_top=kata_top)
            own = self.memory.new_ledger() if ledger < 0 else -1
            try:
                self._keep_share(directory, path, own if ledger < 0 else ledger, owners)
                with self._numbering:
                    if serial:
                        vfs.next_serial = serial
                    share = Share(path, source, directory, vfs.next_serial)
                    self.memory.reserve(vfs.kind, share.serial)
                    vfs.mount_passthrough(path, directory)
                with self._lock:
                    self._shares[path] = share
                self.memory.put(share.record(own))
            except OSError as error:
                directory.close()
                raise Failure(f"cannot mount at {path}: {error.strerror}") from error
            finally:
                close_fd(own)
        self._changed()
        self._log.say(logs.INFO, "host directory mounted", mountpoint=path, source=source)

    def _keep_share(self, directory: Passthrough, path: str, ledger: int, owners: "Iterable[int]") -> None:
        if ledger < 0:
            return
        try:
            lost = directory.keep(ledger, owners)
        except Failure as failure:
            self._log.say(logs.ERROR, str(failure))
            return
        if lost:
            self._log.say(logs.ERROR, f"{lost} open files could not be opened again", mountpoint=path)

    # ---- numbers that another process gave

    def has_numbers(self, serials: "dict[str, int]", directories: "list[tuple[int, int, str]]") -> bool:
        """Whether the images at these mount points, and the directories that lead to them, have these numbers."""
        vfs = self.vfs
        with self._lock:
            return (
                vfs is not None
                and all(path in self._mounts and self._mounts[path].serial == one for path, one in serials.items())
                and vfs.directories() == directories
            )

    def renumber(self, serials: "dict[str, int]", directories: "list[tuple[int, int, str]]", next_serial: int) -> None:
        """Gives images and directories the numbers that they had in a process that this one goes on for. Other images
        get new ones. For a table that no guest uses yet. Raises Failure; all is mounted then, by some numbers.
        """
        with self._changeable:
            while self._busy:
                self._changeable.wait()
            if self.vfs is None or self._closing:
                raise not_ready()
            if self._shares:
                raise Failure("host directories are mounted, and keep their numbers")
            vfs = self.vfs
            self._busy.update(self._mounts)
        try:
            others = [path for path in self._mounts if path not in serials]
            order = [*sorted(serials, key=lambda path: serials[path]), *others]
            self._renumber(vfs, order, serials, directories, next_serial)
        finally:
            with self._changeable:
                self._busy.clear()
                self._changeable.notify_all()
        self._changed()

    def _renumber(
        self,
        vfs: Vfs,
        order: "list[str]",
        serials: "dict[str, int]",
        directories: "list[tuple[int, int, str]]",
        next_serial: int,
    ) -> None:
        with self._lock:
            found = {path: self._mounts[path] for path in order}
        for path in sorted(order, key=lambda path: found[path].serial, reverse=True):
            vfs.umount(path)
        failure: OSError | Failure | None = None
        try:
            vfs.restart()
            for directory in directories:
                vfs.add_directory(*directory)
        except OSError as error:
            failure = error
        for path in order:
            try:
                if path in serials and failure is None:
                    vfs.next_serial = serials[path]
                elif failure is None and vfs.next_serial < next_serial:
                    vfs.next_serial = next_serial
            except Failure as error:
                failure = error
            one = found[path]
            one.serial = vfs.next_serial
            self.memory.reserve(vfs.kind, one.serial)
            vfs.mount_rafs(path, one.image)
            self.memory.put(one.record())
        if failure is not None:
            raise Failure(f"mounts cannot have the numbers that they had: {failure}", Cause.FORMAT)
        if vfs.next_serial < next_serial <= SERIAL_MAX:
            vfs.next_serial = next_serial
            self.memory.reserve(vfs.kind, next_serial - 1)

    def pinned_image(self) -> Rafs:
        """The one image that is mounted, which stays: a disk of it is in use. Raises Failure."""
        with self._lock:
            if len(self._mounts) != 1 or self._shares:
                raise Failure("a block device is of one image: give --bootstrap")
            self._pinned = True
            return next(iter(self._mounts.values())).image

    def _require_loose(self, path: str) -> None:
        if self._pinned:
            raise Failure(f"{path} is the image of a block device, which cannot change under a guest")

    def umount(self, path: str) -> None:
        """Takes a mount away; returns once no request is inside it and all of it is freed."""
        self._require_mounted(path)
        self._require_loose(path)
        with self._changing(path) as vfs:
            self._require_mounted(path)  # still: the change that was waited for may have taken it away
            mount, share = self._mounts.get(path), self._shares.get(path)
            try:
                vfs.umount(path)
            except OSError as error:
                raise Failure(f"cannot unmount {path}: {error.strerror}") from error
            with self._lock:
                self._mounts.pop(path, None)
                self._shares.pop(path, None)
                if mount is not None:
                    self._kept.pop(path, None)
            if mount is not None:
                self._release(mount)
            if share is not None:
                share.directory.close()
            self.memory.drop(path)
        self._changed()
        for left in self.shares():  # the host unmounts the container's directories next
            self._drop_idle(left)

    def restore(
        self,
        records: "list[tuple[dict[str, Any], list[int]]]",
        next_serial: int,
        changes: "dict[str, dict[str, str]]",
        owners: "list[int]",
    ) -> None:
        """Mounts what another process had mounted, each with the descriptors of its record, at the same numbers. What
        cannot be mounted again is told and left out: its guests get ESTALE. owners: the front-ends that are there."""
        assert self.vfs is not None
        self._kept = changes
        memory, self.memory = self.memory, Forgetful()
        for record, fds in sorted(records, key=lambda one: int(one[0]["serial"])):
            try:
                self._restore(record, fds, owners)
            except (Failure, OSError, KeyError, TypeError, ValueError) as error:
                self._log.say(logs.ERROR, f"the mount at {record.get('path')} is lost: {error}")
        self.memory = memory
        self.vfs.next_serial = next_serial

    def _restore(self, record: "dict[str, Any]", fds: "list[int]", owners: "list[int]") -> None:
        path, source, serial = str(record["path"]), str(record["source"]), int(record["serial"])
        if record["type"] == "share":
            self.mount_share(path, source, serial, fds[0] if fds else -1, owners)
            self._shares[path].mounted_at = float(record["mounted_at"])
            return
        self.mount_image(ImageMount(path, source, read_config(record), record.get("prefetch_files")), serial)
        self._mounts[path].mounted_at = float(record["mounted_at"])

    def _require_mounted(self, path: str) -> None:
        with self._lock:
            if path not in self._mounts and path not in self._shares:
                raise Failure(NOT_MOUNTED)

    def _drop_idle(self, share: Share) -> None:
        """Closes the share's descriptors that no open file needs; not of one that is being unmounted."""
        with self._changeable:
            if self._closing or share.path in self._busy or self._shares.get(share.path) is not share:
                return
            self._busy.add(share.path)
        try:
            share.directory.drop_idle()
        finally:
            self._end_change(share.path)

    def _release(self, mount: Mount) -> None:
        """Frees a mount that is in no table any more."""
        mount.prefetch.cancel()
        with self._lock:
            if self._late is not None and mount in self._late:
                self._late.remove(mount)
        mount.opened.close()

    # ---- hot changes of configuration

    def change_config(self, wanted: str | None, changes: "dict[str, str]") -> None:
        """Hot change of a mount's login or proxy, from its next request on. What names no mount is kept for one that
        comes. Raises ApiError or Failure for what cannot be; nothing is changed then."""
        from virtiofsd_nydus.storage.factory import HOT_KEYS

        if not all(key in HOT_KEYS for key in changes):
            raise ApiError(500, "Configure(ResponsePayloadType)")
        mount = self.find(wanted)
        if mount is not None:
            self._change_backend(mount, changes)
        with self._lock:
            self._kept.setdefault(mount.path if mount else wanted or "", {}).update(changes)
            kept = {key: dict(values) for key, values in self._kept.items()}
        self.memory.changed_configs(kept)

    def _change_backend(self, mount: Mount, changes: "dict[str, str]") -> None:
        from virtiofsd_nydus.storage.factory import change_backend

        unused = change_backend(mount.backend, changes)
        fields: dict[str, Any] = {"without effect": ", ".join(unused)} if unused else {}
        self._log.say(
            logs.INFO, "configuration changed", mountpoint=mount.path, keys=", ".join(sorted(changes)), **fields
        )

    def changed_config(self, wanted: str | None) -> "dict[str, str]":
        """Key -> value that change_config gave."""
        mount = self.find(wanted)
        with self._lock:
            return dict(self._kept.get(mount.path if mount else wanted or "", {}))


def find_mount(mounts: list[Mount], wanted: str | None) -> Mount | None:
    """The mount that an `id` names (its mountpoint or the id of its configuration); without one the only mount."""
    if wanted is None:
        return mounts[0] if len(mounts) == 1 else None
    for mount in mounts:
        if mount.path == wanted:
            return mount
    return next((mount for mount in mounts if mount.config.id and mount.config.id == wanted), None)


def _start_prefetch(mount: Mount) -> None:
    """What the configuration wants; a list that was given is fetched even where the configuration says nothing."""
    config = mount.config
    if config.prefetch or mount.prefetch_files:
        mount.prefetch.start(mount.prefetch_files, then_all=config.prefetch_all)
