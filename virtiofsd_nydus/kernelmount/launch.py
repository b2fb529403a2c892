"""What the verbs `mount --kernel` and `umount` do."""

import fcntl
import json
import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from virtiofsd_nydus.errors import Cause, Failure
from virtiofsd_nydus.fuse import mounts
from virtiofsd_nydus.fuse.background import BackgroundMount
from virtiofsd_nydus.kernelmount import record
from virtiofsd_nydus.kernelmount.erofs import check_kernel, mount_erofs
from virtiofsd_nydus.kernelmount.image import KernelImage
from virtiofsd_nydus.kernelmount.settings import Settings, reap
from virtiofsd_nydus.storage.config import ImageConfig

END_S = 2.0


def mount_whole(
    bootstrap: Path, config: ImageConfig, target: str, *, progress: Callable[[int, int], None] | None = None
) -> None:
    """Completes the cache, then mounts. target: a checked directory."""
    check_kernel()
    place = BackgroundMount(target)
    Path(config.work_dir).mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        with KernelImage(str(bootstrap), config) as image:
            image.complete(progress)
            # Not by names: another table of the blob may have them. A blob without chunks has no file, and none is read
            files = [image.rafs.open_data(blob.index) for blob in image.blobs]
            for fd in files:
                if fd >= 0:
                    stack.callback(os.close, fd)
        # No name with a comma in it among the options
        devices = [f"/proc/self/fd/{fd}" if fd >= 0 else str(bootstrap) for fd in files]
        mount_erofs(str(bootstrap), devices, target)
    place.make()
    record.write_record(place.directory, record.mount_id(target), lazy=False)


def mount_lazy(bootstrap: Path, config: ImageConfig, target: str) -> int:
    """Mounts at once; the process that serves what is not here yet, or 0: all is here and none stays."""
    check_kernel()
    if os.geteuid() != 0:
        raise Failure("mount --kernel needs root; mount without --kernel", Cause.IO)
    place = BackgroundMount(target)
    Path(config.work_dir).mkdir(parents=True, exist_ok=True)
    config.work_dir = os.path.realpath(config.work_dir)
    place.make()
    try:
        return _start(place, bootstrap, config, target)
    except BaseException:
        place.remove()
        raise


def _start(place: BackgroundMount, bootstrap: Path, config: ImageConfig, target: str) -> int:
    log = os.open(place.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o600)
    lock = os.open(place.directory / record.LOCK, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    listen, ready = os.pipe2(os.O_CLOEXEC)
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    settings = Settings(
        target=target,
        directory=str(place.directory),
        bootstrap=str(bootstrap),
        log=log,
        lock=lock,
        config={name: getattr(config, name) for name in ImageConfig.__slots__},
    )
    settings.save()
    try:
        worker = settings.start("worker", ready)
    finally:
        for fd in (ready, lock, log, settings.fd):
            os.close(fd)
    with open(listen, "rb") as stream:
        told = stream.read()
    if not told:
        reap(worker)
        said = place.log.read_text(errors="replace").strip().splitlines() or ["it said nothing"]
        raise Failure(f"the daemon ended before it was ready: {said[-1]}", Cause.IO)
    answer = json.loads(told)
    if "error" in answer:
        raise Failure(answer["error"], Cause(answer["cause"]))
    return int(answer["pid"]) if answer["lazy"] else 0


def umount_kernel(target: str, *, lazy: bool) -> bool:
    """Unmounts a recorded mount. False: its processes go on, for a process still uses it. Raises OSError."""
    directory = BackgroundMount(target).directory
    number = record.recorded_id(directory)
    mounts.umount(target, lazy=lazy)
    ended = record.wait_ended(directory, END_S)
    record.forget(directory, number)
    return ended
