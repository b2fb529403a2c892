"""`block`: an image as a vhost-user block device. The guest's own EROFS mounts it (docs/block.md).

Only what must be known before RUNNING is imported here.
"""

from virtiofsd_nydus.cli import virtiofs
from virtiofsd_nydus.cli.words import check_words
from virtiofsd_nydus.errors import UsageFailure

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse


def add_arguments(parser: "argparse.ArgumentParser") -> None:
    virtiofs.add_arguments(parser)


def run(args: "argparse.Namespace") -> int:
    check_words(args)
    if not args.bootstrap:
        raise UsageFailure("give --bootstrap IMAGE: a block device is of one image")
    if args.shared_dir or args.virtual_mountpoint != "/":
        raise UsageFailure("a block device has no mount points: leave --shared-dir and --virtual-mountpoint out")
    args.device = "blk"
    return virtiofs.start(args)
