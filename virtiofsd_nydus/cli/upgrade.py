"""`upgrade`: has running daemons go on with this version, under their guests."""

import sys
from pathlib import Path

from virtiofsd_nydus.errors import Failure, UsageFailure

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse

ROUTE = "/api/ext/v1/upgrade"
SECONDS = 90.0  # for one daemon; it gives up before


def add_arguments(parser: "argparse.ArgumentParser") -> None:
    parser.add_argument("apisock", nargs="*", metavar="APISOCK", help="API sockets of daemons")
    parser.add_argument("--all", action="store_true", help="all `virtiofs` daemons of this host that have an API")
    parser.add_argument(
        "--python",
        default=sys.executable,
        metavar="PATH",
        help="the interpreter of the version to go on with (default: the one that runs this)",
    )


def run(args: "argparse.Namespace") -> int:
    if bool(args.apisock) == args.all:
        raise UsageFailure("give either API sockets or --all")
    paths = find_daemons() if args.all else [Path(one) for one in args.apisock]
    failed = 0
    for path in paths:
        error = upgrade(path, args.python)
        print(f"{path}: {error or 'upgraded'}")
        failed += error is not None
    if failed:
        raise Failure(f"{failed} of {len(paths)} daemons were not upgraded and serve on as they are")
    return 0


def upgrade(path: Path, python: str) -> "str | None":
    """Upgrades one daemon: None, or why it was not."""
    from virtiofsd_nydus.vmm.servers import call_api

    try:
        status, answer = call_api(path, "PUT", ROUTE, {"python": python}, SECONDS)
    except OSError as error:
        return f"no answer: {error.strerror or error}"
    if status == 204:
        return None
    return str(answer.get("message", answer)) if isinstance(answer, dict) else f"status {status}"


def find_daemons() -> list[Path]:
    """The API sockets of this host's `virtiofs` daemons, each once."""
    found: dict[Path, None] = {}
    for process in Path("/proc").iterdir():
        if not process.name.isdigit():
            continue
        try:
            words = (process / "cmdline").read_text().split("\0")
            directory = (process / "cwd").readlink()
        except (OSError, UnicodeDecodeError):
            continue
        path = api_socket(words)
        if path is not None:
            found[directory / path] = None
    return [path for path in found if path.is_socket()]


def api_socket(words: list[str]) -> "str | None":
    """The --apisock of a command line that is a `virtiofs` daemon's."""
    if "virtiofs" not in words or not any("virtiofsd" in word for word in words[: words.index("virtiofs")]):
        return None
    for at, word in enumerate(words[:-1]):
        if word in ("--apisock", "-A"):
            return words[at + 1]
        if word.startswith("--apisock="):
            return word.partition("=")[2]
    return None
