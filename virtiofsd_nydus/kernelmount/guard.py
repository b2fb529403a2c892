"""The guard: holds the group of a lazy mount, so that no reader is let through when the worker dies, and starts another
worker. When that fails again and again, readers get EIO until one stays.

Light, and asleep for most of its life: not what a machine that is short of memory ends first.
"""

import os
import select
import sys
import time

from virtiofsd_nydus.engine import ffi, lib, reduce_privileges
from virtiofsd_nydus.kernelmount.settings import Settings, catch_signals, reap

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

TRIES = 5  # workers that die young; then readers are refused
YOUNG_S = 5.0
PAUSE_FIRST_S, PAUSE_LAST_S = 2.0, 30.0
MNT_DETACH = 2


def detach(settings: Settings) -> None:
    """SIGTERM: takes the mount away; the processes end when its last user has left."""
    target = os.fsencode(settings.target)
    if lib.vnd_mount_id(target) == settings.mount_id:
        lib.vnd_umount(target, MNT_DETACH)


def say(text: str) -> None:
    print(f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} [guard] {text}", file=sys.stderr, flush=True)


def refuse_until(settings: Settings, shared: "Any", end: float) -> None:
    """Fails readers as they come."""
    events = select.poll()
    events.register(settings.group, select.POLLIN)
    while (left := end - time.monotonic()) > 0:
        lib.vnd_precontent_refuse(shared)
        if lib.vnd_precontent_ended(shared):
            return
        events.poll(left * 1000)


def open_shared(settings: Settings) -> "Any":
    err = ffi.new("char[]", lib.VND_ERR_MAX)
    shared = lib.vnd_precontent_new(ffi.NULL, settings.group, settings.state, err, lib.VND_ERR_MAX)
    if shared == ffi.NULL:
        sys.exit(ffi.string(err).decode())
    return shared


def wait_for(pidfd: int) -> None:
    events = select.poll()
    events.register(pidfd, select.POLLIN)
    events.poll()
    os.close(pidfd)


def guard(settings: Settings, pidfd: int) -> None:
    shared = open_shared(settings)
    catch_signals(lambda: detach(settings))
    own = os.pidfd_open(os.getpid())
    worker, began, young = 0, time.monotonic(), 0
    while True:
        if pidfd >= 0:
            wait_for(pidfd)
        if worker:
            reap(worker)
        if lib.vnd_precontent_ended(shared):
            return
        failed = pidfd < 0 or (worker and time.monotonic() - began < YOUNG_S)
        young = young + 1 if failed else 0
        if young >= TRIES:
            pause = min(PAUSE_FIRST_S * 2 ** min(young - TRIES, 10), PAUSE_LAST_S)
            say(f"{young} workers in a row have died young: reads of what is not here fail for {pause:.0f} s")
            refuse_until(settings, shared, time.monotonic() + pause)
            if lib.vnd_precontent_ended(shared):
                return
        say("the worker is gone: starting another")
        began = time.monotonic()
        try:
            worker = settings.start("worker", own)
            pidfd = os.pidfd_open(worker)
        except OSError as error:
            say(f"cannot start a worker: {error.strerror}")
            worker, pidfd, young = 0, -1, max(young, TRIES)


def main() -> None:
    settings = Settings.load(int(sys.argv[1]))
    reduce_privileges()
    guard(settings, int(sys.argv[2]))
    # Imported at the end alone: it costs memory
    from pathlib import Path

    from virtiofsd_nydus.kernelmount.record import forget, is_ours

    if not is_ours(settings.target):
        forget(Path(settings.directory), settings.mount_id)


if __name__ == "__main__":
    main()
