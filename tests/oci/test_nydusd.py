"""The real nydusd as the judge: it mounts what convert pushed, from the registry, with the configuration we give.

Runs where the environment variable NYDUSD names a nydusd, as root with /dev/fuse."""

import json
import os
import shutil
import subprocess
import tarfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.oci.conftest import BIG, SMALL
from tests.peers.registry import LocalRegistry
from virtiofsd_nydus.oci.image import ServedImage, resolve_image
from virtiofsd_nydus.oci.store import Access

NYDUSD = os.environ.get("NYDUSD", "")
pytestmark = [
    pytest.mark.peer,
    pytest.mark.skipif(not shutil.which(NYDUSD), reason="NYDUSD names no nydusd"),
    pytest.mark.skipif(os.geteuid() != 0 or not Path("/dev/fuse").exists(), reason="needs root and /dev/fuse"),
]


@contextmanager
def mounted(image: ServedImage, directory: Path) -> Iterator[Path]:
    """The image on directory/mount by nydusd."""
    mount, work_dir = directory / "mount", directory / "work"
    mount.mkdir()
    work_dir.mkdir()
    config = directory / "nydusd.json"
    config.write_text(
        json.dumps(
            {
                "device": {
                    "backend": image.backend_config(),
                    "cache": {"type": "blobcache", "validate": True, "config": {"work_dir": str(work_dir)}},
                },
                "mode": "direct",
                "digest_validate": False,
                "enable_xattr": True,
            }
        )
    )
    log = directory / "nydusd.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [
                NYDUSD,
                "fuse",
                "--config",
                str(config),
                "--bootstrap",
                str(image.bootstrap),
                "--mountpoint",
                str(mount),
                "--rlimit-nofile",
                "0",
            ],
            stdout=out,
            stderr=out,
        )
    try:
        deadline = time.monotonic() + 30
        while not mount.is_mount() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        assert mount.is_mount(), log.read_text()
        yield mount
    finally:
        process.terminate()
        process.wait(20)


WAYS = [
    *(
        f"--fs-version {version} --compressor {compressor} --digester {digester} --chunk-size {size}"
        for version in (5, 6)
        for compressor in ("none", "lz4_block", "zstd")
        for digester in ("blake3", "sha256")
        for size in ("64K", "1M")
    ),
    "--fs-version 5 --aligned-chunk",
    "--batch-size 64K",
    "--batch-size 1M --compressor lz4_block --chunk-size 2M",
    "--encrypt",
    "--encrypt --compressor none",
    "--encrypt --batch-size 64K",
    "--oci-ref",
    "--oci-ref --chunk-size 64K",
]


@pytest.mark.parametrize("way", WAYS)
def test_nydusd_serves_what_convert_pushed(convert, image: Path, tmp_path: Path, way: str) -> None:
    with LocalRegistry(tmp_path / "registry", auth="token") as registry:
        reference = f"docker://{registry.host}/judge/a:n"
        creds = f"{registry.username}:{registry.password}"
        result = convert(f"oci:{image}:t", reference, "--creds", creds, *way.split())
        assert isinstance(result, dict), result
        found = resolve_image(reference, cache_dir=tmp_path / "cache", access=Access(creds=creds))
        with mounted(found, tmp_path) as root:
            assert sorted(path.name for path in (root / "etc").iterdir()) == ["hosts", "two"]
            assert (root / "big").read_bytes() == (root / "copy").read_bytes() == BIG
            assert (root / "again").read_bytes() == BIG[: 2 << 20]
            assert [(root / f"small{index}").read_bytes() for index in range(len(SMALL))] == SMALL
            assert (root / "link").readlink() == Path("etc/hosts")
            assert (root / "copy").stat().st_mode & 0o777 == 0o600
            check_metas(registry, result, tmp_path / "work")


def check_metas(registry: LocalRegistry, result: dict, work_dir: Path) -> None:
    """What lies beside the bootstrap is what nydusd has made of the blobs themselves."""
    manifest = json.loads(registry.blob_file(result["manifest_digest"][7:]).read_bytes())
    if "manifests" in manifest:
        manifest = json.loads(registry.blob_file(manifest["manifests"][1]["digest"][7:]).read_bytes())
    with tarfile.open(registry.blob_file(manifest["layers"][-1]["digest"][7:])) as archive:
        metas = {
            Path(one.name).name: archive.extractfile(one).read()  # type: ignore[union-attr]
            for one in archive
            if one.name.endswith(".blob.meta")
        }
    assert bool(metas) == (manifest["layers"][-1]["annotations"]["containerd.io/snapshot/nydus-fs-version"] == "6")
    for name, data in metas.items():
        assert (work_dir / name).read_bytes() == data
