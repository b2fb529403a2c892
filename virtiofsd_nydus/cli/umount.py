"""`umount DIR`: takes a mount of `mount` away; its daemon ends with it."""

import argparse
import errno

from virtiofsd_nydus.errors import Cause, Failure


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", metavar="DIR")
    parser.add_argument(
        "--lazy", action="store_true", help="also while a process uses it: the mount and its daemon go when that ends"
    )


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
    place = BackgroundMount(target)
    try:
        if kernel:
            ended = umount_kernel(target, lazy=args.lazy)
        else:
            mounts.umount(target, lazy=args.lazy)
            ended = place.wait_ended()
            place.remove()
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise Failure(
                f"{args.directory} is in use: end the processes that use it (fuser -vm {args.directory}), or give "
                "--lazy",
                Cause.IO,
            ) from None
        raise Failure(f"cannot unmount {args.directory}: {error.strerror}", Cause.IO) from None
    if not ended:
        print(f"{args.directory} is unmounted and still in use elsewhere: its daemon ends with the last user")
    return 0
