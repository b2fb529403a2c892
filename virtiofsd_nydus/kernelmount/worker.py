"""The worker of a lazy mount: answers the kernel's events from the engine, and starts another guard when that dies.

The first one mounts and tells the verb; a later one goes on with what it is given. It ends when all is fetched, which
leaves a plain mount, or when the file system is gone.
"""

import errno
import json
import os
import select
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path

from virtiofsd_nydus import log as logs
from virtiofsd_nydus.engine import ERR_MAX, ffi, lib, reduce_privileges, text_of
from virtiofsd_nydus.errors import Cause, Failure
from virtiofsd_nydus.kernelmount import record
from virtiofsd_nydus.kernelmount.erofs import mount_erofs
from virtiofsd_nydus.kernelmount.guard import detach, open_shared, wait_for
from virtiofsd_nydus.kernelmount.image import KernelImage
from virtiofsd_nydus.kernelmount.settings import Settings, catch_signals, reap

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

LOOK_MS = 1000  # between two looks at what is complete
PREFETCH_TAG = 1
GUARD_PAUSE_S = 1.0  # guards are not started faster than this
WHOLE = "mount --kernel --fetch-all fetches the whole image first and needs no events"


class GuardWatch:
    """Starts another guard whenever the present one is gone. A worker that goes on for another begins with it: without
    a guard it is the only one that holds the group."""

    def __init__(self, settings: Settings, log: logs.Log) -> None:
        self._settings, self._log = settings, log
        self._shared = open_shared(settings)
        self._pid = 0

    def start_guard(self) -> int:
        """Starts the guard and returns its pidfd. Raises OSError."""
        own = os.pidfd_open(os.getpid())
        try:
            self._pid = self._settings.start("guard", own)
        finally:
            os.close(own)
        return os.pidfd_open(self._pid)

    def watch(self, pidfd: int) -> None:
        """Watches in the background until the mount is over."""
        threading.Thread(target=self._run, args=(pidfd,), name="guard", daemon=True).start()

    def _run(self, pidfd: int) -> None:
        began = -GUARD_PAUSE_S
        while True:
            if pidfd >= 0:
                wait_for(pidfd)
            if self._pid:
                reap(self._pid)
            if lib.vnd_precontent_ended(self._shared):
                return
            self._log.say(logs.WARNING, "the guard is gone: starting another")
            if time.monotonic() - began < GUARD_PAUSE_S:
                time.sleep(GUARD_PAUSE_S)  # one that always dies must not use the machine up
            began = time.monotonic()
            try:
                pidfd = self.start_guard()
            except OSError as error:
                self._log.say(logs.ERROR, f"cannot start a guard: {error.strerror}")
                pidfd = -1


