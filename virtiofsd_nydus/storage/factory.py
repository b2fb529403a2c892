"""From the backend section of a nydusd configuration to a Backend. Light: no network, no HTTP library."""

import os

from virtiofsd_nydus.errors import Failure, UsageFailure
from virtiofsd_nydus.net.address import origin_of
from virtiofsd_nydus.net.client import (
    CONNECT_TIMEOUT_S,
    READ_TIMEOUT_S,
    RETRIES,
    CommonHeaders,
    HttpClient,
    Limits,
    Trust,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Any

    from virtiofsd_nydus.net.kubelet import Providers
    from virtiofsd_nydus.net.proxy import ForwardProxy
    from virtiofsd_nydus.storage.backend import Backend
    from virtiofsd_nydus.storage.objects import Keys
    from virtiofsd_nydus.storage.registry import Mirror

    Settings = Mapping[str, Any]
    Say = Callable[[str], None] | None

HEADER_PREFIX = "NYDUS_HEADER_"
TOKEN_CHARACTERS = frozenset("!#$%&'*+-.^_`|~0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")

HTTP_KEYS = frozenset(("skip_verify", "ca_cert_files", "timeout", "connect_timeout", "retry_limit", "proxy"))
OBJECT_KEYS = HTTP_KEYS | {
    "scheme",
    "endpoint",
    "bucket_name",
    "object_prefix",
    "access_key_id",
    "access_key_secret",
    "session_token",
}
LAYERS_KEY = "layers"
# Puts the backend of plain OCI images before one that has their layers; oci.layers.install() sets it.
wrap_layers: "Callable[[Backend, str], Backend] | None" = None
KEYS = {
    "registry": HTTP_KEYS
    | {"scheme", "host", "repo", "auth", "registry_token", "blob_url_scheme", "blob_redirected_host", "mirrors"}
    | {"hosts_dir", "credential_provider_config", "credential_provider_bin_dir"},
    "s3": OBJECT_KEYS | {"region", "path_style"},
    "oss": OBJECT_KEYS,
    "http-proxy": HTTP_KEYS | {"addr", "path"},
    "localfs": frozenset(("dir", "blob_file", "alt_dirs")),
    "localdisk": frozenset(("device_path", "disable_gpt")),
}
PROXY_KEYS = frozenset(
    ("url", "ping_url", "fallback", "check_interval", "use_http", "check_pause_elapsed", "dragonfly_scheduler_endpoint")
)
MIRROR_KEYS = frozenset(("host", "ping_url", "headers", "health_check_interval", "failure_limit", "auth_through"))
HOT_KEYS = ("registry_auth", "proxy_url", "dragonfly_scheduler_endpoint")
# What nydusd once took and takes no more: told with the reason.
REMOVED_KEYS = {
    "readahead": "blob files are read ahead by the kernel",
    "readahead_sec": "blob files are read ahead by the kernel",
}


def create_backend(kind: str, settings: "Settings", *, warn: "Say" = None) -> "Backend":
    """The backend of a type and its settings, as they stand in nydusd's configurations.

    warn gets one line that names all keys that were not understood, and later lines about servers that come and go: it
    is called from any thread. Raises UsageFailure for settings that cannot be, naming keys and never values. Opens
    nothing, so that nothing has to be up yet."""
    known = KEYS.get(kind)
    if known is None:
        raise UsageFailure(f"backend type {kind!r} is not supported: {', '.join(sorted(KEYS))} are")
    if not isinstance(settings, dict):
        raise UsageFailure(f"backend {kind}: its config must be an object")
    layers = _text(settings, LAYERS_KEY)
    _name_unknown(f"backend {kind}", settings, known | {LAYERS_KEY}, warn)
    if layers and wrap_layers is None:
        raise UsageFailure(f"backend {kind}: layers is a key of mounts of plain OCI images")
    backend = MAKERS[kind](settings, warn)
    return wrap_layers(backend, layers) if layers and wrap_layers is not None else backend


def _make_localfs(settings: "Settings", say: "Say") -> "Backend":
    from virtiofsd_nydus.storage.localfs import LocalfsBackend

    directory, blob_file = _text(settings, "dir"), _text(settings, "blob_file")
    if not directory and not blob_file:
        raise UsageFailure("backend localfs: give dir or blob_file")
    return LocalfsBackend(directory, blob_file, tuple(_texts(settings, "alt_dirs")))


def _make_localdisk(settings: "Settings", say: "Say") -> "Backend":
    from virtiofsd_nydus.storage.localdisk import LocaldiskBackend

    path = _text(settings, "device_path")
    if not path:
        raise UsageFailure("backend localdisk: device_path is needed")
    return LocaldiskBackend(path, with_gpt=not _flag(settings, "disable_gpt"))


def _make_registry(settings: "Settings", say: "Say") -> "Backend":
    from virtiofsd_nydus.net.credentials import decode_basic, find_docker_credentials
    from virtiofsd_nydus.net.login import Login
    from virtiofsd_nydus.net.session import Endpoint
    from virtiofsd_nydus.storage.registry import Redirects, RegistryBackend, make_mirrors

    host, repo = _text(settings, "host"), _text(settings, "repo")
    if not host or not repo:
        raise UsageFailure("backend registry: host and repo are needed")
    auth = _text(settings, "auth")
    mirrors = _make_mirrors(settings, say)
    if _text(settings, "hosts_dir"):
        from virtiofsd_nydus.net.hosts import find_hosts

        mirrors += make_mirrors(find_hosts(_text(settings, "hosts_dir"), host, say), host)
    providers = make_providers(
        _text(settings, "credential_provider_config"), _text(settings, "credential_provider_bin_dir")
    )
    endpoint = Endpoint(_scheme(settings), host, repo, plain_fallback=_flag(settings, "skip_verify"))
    # Secrets of the configuration go where its login goes, and nowhere else.
    trusted = [f"{endpoint.scheme}://{host}", *(f"{one.scheme}://{one.host}" for one in mirrors if one.with_login)]
    if endpoint.plain_fallback:
        trusted.append(f"http://{host}")
    return RegistryBackend(
        _make_client(settings, say, trusted),
        endpoint,
        Login(
            decode_basic(auth, "backend registry, auth") if auth else None,
            _text(settings, "registry_token"),
            lambda limit_s: (
                (providers.find(host, repo, limit_s) if providers is not None else None)
                or find_docker_credentials(host, limit_s)
            ),
        ),
        redirects=Redirects(_text(settings, "blob_url_scheme"), _text(settings, "blob_redirected_host")),
        mirrors=mirrors,
        say=say,
    )


def make_providers(config: str, bin_dir: str) -> "Providers | None":
    """The kubelet's credential providers, where a configuration and a directory of them are given."""
    if not config and not bin_dir:
        return None
    if not config or not bin_dir:
        raise UsageFailure("credential providers need a configuration and the directory of the programs")
    from virtiofsd_nydus.net.kubelet import Providers

    return Providers(config, bin_dir)


def _make_mirrors(settings: "Settings", say: "Say") -> "list[Mirror]":
    from virtiofsd_nydus.storage import registry

    found = settings.get("mirrors")
    if found is None:
        return []
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        raise UsageFailure("backend: mirrors must be a list of objects")
    mirrors = []
    for one in found:
        _name_unknown("backend registry, mirrors", one, MIRROR_KEYS, say)
        scheme, separator, host = _text(one, "host").rstrip("/").rpartition("://")
        if not host or (separator and scheme not in ("http", "https")) or "/" in host:
            raise UsageFailure("backend registry, mirrors: host must be http(s)://HOST[:PORT]")
        headers = one.get("headers") or {}
        if not isinstance(headers, dict) or not all(isinstance(value, str) for value in headers.values()):
            raise UsageFailure("backend registry, mirrors: headers must be an object of strings")
        mirrors.append(
            registry.Mirror(
                scheme or "https",
                host,
                ping_url=_address(one, "ping_url"),
                headers=headers,
                failures_max=int(_number(one, "failure_limit", 0)) or registry.MIRROR_FAILURES_MAX,
                check_interval_s=_number(one, "health_check_interval", 0) or registry.MIRROR_CHECK_INTERVAL_S,
                with_login=_flag(one, "auth_through"),
            )
        )
    return mirrors


def _make_s3(settings: "Settings", say: "Say") -> "Backend":
    from virtiofsd_nydus.storage.objects import S3_ENDPOINT, Bucket, S3Backend

    bucket, region = _text(settings, "bucket_name"), _text(settings, "region")
    if not bucket or not region:
        raise UsageFailure("backend s3: bucket_name and region are needed")
    place = Bucket(
        _scheme(settings),
        _text(settings, "endpoint") or S3_ENDPOINT,
        bucket,
        _text(settings, "object_prefix"),
        path_style=_flag(settings, "path_style", True),
        region=region,
    )
    return S3Backend(_make_client(settings, say, [place.base]), place, _keys(settings), say)


def _make_oss(settings: "Settings", say: "Say") -> "Backend":
    from virtiofsd_nydus.storage.objects import Bucket, OssBackend

    endpoint, bucket = _text(settings, "endpoint"), _text(settings, "bucket_name")
    if not endpoint or not bucket:
        raise UsageFailure("backend oss: endpoint and bucket_name are needed")
    place = Bucket(_scheme(settings), endpoint, bucket, _text(settings, "object_prefix"))
    return OssBackend(_make_client(settings, say, [place.base]), place, _keys(settings), say)


def _make_http_proxy(settings: "Settings", say: "Say") -> "Backend":
    from virtiofsd_nydus.storage.httpproxy import UNIX_BASE, HttpProxyBackend

    address, path = _text(settings, "addr"), _text(settings, "path")
    unix = address.startswith("/")
    if not unix and not address.startswith(("http://", "https://")):
        raise UsageFailure(
            "backend http-proxy: addr must be http://..., https://... or the absolute path of a unix socket"
        )
    return HttpProxyBackend(
        _make_client(settings, say, [UNIX_BASE if unix else address], unix_socket=address if unix else ""),
        address,
        path,
        unix=unix,
        say=say,
    )


MAKERS: "dict[str, Callable[[Settings, Say], Backend]]" = {
    "registry": _make_registry,
    "s3": _make_s3,
    "oss": _make_oss,
    "http-proxy": _make_http_proxy,
    "localfs": _make_localfs,
    "localdisk": _make_localdisk,
}


def change_backend(backend: "Backend", changes: "Mapping[str, str]") -> list[str]:
    """Hot change by the keys of nydusd's PUT /api/v1/config: registry_auth (base64 of USER:PASSWORD), proxy_url ("" for
    none). Nothing is changed when one of them cannot be: UsageFailure naming keys, never values. Returns the keys that
    mean nothing to this backend."""
    from virtiofsd_nydus.net.credentials import decode_basic
    from virtiofsd_nydus.net.proxy import ForwardProxy, ProxySettings
    from virtiofsd_nydus.storage.blobs import HttpBackend
    from virtiofsd_nydus.storage.registry import RegistryBackend

    for key in changes:
        if key not in HOT_KEYS:
            raise UsageFailure(f"key {key!r} cannot be changed while mounted: {', '.join(HOT_KEYS)} can")
    backend = getattr(backend, "inner", backend)
    unused = ["dragonfly_scheduler_endpoint"] if "dragonfly_scheduler_endpoint" in changes else []
    login = decode_basic(changes["registry_auth"], "registry_auth") if changes.get("registry_auth") else None
    if "proxy_url" in changes:
        url = _address(changes, "proxy_url")
        if isinstance(backend, HttpBackend):
            backend.set_proxy(ForwardProxy(ProxySettings(url), backend.say) if url else None)
        else:
            unused.append("proxy_url")
    if "registry_auth" in changes:
        if isinstance(backend, RegistryBackend):
            backend.set_credentials(login)
        else:
            unused.append("registry_auth")
    return unused


# ---- parts


def _make_client(settings: "Settings", say: "Say", trusted: "Sequence[str]", *, unix_socket: str = "") -> HttpClient:
    """trusted: addresses of the servers that get the secrets among the environment's headers."""
    try:
        origins = [origin_of(address) for address in trusted]
    except Failure as failure:
        raise UsageFailure(f"backend: {failure}") from None
    connect_timeout_s = _number(settings, "connect_timeout", CONNECT_TIMEOUT_S)
    return HttpClient(
        Limits(
            read_timeout_s=_number(settings, "timeout", READ_TIMEOUT_S),
            connect_timeout_s=connect_timeout_s,
            retries=int(_number(settings, "retry_limit", 0)) or RETRIES,
        ),
        Trust(_texts(settings, "ca_cert_files"), skip_verify=_flag(settings, "skip_verify")),
        headers=CommonHeaders(read_header_environment(say), origins),
        unix_socket=unix_socket,
        proxy=None if unix_socket else _make_proxy(settings, connect_timeout_s, say),
    )


def _make_proxy(settings: "Settings", connect_timeout_s: float, say: "Say") -> "ForwardProxy | None":
    from virtiofsd_nydus.net.proxy import ForwardProxy, ProxySettings

    proxy = settings.get("proxy")
    if proxy is None:
        return None
    if not isinstance(proxy, dict):
        raise UsageFailure("backend: proxy must be an object")
    _name_unknown("backend, proxy", proxy, PROXY_KEYS, say)
    url = _address(proxy, "url")
    if _text(proxy, "dragonfly_scheduler_endpoint") and say is not None:
        say(
            "backend, proxy: dragonfly_scheduler_endpoint is not used: Dragonfly's peer daemon is spoken to as an HTTP "
            f"proxy ({'by url' if url else 'give its url'})"
        )
    if not url:
        return None
    wanted = ProxySettings(
        url,
        ping_url=_address(proxy, "ping_url"),
        fallback=_flag(proxy, "fallback", True),
        check_interval_s=_number(proxy, "check_interval", 0) or 5.0,
        use_http=_flag(proxy, "use_http"),
        check_pause_s=_number(proxy, "check_pause_elapsed", 0) or 300.0,
        connect_timeout_s=connect_timeout_s,
    )
    return ForwardProxy(wanted, say)


def read_header_environment(say: "Say") -> dict[str, str]:
    """Headers from NYDUS_HEADER_<Name>=<value>. What cannot be a header is named, its value is not."""
    found: dict[str, str] = {}
    for variable, value in sorted(os.environ.items()):
        if not variable.startswith(HEADER_PREFIX):
            continue
        name = variable.removeprefix(HEADER_PREFIX)
        if not name or not TOKEN_CHARACTERS.issuperset(name) or not (value.isascii() and value.isprintable()):
            if say is not None:
                say(f"{variable}: not a valid HTTP header, left out")
            continue
        found["User-Agent" if name.lower() == "user-agent" else name] = value
    return found


def _name_unknown(where: str, settings: "Settings", known: "frozenset[str] | set[str]", warn: "Say") -> None:
    if warn is None:
        return
    unknown = sorted(key for key in settings if key not in known and key not in REMOVED_KEYS)
    if unknown:
        warn(f"{where}: unknown keys, without effect: {', '.join(unknown)}")
    for key, reason in REMOVED_KEYS.items():
        if key in settings and key not in known and settings[key]:
            warn(f"{where}: {key} is no longer a key of nydusd's and without effect: {reason}")


def _scheme(settings: "Settings") -> str:
    """The scheme as nydusd reads it: anything but http is https."""
    return "http" if _text(settings, "scheme") == "http" else "https"


def _keys(settings: "Settings") -> "Keys":
    from virtiofsd_nydus.storage.objects import Keys

    return Keys(
        _text(settings, "access_key_id"), _text(settings, "access_key_secret"), _text(settings, "session_token")
    )


def _text(settings: "Settings", key: str) -> str:
    value = settings.get(key)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UsageFailure(f"backend: {key} must be a string")
    return value


def _address(settings: "Settings", key: str) -> str:
    value = _text(settings, key)
    if value and not value.startswith(("http://", "https://")):
        raise UsageFailure(f"backend: {key} must be an http:// or https:// address")
    return value


def _flag(settings: "Settings", key: str, default: bool = False) -> bool:
    value = settings.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise UsageFailure(f"backend: {key} must be true or false")
    return value


def _texts(settings: "Settings", key: str) -> list[str]:
    value = settings.get(key)
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise UsageFailure(f"backend: {key} must be a list of strings")
    return value


def _number(settings: "Settings", key: str, default: float) -> float:
    value = settings.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1 << 31:
        raise UsageFailure(f"backend: {key} must be a number of at least 0")
    return float(value)
