"""The daemon's configuration as nydusd reads it: v1 JSON (device.backend ...) and v2 JSON or TOML (version = 2).

Keys, defaults and limits are nydusd's; docs/operations.md lists them. Every key that is not
known is named in a warning; what is known and without effect here is told with the reason; what would make the daemon
serve less safely than it was asked to is refused. Parsing touches no network. No message holds a value.
"""

import json
import os

from virtiofsd_nydus.errors import UsageFailure

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    # Known keys: what lies below each, None where anything may (or where others check it).
    Schema = dict[str, "Schema | None"]

CONFIG_MAX_BYTES = 1 << 20
RANGE_MAX_BYTES = 0x1000_0000  # amplify_io, merging_size and their v2 names
THREADS_MAX = 1024
AMPLIFY_DEFAULT_BYTES = 1 << 20
CACHE_TYPES = ("blobcache", "filecache")
NO_CACHE_TYPES = ("dummycache", "")
BACKEND_TYPES = ("localdisk", "localfs", "oss", "s3", "registry", "http-proxy")

CACHE_CONFIG: "Schema" = {
    "work_dir": None,
    "disable_indexed_map": None,
    "enable_encryption": None,
    "enable_convergent_encryption": None,
    "encryption_key": None,
}
V1_SCHEMA: "Schema" = {
    "verify_keys": None,
    "policy": None,
    "device": {
        "id": None,
        "backend": {"type": None, "config": None},
        "external_backends": None,
        "cache": {"type": None, "compressed": None, "validate": None, "config": CACHE_CONFIG},
    },
    "mode": None,
    "digest_validate": None,
    "iostats_files": None,
    "access_pattern": None,
    "latest_read_files": None,
    "enable_xattr": None,
    "amplify_io": None,
    "fs_prefetch": {
        "enable": None,
        "threads_count": None,
        "merging_size": None,
        "bandwidth_rate": None,
        "prefetch_all": None,
        "stream_prefetch": None,
    },
}
V2_PREFETCH: "Schema" = {
    "enable": None,
    "threads": None,
    "batch_size": None,
    "bandwidth_limit": None,
    "prefetch_all": None,
    "stream_prefetch": None,
}
V2_SCHEMA: "Schema" = {
    "version": None,
    "id": None,
    "bootstrap_digest": None,
    "verify_keys": None,
    "policy": None,
    "backend": {"type": None, **dict.fromkeys(BACKEND_TYPES)},
    "external_backends": None,
    "cache": {
        "type": None,
        "compressed": None,
        "validate": None,
        "prefetch": V2_PREFETCH,
        "filecache": CACHE_CONFIG,
        "fscache": {"work_dir": None},
    },
    "rafs": {
        "mode": None,
        "batch_size": None,
        "validate": None,
        "enable_xattr": None,
        "iostats_files": None,
        "access_pattern": None,
        "latest_read_files": None,
        "prefetch": V2_PREFETCH,
    },
    "overlay": {"upper_dir": None, "work_dir": None},
}
# What nydusd once took and takes no more, by the path of the key.
REMOVED_KEYS = {
    "rafs_type": "the image itself tells its version",
    "fs_prefetch.threads": "threads_count is its name",
    "fs_prefetch.prefetch_files": "--prefetch-files and the API's prefetch_files give lists",
    "device.cache.config.blob_cache_dir": "work_dir is its name",
}
SECRET_KEYS = frozenset(("auth", "registry_token", "access_key_secret", "session_token", "encryption_key", "password"))


