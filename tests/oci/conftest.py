"""A small OCI image made of tars, and real registries to put it in."""

import hashlib
import io
import json
import random
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.peers.registry import LocalRegistry
from virtiofsd_nydus.cli.main import main
from virtiofsd_nydus.oci.layout import LayoutStore
from virtiofsd_nydus.oci.manifest import (
    MEDIA_CONFIG,
    MEDIA_LAYER,
    MEDIA_LAYER_GZIP,
    MEDIA_LAYER_ZSTD,
    MEDIA_MANIFEST,
    Descriptor,
    digest_of,
)

RANDOM = random.Random(5)
BIG = RANDOM.randbytes(3_000_000)
SMALL = [RANDOM.randbytes(2000) * 3 for _ in range(40)]


def make_tar(entries: list[tuple[str, bytes | None, dict]]) -> bytes:
    """(name, data, TarInfo fields) of each entry."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, data, fields in entries:
            info = tarfile.TarInfo(name)
            info.mode = 0o755 if fields.get("type") == tarfile.DIRTYPE else 0o644
            for key, value in fields.items():
                setattr(info, key, value)
            info.size = len(data or b"")
            archive.addfile(info, io.BytesIO(data or b""))
    return out.getvalue()


DIRECTORY = {"type": tarfile.DIRTYPE}
LAYERS = [
    make_tar(
        [
            ("etc", None, DIRECTORY),
            ("etc/hosts", b"hosts\n", {}),
            ("etc/gone", b"gone\n", {}),
            ("big", BIG, {}),
            ("copy", BIG, {"mode": 0o600}),
            ("link", None, {"type": tarfile.SYMTYPE, "linkname": "etc/hosts"}),
            *((f"small{index}", data, {}) for index, data in enumerate(SMALL)),
        ]
    ),
    make_tar([("etc/.wh.gone", b"", {}), ("etc/two", b"two\n", {}), ("again", BIG[: 2 << 20], {})]),
    make_tar([("dir", None, {"type": tarfile.DIRTYPE, "mode": 0o700})]),
]


def compress(data: bytes, how: str) -> tuple[bytes, str]:
    if how == "gzip":
        import gzip

        return gzip.compress(data, 6, mtime=0), MEDIA_LAYER_GZIP
    if how == "zstd":
        import zstandard

        return zstandard.ZstdCompressor().compress(data), MEDIA_LAYER_ZSTD
    return data, MEDIA_LAYER


def write_image(
    directory: Path,
    layers: list[bytes],
    compression: str | list[str] = "gzip",
    *,
    tag: str = "t",
    architecture: str = "amd64",
    folder: Path | None = None,
) -> str:
    """Puts an image into the OCI layout at directory; the manifest's digest."""
    store = LayoutStore(directory)
    spool = directory.parent / "spool"

    def put(data: bytes, media_type: str) -> Descriptor:
        descriptor = Descriptor(media_type, digest_of(data), len(data))
        spool.write_bytes(data)
        if not store.has_blob(descriptor):
            store.put_blob(descriptor, spool)
        spool.unlink(missing_ok=True)
        return descriptor

    ways = [compression] * len(layers) if isinstance(compression, str) else compression
    packed = [put(*compress(layer, way)) for layer, way in zip(layers, ways, strict=True)]
    config = {
        "architecture": architecture,
        "os": "linux",
        "config": {"Cmd": ["/bin/true"], "Env": ["A=b"]},
        "rootfs": {"type": "layers", "diff_ids": [digest_of(layer) for layer in layers]},
        "history": [{"created_by": f"layer {index}"} for index in range(len(layers))]
        + [{"created_by": "CMD", "empty_layer": True}],
    }
    config_descriptor = put(json.dumps(config).encode(), MEDIA_CONFIG)
    manifest = json.dumps(
        {
            "schemaVersion": 2,
            "mediaType": MEDIA_MANIFEST,
            "config": config_descriptor.to_json(),
            "layers": [layer.to_json() for layer in packed],
            "annotations": {"a.note": "kept"},
        }
    ).encode()
    store.put_manifest(manifest, MEDIA_MANIFEST, tag)
    store.close()
    return digest_of(manifest)


@pytest.fixture(scope="session")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An OCI layout with the image `t`."""
    directory = tmp_path_factory.mktemp("image") / "layout"
    write_image(directory, LAYERS)
    return directory


@pytest.fixture(scope="session")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalRegistry]:
    with LocalRegistry(tmp_path_factory.mktemp("registry")) as registry:
        yield registry


@pytest.fixture
def convert(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Runs `convert ... --json`; its result, or the failed run's status and line."""
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "no-docker-config"))

    def run(*words: object):
        status = main(["convert", *map(str, words), "--json"])
        out, error = capsys.readouterr()
        return json.loads(out) if status == 0 else (status, error)

    return run


def skopeo(*words: object) -> str:
    done = subprocess.run(["skopeo", *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def read_layout(directory: Path, tag: str) -> tuple[dict, dict]:
    """Manifest and configuration of a tag."""
    index = json.loads((directory / "index.json").read_bytes())
    entry = next(one for one in index["manifests"] if one["annotations"]["org.opencontainers.image.ref.name"] == tag)
    manifest = json.loads(blob(directory, entry["digest"]))
    return manifest, json.loads(blob(directory, manifest["config"]["digest"]))


def blob(directory: Path, digest: str) -> bytes:
    data = (directory / "blobs/sha256" / digest[7:]).read_bytes()
    assert hashlib.sha256(data).hexdigest() == digest[7:]
    return data
