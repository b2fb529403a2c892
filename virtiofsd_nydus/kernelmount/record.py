"""Which kernel mounts are ours: a file in the mount's run directory, bound to the kernel's number of that mount."""

import fcntl
import json
import os
import shutil
import time
from pathlib import Path

from virtiofsd_nydus.engine import lib
from virtiofsd_nydus.fuse.background import BackgroundMount
from virtiofsd_nydus.net.documents import parse_json

FILE, LOCK = "kernel.json", "lock"
POLL_S = 0.01


def mount_id(target: str) -> int:
    """The number that no other mount has until the next boot. Raises OSError."""
    found: int = lib.vnd_mount_id(os.fsencode(target))
    if found < 0:
        raise OSError(-found, os.strerror(-found), target)
    return found


def write_record(directory: Path, number: int, *, lazy: bool) -> None:
    (directory / FILE).write_text(json.dumps({"mount_id": number, "lazy": lazy}))


def recorded_id(directory: Path) -> int:
    """0: no mount of ours was recorded there."""
    try:
        return int(parse_json((directory / FILE).read_bytes())["mount_id"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def is_ours(target: str) -> bool:
    """What the kernel has mounted there is what we recorded."""
    number = recorded_id(BackgroundMount(target).directory)
    try:
        return number != 0 and number == mount_id(target)
    except OSError:
        return False


def forget(directory: Path, number: int) -> None:
    """Removes the run directory, if it is still that mount's."""
    if recorded_id(directory) == number:
        shutil.rmtree(directory, ignore_errors=True)


def wait_ended(directory: Path, seconds: float) -> bool:
    """Whether no process of the mount lives, within that time."""
    try:
        fd = os.open(directory / LOCK, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return True
    end = time.monotonic() + seconds
    try:
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                if time.monotonic() > end:
                    return False
            time.sleep(POLL_S)  # between two looks; the deadline decides
    finally:
        os.close(fd)
