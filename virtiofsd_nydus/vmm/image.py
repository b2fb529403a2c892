"""An image named on a command line, made ready for our daemon: its bootstrap, and a configuration file."""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from virtiofsd_nydus.errors import Cause, Failure, UsageFailure
from virtiofsd_nydus.oci.serve import PREFIXES, resolve
from virtiofsd_nydus.oci.serve import default_cache_dir as default_dir


def tell(line: str) -> None:
    """A line for the person at the command line."""
    print(line, file=sys.stderr)


@dataclass(frozen=True)
class PreparedImage:
    """daemon_options: what NydusDaemon takes. command, env, cwd: the image's own, as its configuration has them.
    fetched_bytes, fetch_requests: what finding it took, the bootstrap above all (as far as it was fetched now)."""

    daemon_options: list[str]
    command: list[str] = field(default_factory=list)
    env: dict[str, str] = field(default_factory=dict)
    cwd: str = "/"
    fetched_bytes: int = 0
    fetch_requests: int = 0


def default_cache_dir() -> Path:
    """The default cache directory: the system's for root, otherwise the user's."""
    return Path(default_dir())


@dataclass(frozen=True)
class WantedImage:
    """An image as a command line names it. name: a reference, or a bootstrap file with blob_dir or config. The others
    are for a reference: how to talk to the registry, and which signatures are asked for."""

    name: str
    blob_dir: Path | None = None
    config: Path | None = None
    cache_dir: Path | None = None
    plain_http: bool = False
    creds: str = ""
    ca_cert_files: tuple[str, ...] = ()
    verify_keys: tuple[str, ...] = ()
    policy: str = ""
    hosts_dir: str = ""
    provider_config: str = ""
    provider_bin_dir: str = ""

    @classmethod
    def from_arguments(cls, args: argparse.Namespace) -> Self:
        """What the flags of arguments.py say: IMAGE, its place and the registry's."""
        return cls(
            args.image,
            args.blob_dir,
            args.config,
            args.cache_dir,
            args.plain_http,
            args.creds,
            tuple(args.ca_cert),
            tuple(args.verify_key),
            args.policy or "",
            args.hosts_dir,
            args.credential_provider_config,
            args.credential_provider_bin_dir,
        )


@contextmanager
def prepare_image(wanted: WantedImage) -> Iterator[PreparedImage]:
    """Finds the image and writes the daemon's configuration into a file that lasts as long as the context. The cache
    directory is made, and stays. Raises Failure, or UsageFailure where options do not fit."""
    image, blob_dir, config = wanted.name, wanted.blob_dir, wanted.config
    work_dir = wanted.cache_dir or default_cache_dir()
    by_reference = image.startswith(PREFIXES)
    if by_reference and (blob_dir or config):
        raise UsageFailure("--blob-dir and --config go with a bootstrap file, not with a reference")
    if not by_reference:
        if not Path(image).is_file():
            raise Failure(f"no image {image}: neither a file nor docker://HOST/NAME or oci:DIR", Cause.MISSING)
        if bool(blob_dir) == bool(config):
            raise UsageFailure("a bootstrap file needs --blob-dir DIR or --config FILE")
        if config:
            yield PreparedImage(["--bootstrap", image, "--config", str(config)])
            return
    try:
        work_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Failure(
            f"cannot make the cache directory {work_dir}: {error.strerror}; choose one with --cache-dir", Cause.IO
        ) from None
    if by_reference:
        from virtiofsd_nydus.oci.store import Access

        bootstraps = work_dir / "bootstraps"
        before = set(bootstraps.glob("*.boot"))
        access = Access(
            wanted.plain_http,
            wanted.creds,
            wanted.ca_cert_files,
            hosts_dir=wanted.hosts_dir,
            provider_config=wanted.provider_config,
            provider_bin_dir=wanted.provider_bin_dir,
        )
        found = resolve(
            image, str(work_dir), access=access, verify_keys=wanted.verify_keys, policy=wanted.policy, say=tell
        )
        backend = found.backend_config()
        kind, settings, bootstrap = backend["type"], backend["config"], str(found.bootstrap)
        own = found.config.get("config") or {}
        digest = found.bootstrap_digest
        # Manifest and configuration are asked for each time, the bootstrap once
        fetched = (0, 2) if found.bootstrap in before or found.plain else (found.bootstrap_layer_bytes, 3)
        fetched = (fetched[0] + found.read_bytes, fetched[1] + found.requests)
    else:
        if blob_dir is None or not blob_dir.is_dir():
            raise Failure(f"no blob directory {blob_dir}", Cause.MISSING)
        kind, settings, bootstrap, own = "localfs", {"dir": str(blob_dir.resolve())}, image, {}
        fetched, digest = (0, 0), ""
    document = {
        "version": 2,
        "bootstrap_digest": digest,
        "backend": {"type": kind, kind: settings},
        "cache": {"type": "blobcache", "filecache": {"work_dir": str(work_dir.resolve())}},
    }
    # May hold a login: mkdtemp makes the directory for this user alone
    with tempfile.TemporaryDirectory(prefix="vnd-conf-") as scratch:
        path = Path(scratch) / "config.json"
        path.write_text(json.dumps(document))
        yield PreparedImage(["--bootstrap", bootstrap, "--config", str(path)], *_read_own(own), *fetched)


def _read_own(config: dict[str, Any]) -> tuple[list[str], dict[str, str], str]:
    """Command, environment and directory of an OCI image configuration. The image's author wrote it: values of the
    wrong kind are left out."""

    def strings(key: str) -> list[str]:
        value = config.get(key)
        return [word for word in value if isinstance(word, str)] if isinstance(value, list) else []

    env = dict(word.split("=", 1) for word in strings("Env") if "=" in word)
    cwd = config.get("WorkingDir")
    return strings("Entrypoint") + strings("Cmd"), env, cwd if isinstance(cwd, str) and cwd else "/"
