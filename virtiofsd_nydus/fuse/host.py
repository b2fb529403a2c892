"""A host mount of the daemon: the mount itself, its /dev/fuse descriptor, and the C threads that serve it.

Light: the daemon imports it before its API answers.
"""

import os
import threading

from virtiofsd_nydus.engine import ERR_MAX, Engine, Vfs, ffi, lib, require
from virtiofsd_nydus.errors import Failure, UsageFailure
from virtiofsd_nydus.fuse import mounts

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

THREADS_DEFAULT = 4
THREADS_MAX = 64
READ_AHEAD_KIB = 1024
WATCH_MS = 1000


class HostFuse:
    """One mount. mount() or adopt() gives it its descriptor, serve() its threads.

    supervisor: where another process keeps the descriptor, so that a successor can go on after our death; all
    threads then read the one descriptor, because the kernel fails what a clone has read when the clone is closed.
    passthrough: have the kernel read files by itself that are wholly in the cache, where it can.
    """

    def __init__(
        self,
        mountpoint: str,
        *,
        threads: int = THREADS_DEFAULT,
        failover_policy: str = "resend",
        writable: bool = False,
        supervised: bool = False,
        passthrough: bool = False,
    ) -> None:
        if not 1 <= threads <= 1024:
            raise UsageFailure("--fuse-threads: 1 to 1024")
        self.mountpoint = mountpoint
        self.failover_policy = failover_policy
        self.fd = -1
        self._threads = min(threads, THREADS_MAX)
        self._writable, self._supervised = writable, supervised
        self.passthrough = passthrough and not supervised
        self._handle: Any = None
        self._in_use = threading.Lock()  # of the handle, by threads of the API: it is not freed meanwhile
        self._mounted = False
        self._watcher: threading.Thread | None = None
        self._closing = False

    def mount(self) -> None:
        self.mountpoint = mounts.check_mountpoint(self.mountpoint)
        self.fd = mounts.mount_fuse(self.mountpoint, read_only=not self._writable)
        self._mounted = True

    def adopt(self, fd: int) -> None:
        """Goes on with a mount that another process made; the descriptor becomes ours."""
        self.fd, self._mounted = fd, True
        self.mountpoint = mounts.resolve_mountpoint(self.mountpoint)

    def forget(self) -> None:
        """Undoes adopt()."""
        if self.fd >= 0:
            os.close(self.fd)
        self.fd, self._mounted = -1, False

    def serve(self, engine: Engine, vfs: Vfs, *, on_end: "Callable[[], None]", resumed: bool = False) -> None:
        """Starts the threads and, for a new mount, returns once the kernel has it. on_end: called from a thread when
        the mount goes away under us."""
        flags = lib.VND_FUSEDEV_SHARED if self._supervised else 0
        if self.passthrough and mounts.can_pass_through():
            flags |= lib.VND_FUSEDEV_BACKING
        if resumed:
            flags |= lib.VND_FUSEDEV_RESUME
            if self.failover_policy != "none":
                flags |= lib.VND_FUSEDEV_RESEND
        err = ffi.new("char[]", ERR_MAX)
        handle = lib.vnd_fusedev_new(engine.handle, vfs.handle, self.fd, self._threads, flags, err, ERR_MAX)
        require(handle != ffi.NULL, err)
        self._handle = handle
        if not resumed:
            try:
                os.stat(self.mountpoint)  # waits until INIT is answered  # noqa: PTH116
            except OSError as error:
                raise Failure(f"the mount on {self.mountpoint} does not answer: {error.strerror}") from None
            self._raise_read_ahead()
        self._watcher = threading.Thread(target=self._watch, args=(on_end,), name="fuse-end", daemon=True)
        self._watcher.start()

    @property
    def ready(self) -> bool:
        """INIT was answered."""
        with self._in_use:
            return self._handle is not None and bool(lib.vnd_fusedev_ready(self._handle))

    def root_changed(self) -> None:
        """After the mount table changed: the kernel asks for the root's attributes again."""
        with self._in_use:
            if self._handle is not None:
                lib.vnd_fusedev_root_changed(self._handle)

    def _raise_read_ahead(self) -> None:
        """The kernel reads 128 KiB ahead unless told otherwise; root alone may."""
        there = mounts.find_mount(self.mountpoint)
        if there is None:
            return
        try:
            with open(f"/sys/class/bdi/{there.device}/read_ahead_kb", "w") as knob:
                knob.write(str(READ_AHEAD_KIB))
        except OSError:
            pass

    def _watch(self, on_end: "Callable[[], None]") -> None:
        while not self._closing:
            if lib.vnd_fusedev_wait(self._handle, WATCH_MS) == 0:
                if not self._closing:
                    self._mounted = False
                    on_end()
                return

    def stop(self) -> None:
        """Ends the threads; the mount stays. What is unanswered is the next server's."""
        self._closing = True
        if self._handle is not None:
            lib.vnd_fusedev_stop(self._handle)
        if self._watcher:
            self._watcher.join()
            self._watcher = None

    def close(self, *, keep_mount: bool) -> None:
        """Ends it; unmounts unless keep_mount. Idempotent. Before the mount table is closed."""
        self._closing = True
        if self._mounted and not keep_mount:
            try:
                mounts.umount(self.mountpoint, lazy=True)
            except OSError:
                pass  # it is unmounted already
        self._mounted = False
        self.stop()
        with self._in_use:
            handle, self._handle = self._handle, None
        if handle is not None:
            lib.vnd_fusedev_free(handle)
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
