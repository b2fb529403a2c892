"""The cache directory as people look at it, beside an engine that uses it."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.store.conftest import CHUNK_BYTES, Image
from virtiofsd_nydus.cli.main import main
from virtiofsd_nydus.engine import Engine, Store
from virtiofsd_nydus.errors import Failure
from virtiofsd_nydus.fakeguest.fakeguest import FakeGuest
from virtiofsd_nydus.reader.bootstrap import Bootstrap
from virtiofsd_nydus.storage.cachedir import SIDE_DIR, STALE_TMP_S, CacheDir, Kept
from virtiofsd_nydus.storage.localfs import LocalfsBackend
from virtiofsd_nydus.storage.pump import FetchPump
from virtiofsd_nydus.vmm.servers import NydusDaemon


@contextmanager
def opened(image: Image, work_dir: Path, *, compressed: bool = False) -> Iterator[Bootstrap]:
    """The image with its data, as a daemon has it."""
    engine = Engine()
    pump = FetchPump(engine)
    store = Store(engine, str(work_dir), compressed=compressed)
    found = Bootstrap(image.bootstrap, engine=engine, store=store)
    for blob in found.blobs:
        pump.add_backend(blob.key, LocalfsBackend(str(image.blob_dir)))
    pump.start()
    try:
        yield found
    finally:
        engine.shutdown()
        assert pump.join(10)
        found.close()
        store.close()
        engine.close()


def read_files(image: Image, found: Bootstrap, count: int = 1 << 20) -> None:
    for name in list(image.files)[:count]:
        assert found.read(found.lookup(found.root_ino, name)) == image.files[name]


def flip_first_byte(path: Path) -> None:
    with path.open("r+b") as stream:
        byte = stream.read(1)
        stream.seek(0)
        stream.write(bytes([byte[0] ^ 1]))


def test_what_is_there_is_told(image: Image, work_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """While the engine is at work; all figures of ls and stat are those of the image."""
    with opened(image, work_dir) as found:
        (blob,) = found.blobs
        read_files(image, found)
        assert main(["cache", "ls", str(work_dir), "--json"]) == 0
        (told,) = json.loads(capsys.readouterr().out)
        ready, total = found.image.ready_chunks(0)
        assert (told["id"], told["size_bytes"]) == (blob.id, blob.uncompressed_size_bytes)
        assert (told["trusted"], told["marked"], told["chunks"]) == (ready, ready, total)
        assert told["disk_bytes"] >= sum(map(len, image.files.values()))
        assert main(["cache", "stat", str(work_dir), blob.id[:6]]) == 0
        assert f"trusted: {ready}" in capsys.readouterr().out.splitlines()
    assert main(["cache", "stat", str(work_dir), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["trusted"] == ready


def test_a_part_that_was_read(image: Image, work_dir: Path) -> None:
    with opened(image, work_dir) as found:
        found.image.read(found.lookup(found.root_ino, "file-01"), 0, 1)
    (use,) = CacheDir(work_dir).uses()
    assert use.trusted is not None and use.chunks is not None and use.marked == use.trusted
    assert 0 < use.trusted <= use.chunks
    assert CacheDir(work_dir).verify(Kept(use.id)).right == use.trusted


def test_right_bytes_are_verified(image: Image, work_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with opened(image, work_dir) as found:
        read_files(image, found)
        assert main(["cache", "verify", str(work_dir), "--json"]) == 0
        (told,) = json.loads(capsys.readouterr().out)
        assert told["right"] == found.image.ready_chunks(0)[0] and told["faults"] == []
        assert told["unknown"] == 0 and told["bytes"] > CHUNK_BYTES


def test_a_wrong_byte_is_found(image: Image, work_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By our own map, and by Nydus's alone once ours does not know of the chunk."""
    with opened(image, work_dir) as found:
        read_files(image, found)
        (blob,) = found.blobs
    flip_first_byte(work_dir / f"{blob.id}.blob.data")
    assert main(["cache", "verify", str(work_dir)]) == 1
    told = capsys.readouterr()
    assert "chunk 0," in told.err and "trusted" in told.err and ", 1 wrong" in told.out
    side = work_dir / SIDE_DIR / f"{blob.id}.vnd"
    with side.open("r+b") as stream:
        stream.seek(4096)
        stream.write(bytes(8))
    (fault,) = CacheDir(work_dir).verify(Kept(blob.id)).faults
    assert "marked in Nydus's chunk map" in fault