class ImageConfig:
    """Where the blobs of an image are, where they are cached, and what is fetched before it is asked for.

    backend_type and backend_config: as in v2, for storage.factory. work_dir: cache directory. prefetch: background
    fetching is on; prefetch_all: of the whole image. prefetch_bandwidth_bytes_s: limit for prefetch alone, 0 = none.
    amplify_bytes: how far a miss is extended. bootstrap_digest: what the bootstrap's bytes must be, "": not told.
    verify_keys, policy: files that say which signatures are asked for. The flags of nydusd's statistics are kept for
    its API. warnings: lines for the log."""

    __slots__ = (
        "access_pattern",
        "amplify_bytes",
        "backend_config",
        "backend_type",
        "bootstrap_digest",
        "cache_compressed",
        "cache_validate",
        "enable_xattr",
        "id",
        "iostats_files",
        "latest_read_files",
        "mode",
        "policy",
        "prefetch",
        "prefetch_all",
        "prefetch_bandwidth_bytes_s",
        "prefetch_batch_bytes",
        "prefetch_stream",
        "prefetch_threads",
        "verify_keys",
        "warnings",
        "work_dir",
    )

    def __init__(self, backend_type: str, backend_config: "dict[str, Any]", work_dir: str) -> None:
        self.id = self.bootstrap_digest = self.policy = ""
        self.verify_keys: tuple[str, ...] = ()
        self.backend_type = backend_type
        self.backend_config = backend_config
        self.work_dir = work_dir
        self.mode = "direct"
        self.cache_compressed = self.cache_validate = False
        self.iostats_files = self.access_pattern = self.latest_read_files = self.enable_xattr = False
        self.amplify_bytes = AMPLIFY_DEFAULT_BYTES
        self.prefetch = self.prefetch_all = self.prefetch_stream = False
        self.prefetch_threads = 8
        self.prefetch_batch_bytes = 1 << 20
        self.prefetch_bandwidth_bytes_s = 0
        self.warnings: list[str] = []

    def public(self) -> "dict[str, Any]":
        """The configuration as nydusd shows it: v2's form, every key, nothing secret."""
        prefetch = {
            "enable": self.prefetch,
            "threads": self.prefetch_threads,
            "batch_size": self.prefetch_batch_bytes,
            "bandwidth_limit": self.prefetch_bandwidth_bytes_s,
            "prefetch_all": self.prefetch_all,
            "stream_prefetch": self.prefetch_stream,
        }
        backend = hide_secrets(self.backend_config)
        if self.backend_type == "localfs":
            backend = {"blob_file": "", "dir": "", "alt_dirs": [], **backend}
        return {
            "version": 2,
            "id": self.id,
            "backend": {"type": self.backend_type, **dict.fromkeys(BACKEND_TYPES), self.backend_type: backend},
            "external_backends": [],
            "cache": {
                "type": "blobcache",
                "compressed": self.cache_compressed,
                "validate": self.cache_validate,
                "prefetch": prefetch,
                "fscache": None,
                "filecache": {
                    "work_dir": self.work_dir,
                    "disable_indexed_map": False,
                    "enable_encryption": False,
                    "enable_convergent_encryption": False,
                    "encryption_key": "",
                },
            },
            "rafs": {
                "mode": self.mode,
                "batch_size": self.amplify_bytes,
                "validate": self.cache_validate,
                "enable_xattr": self.enable_xattr,
                "iostats_files": self.iostats_files,
                "access_pattern": self.access_pattern,
                "latest_read_files": self.latest_read_files,
                "prefetch": prefetch,
            },
            "overlay": None,
        }


def hide_secrets(value: "Any") -> "Any":
    """A copy without secret keys, without logins in addresses, and without the values of headers."""
    if isinstance(value, dict):
        return {
            key: {name: "***" for name in below}
            if key == "headers" and isinstance(below, dict)
            else hide_secrets(below)
            for key, below in value.items()
            if key not in SECRET_KEYS
        }
    if isinstance(value, list):
        return [hide_secrets(one) for one in value]
    if isinstance(value, str) and "://" in value:
        scheme, _, rest = value.partition("://")
        authority, slash, path = rest.partition("/")
        return f"{scheme}://{authority.rpartition('@')[2]}{slash}{path.partition('?')[0]}"
    return value


def localfs_config(directory: str) -> ImageConfig:
    """What --localfs-dir stands for: blobs and cache in one directory."""
    return ImageConfig("localfs", {"dir": directory}, directory)


def load_config(path: str) -> ImageConfig:
    """The daemon's own configuration file. IMAGE_PULL_AUTH, where set, overrides its login."""
    try:
        with open(path, "rb") as stream:
            raw = stream.read(CONFIG_MAX_BYTES + 1)
    except OSError as error:
        raise UsageFailure(f"cannot read configuration {path}: {error.strerror}") from error
    if len(raw) > CONFIG_MAX_BYTES:
        raise UsageFailure(f"configuration {path} is larger than {CONFIG_MAX_BYTES} bytes")
    config = parse_config(raw.decode("utf-8", "replace"), path)
    auth = os.environ.get("IMAGE_PULL_AUTH")
    if auth and config.backend_type == "registry":
        config.backend_config["auth"] = auth
    return config


def parse_config(text: str, where: str = "config") -> ImageConfig:
    """Parses v1 or v2. Raises UsageFailure naming the key at fault, never its value. IMAGE_PULL_AUTH is the login of a
    registry that is configured without one."""
    try:
        document = json.loads(text)
    except ValueError as json_error:
        document = _parse_toml(text, where, json_error)
    except RecursionError:
        raise UsageFailure(f"{where} is nested too deeply") from None
    if not isinstance(document, dict):
        raise UsageFailure(f"{where} must hold one object")
    config = _from_v1(document, where) if "device" in document else _from_v2(document, where)
    settings = config.backend_config
    auth = os.environ.get("IMAGE_PULL_AUTH")
    if auth and config.backend_type == "registry" and not settings.get("auth") and not settings.get("registry_token"):
        settings["auth"] = auth
    return config


