"""`umount DIR`: takes a mount of `mount` away; its daemon ends with it."""

import argparse

from virtiofsd_nydus.errors import Cause, Failure


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", metavar="DIR")


def run(args: argparse.Namespace) -> int:
    from virtiofsd_nydus.fuse import mounts
    from virtiofsd_nydus.fuse.background import BackgroundMount
    from virtiofsd_nydus.kernelmount.erofs import FSTYPE as KERNEL_FSTYPE
    from virtiofsd_nydus.kernelmount.launch import umount_kernel
    from virtiofsd_nydus.kernelmount.record import is_ours

    try:
        target = mounts.resolve_mountpoint(args.directory)
    except OSError as error:
        raise Failure(f"no directory {args.directory}: {error.strerror}", Cause.MISSING) from None
    there = mounts.find_mount(target)
    kernel = there is not None and there.fstype == KERNEL_FSTYPE and is_ours(target)
    if there is None or not (kernel or there.fstype == mounts.FSTYPE):
        raise Failure(
            f"no image of ours is mounted on {args.directory}"
            + (f", but {there.source} ({there.fstype})" if there else ""),
            Cause.MISSING,
        )
    if kernel:
        line = umount_kernel(target, args.directory)
        if line:
            print(line)
        return 0
    try:
        mounts.umount(target)
    except OSError as error:
        raise Failure(f"cannot unmount {args.directory}: {error.strerror}", Cause.IO) from None
    place = BackgroundMount(target)
    place.wait_ended()
    place.remove()
    return 0
