"""Images that Nydus' own tool built, read through the store: batches, every codec, every digest, merged metadata.

Runs where the environment variable NYDUS_IMAGE names a nydus-image.
"""

import os
import shutil
import subprocess
import time
from pathlib import Path
from random import Random

import pytest

from virtiofsd_nydus.engine import Engine, Store
from virtiofsd_nydus.reader.bootstrap import Bootstrap
from virtiofsd_nydus.storage.localfs import LocalfsBackend
from virtiofsd_nydus.storage.pump import FetchPump

NYDUS_IMAGE = os.environ.get("NYDUS_IMAGE", "")
pytestmark = [
    pytest.mark.peer,
    pytest.mark.skipif(not shutil.which(NYDUS_IMAGE), reason="NYDUS_IMAGE names no nydus-image"),
]


def make_source(directory: Path) -> dict[str, bytes]:
    """Small files that batches join, and files of several chunks between them."""
    random = Random(4)
    words = [random.randbytes(5) for _ in range(500)]
    files = {}
    for number in range(60):
        size = random.randrange(1, 9000) if number % 10 else 300_000 + number
        files[f"file-{number:02}"] = b" ".join(random.choices(words, k=size // 6 + 1))[:size]
    directory.mkdir()
    for name, data in files.items():
        (directory / name).write_bytes(data)
    return files


@pytest.mark.parametrize("batch_bytes", [0, 0x10000])
@pytest.mark.parametrize("compressor", ["zstd", "lz4_block", "none"])
@pytest.mark.parametrize("digester", ["blake3", "sha256"])
def test_reads_every_file(tmp_path: Path, work_dir: Path, compressor: str, digester: str, batch_bytes: int) -> None:
    files = make_source(tmp_path / "source")
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    done = subprocess.run(
        [
            NYDUS_IMAGE,
            "create",
            "--type",
            "directory",
            "--fs-version",
            "6",
            "--chunk-size",
            "0x20000",
            "--batch-size",
            hex(batch_bytes),
            "--compressor",
            compressor,
            "--digester",
            digester,
            "--bootstrap",
            str(tmp_path / "image.boot"),
            "--blob-dir",
            str(blobs),
            str(tmp_path / "source"),
        ],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    engine = Engine()
    store = Store(engine, str(work_dir))
    image = Bootstrap(tmp_path / "image.boot", engine=engine, store=store)
    pump = FetchPump(engine, slots=2)
    (blob,) = image.blobs
    pump.add_backend(blob.key, LocalfsBackend(directory=str(blobs)))
    pump.start()
    try:
        # From the back, so that batches are entered in the middle
        for name in sorted(files, reverse=True):
            assert image.read(image.lookup(image.root_ino, name)) == files[name], name
        image.image.prefetch_blob(0)
        until = time.monotonic() + 20
        while engine.stats()["fetched_chunks"] < blob.chunk_count:
            assert time.monotonic() < until
            time.sleep(0.01)
        stats = engine.stats()
        assert stats["digest_failures"] == 0
        assert stats["fetched_chunks"] == blob.chunk_count
        assert image.image.ready_chunks(0) == (blob.chunk_count, blob.chunk_count)
        assert stats["fetched_bytes"] < blob.compressed_size_bytes * 1.5
        assert bool(blob.features & 0x80) == bool(batch_bytes)
        assert (work_dir / f"{blob.id}.blob.meta").exists() == bool(batch_bytes)
    finally:
        engine.shutdown()
        assert pump.join(5)
        image.close()
        store.close()
        engine.close()
