"""Configurations as nydusd reads them: v1 and v2, JSON and TOML, each key; unknown ones named, no secret told."""

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from virtiofsd_nydus.errors import UsageFailure
from virtiofsd_nydus.storage.config import (
    CONFIG_MAX_BYTES,
    V1_SCHEMA,
    V2_SCHEMA,
    load_config,
    localfs_config,
    parse_config,
)

SECRET = "the-secret-word"
AUTH = base64.b64encode(f"someone:{SECRET}".encode()).decode()

V1 = {
    "device": {
        "id": "/snap-1",
        "backend": {
            "type": "registry",
            "config": {
                "scheme": "https",
                "host": "registry.example",
                "repo": "a/b",
                "auth": AUTH,
                "timeout": 5,
                "connect_timeout": 5,
                "retry_limit": 2,
            },
        },
        "cache": {
            "type": "blobcache",
            "compressed": False,
            "validate": True,
            "config": {"work_dir": "/cache", "disable_indexed_map": False},
        },
    },
    "mode": "direct",
    "digest_validate": False,
    "iostats_files": True,
    "access_pattern": True,
    "latest_read_files": True,
    "enable_xattr": True,
    "amplify_io": 4096,
    "fs_prefetch": {
        "enable": True,
        "threads_count": 10,
        "merging_size": 131072,
        "bandwidth_rate": 1048576,
        "prefetch_all": False,
        "stream_prefetch": False,
    },
}
V2 = {
    "version": 2,
    "id": "/snap-1",
    "backend": {"type": "registry", "registry": V1["device"]["backend"]["config"]},
    "cache": {
        "type": "blobcache",
        "compressed": False,
        "validate": True,
        "filecache": {"work_dir": "/cache", "disable_indexed_map": False},
    },
    "rafs": {
        "mode": "direct",
        "batch_size": 4096,
        "validate": False,
        "enable_xattr": True,
        "iostats_files": True,
        "access_pattern": True,
        "latest_read_files": True,
        "prefetch": {
            "enable": True,
            "threads": 10,
            "batch_size": 131072,
            "bandwidth_limit": 1048576,
            "prefetch_all": False,
            "stream_prefetch": False,
        },
    },
}
TOML = f"""
version = 2
id = "/snap-1"
[backend]
type = "registry"
[backend.registry]
scheme = "https"
host = "registry.example"
repo = "a/b"
auth = "{AUTH}"
timeout = 5
connect_timeout = 5
retry_limit = 2
[cache]
type = "blobcache"
compressed = false
validate = true
[cache.filecache]
work_dir = "/cache"
disable_indexed_map = false
[rafs]
mode = "direct"
batch_size = 4096
enable_xattr = true
iostats_files = true
access_pattern = true
latest_read_files = true
[rafs.prefetch]
enable = true
threads = 10
batch_size = 131072
bandwidth_limit = 1048576
prefetch_all = false
"""


def changed(document: dict, path: str, value: object) -> str:
    """The document as JSON with one key set (value None: taken away)."""
    copy = json.loads(json.dumps(document))
    *above, last = path.split(".")
    table = copy
    for key in above:
        table = table.setdefault(key, {})
    if value is None:
        del table[last]
    else:
        table[last] = value
    return json.dumps(copy)


@pytest.mark.parametrize("text", [json.dumps(V1), json.dumps(V2), TOML], ids=["v1", "v2", "toml"])
def test_every_key_is_read(text: str) -> None:
    config = parse_config(text)
    assert config.warnings == []
    assert (config.id, config.backend_type, config.work_dir, config.mode) == ("/snap-1", "registry", "/cache", "direct")
    assert config.backend_config == V1["device"]["backend"]["config"]
    assert (config.cache_validate, config.cache_compressed) == (True, False)
    assert config.iostats_files and config.access_pattern and config.latest_read_files and config.enable_xattr
    assert config.amplify_bytes == 4096
    assert config.prefetch and not config.prefetch_all and not config.prefetch_stream
    assert (config.prefetch_threads, config.prefetch_batch_bytes, config.prefetch_bandwidth_bytes_s) == (
        10,
        131072,
        1048576,
    )


