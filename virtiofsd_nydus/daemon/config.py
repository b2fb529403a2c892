"""The daemon's configuration as nydusd reads it: v1 JSON (device.backend ...) and v2 JSON or TOML (version = 2).

Sources: nydus's documented configuration, keys and defaults as in docs/operations.md. Parsing touches no network.
"""

import json
import os

from virtiofsd_nydus.errors import UsageFailure

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

CONFIG_MAX_BYTES = 1 << 20
CACHE_TYPES = ("blobcache", "filecache")
IGNORED_CACHE_TYPES = ("dummycache", "fscache", "")


class ImageConfig:
    """Where the blobs of an image are and where they are cached.

    backend: {"type": name, name: {keys}} as v2 has it. work_dir: cache directory. prefetch_all: fetch the whole image
    in the background. warnings: lines for the log.
    """

    __slots__ = ("backend_config", "backend_type", "id", "prefetch", "prefetch_all", "warnings", "work_dir")

    def __init__(self, backend_type: str, backend_config: "dict[str, Any]", work_dir: str) -> None:
        self.id = ""
        self.backend_type = backend_type
        self.backend_config = backend_config
        self.work_dir = work_dir
        self.prefetch = False
        self.prefetch_all = False
        self.warnings: list[str] = []


def localfs_config(directory: str) -> ImageConfig:
    """What --localfs-dir stands for: blobs and cache in one directory."""
    return ImageConfig("localfs", {"dir": directory}, directory)


def load_config(path: str) -> ImageConfig:
    try:
        with open(path, "rb") as stream:
            raw = stream.read(CONFIG_MAX_BYTES + 1)
    except OSError as error:
        raise UsageFailure(f"cannot read configuration {path}: {error.strerror}") from error
    if len(raw) > CONFIG_MAX_BYTES:
        raise UsageFailure(f"configuration {path} is larger than {CONFIG_MAX_BYTES} bytes")
    return parse_config(raw.decode("utf-8", "replace"), path)


def parse_config(text: str, where: str = "config") -> ImageConfig:
    """Parses v1 or v2. Raises UsageFailure naming the key at fault, never its value."""
    try:
        document = json.loads(text)
    except ValueError as json_error:
        import tomllib

        try:
            document = tomllib.loads(text)
        except tomllib.TOMLDecodeError as toml_error:
            raise UsageFailure(f"{where} is neither JSON ({json_error}) nor TOML ({toml_error})") from None
    if not isinstance(document, dict):
        raise UsageFailure(f"{where} must hold one object")
    config = _from_v1(document, where) if "device" in document else _from_v2(document, where)
    auth = os.environ.get("IMAGE_PULL_AUTH")
    if auth and config.backend_type == "registry":
        config.backend_config["auth"] = auth
    return config


def _table(document: "dict[str, Any]", key: str, where: str, *, required: bool = False) -> "dict[str, Any]":
    value = document.get(key)
    if value is None:
        if required:
            raise UsageFailure(f"{where}: {key} is missing")
        return {}
    if not isinstance(value, dict):
        raise UsageFailure(f"{where}: {key} must be an object")
    return value


def _cache_dir(kind: object, work_dir: object, where: str) -> str:
    if kind in IGNORED_CACHE_TYPES or kind is None:
        raise UsageFailure(f"{where}: the cache type must be blobcache; RAFS v6 needs a cache directory")
    if kind not in CACHE_TYPES:
        raise UsageFailure(f"{where}: cache type {kind!r} is unknown; use blobcache")
    if work_dir is None:
        return "."
    if not isinstance(work_dir, str) or not work_dir:
        raise UsageFailure(f"{where}: work_dir of the cache must be a path")
    return work_dir


def _from_v1(document: "dict[str, Any]", where: str) -> ImageConfig:
    device = _table(document, "device", where, required=True)
    backend = _table(device, "backend", where, required=True)
    cache = _table(device, "cache", where)
    kind = backend.get("type")
    if not isinstance(kind, str) or not kind:
        raise UsageFailure(f"{where}: device.backend.type is missing")
    work_dir = _cache_dir(cache.get("type", ""), _table(cache, "config", where).get("work_dir"), where)
    config = ImageConfig(kind, dict(_table(backend, "config", where)), work_dir)
    config.id = str(device.get("id", ""))
    prefetch = _table(document, "fs_prefetch", where)
    config.prefetch = bool(prefetch.get("enable", False))
    config.prefetch_all = config.prefetch and bool(prefetch.get("prefetch_all", True))
    if cache.get("compressed"):
        config.warnings.append(f"{where}: a compressed cache is not supported; the cache is kept uncompressed")
    return config


def _from_v2(document: "dict[str, Any]", where: str) -> ImageConfig:
    if document.get("version") != 2:
        raise UsageFailure(f"{where}: neither a v1 configuration (device) nor version = 2")
    backend = _table(document, "backend", where, required=True)
    kind = backend.get("type")
    if not isinstance(kind, str) or not kind:
        raise UsageFailure(f"{where}: backend.type is missing")
    cache = _table(document, "cache", where, required=True)
    work_dir = _cache_dir(cache.get("type", ""), _table(cache, "filecache", where).get("work_dir"), where)
    config = ImageConfig(kind, dict(_table(backend, kind, where, required=True)), work_dir)
    config.id = str(document.get("id", ""))
    prefetch = _table(_table(document, "rafs", where), "prefetch", where)
    config.prefetch = bool(prefetch.get("enable", False))
    config.prefetch_all = config.prefetch and bool(prefetch.get("prefetch_all", False))
    if cache.get("compressed"):
        config.warnings.append(f"{where}: a compressed cache is not supported; the cache is kept uncompressed")
    return config
