"""One cache directory for us and for a real nydusd: same bytes in the same files, each uses what the other fetched.

Runs where NYDUS_IMAGE and NYDUSD name the tools and /dev/fuse can be used.
"""

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.store.test_nydus_images import make_source
from virtiofsd_nydus.engine import Engine, Store
from virtiofsd_nydus.reader.bootstrap import Bootstrap
from virtiofsd_nydus.storage.localfs import LocalfsBackend
from virtiofsd_nydus.storage.pump import FetchPump

NYDUS_IMAGE, NYDUSD = os.environ.get("NYDUS_IMAGE", ""), os.environ.get("NYDUSD", "")
pytestmark = [
    pytest.mark.peer,
    pytest.mark.skipif(
        not (shutil.which(NYDUS_IMAGE) and shutil.which(NYDUSD) and os.access("/dev/fuse", os.W_OK)),
        reason="NYDUS_IMAGE and NYDUSD do not name both tools, or no /dev/fuse",
    ),
]


class Built:
    """An image of nydus-image's and the files in it."""

    def __init__(self, directory: Path, batch_bytes: int, fs_version: int = 6, compressor: str = "zstd") -> None:
        self.files = make_source(directory / "source")
        self.blob_dir, self.bootstrap, self.mount = directory / "blobs", directory / "image.boot", directory / "mnt"
        self.blob_dir.mkdir()
        self.mount.mkdir()
        subprocess.run(
            [
                NYDUS_IMAGE,
                "create",
                "--type",
                "directory",
                "--fs-version",
                str(fs_version),
                "--chunk-size",
                "0x20000",
                "--compressor",
                compressor,
                "--batch-size",
                hex(batch_bytes),
                "--bootstrap",
                str(self.bootstrap),
                "--blob-dir",
                str(self.blob_dir),
                str(directory / "source"),
            ],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=True,
        )


@contextmanager
def nydusd(built: Built, work_dir: Path, *, compressed: bool = False) -> Iterator[Path]:
    config = built.mount.with_name("config.json")
    config.write_text(
        json.dumps(
            {
                "device": {
                    "backend": {"type": "localfs", "config": {"dir": str(built.blob_dir)}},
                    "cache": {"type": "blobcache", "compressed": compressed, "config": {"work_dir": str(work_dir)}},
                },
                "mode": "direct",
                "digest_validate": False,
                "fs_prefetch": {"enable": False},
            }
        )
    )
    daemon = subprocess.Popen(
        [
            NYDUSD,
            "fuse",
            "--rlimit-nofile",
            "0",
            "--config",
            str(config),
            "--bootstrap",
            str(built.bootstrap),
            "--mountpoint",
            str(built.mount),
            "--log-level",
            "error",
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        until = time.monotonic() + 20
        while not os.path.ismount(built.mount):
            assert daemon.poll() is None and time.monotonic() < until
            time.sleep(0.02)
        yield built.mount
    finally:
        daemon.terminate()
        daemon.wait(20)


def read_ours(built: Built, work_dir: Path, *, compressed: bool = False) -> dict[str, int]:
    """Reads every file through our store; the counters."""
    engine = Engine()
    store = Store(engine, str(work_dir), compressed=compressed)
    image = Bootstrap(built.bootstrap, engine=engine, store=store)
    pump = FetchPump(engine, slots=2)
    for blob in image.blobs:
        pump.add_backend(blob.key, LocalfsBackend(directory=str(built.blob_dir)))
    pump.start()
    try:
        for name, data in built.files.items():
            assert image.read(image.lookup(image.root_ino, name)) == data
        return engine.stats()
    finally:
        engine.shutdown()
        assert pump.join(5)
        image.close()
        store.close()
        engine.close()


def cache_files(work_dir: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in work_dir.iterdir() if path.is_file()}


@pytest.mark.parametrize("batch_bytes", [0, 0x10000])
def test_same_files(tmp_path: Path, batch_bytes: int) -> None:
    built = Built(tmp_path, batch_bytes)
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    ours.mkdir()
    theirs.mkdir()
    read_ours(built, ours)
    with nydusd(built, theirs) as mount:
        for name, data in built.files.items():
            assert (mount / name).read_bytes() == data
    mine, other = cache_files(ours), cache_files(theirs)
    assert set(mine) <= set(other)
    for name in mine:
        assert mine[name] == other[name], name


def test_uses_what_nydusd_fetched(tmp_path: Path, work_dir: Path) -> None:
    built = Built(tmp_path, 0)
    with nydusd(built, work_dir) as mount:
        for name in built.files:
            (mount / name).read_bytes()
        stats = read_ours(built, work_dir)  # beside the running one
    assert stats["fetched_bytes"] == 0
    assert stats["verified_chunks"] > 0


def test_nydusd_uses_what_we_fetched(tmp_path: Path, work_dir: Path) -> None:
    built = Built(tmp_path, 0)
    read_ours(built, work_dir)
    (blob,) = built.blob_dir.iterdir()
    # Of the blob only its tail is left, which nydusd wants for its own chunk table
    size = blob.stat().st_size
    with Bootstrap(built.bootstrap) as image:
        chunk_bytes = max(
            chunk.coff + chunk.csize_bytes
            for entry in image.walk()
            if entry.path != "/"
            for chunk in image.chunks(entry.attr.ino)
        )
    with blob.open("r+b") as file:
        file.write(bytes(chunk_bytes))
    assert blob.stat().st_size == size
    with nydusd(built, work_dir) as mount:
        for name, data in built.files.items():
            assert (mount / name).read_bytes() == data


@pytest.mark.parametrize(
    ("fs_version", "compressor"), [(6, "zstd"), (6, "lz4_block"), (6, "none"), (5, "zstd"), (5, "lz4_block")]
)
def test_compressed_cache(tmp_path: Path, fs_version: int, compressor: str) -> None:
    """Same files as nydusd's, and each reads what the other has fetched."""
    built = Built(tmp_path, 0, fs_version, compressor)
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    ours.mkdir()
    theirs.mkdir()
    read_ours(built, ours, compressed=True)
    with nydusd(built, theirs, compressed=True) as mount:
        for name, data in built.files.items():
            assert (mount / name).read_bytes() == data
        stats = read_ours(built, theirs, compressed=True)  # beside the running one
    assert stats["fetched_bytes"] == 0 and stats["verified_chunks"] > 0
    mine, other = cache_files(ours), cache_files(theirs)
    assert any(name.endswith(".blob.raw") for name in mine) and set(mine) <= set(other)
    for name in mine:
        assert mine[name] == other[name], name
    (blob,) = built.blob_dir.iterdir()
    with blob.open("r+b") as file:  # of the blob only its tail is left, which nydusd wants for its own chunk table
        file.write(bytes(min(len(raw) for name, raw in mine.items() if name.endswith(".blob.raw")) - 512))
    with nydusd(built, ours, compressed=True) as mount:
        for name, data in built.files.items():
            assert (mount / name).read_bytes() == data


def test_a_compressed_cache_of_batches_is_not(tmp_path: Path, work_dir: Path) -> None:
    """nydusd keeps them as they are stored and then reads EIO; here they are kept uncompressed."""
    built = Built(tmp_path, 0x10000)
    read_ours(built, work_dir, compressed=True)
    assert not any(name.endswith(".blob.raw") for name in cache_files(work_dir))
    assert read_ours(built, work_dir, compressed=True)["fetched_bytes"] == 0
