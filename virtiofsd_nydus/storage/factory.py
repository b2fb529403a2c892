"""From the backend section of a nydusd configuration to a Backend. Light: no network, no HTTP library."""

from virtiofsd_nydus.errors import UsageFailure
from virtiofsd_nydus.storage import http

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    from virtiofsd_nydus.storage.backend import Backend

REGISTRY_KEYS = frozenset((
    "scheme", "host", "repo", "auth", "registry_token", "blob_url_scheme", "blob_redirected_host", "skip_verify",
    "ca_cert_files", "timeout", "connect_timeout", "retry_limit"))
LOCALFS_KEYS = frozenset(("dir", "blob_file", "alt_dirs"))
# Given by nydusd's clients and without effect when empty.
QUIET_EMPTY_KEYS = frozenset(("proxy", "mirrors", "readahead", "readahead_sec"))


def create_backend(kind: str, settings: "Mapping[str, Any]", *,
                   warn: "Callable[[str], None] | None" = None) -> "Backend":
    """The backend of a type and its settings, as they stand in nydusd's configurations.

    warn gets one line that names all keys that were not understood. Raises UsageFailure for settings that cannot be.
    Opens nothing, so that nothing has to be up yet."""
    known = {"registry": REGISTRY_KEYS, "localfs": LOCALFS_KEYS}.get(kind)
    if known is None:
        raise UsageFailure(f"backend type {kind!r} is not supported: registry and localfs are")
    if not isinstance(settings, dict):
        raise UsageFailure(f"backend {kind}: its config must be an object")
    unknown = sorted(key for key, value in settings.items()
                     if key not in known and not (key in QUIET_EMPTY_KEYS and not _has_effect(value)))
    if unknown and warn is not None:
        warn(f"backend {kind}: keys without effect here: {', '.join(unknown)}")
    if kind == "localfs":
        return _make_localfs(settings)
    return _make_registry(settings)


def _make_localfs(settings: "Mapping[str, Any]") -> "Backend":
    from virtiofsd_nydus.storage.localfs import LocalfsBackend

    directory, blob_file = _text(settings, "dir"), _text(settings, "blob_file")
    if not directory and not blob_file:
        raise UsageFailure("backend localfs: give dir or blob_file")
    return LocalfsBackend(directory, blob_file, tuple(_texts(settings, "alt_dirs")))


def _make_registry(settings: "Mapping[str, Any]") -> "Backend":
    from virtiofsd_nydus.oci.auth import decode_basic
    from virtiofsd_nydus.storage.registry import RETRIES, RegistryBackend

    host, repo = _text(settings, "host"), _text(settings, "repo")
    if not host or not repo:
        raise UsageFailure("backend registry: host and repo are needed")
    auth = _text(settings, "auth")
    skip_verify = settings.get("skip_verify") is True
    client = http.HttpClient(
        skip_verify=skip_verify, ca_cert_files=_texts(settings, "ca_cert_files"),
        read_timeout_s=_number(settings, "timeout", http.READ_TIMEOUT_S),
        connect_timeout_s=_number(settings, "connect_timeout", http.CONNECT_TIMEOUT_S))
    return RegistryBackend(
        # nydusd: anything but http is https.
        client, "http" if _text(settings, "scheme") == "http" else "https", host, repo,
        credentials=decode_basic(auth, "backend registry, auth") if auth else None,
        token=_text(settings, "registry_token"), retries=int(_number(settings, "retry_limit", 0)) or RETRIES,
        plain_fallback=skip_verify, blob_url_scheme=_text(settings, "blob_url_scheme"),
        blob_redirected_host=_text(settings, "blob_redirected_host"))


def _has_effect(value: "Any") -> bool:
    """False for what is empty, and for a `proxy` without an address, as clients send it."""
    if isinstance(value, dict):
        return bool(value.get("url")) or bool(value.get("dragonfly_scheduler_endpoint"))
    return bool(value)


def _text(settings: "Mapping[str, Any]", key: str) -> str:
    value = settings.get(key)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UsageFailure(f"backend: {key} must be a string")
    return value


def _texts(settings: "Mapping[str, Any]", key: str) -> list[str]:
    value = settings.get(key)
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise UsageFailure(f"backend: {key} must be a list of strings")
    return value


def _number(settings: "Mapping[str, Any]", key: str, default: float) -> float:
    value = settings.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1 << 31:
        raise UsageFailure(f"backend: {key} must be a number of at least 0")
    return float(value)