def test_defaults_differ_as_nydusd_has_it() -> None:
    """v1 fetches the whole image when prefetch is on, v2 does not."""
    v1 = {
        "device": {"backend": {"type": "localfs", "config": {"dir": "/b"}}, "cache": {"type": "blobcache"}},
        "mode": "direct",
        "fs_prefetch": {"enable": True},
    }
    v2 = {
        "version": 2,
        "backend": {"type": "localfs", "localfs": {"dir": "/b"}},
        "cache": {"type": "filecache"},
        "rafs": {"prefetch": {"enable": True}},
    }
    one, two = parse_config(json.dumps(v1)), parse_config(json.dumps(v2))
    assert (one.prefetch_all, two.prefetch_all) == (True, False)
    for config in (one, two):
        assert (config.work_dir, config.amplify_bytes, config.prefetch_threads) == (".", 1 << 20, 8)
        assert config.prefetch_bandwidth_bytes_s == 0 and config.warnings == []
    assert parse_config(changed(v1, "fs_prefetch.enable", False)).prefetch_all is False


@pytest.mark.parametrize("kind", ["localfs", "localdisk", "oss", "s3", "registry", "http-proxy"])
def test_every_backend_in_both_forms(kind: str) -> None:
    v1 = {"device": {"backend": {"type": kind, "config": {"x": 1}}, "cache": {"type": "blobcache"}}}
    v2 = {"version": 2, "backend": {"type": kind, kind: {"x": 1}}, "cache": {"type": "blobcache"}}
    for document in (v1, v2):
        config = parse_config(json.dumps(document))
        assert (config.backend_type, config.backend_config, config.warnings) == (kind, {"x": 1}, [])


def test_unknown_keys_are_one_warning() -> None:
    text = changed(json.loads(changed(V1, "device.cache.colour", 1)), "fs_prefetch.taste", 2)
    assert parse_config(text, "c").warnings == [
        "c: unknown keys, without effect: device.cache.colour, fs_prefetch.taste"
    ]
    assert parse_config(changed(V2, "zest", 1), "c").warnings == ["c: unknown keys, without effect: zest"]


@pytest.mark.parametrize(
    ("document", "path", "value", "word"),
    [
        (V1, "rafs_type", "x", "image itself"),
        (V1, "fs_prefetch.prefetch_files", "/x", "--prefetch-files"),
        (V1, "device.external_backends", [{"type": "x"}], "external_backends"),
        (V1, "device.cache.type", "", "without cache"),
        (V1, "device.cache.type", "dummycache", "without cache"),
        (V2, "overlay", {"upper_dir": "/u"}, "writable layer"),
        (V2, "rafs.prefetch.stream_prefetch", True, "ranges"),
    ],
)
def test_what_has_no_effect_is_explained(document: dict, path: str, value: object, word: str) -> None:
    (line,) = parse_config(changed(document, path, value)).warnings
    assert word in line


