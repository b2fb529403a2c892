"""Flags that several verbs take. Light: the daemons import it before they answer RUNNING."""

import argparse
import os

NOFILE_DEFAULT = 1_000_000
IMAGE_HELP = (
    "docker://HOST[:PORT]/NAME[:TAG|@DIGEST], oci:DIR[:TAG], docker-archive:FILE, oci-archive:FILE, "
    "or a bootstrap file with --blob-dir"
)


# ---- images that are used


def add_reference_arguments(parser: "argparse.ArgumentParser") -> None:
    """IMAGE, as the verbs take it that serve one."""
    parser.add_argument("image", metavar="IMAGE", help=IMAGE_HELP)


def add_place_arguments(parser: "argparse.ArgumentParser | argparse._ArgumentGroup") -> None:
    """Where a bootstrap's blobs are, and where fetched chunks are kept."""
    from pathlib import Path

    parser.add_argument("--blob-dir", type=Path, metavar="DIR", help="where a bootstrap's blobs lie")
    parser.add_argument("--config", type=Path, metavar="FILE", help="nydusd configuration for a bootstrap, instead")
    parser.add_argument(
        "--cache-dir",
        type=Path,
        metavar="DIR",
        help="where fetched chunks are kept; default "
        "/var/cache/virtiofsd-nydus, or $XDG_CACHE_HOME/virtiofsd-nydus without root",
    )


def add_registry_arguments(parser: "argparse.ArgumentParser | argparse._ArgumentGroup") -> None:
    """How a registry is talked to: of every verb that takes an image reference."""
    parser.add_argument(
        "--plain-http", action="store_true", help="talk plain HTTP to registries (loopback ones: always)"
    )
    parser.add_argument(
        "--creds",
        default="",
        metavar="USER:PASSWORD",
        help="login (default: docker's config.json); other users of this host can see it",
    )
    parser.add_argument(
        "--ca-cert",
        action="append",
        default=[],
        metavar="FILE",
        help="PEM file with a CA to trust beside the system's; may be given again",
    )
    parser.add_argument(
        "--hosts-dir",
        default="",
        metavar="DIR",
        help="containerd's directory of HOST/hosts.toml: mirrors, CAs, headers (/etc/containerd/certs.d)",
    )
    parser.add_argument(
        "--credential-provider-config",
        default="",
        metavar="FILE",
        help="the kubelet's CredentialProviderConfig: its plugins give the login",
    )
    parser.add_argument("--credential-provider-bin-dir", default="", metavar="DIR", help="where those plugins are")
    parser.add_argument(
        "--proxy",
        default=None,
        metavar="URL",
        action=_UseProxy,
        help="HTTP proxy for all servers but those of NO_PROXY, instead of HTTP_PROXY and HTTPS_PROXY; '' for none",
    )


def add_trust_arguments(parser: "argparse.ArgumentParser | argparse._ArgumentGroup") -> None:
    """Which signatures are asked for: of every verb that uses an image by its reference."""
    parser.add_argument(
        "--verify-key",
        action="append",
        default=[],
        metavar="PEM",
        help="refuse an image that this public key did not sign (cosign's signatures); again: any of them",
    )
    parser.add_argument("--policy", metavar="FILE", help="which images need which key (containers-policy.json)")


def add_cache_argument(parser: "argparse.ArgumentParser | argparse._ArgumentGroup") -> None:
    parser.add_argument(
        "--cache-dir",
        metavar="DIR",
        help="where chunks and what is known of layers are kept; default /var/cache/virtiofsd-nydus, or "
        "$XDG_CACHE_HOME/virtiofsd-nydus without root",
    )


class _UseProxy(argparse.Action):
    """Sets the environment, by which a daemon that the verb starts takes the same way."""

    def __call__(self, parser: object, namespace: "argparse.Namespace", values: object, option: object = None) -> None:
        for name in ("HTTP_PROXY", "HTTPS_PROXY"):
            os.environ.pop(name.lower(), None)
            os.environ[name] = str(values)
        setattr(namespace, self.dest, values)


def add_data_arguments(parser: "argparse.ArgumentParser", purpose: str) -> None:
    """A bootstrap and its blobs, for verbs that read all of an image (reader/data.py)."""
    from pathlib import Path

    parser.add_argument("bootstrap", metavar="IMAGE", help=f"{IMAGE_HELP}, or a data blob that holds one")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--blob-dir", type=Path, metavar="DIR", help=f"directory of the data blobs: {purpose}")
    where.add_argument(
        "-C", "--config", type=Path, metavar="FILE", help=f"nydusd configuration whose backend has them: {purpose}"
    )
    parser.add_argument("--blob-id", metavar="ID", help="id of the blob, if the bootstrap was inlined in it")
    parser.add_argument(
        "--allow-unverified",
        action="store_true",
        help="read an image without chunk digests too: says only that its data can be decoded",
    )
    add_reference_options(parser)


