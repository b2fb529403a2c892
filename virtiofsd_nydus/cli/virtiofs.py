"""`virtiofs`: the vhost-user daemon. Takes nydusd's flags and the ones of virtiofsd that launchers pass.

Only what must be known before RUNNING is imported here.
"""

import sys

from virtiofsd_nydus import __version__
from virtiofsd_nydus.errors import Failure, UsageFailure

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    import socket

    from virtiofsd_nydus.log import Log

NOFILE_DEFAULT = 1_000_000


def add_arguments(parser: "argparse.ArgumentParser") -> None:
    where = parser.add_argument_group("socket (one of)")
    where.add_argument("--sock", metavar="PATH", help="listen for the VMM on this unix socket")
    where.add_argument("--socket-path", metavar="PATH", help="the same, as virtiofsd calls it")
    where.add_argument("--fd", type=int, metavar="N", help="use an inherited socket, listening or connected")
    add_daemon_arguments(parser)
    tolerated = parser.add_argument_group("accepted for compatibility, without effect")
    tolerated.add_argument("--hybrid-mode", action="store_true")
    tolerated.add_argument("--log-rotation-size", type=int, default=0)
    tolerated.add_argument("--dedup-db", metavar="PATH", help="nydusd's chunk database; not used")
    tolerated.add_argument("--thread-num", "--fuse-threads", type=int)
    tolerated.add_argument("--tag")
    tolerated.add_argument("--print-capabilities", action="store_true", help="print what a VMM manager asks, exit 0")


def add_daemon_arguments(parser: "argparse.ArgumentParser") -> None:
    """What both daemons take, for guests and for host mounts."""
    image = parser.add_argument_group("image")
    image.add_argument("-B", "--bootstrap", metavar="FILE", help="RAFS metadata to mount; none: mount by the API")
    image.add_argument("-C", "--config", metavar="FILE", help="nydusd configuration, v1 JSON, v2 JSON or TOML")
    image.add_argument("-D", "--localfs-dir", metavar="DIR", help="blobs and cache in one directory, no configuration")
    image.add_argument("-s", "--shared-dir", metavar="DIR", help="a host directory to share, read-write")
    image.add_argument("-m", "--virtual-mountpoint", metavar="PATH", default="/", help="where the image appears")
    image.add_argument(
        "--prefetch-files",
        metavar="FILE",
        help="fetch these first: absolute paths of files and directories, one a line",
    )
    daemon = parser.add_argument_group("daemon")
    daemon.add_argument("-A", "--apisock", metavar="PATH", help="serve nydusd's HTTP API on this unix socket")
    daemon.add_argument("--id", metavar="ID", help="instance id, for the API")
    daemon.add_argument("--supervisor", metavar="PATH", help="supervisor socket, for the API")
    daemon.add_argument("-l", "--log-level", default="info", choices=["trace", "debug", "info", "warn", "error"])
    daemon.add_argument("-L", "--log-file", metavar="PATH", help="append the log to this file; default standard error")
    daemon.add_argument("--log-format", default="text", choices=["text", "json"])
    daemon.add_argument(
        "--rlimit-nofile",
        type=int,
        default=NOFILE_DEFAULT,
        metavar="N",
        help="open files wanted; clamped to what is allowed, 0 = leave",
    )
    daemon.add_argument(
        "--read-deadline-ms",
        type=int,
        default=0,
        metavar="MS",
        help="a guest read that cannot be had in time ends in EIO after this (default 30000)",
    )
    daemon.add_argument(
        "--allow-unverified",
        action="store_true",
        help="serve images that carry no chunk digests: their bytes cannot be checked",
    )


def raise_nofile(wanted: int) -> str | None:
    """Raises RLIMIT_NOFILE as far as allowed; a line for the log where that is less than wanted."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if not wanted or soft >= wanted:
        return None
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, max(hard, wanted)))
        return None
    except (ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        return f"RLIMIT_NOFILE is {hard}, {wanted} was asked for" if wanted != NOFILE_DEFAULT else None


def prepare_process(args: "argparse.Namespace", log: "Log") -> None:
    """Limits, then rights: what needs more than a daemon's is over after it. Before any thread is started."""
    from virtiofsd_nydus import log as logs
    from virtiofsd_nydus.engine import reduce_privileges

    clamped = raise_nofile(args.rlimit_nofile)
    if clamped:
        log.say(logs.WARNING, clamped)
    kept = reduce_privileges()
    if kept:
        log.say(logs.DEBUG, kept)


def run(args: "argparse.Namespace") -> int:
    if args.print_capabilities:
        print('{"type": "fs", "features": []}')
        return 0
    sock = args.sock or args.socket_path
    if (sock is None) == (args.fd is None):
        raise UsageFailure("give either --sock PATH or --fd N")
    if args.shared_dir and (args.bootstrap or args.config or args.localfs_dir):
        raise UsageFailure("--shared-dir shares a host directory: it takes no --bootstrap, --config or --localfs-dir")
    if args.bootstrap and bool(args.config) == bool(args.localfs_dir):
        raise UsageFailure("--bootstrap needs either --config or --localfs-dir")

    if not args.apisock:
        return _serve(args, sock, None)

    from virtiofsd_nydus.daemon.listener import listen_api, remove_file

    listener = listen_api(args.apisock)
    try:
        return _serve(args, sock, listener)
    except BaseException:
        listener.close()
        remove_file(args.apisock)
        raise


def _serve(args: "argparse.Namespace", sock: str | None, api_listener: "socket.socket | None") -> int:
    from virtiofsd_nydus import config as configs
    from virtiofsd_nydus import log as logs
    from virtiofsd_nydus.daemon.prefetch import read_list
    from virtiofsd_nydus.daemon.service import Service

    if args.prefetch_files and not args.bootstrap:
        raise UsageFailure("--prefetch-files needs --bootstrap; for mounts by the API the list is in the request")
    prefetch_files = read_list(args.prefetch_files) if args.prefetch_files else None
    config = None
    if args.localfs_dir:
        config = configs.localfs_config(args.localfs_dir)
    elif args.config and args.bootstrap:  # else mounts by the API bring theirs; nydusd does not read it then
        config = configs.load_config(args.config)
    try:
        log = logs.Log(args.log_level, args.log_file, args.log_format)
    except OSError as error:
        raise Failure(f"cannot write log file {args.log_file}: {error.strerror}") from error
    prepare_process(args, log)
    service = Service(
        log,
        instance_id=args.id,
        supervisor=args.supervisor,
        read_deadline_ms=args.read_deadline_ms,
        allow_unverified=args.allow_unverified,
    )
    service.catch_signals()  # one that comes as soon as RUNNING is answered is an orderly end, too
    try:
        service.start(
            sock=sock,
            fd=args.fd,
            apisock=args.apisock,
            bootstrap=args.bootstrap,
            config=config,
            mountpoint=args.virtual_mountpoint,
            prefetch_files=prefetch_files,
            shared_dir=args.shared_dir,
            api_listener=api_listener,
        )
    except Failure:
        service.stop()
        raise
    print(f"virtiofsd-nydus {__version__} running", file=sys.stderr) if sys.stderr.isatty() else None
    service.wait()
    service.stop()
    return 0