def test_a_compressed_cache(image: Image, work_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of the blob's own size; verified by decoding; swept like the other kind."""
    with opened(image, work_dir, compressed=True) as found:
        read_files(image, found)
        (blob,), ready = found.blobs, found.image.ready_chunks(0)[0]
    assert main(["cache", "ls", str(work_dir), "--json"]) == 0
    (told,) = json.loads(capsys.readouterr().out)
    data = work_dir / f"{blob.id}.blob.raw"
    assert (told["compressed"], told["size_bytes"], told["trusted"]) == (True, data.stat().st_size, ready)
    assert main(["cache", "verify", str(work_dir), blob.id[:8]]) == 0
    assert f"{ready} chunks" in capsys.readouterr().out
    flip_first_byte(data)
    (fault,) = CacheDir(work_dir).verify(Kept(blob.id, compressed=True)).faults
    assert "chunk 0," in fault
    data.unlink()
    assert CacheDir(work_dir).collect() == [work_dir / SIDE_DIR / f"{blob.id}.raw.vnd"]


def test_a_side_file_of_another_data_file_vouches_for_nothing(image: Image, work_dir: Path) -> None:
    with opened(image, work_dir) as found:
        read_files(image, found)
        (blob,) = found.blobs
    data = work_dir / f"{blob.id}.blob.data"
    copy = data.read_bytes()
    other = work_dir / "other"
    other.write_bytes(copy)
    other.rename(data)
    use = CacheDir(work_dir).use(Kept(blob.id))
    assert use is not None and use.trusted is None and use.marked
    verdict = CacheDir(work_dir).verify(Kept(blob.id))
    assert (verdict.right, verdict.unknown) == (0, use.marked)


def test_side_files_of_gone_blobs_are_swept(image: Image, work_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Not before the last engine that reads on in the removed file is gone."""
    with opened(image, work_dir) as found:
        read_files(image, found, 4)
        (blob,) = found.blobs
        side = work_dir / SIDE_DIR / f"{blob.id}.vnd"
        assert CacheDir(work_dir).collect() == []
        (work_dir / f"{blob.id}.blob.data").unlink()
        assert CacheDir(work_dir).collect() == []
        read_files(image, found)
    (work_dir / f"{blob.id}.blob.data").unlink(missing_ok=True)  # it may have been made anew meanwhile
    assert main(["cache", "gc", str(work_dir), "--dry-run"]) == 0
    assert capsys.readouterr().out.strip() == str(side) and side.exists()
    assert main(["cache", "gc", str(work_dir), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["removed"] == [str(side)]
    assert not side.exists()
    with opened(image, work_dir) as found:
        read_files(image, found)


def test_unfinished_side_files_are_swept_when_old(image: Image, work_dir: Path) -> None:
    with opened(image, work_dir) as found:
        old, fresh = (work_dir / SIDE_DIR / f"{found.blobs[0].id}.vnd.{name}.tmp" for name in ("1.0x1", "2.0x2"))
        old.touch()
        fresh.touch()
        then = fresh.stat().st_mtime
        os.utime(old, (then - STALE_TMP_S - 2, then - STALE_TMP_S - 2))
        assert CacheDir(work_dir).collect(now=then) == [old]
        assert fresh.exists() and not old.exists()


def test_no_cache(tmp_path: Path, work_dir: Path) -> None:
    with pytest.raises(Failure, match="no such cache directory"):
        CacheDir(tmp_path / "nowhere")
    assert CacheDir(work_dir).uses() == [] and CacheDir(work_dir).collect() == []
    with pytest.raises(Failure, match="no blob 'ab'"):
        CacheDir(work_dir).find("ab")


def test_a_daemon_keeps_its_cache_as_configured(image: Image, tmp_path: Path, work_dir: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(
        json.dumps(
            {
                "device": {
                    "backend": {"type": "localfs", "config": {"dir": str(image.blob_dir)}},
                    "cache": {"type": "blobcache", "compressed": True, "config": {"work_dir": str(work_dir)}},
                }
            }
        )
    )
    daemon = NydusDaemon(["--bootstrap", str(image.bootstrap), "--config", str(config)])
    with daemon, FakeGuest(daemon.socket_path) as guest:
        guest.fuse.init()
        for _ in range(2):
            for name, data in image.files.items():
                assert guest.fuse.read_file(name) == data
    (kept,) = CacheDir(work_dir).kept()
    assert kept.compressed and CacheDir(work_dir).verify(kept).right > len(image.files)


def test_files_named_after_a_table_go_with_the_blobs_own(image: Image, work_dir: Path) -> None:
    """A program that removes a blob's files by its id leaves those: gc takes them, unless they are in use."""
    (work_dir / f"{image.blob.name}.blob.data").write_bytes(b"another program's")
    with opened(image, work_dir) as found:
        read_files(image, found)
        (named,) = [one for one in CacheDir(work_dir).kept() if one.id != one.blob_id]
        assert CacheDir(work_dir).verify(named).right == found.image.ready_chunks(0)[0]
        assert CacheDir(work_dir).collect() == []
        (work_dir / f"{image.blob.name}.blob.data").unlink()
        assert CacheDir(work_dir).collect() == []  # in use
    wanted = {
        work_dir / named.data_name,
        work_dir / f"{named.id}.blob.data.chunk_map",
        work_dir / SIDE_DIR / named.side_name,
    }
    assert set(CacheDir(work_dir).collect(dry_run=True)) == wanted
    assert all(one.exists() for one in wanted)
    assert set(CacheDir(work_dir).collect()) == wanted
    assert not any(one.exists() for one in wanted) and CacheDir(work_dir).collect() == []
