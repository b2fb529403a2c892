"""What a daemon's verb does before its service starts: configuration, log, limits, rights. Light."""

from virtiofsd_nydus import log as logs
from virtiofsd_nydus.arguments import raise_nofile
from virtiofsd_nydus.daemon.mounts import ImageMount
from virtiofsd_nydus.daemon.prefetch import read_list
from virtiofsd_nydus.engine import reduce_privileges
from virtiofsd_nydus.errors import Failure, UsageFailure
from virtiofsd_nydus.oci.serve import apply, is_reference, read_mount_config, resolve_arguments
from virtiofsd_nydus.storage import config as configs

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse


def read_image(args: "argparse.Namespace") -> ImageMount | None:
    """The image of --bootstrap, a file or a reference, with its configuration and its list of files to prefetch."""
    prefetch_files = read_list(args.prefetch_files) if args.prefetch_files else None
    if not args.bootstrap:
        return None  # --config is not read then: mounts by the API bring theirs
    if is_reference(args.bootstrap):
        return _resolve_image(args, prefetch_files)
    if bool(args.config) == bool(args.localfs_dir):
        raise UsageFailure("--bootstrap needs either --config or --localfs-dir")
    config = configs.localfs_config(args.localfs_dir) if args.localfs_dir else configs.load_config(args.config)
    return ImageMount(args.virtual_mountpoint, args.bootstrap, config, prefetch_files)


def _resolve_image(args: "argparse.Namespace", prefetch_files: "list[str] | None") -> ImageMount:
    """The image that --bootstrap names by a reference. The registry is asked before the daemon's sockets are there."""
    if args.localfs_dir:
        raise UsageFailure("--localfs-dir goes with a bootstrap file, not with a reference (--cache-dir)")
    if args.config:
        with open(args.config, encoding="utf-8", errors="replace") as stream:
            config = read_mount_config(stream.read(configs.CONFIG_MAX_BYTES), args.config)
    else:
        config = read_mount_config("", "configuration")
    if args.cache_dir:
        config.work_dir = args.cache_dir
    args.cache_dir = config.work_dir
    args.verify_key = [*args.verify_key, *config.verify_keys]
    args.policy = args.policy or config.policy
    lines: list[str] = []
    source = apply(resolve_arguments(args.bootstrap, args, lines.append), config)
    config.warnings += lines
    return ImageMount(args.virtual_mountpoint, source, config, prefetch_files)


def open_log(args: "argparse.Namespace") -> logs.Log:
    """The log that the arguments ask for."""
    try:
        return logs.Log(args.log_level, args.log_file, args.log_format)
    except OSError as error:
        raise Failure(f"cannot write log file {args.log_file}: {error.strerror}") from error


def prepare_process(args: "argparse.Namespace", log: logs.Log) -> None:
    """Sets limits, then gives rights up, because the limits need them. Before any thread is started."""
    clamped = raise_nofile(args.rlimit_nofile)
    if clamped:
        log.say(logs.WARNING, clamped)
    kept = reduce_privileges()
    if kept:
        log.say(logs.DEBUG, kept)
