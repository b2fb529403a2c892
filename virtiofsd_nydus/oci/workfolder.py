"""The folder a conversion works in: gone when it ends, and when it was killed, with the next conversion.

A run holds a lock (flock) on its folder as long as it lives, so that a folder whose lock can be had belongs to no run
that lives."""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PREFIX = "virtiofsd-nydus-convert-"


@contextmanager
def make_work_folder(parent: Path | None) -> Iterator[Path]:
    """A new folder in parent (default: TMPDIR), in which those of dead runs are removed first. Raises OSError."""
    top = parent or Path(tempfile.gettempdir())
    sweep_work_folders(top)
    folder, lock = _make_locked(top)
    try:
        yield folder
    finally:
        # Threads that were left behind may still be writing.
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def sweep_work_folders(top: Path) -> None:
    """Removes what killed runs of this user left in top."""
    for folder in top.glob(PREFIX + "*"):
        with suppress(OSError):  # another run's, another user's, or just gone
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                if os.fstat(lock).st_uid == os.geteuid():
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)


def _make_locked(top: Path) -> tuple[Path, int]:
    while True:
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=top))
        lock = -1
        try:
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            with suppress(OSError):  # a file system without locks: no run can sweep there either
                fcntl.flock(lock, fcntl.LOCK_EX)
            if os.path.samestat(os.fstat(lock), folder.stat()):
                return folder, lock
        except FileNotFoundError:
            pass
        # Another run took it for a dead one's before it was locked.
        if lock >= 0:
            os.close(lock)
