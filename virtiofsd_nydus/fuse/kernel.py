"""`mount --kernel`: the kernel's own EROFS over the bootstrap, with the blobs' cache files as its devices.

The whole image is fetched and verified first: the kernel then reads the cache files itself, without any daemon, and
nothing could keep bytes from it that were never checked.
"""

import errno
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from virtiofsd_nydus.daemon.config import ImageConfig
from virtiofsd_nydus.engine import Engine, Rafs, Store
from virtiofsd_nydus.errors import Cause, Failure
from virtiofsd_nydus.fuse import mounts
from virtiofsd_nydus.storage.factory import create_backend
from virtiofsd_nydus.storage.pump import FetchPump

FSTYPE = "erofs"
STALL_SECONDS = 60.0
EVENT_MS = 100


def mount_kernel(bootstrap: Path, config: ImageConfig, target: str, *,
                 progress: Callable[[int, int], None] | None = None) -> None:
    """Completes the cache, then mounts. target: a checked directory. progress: chunks ready, chunks in all."""
    if FSTYPE not in {line.split()[-1] for line in Path("/proc/filesystems").read_text().splitlines()}:
        raise Failure("this kernel has no EROFS or its module is not loaded: modprobe erofs, or mount without --kernel",
                      Cause.MISSING)
    ids = _complete_cache(bootstrap, config, progress)
    devices = ",".join(f"device={Path(config.work_dir) / blob_id}.blob.data" for blob_id in ids)
    try:
        mounts.mount(str(bootstrap), target, FSTYPE, mounts.MS_RDONLY | mounts.MS_NOSUID | mounts.MS_NODEV, devices)
    except OSError as error:
        why = error.strerror
        if error.errno == errno.ENOTBLK:
            why = "this kernel mounts EROFS from block devices alone (plain files since 6.12)"
        elif error.errno == errno.EPERM:
            why = "that needs root"
        raise Failure(f"the kernel does not mount this image on {target}: {why}; mount without --kernel",
                      Cause.IO) from None


def _complete_cache(bootstrap: Path, config: ImageConfig, progress: Callable[[int, int], None] | None) -> list[str]:
    """Fetches and verifies every chunk; the ids of the blobs in the bootstrap's order."""
    Path(config.work_dir).mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        engine = Engine()
        stack.callback(engine.close)
        backend = create_backend(config.backend_type, config.backend_config, warn=lambda line: None)
        stack.callback(backend.close)
        store = Store(engine, config.work_dir)
        stack.callback(store.close)
        image = Rafs(engine, str(bootstrap), store)
        stack.callback(image.close)
        if image.info()["fs_version"] != 6:
            raise Failure(f"{bootstrap} is RAFS version 5, which EROFS does not know: mount without --kernel",
                          Cause.FORMAT)
        pump = FetchPump(engine)
        blobs = image.blobs()
        for blob in blobs:
            pump.add_backend(blob.key, backend)
        pump.start()
        stack.callback(pump.join, 5.0)
        stack.callback(engine.shutdown)
        for blob in blobs:
            image.prefetch_blob(blob.index)
        last_ready, moved_at = -1, time.monotonic()
        while True:
            ready, total, known = 0, 0, True
            for blob in blobs:
                have, of = image.ready_chunks(blob.index)
                ready, total, known = ready + have, total + of, known and (of > 0 or blob.chunk_count == 0)
            if known and ready == total:
                return [blob.id for blob in blobs]
            if ready != last_ready:
                last_ready, moved_at = ready, time.monotonic()
                if progress:
                    progress(ready, total)
            if time.monotonic() - moved_at > STALL_SECONDS:
                raise Failure(f"only {ready} of {total} chunks came", Cause.NETWORK)
            event = engine.next_event(EVENT_MS)
            if event is not None and event.level >= 40:
                raise Failure(event.text, event.cause)