def _parse_toml(text: str, where: str, json_error: ValueError) -> "Any":
    import tomllib

    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as toml_error:
        # Only the place of the fault: the words around it may be a secret.
        at = f"line {json_error.lineno}" if isinstance(json_error, json.JSONDecodeError) else "somewhere"
        tail = str(toml_error).rpartition("(")[2].rstrip(")")
        raise UsageFailure(f"{where} is neither JSON (fault at {at}) nor TOML (fault {tail[:40]})") from None
    except RecursionError:
        raise UsageFailure(f"{where} is nested too deeply") from None


# ---- the two forms


def _from_v1(document: "dict[str, Any]", where: str) -> ImageConfig:
    device = _table(document, "device", where)
    backend = _table(device, "backend", where, required=True)
    cache = _table(device, "cache", where)
    kind = _kind(backend, "device.backend.type", where)
    config = ImageConfig(
        kind,
        dict(_table(backend, "config", where)),
        _cache_dir(cache.get("type", ""), _table(cache, "config", where), where),
    )
    config.id = _text(device, "id", where)
    _note_unknown(document, V1_SCHEMA, where, config)
    _read_trust(config, document, where)
    config.mode = _mode(document, where)
    for key in ("iostats_files", "access_pattern", "latest_read_files", "enable_xattr"):
        setattr(config, key, _flag(document, key, where))
    _flag(document, "digest_validate", where)  # every chunk is verified on arrival, asked or not
    config.amplify_bytes = _number(document, "amplify_io", where, AMPLIFY_DEFAULT_BYTES, RANGE_MAX_BYTES)
    _read_cache(config, cache, _table(cache, "config", where), where)
    # v1: the whole image unless told otherwise
    _read_prefetch(
        config,
        _table(document, "fs_prefetch", where),
        where,
        ("threads_count", "merging_size", "bandwidth_rate"),
        prefetch_all=True,
    )
    _note_unused(config, device.get("external_backends"), None, where)
    return config


def _from_v2(document: "dict[str, Any]", where: str) -> ImageConfig:
    if document.get("version") != 2:
        raise UsageFailure(f"{where}: neither a v1 configuration (device) nor version = 2")
    backend = _table(document, "backend", where, required=True)
    kind = _kind(backend, "backend.type", where)
    cache = _table(document, "cache", where, required=True)
    rafs = _table(document, "rafs", where)
    config = ImageConfig(
        kind,
        dict(_table(backend, kind, where, required=True)),
        _cache_dir(cache.get("type", ""), _table(cache, "filecache", where), where),
    )
    config.id = _text(document, "id", where)
    config.bootstrap_digest = _text(document, "bootstrap_digest", where)
    _read_trust(config, document, where)
    _note_unknown(document, V2_SCHEMA, where, config)
    config.mode = _mode(rafs, where)
    for key in ("iostats_files", "access_pattern", "latest_read_files", "enable_xattr"):
        setattr(config, key, _flag(rafs, key, where))
    _flag(rafs, "validate", where)
    config.amplify_bytes = _number(rafs, "batch_size", where, AMPLIFY_DEFAULT_BYTES, RANGE_MAX_BYTES)
    _read_cache(config, cache, _table(cache, "filecache", where), where)
    _read_prefetch(
        config, _table(rafs, "prefetch", where), where, ("threads", "batch_size", "bandwidth_limit"), prefetch_all=False
    )
    _note_unused(config, document.get("external_backends"), document.get("overlay"), where)
    return config


def _read_trust(config: ImageConfig, document: "dict[str, Any]", where: str) -> None:
    """Which signatures are asked for of an image that a reference names."""
    config.policy = _text(document, "policy", where)
    keys = document.get("verify_keys") or []
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise UsageFailure(f"{where}: verify_keys must be a list of file names")
    config.verify_keys = tuple(keys)


def _read_cache(config: ImageConfig, cache: "dict[str, Any]", settings: "dict[str, Any]", where: str) -> None:
    config.cache_compressed = _flag(cache, "compressed", where)
    config.cache_validate = _flag(cache, "validate", where)
    _flag(settings, "disable_indexed_map", where)
    if _flag(settings, "enable_encryption", where) or _flag(settings, "enable_convergent_encryption", where):
        raise UsageFailure(
            f"{where}: an encrypted cache is not supported; keep the cache directory on an encrypted "
            "file system instead"
        )
    if cache.get("type", "") in NO_CACHE_TYPES:
        config.warnings.append(f"{where}: there is no mode without cache; {config.work_dir} is the cache")


