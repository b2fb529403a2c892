"""Image references where a bootstrap file is wanted: of the daemons, of the API's mounts, of the verbs that read
images.

Light: what talks to a registry is loaded when there is a reference.
"""

import os

from virtiofsd_nydus.errors import Failure, UsageFailure
from virtiofsd_nydus.storage.config import ImageConfig, parse_config

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable
    from typing import Any

    from virtiofsd_nydus.oci.image import ServedImage

# How references begin (oci/reference.py); anything else names a file.
PREFIXES = ("docker://", "oci:", "docker-archive:", "oci-archive:")
BOOTSTRAPS = "bootstraps"


def is_reference(name: object) -> bool:
    return isinstance(name, str) and name.startswith(PREFIXES)


def default_cache_dir() -> str:
    """The default cache directory: the system's for root, otherwise the user's."""
    if os.geteuid() == 0:
        return "/var/cache/virtiofsd-nydus"
    return os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "virtiofsd-nydus")  # noqa: PTH111, PTH118


def resolve(
    reference: str,
    work_dir: str,
    *,
    access: "Any" = None,
    verify_keys: "tuple[str, ...]" = (),
    policy: str = "",
    say: "Callable[[str], None]" = lambda line: None,
) -> "ServedImage":
    """Finds an image and puts what serving it takes into the cache directory work_dir. access: oci.store.Access. Raises
    Failure."""
    from pathlib import Path

    from virtiofsd_nydus.oci.image import ResolveOptions, resolve_image
    from virtiofsd_nydus.oci.reference import parse_reference
    from virtiofsd_nydus.oci.store import DEFAULT_ACCESS

    parsed = parse_reference(reference)
    trust = None
    if verify_keys or policy:
        from virtiofsd_nydus.oci.policy import choose_trust

        trust = choose_trust(parsed, [Path(one) for one in verify_keys], Path(policy) if policy else None)
    options = ResolveOptions(access=access or DEFAULT_ACCESS, work_dir=Path(work_dir), trust=trust, say=say)
    return resolve_image(parsed, cache_dir=Path(work_dir) / BOOTSTRAPS, options=options)


def access_of(args: "argparse.Namespace") -> "Any":
    """What the flags of arguments.add_registry_arguments say."""
    from virtiofsd_nydus.oci.store import Access

    return Access(
        args.plain_http,
        args.creds,
        tuple(args.ca_cert),
        hosts_dir=args.hosts_dir,
        provider_config=args.credential_provider_config,
        provider_bin_dir=args.credential_provider_bin_dir,
    )


def resolve_arguments(
    reference: str, args: "argparse.Namespace", say: "Callable[[str], None]" = lambda line: None
) -> "ServedImage":
    """Of a verb with the registry's, the trust's and the cache's flags."""
    try:
        work_dir = os.fspath(args.cache_dir or default_cache_dir())
        os.makedirs(work_dir, exist_ok=True)  # noqa: PTH103
    except OSError as error:
        raise Failure(
            f"cannot make the cache directory {work_dir}: {error.strerror}; choose one with --cache-dir"
        ) from None
    return resolve(
        reference,
        work_dir,
        access=access_of(args),
        verify_keys=tuple(args.verify_key),
        policy=args.policy or "",
        say=say,
    )


def apply(found: "ServedImage", config: ImageConfig) -> str:
    """Has a configuration lead to an image; what it says of a registry beside place and login (mirrors, proxies, times)
    holds on. The bootstrap's path."""
    place = found.backend_config()
    kept = config.backend_config if config.backend_type == place["type"] else {}
    config.backend_type = place["type"]
    config.backend_config = {**kept, **place["config"]}
    config.bootstrap_digest = found.bootstrap_digest
    return str(found.bootstrap)


def read_mount_config(text: str, where: str) -> ImageConfig:
    """The configuration of a mount whose source is a reference: it need not tell a backend. Its keys `verify_keys` and
    `policy` ask for signatures."""
    import json

    try:
        document = json.loads(text) if text.strip() else {}
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict):
        raise UsageFailure(f"{where} must hold one JSON object")
    place: dict[str, Any] = {"type": "localfs", "config": {"dir": "/"}, "localfs": {"dir": "/"}}
    if "device" in document:
        if isinstance(document["device"], dict):
            document["device"].setdefault("backend", place)
    else:
        document.setdefault("version", 2)
        document.setdefault("backend", place)
        document.setdefault("cache", {"type": "blobcache", "filecache": {"work_dir": default_cache_dir()}})
    return parse_config(json.dumps(document), where)


def resolve_mount(source: str, config: ImageConfig, say: "Callable[[str], None]") -> str:
    """The bootstrap of a reference that the API is asked to mount; config then leads to its blobs."""
    from virtiofsd_nydus.net.credentials import decode_basic
    from virtiofsd_nydus.oci.store import Access

    settings = config.backend_config if config.backend_type == "registry" else {}
    creds = ""
    if settings.get("auth"):
        login = decode_basic(str(settings["auth"]), "backend registry, auth")
        creds = f"{login.username}:{login.password}"
    access = Access(
        settings.get("scheme") == "http",
        creds,
        tuple(str(one) for one in settings.get("ca_cert_files") or ()),
        bool(settings.get("skip_verify")),
    )
    os.makedirs(config.work_dir, exist_ok=True)  # noqa: PTH103
    found = resolve(
        source, config.work_dir, access=access, verify_keys=config.verify_keys, policy=config.policy, say=say
    )
    return apply(found, config)
