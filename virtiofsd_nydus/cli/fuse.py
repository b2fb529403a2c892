"""`fuse`: the daemon for a mount on this host. Takes nydusd's flags; without a verb they mean this one.

Only what must be known before the mount is there is imported here.
"""

from virtiofsd_nydus.arguments import add_daemon_arguments
from virtiofsd_nydus.errors import Failure, UsageFailure

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse


def add_arguments(parser: "argparse.ArgumentParser") -> None:
    mount = parser.add_argument_group("mount")
    mount.add_argument("-M", "--mountpoint", metavar="DIR", required=True, help="an existing directory of this host")
    mount.add_argument("--fuse-threads", "--thread-num", type=int, default=4, metavar="N", help="default 4")
    mount.add_argument("--writable", action="store_true", help="mount read-write; the image itself stays read-only")
    mount.add_argument("--sock", metavar="PATH", help="serve guests on this unix socket too, as `virtiofs` does")
    mount.add_argument(
        "--failover-policy",
        default="resend",
        choices=["none", "resend", "flush"],
        help="what becomes of requests that a dead predecessor left unanswered (default resend)",
    )
    mount.add_argument(
        "--fuse-passthrough",
        default="auto",
        choices=["auto", "off"],
        help="have the kernel read files by itself that are wholly in the cache (auto: where it can)",
    )
    mount.add_argument("--run-dir", metavar="DIR", help="remove this directory at the end (`mount` gives it)")
    mount.add_argument("--upgrade", action="store_true", help="wait in INIT until PUT fuse/takeover")
    add_daemon_arguments(parser)
    tolerated = parser.add_argument_group("accepted for compatibility, without effect")
    tolerated.add_argument("--log-rotation-size", type=int, default=0)
    tolerated.add_argument("--dedup-db", metavar="PATH", help="nydusd's chunk database; not used")


def run(args: "argparse.Namespace") -> int:
    if args.shared_dir:
        raise UsageFailure("--shared-dir: passthrough on the host is not supported; use a bind mount")
    if bool(args.id) != bool(args.supervisor):
        raise UsageFailure("--id and --supervisor go together")

    from virtiofsd_nydus.daemon.host import HostService
    from virtiofsd_nydus.daemon.process import open_log, prepare_process, read_image
    from virtiofsd_nydus.daemon.service import STOP_DEADLINE_S, Sockets
    from virtiofsd_nydus.fuse.host import HostFuse

    image = read_image(args)
    fuse = HostFuse(
        args.mountpoint,
        threads=args.fuse_threads,
        failover_policy=args.failover_policy,
        writable=args.writable,
        supervised=args.supervisor is not None,
        passthrough=args.fuse_passthrough == "auto",
    )
    log = open_log(args)
    prepare_process(args, log)
    service = HostService(
        log,
        fuse,
        instance_id=args.id,
        supervisor=args.supervisor,
        read_deadline_ms=args.read_deadline_ms,
        allow_unverified=args.allow_unverified,
        seccomp=args.seccomp,
    )
    try:
        service.start_host(Sockets(sock=args.sock, apisock=args.apisock), image, upgrade=args.upgrade)
    except Failure as failure:
        service.stop(STOP_DEADLINE_S, failure)
        raise
    service.wait()
    service.stop(STOP_DEADLINE_S)
    if args.run_dir:
        from virtiofsd_nydus.fuse.background import remove_run_dir

        remove_run_dir(args.run_dir)
    return 0
