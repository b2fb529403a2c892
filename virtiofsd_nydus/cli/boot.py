"""`boot IMAGE [-- CMD...]`: a guest on an image that stays where it is, and one command in it.

Exit status: the command's; 124 when --timeout is over; 125 when the boot itself fails.
"""

import argparse
import json
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from virtiofsd_nydus.arguments import (
    add_machine_arguments,
    add_place_arguments,
    add_reference_arguments,
    add_registry_arguments,
    add_trust_arguments,
)
from virtiofsd_nydus.errors import Failure, UsageFailure

if TYPE_CHECKING:
    from virtiofsd_nydus.vmm.guest import Sink

TAKES_COMMAND = True  # args.command is what follows --
TIMED_OUT, OWN_FAILURE = 124, 125
# How many lines of the daemon's log are shown when a command fails: its last warnings tell why a read gave EIO
SHOWN_LOG_LINES = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_reference_arguments(parser)
    parser.usage = "%(prog)s IMAGE [options] [-- CMD...]"
    parser.epilog = "CMD: what to run in the guest, in the image's root; default: what the image's configuration says."
    add_place_arguments(parser.add_argument_group("image"))
    add_registry_arguments(parser)
    add_trust_arguments(parser)
    add_machine_arguments(parser)
    parser.add_argument("--log-file", type=Path, metavar="FILE", help="keep the daemon's log here")
    parser.add_argument(
        "--json",
        action="store_true",
        help="the figures as one JSON object on standard output; the command's own output then goes to standard error",
    )


def run(args: argparse.Namespace) -> int:
    from virtiofsd_nydus.vmm.boot import TimedOut

    try:
        return _boot(args)
    except UsageFailure:
        raise
    except TimedOut as failure:
        print(f"virtiofsd-nydus boot: {failure}", file=sys.stderr)
        return TIMED_OUT
    except Failure as failure:
        print(f"virtiofsd-nydus boot: {failure}", file=sys.stderr)
        return OWN_FAILURE


def _boot(args: argparse.Namespace) -> int:
    from virtiofsd_nydus.vmm.accel import choose_accel
    from virtiofsd_nydus.vmm.boot import BootOptions, boot_guest
    from virtiofsd_nydus.vmm.image import WantedImage, prepare_image
    from virtiofsd_nydus.vmm.qemu import QEMU, GuestFiles, check_memory, find_program
    from virtiofsd_nydus.vmm.servers import NydusDaemon

    started_at = time.monotonic()
    if args.timeout <= 0 or args.cpus < 1:
        raise UsageFailure("--timeout and --cpus must be positive")
    check_memory(args.memory)
    find_program(QEMU, "qemu-system-x86")
    files = GuestFiles.find(args.kernel, args.initrd)
    accel = choose_accel(args.accel, files)
    out = sys.stderr.buffer if args.json else sys.stdout.buffer
    with ExitStack() as stack:
        image = stack.enter_context(prepare_image(WantedImage.from_arguments(args)))
        daemon = stack.enter_context(NydusDaemon(image.daemon_options, die_with_parent=True))
        options = BootOptions(
            files,
            args.command or image.command,
            args.memory,
            args.cpus,
            accel,
            args.timeout - (time.monotonic() - started_at),
            image.env,
            image.cwd,
            die_with_parent=True,
        )
        try:
            report = boot_guest(
                daemon, options, started_at=started_at, stdout=_writer(out), stderr=_writer(sys.stderr.buffer)
            )
        finally:
            log = daemon.log_text()
            if args.log_file:
                args.log_file.write_text(log)
    if args.json:
        print(json.dumps({"image": args.image, "command": list(options.command), **report.as_dict()}))
    else:
        print(report.describe(), file=sys.stderr)
    if report.status:
        told = [line for line in log.splitlines() if "error" in line.lower() or "warning" in line.lower()]
        for line in told[-SHOWN_LOG_LINES:]:
            print(f"daemon: {line}", file=sys.stderr)
    return report.status


def _writer(stream: BinaryIO) -> "Sink":
    """Passes a piece of the guest's output on at once."""

    def write(data: bytes) -> None:
        stream.write(data)
        stream.flush()

    return write
