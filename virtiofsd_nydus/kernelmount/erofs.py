"""mount(2) of EROFS over plain files, and a line for each way in which the kernel refuses."""

import errno
from collections.abc import Sequence

from virtiofsd_nydus.errors import Cause, Failure
from virtiofsd_nydus.fuse import mounts

FSTYPE = "erofs"


def check_kernel() -> None:
    if not mounts.knows_filesystem(FSTYPE):
        raise Failure(
            "this kernel has no EROFS or its module is not loaded: modprobe erofs, or mount without --kernel",
            Cause.MISSING,
        )


def mount_erofs(bootstrap: str, devices: Sequence[str], target: str) -> None:
    """devices: files in the order of the bootstrap's blob table. target: a checked directory."""
    options = ",".join(f"device={device}" for device in devices)
    try:
        mounts.mount(bootstrap, target, FSTYPE, mounts.MS_RDONLY | mounts.MS_NOSUID | mounts.MS_NODEV, options)
    except OSError as error:
        why = error.strerror
        if error.errno == errno.ENOTBLK:
            why = "this kernel mounts EROFS from block devices alone (plain files since 6.12)"
        elif error.errno == errno.EPERM:
            why = "that needs root"
        raise Failure(
            f"the kernel does not mount this image on {target}: {why}; mount without --kernel", Cause.IO
        ) from None