def add_reference_options(parser: "argparse.ArgumentParser | argparse._ArgumentGroup") -> None:
    """What goes with an image that is named by a reference."""
    add_cache_argument(parser)
    add_registry_arguments(parser)
    add_trust_arguments(parser)


# ---- images that are made


def parse_size(text: str) -> int:
    """A number of bytes: decimal, 0x-hexadecimal, or with a suffix K or M (powers of 1024)."""
    import argparse

    number, factor = text, 1
    if text[-1:].upper() in ("K", "M"):
        number, factor = text[:-1], 1 << 10 if text[-1].upper() == "K" else 1 << 20
    try:
        return int(number, 0) * factor
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size") from None


def add_build_arguments(parser: "argparse.ArgumentParser") -> None:
    """What kind of image is made: of `build` and `convert`."""
    from pathlib import Path

    from virtiofsd_nydus.builder.options import CODECS, DIGESTERS, FS_VERSIONS, PREFETCH_POLICIES

    parser.add_argument("--fs-version", type=int, default=6, choices=FS_VERSIONS, help="RAFS version (6)")
    parser.add_argument("--compressor", choices=list(CODECS), default="zstd", help="codec of the chunks (zstd)")
    parser.add_argument("--compression-level", type=int, default=3, metavar="N", help="level of zstd, 1 to 19 (3)")
    parser.add_argument("--digester", choices=list(DIGESTERS), default="blake3", help="chunk digests (blake3)")
    parser.add_argument(
        "--chunk-size", type=parse_size, default=1 << 20, metavar="BYTES", help="power of two, 4K to 16M (1M)"
    )
    parser.add_argument(
        "--batch-size",
        type=parse_size,
        default=0,
        metavar="BYTES",
        help="compress files under half of it together; power of two, 4K to the chunk size (0: not)",
    )
    parser.add_argument("--aligned-chunk", action="store_true", help="align uncompressed chunks to 4K (v5; v6 always)")
    parser.add_argument(
        "--encrypt", action="store_true", help="encrypt blobs with AES-128-XTS; the keys are in the bootstrap"
    )
    parser.add_argument("--chunk-dict", type=Path, metavar="BOOTSTRAP", help="reuse this image's chunks")
    parser.add_argument(
        "--prefetch-policy",
        choices=PREFETCH_POLICIES,
        default="none",
        help="what a mount prefetches: fs: the paths below, blob: the blobs' heads, which hold them",
    )
    parser.add_argument(
        "--prefetch-pattern", action="append", metavar="PATH", help="path in the image to prefetch, repeatable (/)"
    )
    parser.add_argument(
        "--prefetch-files",
        metavar="FILE",
        help="such paths, one a line (-: standard input, read anyway with a policy and no paths)",
    )
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="compressing threads (one a processor)")


# ---- guests


def add_machine_arguments(parser: "argparse.ArgumentParser") -> None:
    """The guest's options: of every verb that boots one."""
    from pathlib import Path

    machine = parser.add_argument_group("guest")
    machine.add_argument("--memory", default="512M", metavar="SIZE", help="default 512M")
    machine.add_argument("--cpus", type=int, default=1, metavar="N")
    machine.add_argument(
        "--accel",
        default="tcg",
        choices=["tcg", "kvm", "auto"],
        help="kvm and auto first try whether a guest boots with KVM; default tcg",
    )
    machine.add_argument("--kernel", type=Path, metavar="FILE", help="default: what make guest built")
    machine.add_argument("--initrd", type=Path, metavar="FILE")
    machine.add_argument("--timeout", type=float, default=120.0, metavar="SECONDS", help="for the whole; default 120")


# ---- daemons


def add_daemon_arguments(parser: "argparse.ArgumentParser") -> None:
    """What both daemons take, for guests (`virtiofs`) and for host mounts (`fuse`)."""
    image = parser.add_argument_group("image")
    image.add_argument(
        "-B",
        "--bootstrap",
        metavar="IMAGE",
        help="RAFS metadata to mount, or docker://, oci:...; none: mount by the API",
    )
    image.add_argument("-C", "--config", metavar="FILE", help="nydusd configuration, v1 JSON, v2 JSON or TOML")
    image.add_argument("-D", "--localfs-dir", metavar="DIR", help="blobs and cache in one directory, no configuration")
    image.add_argument("-s", "--shared-dir", metavar="DIR", help="a host directory to share, read-write")
    image.add_argument("-m", "--virtual-mountpoint", metavar="PATH", default="/", help="where the image appears")
    image.add_argument(
        "--prefetch-files",
        metavar="FILE",
        help="fetch these first: absolute paths of files and directories, one a line",
    )
    add_reference_options(parser.add_argument_group("an image by its reference"))
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
    sandbox = parser.add_argument_group("sandbox")
    sandbox.add_argument(
        "--seccomp",
        default=None,
        choices=["kill", "trap", "log", "none"],
        help="what becomes of a system call that a serving thread does not need (default kill)",
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
