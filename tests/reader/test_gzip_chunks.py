"""Images whose chunks are gzip members each. No builder makes them (nydus-image has no such choice, for layers alone it
has), but the format knows them and nydusd reads them."""

import gzip
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from tests.hostile.images import ImageV5, ImageV6, build, write_source
from virtiofsd_nydus.builder.chunker import Chunker
from virtiofsd_nydus.builder.options import BuildOptions
from virtiofsd_nydus.rafs.layout import ChunkFlag, Codec
from virtiofsd_nydus.reader.bootstrap import Bootstrap
from virtiofsd_nydus.reader.data import opened_with_data

NYDUSD = os.environ.get("NYDUSD", "")
VERSIONS = [5, 6]


@pytest.fixture
def pack(monkeypatch: pytest.MonkeyPatch) -> None:
    """The writer, with a compressor that it has no option for."""

    def compress(_: Chunker, chunks: list[bytes]) -> list[tuple[bytes, int]]:
        return [(gzip.compress(data, 6, mtime=0), int(ChunkFlag.COMPRESSED)) for data in chunks]

    monkeypatch.setattr(BuildOptions, "codec", property(lambda _: Codec.GZIP))
    monkeypatch.setattr(Chunker, "_compress", compress)


@pytest.mark.usefixtures("pack")
@pytest.mark.parametrize("version", VERSIONS)
def test_read_as_built(tmp_path: Path, version: int) -> None:
    write_source(tmp_path / "source.tar")
    boot = build(tmp_path / "source.tar", tmp_path / "image", fs_version=version)
    with opened_with_data(boot, boot.parent / "blobs") as image:
        assert [blob.compressor for blob in image.blobs] == [Codec.GZIP]
        assert image.check() == []
        assert image.read(image.resolve("/a")) == b"".join(b"%09d\n" % number for number in range(15_000))
        assert image.read(image.resolve("/d/y")) == b"y" * 9000


@pytest.mark.usefixtures("pack")
@pytest.mark.parametrize("version", VERSIONS)
def test_a_damaged_member_is_an_error(tmp_path: Path, version: int) -> None:
    write_source(tmp_path / "source.tar")
    boot = build(tmp_path / "source.tar", tmp_path / "image", fs_version=version)
    with Bootstrap(boot) as image:
        (chunk,) = image.chunks(image.resolve("/d/x"))
    (blob,) = (boot.parent / "blobs").iterdir()
    data = bytearray(blob.read_bytes())
    data[chunk.coff + 12] ^= 0xFF
    blob.write_bytes(data)
    with opened_with_data(boot, blob.parent) as image:
        with pytest.raises(OSError, match="Input/output error"):
            image.read(image.resolve("/d/x"))
        assert image.read(image.resolve("/d/y")) == b"y" * 9000


@pytest.mark.usefixtures("pack")
@pytest.mark.parametrize("version", VERSIONS)
def test_no_stored_size_is_told_by_name(tmp_path: Path, version: int, capsys: pytest.CaptureFixture[str]) -> None:
    """As the chunks of eStargz images are: their index does not tell where a member ends."""
    write_source(tmp_path / "source.tar")
    boot = build(tmp_path / "source.tar", tmp_path / "image", fs_version=version)
    image = (ImageV5 if version == 5 else ImageV6)(boot)
    image.put(image.record("/d/x") + 40, "I", 0)
    boot.write_bytes(image.bytes)
    with opened_with_data(boot, boot.parent / "blobs") as opened:
        assert any("no stored size, as those of eStargz" in line for line in opened.check())
        with pytest.raises(OSError, match="Input/output error"):
            opened.read(opened.resolve("/d/x"))
    assert "no stored size, as those of eStargz images, which are not read" in capsys.readouterr().err


@pytest.mark.skipif(not shutil.which(NYDUSD), reason="NYDUSD names no nydusd")
@pytest.mark.usefixtures("pack")
@pytest.mark.parametrize("version", VERSIONS)
def test_nydusd_reads_them_too(tmp_path: Path, version: int) -> None:
    import json

    write_source(tmp_path / "source.tar")
    boot = build(tmp_path / "source.tar", tmp_path / "image", fs_version=version)
    mount, config, cache = tmp_path / "mnt", tmp_path / "config.json", tmp_path / "cache"
    mount.mkdir()
    cache.mkdir()
    config.write_text(
        json.dumps(
            {
                "device": {
                    "backend": {"type": "localfs", "config": {"dir": str(boot.parent / "blobs")}},
                    "cache": {"type": "blobcache", "config": {"work_dir": str(cache)}},
                },
                "mode": "direct",
                "digest_validate": version == 5,
                "enable_xattr": True,
            }
        )
    )
    process = subprocess.Popen(
        [
            NYDUSD,
            "fuse",
            "--config",
            str(config),
            "--bootstrap",
            str(boot),
            "--mountpoint",
            str(mount),
            "--rlimit-nofile",
            "0",
            "--log-level",
            "error",
        ]
    )
    try:
        deadline = time.monotonic() + 30
        while not os.path.ismount(mount):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        assert (mount / "a").read_bytes() == b"".join(b"%09d\n" % number for number in range(15_000))
        assert (mount / "d/y").read_bytes() == b"y" * 9000
    finally:
        process.terminate()
        process.wait(20)
        subprocess.run(["umount", "-l", str(mount)], capture_output=True, check=False)