def _read_prefetch(
    config: ImageConfig,
    prefetch: "dict[str, Any]",
    where: str,
    keys: tuple[str, str, str],
    *,
    prefetch_all: bool,
) -> None:
    """keys: what the version of the configuration calls the numbers of threads, bytes a batch, bytes a second."""
    threads, batch, limit = keys
    config.prefetch = _flag(prefetch, "enable", where)
    config.prefetch_all = config.prefetch and _flag(prefetch, "prefetch_all", where, prefetch_all)
    config.prefetch_stream = _flag(prefetch, "stream_prefetch", where)
    config.prefetch_threads = _number(prefetch, threads, where, 8, THREADS_MAX, least=1 if config.prefetch else 0)
    config.prefetch_batch_bytes = _number(prefetch, batch, where, 1 << 20, RANGE_MAX_BYTES)
    config.prefetch_bandwidth_bytes_s = _number(prefetch, limit, where, 0, 1 << 62)
    if config.prefetch and config.prefetch_stream:
        config.warnings.append(f"{where}: stream_prefetch: blobs are fetched in ranges, not as streams")


def _note_unused(config: ImageConfig, external: object, overlay: object, where: str) -> None:
    if external:
        config.warnings.append(f"{where}: external_backends are not supported: images that need them cannot be read")
    if overlay:
        config.warnings.append(f"{where}: overlay is without effect: the guest puts its own writable layer on top")


def _note_unknown(document: "dict[str, Any]", schema: "Schema", where: str, config: ImageConfig) -> None:
    unknown: list[str] = []

    def walk(table: "dict[str, Any]", known: "Schema", path: str) -> None:
        for key, value in table.items():
            name = f"{path}{key}"
            if name in REMOVED_KEYS:
                config.warnings.append(f"{where}: {name} is without effect: {REMOVED_KEYS[name]}")
                continue
            if key not in known:
                unknown.append(name)
                continue
            below = known[key]
            if below is not None and isinstance(value, dict):
                walk(value, below, f"{name}.")

    walk(document, schema, "")
    if unknown:
        config.warnings.append(f"{where}: unknown keys, without effect: {', '.join(sorted(unknown))}")


# ---- one key


def _kind(backend: "dict[str, Any]", name: str, where: str) -> str:
    kind = backend.get("type")
    if not isinstance(kind, str) or not kind:
        raise UsageFailure(f"{where}: {name} is missing")
    return kind


def _mode(table: "dict[str, Any]", where: str) -> str:
    mode = _text(table, "mode", where) or "direct"
    if mode not in ("direct", "cached"):
        raise UsageFailure(f"{where}: mode must be direct or cached")
    return mode


def _table(document: "dict[str, Any]", key: str, where: str, *, required: bool = False) -> "dict[str, Any]":
    value = document.get(key)
    if value is None:
        if required:
            raise UsageFailure(f"{where}: {key} is missing")
        return {}
    if not isinstance(value, dict):
        raise UsageFailure(f"{where}: {key} must be an object")
    return value


def _text(table: "dict[str, Any]", key: str, where: str) -> str:
    value = table.get(key)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UsageFailure(f"{where}: {key} must be a string")
    return value


def _flag(table: "dict[str, Any]", key: str, where: str, default: bool = False) -> bool:
    value = table.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise UsageFailure(f"{where}: {key} must be true or false")
    return value


def _number(table: "dict[str, Any]", key: str, where: str, default: int, most: int, *, least: int = 0) -> int:
    value = table.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise UsageFailure(f"{where}: {key} must be a whole number from {least} to {most}")
    return value


def _cache_dir(kind: object, settings: "dict[str, Any]", where: str) -> str:
    if (kind in NO_CACHE_TYPES or kind is None) and not settings.get("work_dir"):
        raise UsageFailure(f"{where}: the cache type must be blobcache, or name a work_dir: nothing is served uncached")
    if kind == "fscache":
        raise UsageFailure(f"{where}: cache type fscache belongs to the kernel's EROFS over fscache; use blobcache")
    if kind not in CACHE_TYPES and kind not in NO_CACHE_TYPES:
        raise UsageFailure(f"{where}: the cache type is unknown; use blobcache")
    work_dir = settings.get("work_dir")
    if work_dir is None:
        return "."
    if not isinstance(work_dir, str) or not work_dir:
        raise UsageFailure(f"{where}: work_dir of the cache must be a path")
    return work_dir