@pytest.mark.parametrize(
    ("document", "path", "value", "word"),
    [
        (V1, "device.backend", None, "backend is missing"),
        (V1, "device.backend.type", None, "type is missing"),
        (V1, "device.backend.config", [], "must be an object"),
        (V1, "device.cache", {"type": "dummycache"}, "must be blobcache"),
        (V1, "device.cache.type", "fscache", "fscache"),
        (V1, "device.cache.type", "x", "unknown"),
        (V1, "device.cache.config.work_dir", 5, "work_dir"),
        (V1, "device.cache.config.enable_encryption", True, "encrypted"),
        (V1, "mode", "x", "direct or cached"),
        (V1, "amplify_io", 0x10000001, "amplify_io"),
        (V1, "amplify_io", "1", "amplify_io"),
        (V1, "fs_prefetch.threads_count", 0, "threads_count"),
        (V1, "fs_prefetch.threads_count", 1025, "threads_count"),
        (V1, "fs_prefetch.merging_size", -1, "merging_size"),
        (V1, "fs_prefetch.enable", "yes", "true or false"),
        (V1, "fs_prefetch.bandwidth_rate", 1.5, "bandwidth_rate"),
        (V1, "device.id", 5, "id must be a string"),
        (V2, "version", 3, "version = 2"),
        (V2, "cache", None, "cache is missing"),
        (V2, "backend", None, "missing"),
        (V2, "backend.registry", None, "registry is missing"),
        (V2, "rafs.batch_size", True, "batch_size"),
        (V2, "rafs.prefetch", [], "must be an object"),
    ],
)
def test_what_cannot_be_is_refused(document: dict, path: str, value: object, word: str) -> None:
    with pytest.raises(UsageFailure, match=word) as caught:
        parse_config(changed(document, path, value))
    assert SECRET not in str(caught.value) and AUTH not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "5", '{"a"', "a = ", f'{{"auth": "{AUTH}', f'auth = "{AUTH}', "[" * 100_000, '{"device": ' * 10_000],
)
def test_what_is_no_configuration(text: str) -> None:
    with pytest.raises(UsageFailure) as caught:
        parse_config(text, "c")
    assert str(caught.value).startswith("c")
    assert AUTH not in str(caught.value) and len(str(caught.value)) < 300


def test_public_form_has_no_secret() -> None:
    secrets = {
        "auth": AUTH,
        "registry_token": SECRET,
        "access_key_secret": SECRET,
        "session_token": SECRET,
        "proxy": {"url": f"http://user:{SECRET}@proxy:1", "ping_url": f"http://proxy/p?token={SECRET}"},
        "mirrors": [{"host": f"http://u:{SECRET}@m", "headers": {"Authorization": SECRET}}],
    }
    document = json.loads(changed(V2, "backend.registry", {**V2["backend"]["registry"], **secrets}))
    shown = parse_config(json.dumps(document)).public()
    text = json.dumps(shown)
    assert SECRET not in text and AUTH not in text
    assert shown["backend"]["registry"]["host"] == "registry.example"
    assert shown["backend"]["registry"]["proxy"] == {"url": "http://proxy:1", "ping_url": "http://proxy/p"}
    # What is shown is a configuration again, in which only the secrets are missing.
    again = parse_config(text)
    assert again.public() == shown and again.warnings == []


def test_image_pull_auth(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Overrides the login of --config; a mount by the API keeps its own."""
    other = base64.b64encode(b"other:x").decode()
    monkeypatch.setenv("IMAGE_PULL_AUTH", other)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(V1))
    assert load_config(str(path)).backend_config["auth"] == other
    assert parse_config(json.dumps(V1)).backend_config["auth"] == AUTH
    assert parse_config(changed(V1, "device.backend.config.auth", None)).backend_config["auth"] == other


def test_files(tmp_path) -> None:
    with pytest.raises(UsageFailure, match="cannot read"):
        load_config(str(tmp_path / "none"))
    (tmp_path / "big").write_bytes(b" " * (CONFIG_MAX_BYTES + 1))
    with pytest.raises(UsageFailure, match="larger than"):
        load_config(str(tmp_path / "big"))
    assert localfs_config("/d").backend_config == {"dir": "/d"}


def test_every_key_is_explained() -> None:
    """docs/operations.md names each key that is known."""
    told = (Path(__file__).parents[2] / "docs/operations.md").read_text()

    def names(schema: dict[str, Any]) -> Iterator[str]:
        for key, below in schema.items():
            yield key
            yield from names(below or {})

    wanted = {*names(V1_SCHEMA), *names(V2_SCHEMA)} - {"version", "device", "config", "rafs", "cache"}
    assert sorted(key for key in wanted if key not in told) == []
