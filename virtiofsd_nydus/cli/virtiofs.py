"""`virtiofs`: the vhost-user daemon. Takes nydusd's flags and the ones of virtiofsd that launchers pass.

Only what must be known before RUNNING is imported here.
"""

import argparse
import sys

from virtiofsd_nydus import __version__
from virtiofsd_nydus.arguments import add_daemon_arguments
from virtiofsd_nydus.cli.words import add_words, check_words
from virtiofsd_nydus.errors import Failure, UsageFailure

# Longer than a wake-up takes, shorter than a guest that thinks between two requests (docs/performance.md).
POLL_DEFAULT_US = 50
POLL_MAX_US = 1000

TYPE_CHECKING = False
if TYPE_CHECKING:
    from virtiofsd_nydus.listening import UnixListener


def add_arguments(parser: "argparse.ArgumentParser") -> None:
    where = parser.add_argument_group("socket (one of)")
    where.add_argument("--sock", metavar="PATH", help="listen for the VMM on this unix socket")
    where.add_argument("--socket-path", "--socket", metavar="PATH", help="the same, as virtiofsd calls it")
    where.add_argument("--fd", type=int, metavar="N", help="use an inherited socket, listening or connected")
    add_daemon_arguments(parser)
    parser.add_argument(
        "--poll-us",
        type=int,
        default=POLL_DEFAULT_US,
        metavar="N",
        help="a queue's thread looks for requests up to N microseconds before it sleeps, while that pays; 0: never "
        f"(default {POLL_DEFAULT_US}, at most {POLL_MAX_US})",
    )
    parser.add_argument(
        "--keeper",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="serve from a worker process whose death guests do not notice (docs/keeper.md); --no-keeper for debugging",
    )
    tolerated = parser.add_argument_group("accepted for compatibility, without effect")
    tolerated.add_argument("--hybrid-mode", action="store_true")
    tolerated.add_argument("--log-rotation-size", type=int, default=0)
    tolerated.add_argument("--dedup-db", metavar="PATH", help="nydusd's chunk database; not used")
    tolerated.add_argument("--thread-num", "--fuse-threads", type=int)
    tolerated.add_argument("--tag")
    tolerated.add_argument("--print-capabilities", action="store_true", help="print what a VMM manager asks, exit 0")
    add_words(parser, tolerated)


def run(args: "argparse.Namespace") -> int:
    args.device = "fs"
    check_words(args)
    return start(args)


def start(args: "argparse.Namespace") -> int:
    """Serves devices of kind args.device, until the end; the exit status."""
    if args.print_capabilities:
        print('{"type": "fs", "features": ["migrate-precopy"]}')
        return 0
    sock = args.sock or args.socket_path
    if (sock is None) == (args.fd is None):
        raise UsageFailure("give either --sock PATH or --fd N")
    if not 0 <= args.poll_us <= POLL_MAX_US:
        raise UsageFailure(f"--poll-us {args.poll_us}: give 0 to {POLL_MAX_US}")
    if args.shared_dir and (args.bootstrap or args.config or args.localfs_dir):
        raise UsageFailure("--shared-dir shares a host directory: it takes no --bootstrap, --config or --localfs-dir")

    if args.socket_group and (sock is None or not args.keeper):
        raise UsageFailure("--socket-group: only for a socket that the daemon makes, and not with --no-keeper")
    if not args.apisock:
        return _serve(args, sock, None)

    from virtiofsd_nydus.daemon.server import listen_api

    listener = listen_api(args.apisock)
    try:
        return _serve(args, sock, listener)
    except BaseException:
        listener.close()
        raise


def _serve(args: "argparse.Namespace", sock: str | None, api_listener: "UnixListener | None") -> int:
    if args.keeper:
        from virtiofsd_nydus.keeper.start import keep

        return keep(args, api_listener)

    from virtiofsd_nydus.daemon.process import open_log, prepare_process, read_image
    from virtiofsd_nydus.daemon.service import STOP_DEADLINE_S, Service, Sockets
    from virtiofsd_nydus.storage.config import load_config

    if args.prefetch_files and not args.bootstrap:
        raise UsageFailure("--prefetch-files needs --bootstrap; for mounts by the API the list is in the request")
    image = read_image(args)
    log = open_log(args)
    prepare_process(args, log)
    service = Service(
        log,
        instance_id=args.id,
        supervisor=args.supervisor,
        read_deadline_ms=args.read_deadline_ms,
        poll_us=args.poll_us,
        allow_unverified=args.allow_unverified,
        seccomp=args.seccomp,
        device=args.device,
    )
    if args.config and image is None:
        service.migration_config = lambda: load_config(args.config)  # mounts by the API bring theirs
    service.catch_signals()  # one that comes as soon as RUNNING is answered is an orderly end, too
    try:
        service.start(
            Sockets(sock=sock, fd=args.fd, apisock=args.apisock, listener=api_listener),
            image,
            (args.virtual_mountpoint, args.shared_dir) if args.shared_dir else None,
        )
    except Failure as failure:
        service.stop(STOP_DEADLINE_S, failure)
        raise
    print(f"virtiofsd-nydus {__version__} running", file=sys.stderr) if sys.stderr.isatty() else None
    service.wait()
    service.stop(STOP_DEADLINE_S)
    return 0
