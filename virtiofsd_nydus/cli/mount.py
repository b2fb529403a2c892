"""`mount IMAGE DIR`: an image on this host, served by a daemon in the background until `umount DIR`."""

import argparse
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from virtiofsd_nydus.arguments import (
    add_place_arguments,
    add_reference_arguments,
    add_registry_arguments,
    add_trust_arguments,
)
from virtiofsd_nydus.errors import Cause, Failure, UsageFailure

if TYPE_CHECKING:
    from virtiofsd_nydus.fuse.background import BackgroundMount

READY_S = 30.0
POLL_S = 0.01


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_reference_arguments(parser)
    parser.add_argument("directory", metavar="DIR", help="where; an existing directory")
    add_place_arguments(parser)
    parser.add_argument(
        "--kernel",
        action="store_true",
        help="have the kernel's EROFS read the cache itself; what is "
        "not in it is fetched when it is read (Linux 6.14), and once all is there no daemon stays",
    )
    parser.add_argument(
        "--fetch-all", action="store_true", help="with --kernel: fetch the whole image first (Linux 6.12)"
    )
    add_registry_arguments(parser)
    add_trust_arguments(parser)


def run(args: argparse.Namespace) -> int:
    from virtiofsd_nydus.fuse.background import BackgroundMount
    from virtiofsd_nydus.fuse.mounts import check_mountpoint
    from virtiofsd_nydus.vmm.image import WantedImage, prepare_image

    if args.fetch_all and not args.kernel:
        raise UsageFailure("--fetch-all goes with --kernel")
    target = check_mountpoint(args.directory)
    place = BackgroundMount(target)
    with prepare_image(WantedImage.from_arguments(args)) as image:
        if args.kernel:
            return _mount_kernel(args.image, image.daemon_options, target, fetch_all=args.fetch_all)
        place.remove()  # of a mount that was detached and whose daemon goes on
        place.make()
        with place.log.open("wb") as log:
            process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "virtiofsd_nydus.cli.main",
                    "fuse",
                    "--mountpoint",
                    target,
                    "--apisock",
                    str(place.api),
                    "--run-dir",
                    str(place.directory),
                    *image.daemon_options,
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            _wait_ready(process, place)
        except BaseException:
            process.terminate()  # it unmounts
            process.wait()
            place.remove()
            raise
    print(f"{args.image} is on {target}; its daemon (process {process.pid}) writes {place.log}")
    return 0


def _mount_kernel(name: str, daemon_options: list[str], target: str, *, fetch_all: bool) -> int:
    from virtiofsd_nydus.kernelmount.launch import mount_lazy, mount_whole
    from virtiofsd_nydus.storage.config import load_config

    options = dict(zip(daemon_options[::2], daemon_options[1::2], strict=True))
    bootstrap, config = Path(options["--bootstrap"]).resolve(), load_config(options["--config"])

    def show(ready: int, total: int) -> None:
        if sys.stderr.isatty():
            print(f"\r{ready} of {total} chunks ", end="", file=sys.stderr, flush=True)

    if fetch_all:
        mount_whole(bootstrap, config, target, progress=show)
        pid = 0
    else:
        pid = mount_lazy(bootstrap, config, target)
    print(
        f"{name} is on {target}; "
        + (
            f"process {pid} fetches what the kernel reads and is not in the cache"
            if pid
            else "the kernel reads the cache itself, there is no daemon"
        )
    )
    return 0


def _wait_ready(process: "subprocess.Popen[bytes]", place: "BackgroundMount") -> None:
    end = time.monotonic() + READY_S
    while not place.is_running():
        if process.poll() is not None:
            said = place.log.read_text(errors="replace").strip().splitlines() or ["it said nothing"]
            raise Failure(said[-1].removeprefix("virtiofsd-nydus fuse: "), Cause.IO)
        if time.monotonic() > end:
            raise Failure(f"the daemon is not ready after {READY_S:.0f} s", Cause.DEADLINE)
        time.sleep(POLL_S)  # between two looks; the deadline decides
