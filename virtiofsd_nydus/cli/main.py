"""Entry point. Finds the verb, imports that verb's module alone, turns a Failure into one line and a status.

Exit status: 0 done, 1 failed, 2 usage (verbs may document others).
"""

import signal
import sys
import threading
from contextlib import contextmanager, nullcontext

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType
    from typing import NoReturn

# verb -> help line; the module is virtiofsd_nydus.cli.<verb>
VERBS = {
    "virtiofs": "vhost-user virtio-fs daemon (nydusd's and virtiofsd's flags)",
    "block": "vhost-user block device of one image, for the guest's own EROFS",
    "upgrade": "have running daemons go on with this version",
    "fuse": "daemon for a mount on this host (nydusd's flags)",
    "build": "make a Nydus image from a directory or a tar",
    "convert": "make a Nydus image from an OCI image",
    "check": "verify structure, bounds and chunk digests of an image",
    "unpack": "write the files of an image as a tar",
    "inspect": "tell what a bootstrap says",
    "index": "what a node knows of a plain image, put beside it for others",
    "bootstrap": "the bootstrap of an image, as a file",
    "explain": "why an image's bytes are believed, link by link",
    "cache": "what a cache directory holds, its left-overs, whether its bytes are right",
    "boot": "boot a guest on an image and run a command in it",
    "mount": "an image on a directory of this host",
    "umount": "take such a mount away",
    "bench": "measure the engine or whole guests",
}
ENDS = (signal.SIGTERM, signal.SIGHUP)
DAEMONS = ("virtiofs", "block", "fuse")  # they have an end of their own for signals
# Flags that mean `virtiofs` when no verb is given (virtiofsd's own calling convention)
VIRTIOFS_FLAGS = ("--fd", "--socket-path", "--print-capabilities")


def print_help() -> None:
    print("usage: virtiofsd-nydus VERB [options]\n\nverbs:")
    for verb, line in VERBS.items():
        print(f"  {verb:10} {line}")
    print("\n`virtiofsd-nydus VERB --help` tells a verb's options.")


def leave(number: int, frame: "FrameType | None") -> "NoReturn":
    """Ends a verb in order: what it has started and made is ended and removed on the way out, and no further signal
    breaks that off."""
    for one in ENDS:
        signal.signal(one, signal.SIG_IGN)
    raise SystemExit(128 + number)


@contextmanager
def ending_in_order() -> "Iterator[None]":
    """Inside, SIGTERM, and SIGHUP unless nohup has it ignored, end the verb in order, as SIGINT does. Of the main
    thread; others cannot set handlers."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [one for one in ENDS if signal.getsignal(one) != signal.SIG_IGN]
    before = [signal.signal(one, leave) for one in numbers]
    try:
        yield
    finally:
        for one, handler in zip(numbers, before, strict=True):
            signal.signal(one, handler)


def main(argv: list[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print_help()
        return 0 if words else 2
    if words[0] in ("-V", "--version"):
        from virtiofsd_nydus.version import version_text

        print(version_text())
        return 0
    if words[0].startswith("-") and any(word.split("=", 1)[0] in VIRTIOFS_FLAGS for word in words):
        words.insert(0, "virtiofs")
    elif words[0].startswith("-"):
        words.insert(0, "fuse")  # nydusd's calling convention
    verb, rest = words[0], words[1:]
    if verb not in VERBS:
        print(f"virtiofsd-nydus: no verb {verb!r}; see virtiofsd-nydus --help", file=sys.stderr)
        return 2
    import argparse
    import importlib

    from virtiofsd_nydus.errors import Failure, UsageFailure
    from virtiofsd_nydus.oci import layers

    layers.install()
    module = importlib.import_module(f"virtiofsd_nydus.cli.{verb}")
    parser = argparse.ArgumentParser(prog=f"virtiofsd-nydus {verb}", description=VERBS[verb], allow_abbrev=False)
    module.add_arguments(parser)
    # `VERB options -- CMD...`: split here, for argparse loses a second -- and takes no options after a positional list
    command: list[str] | None = None
    if getattr(module, "TAKES_COMMAND", False):
        at = rest.index("--") if "--" in rest else len(rest)
        rest, command = rest[:at], rest[at + 1 :]
    args = parser.parse_args(rest)
    if command is not None:
        args.command = command
    try:
        with ending_in_order() if verb not in DAEMONS else nullcontext():
            status: int = module.run(args)
        return status
    except Failure as failure:
        print(f"virtiofsd-nydus {verb}: {failure}", file=sys.stderr)
        return 2 if isinstance(failure, UsageFailure) else 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