class Worker:
    def __init__(self, settings: Settings, log: logs.Log) -> None:
        self.settings, self.log = settings, log
        self.events: Any = ffi.NULL

    # ---- start

    def open_events(self, image: KernelImage) -> None:
        """Descriptors are made where the settings have none yet."""
        settings = self.settings
        if settings.state < 0:
            settings.state = check(lib.vnd_precontent_state(), "cannot make shared memory")
        if settings.group < 0:
            settings.group = check(
                lib.vnd_precontent_group(),
                "cannot listen to pre-content events",
                {errno.EPERM: "that needs root", errno.EINVAL: f"this kernel has none (Linux 6.14 and later); {WHOLE}"},
            )
        err = ffi.new("char[]", ERR_MAX)
        self.events = lib.vnd_precontent_new(image.engine.handle, settings.group, settings.state, err, ERR_MAX)
        if self.events == ffi.NULL:
            raise Failure(text_of(err), Cause.IO)
        for blob in image.blobs:
            file = settings.files[blob.index] if settings.files else -1
            handle = lib.vnd_rafs_blob(image.rafs.handle, blob.index)
            if lib.vnd_precontent_add(self.events, handle, file, err, ERR_MAX):
                raise image.last_error(Failure(text_of(err), Cause.IO))

    def mount(self, image: KernelImage) -> bool:
        """Marks and mounts. False: all is here, so the mount is a plain one."""
        settings = self.settings
        devices = []
        for blob in image.blobs:
            file = lib.vnd_precontent_fd(self.events, blob.index)
            clone = -1
            if not lib.vnd_precontent_complete(self.events, blob.index):
                clone = self._mark(file, image.config.work_dir)
            settings.files.append(file)
            settings.clones.append(clone)
            devices.append(f"/proc/self/fd/{file if clone < 0 else clone}")
        lazy = any(clone >= 0 for clone in settings.clones)
        if lazy:
            self.serve()
        mount_erofs(settings.bootstrap, devices, settings.target)
        settings.mount_id = record.mount_id(settings.target)
        settings.save()
        record.write_record(Path(settings.directory), settings.mount_id, lazy=lazy)
        return lazy

    def _mark(self, file: int, work_dir: str) -> int:
        clone = check(
            lib.vnd_precontent_clone(f"/proc/self/fd/{file}".encode()),
            f"cannot clone the mount of {work_dir}",
            {errno.EPERM: "that needs root"},
        )
        check(
            lib.vnd_precontent_mark(self.settings.group, clone, 1),
            f"the kernel cannot wait for bytes in {work_dir}",
            {
                errno.EOPNOTSUPP: f"its file system has no pre-content events (ext4, xfs, btrfs do); choose another "
                f"--cache-dir, or {WHOLE}",
                errno.EINVAL: f"pre-content events came with Linux 6.14; {WHOLE}",
            },
        )
        return clone

    def serve(self) -> None:
        check(lib.vnd_precontent_start(self.events), "cannot start a thread")

    # ---- life

    def run(self, image: KernelImage) -> None:
        """Runs until the mount is over or complete."""
        if image.config.prefetch:
            from virtiofsd_nydus.daemon.prefetch import Prefetch

            Prefetch(image.engine, image.rafs, self.settings.bootstrap, PREFETCH_TAG).start(
                None, then_all=image.config.prefetch_all
            )
        over = select.poll()
        over.register(lib.vnd_precontent_ended_fd(self.events), select.POLLIN)
        open_blobs = {blob.index for blob in image.blobs if self.settings.clones[blob.index] >= 0}
        while not lib.vnd_precontent_ended(self.events):
            for index in [index for index in open_blobs if lib.vnd_precontent_complete(self.events, index)]:
                check(
                    lib.vnd_precontent_mark(self.settings.group, self.settings.clones[index], 0),
                    "cannot take a mark away",
                    {errno.ENOENT: None},
                )
                open_blobs.remove(index)
            if not open_blobs:
                self.log.say(logs.INFO, "all is fetched: the mount goes on by itself", mountpoint=self.settings.target)
                if record.is_ours(self.settings.target):
                    record.write_record(Path(self.settings.directory), self.settings.mount_id, lazy=False)
                lib.vnd_precontent_set_ended(self.events)
                return
            over.poll(LOOK_MS)
        self.log.say(logs.INFO, "unmounted: ending", mountpoint=self.settings.target)
        record.forget(Path(self.settings.directory), self.settings.mount_id)


def check(rc: int, what: str, why: "dict[int, str | None] | None" = None) -> int:
    """The number, or Failure with the line for its errno; one that has None is passed over."""
    if rc >= 0:
        return rc
    line = (why or {}).get(-rc, os.strerror(-rc))
    if line is None:
        return 0
    raise Failure(f"{what}: {line}", Cause.IO)


def tell(ready_fd: int, **what: object) -> bool:
    """Tells the verb that waits. Returns False when it no longer waits."""
    try:
        os.write(ready_fd, json.dumps(what).encode())
    except OSError:
        return False
    finally:
        os.close(ready_fd)
    return True


def work(settings: Settings, other: int) -> None:
    """other: the guard's pidfd; of the first worker, where the verb listens."""
    first = settings.group < 0
    os.set_inheritable(other, False)
    log = logs.Log()
    worker = Worker(settings, log)
    if not first:
        GuardWatch(settings, log).watch(other)
    with ExitStack() as stack:
        try:
            image = stack.enter_context(
                KernelImage(settings.bootstrap, settings.image_config(), lambda line: log.say(logs.WARNING, line))
            )
            worker.open_events(image)
            stack.callback(lambda: lib.vnd_precontent_free(worker.events))
            if first:
                lazy = worker.mount(image)
                if lazy:
                    try:
                        watch = GuardWatch(settings, log)
                        watch.watch(watch.start_guard())
                    except OSError as error:
                        detach(settings)
                        raise Failure(f"cannot start the guard: {error.strerror}", Cause.IO) from None
                if not tell(other, lazy=lazy, pid=os.getpid()):
                    detach(settings)  # the verb has ended and told no user of it
                if not lazy:
                    return
            else:
                worker.serve()
        except Failure as failure:
            if not first:
                raise
            tell(other, error=str(failure), cause=int(failure.cause))
            sys.exit(1)
        except BaseException as unexpected:
            if first:
                tell(other, error=f"{type(unexpected).__name__}: {unexpected}", cause=int(Cause.IO))
            raise
        log.activate()
        image.give_events(lambda event: log.say(event.level, event.text, **event.fields()))
        log.say(logs.INFO, "running", mountpoint=settings.target)
        worker.run(image)
    log.close()


def main() -> None:
    settings = Settings.load(int(sys.argv[1]))
    reduce_privileges()
    if settings.group >= 0:
        lib.vnd_precontent_reserve(settings.state)  # before anything is opened
    catch_signals(lambda: detach(settings))
    try:
        work(settings, int(sys.argv[2]))
    except Failure as failure:
        sys.exit(f"virtiofsd-nydus mount --kernel: {failure}")


if __name__ == "__main__":
    main()
