"""A guest sees what umoci unpacks: every name, attribute and byte, for each codec and digest."""

from pathlib import Path

import pytest

from tests.system.conftest import CODECS, DIGESTERS, Converter
from tests.system.daemon import Daemon, ServedImage
from tests.system.guest_tree import Record, differences, list_tree
from tests.system.image import LARGE_CHUNK_BYTES, SMALL_CHUNK_BYTES
from virtiofsd_nydus.fakeguest.fakeguest import FakeGuest

VARIANTS = [(codec, digester, SMALL_CHUNK_BYTES) for codec in CODECS for digester in DIGESTERS]
VARIANTS += [("zstd", "blake3", LARGE_CHUNK_BYTES), ("none", "sha256", 4096)]


def read_tree(daemon: Daemon) -> list[Record]:
    with FakeGuest(daemon.socket_path) as guest:
        guest.fuse.init()
        return list(list_tree(guest.fuse))


@pytest.mark.parametrize(("codec", "digester", "chunk_bytes"), VARIANTS)
def test_guest_sees_what_umoci_unpacks(
    converter: Converter, expected_tree: list[Record], tmp_path: Path, codec: str, digester: str, chunk_bytes: int
) -> None:
    with Daemon(converter.convert(codec, digester, chunk_bytes), tmp_path / "cache") as daemon:
        assert differences(expected_tree, read_tree(daemon)) == []
        counters = daemon.counters()
    assert counters["fetched_chunks"] > 0 and counters["digest_failures"] == 0
    assert counters["fuse_errors"] == 0
    assert "error" not in daemon.log_text().lower()


@pytest.mark.parametrize("codec", ["zstd", "lz4_block"])
def test_batched_chunks_show_the_same(
    converter: Converter, expected_tree: list[Record], tmp_path: Path, codec: str
) -> None:
    with Daemon(converter.convert(codec, batch_bytes=SMALL_CHUNK_BYTES), tmp_path / "cache") as daemon:
        assert differences(expected_tree, read_tree(daemon)) == []


def test_localfs_shows_the_same(
    converter: Converter, image: ServedImage, expected_tree: list[Record], tmp_path: Path
) -> None:
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for blob_id in image.blobs:
        (blobs / blob_id).symlink_to(converter.registry.blob_file(blob_id))
    with Daemon(image.from_directory(blobs), tmp_path / "cache") as daemon:
        assert differences(expected_tree, read_tree(daemon)) == []


def test_small_odd_reads(image: ServedImage, expected_tree: list[Record], tmp_path: Path) -> None:
    """Reads that begin and end anywhere give the same bytes as reading in order, over chunk borders too."""
    import hashlib
    from random import Random

    expected = next(record for record in expected_tree if record["path"] == "large/text")
    with Daemon(image, tmp_path / "cache") as daemon, FakeGuest(daemon.socket_path) as guest:
        guest.fuse.init()
        node = guest.fuse.walk("large/text").nodeid
        random = Random(7)
        pieces = {}
        for _ in range(300):
            start, length = random.randrange(expected["size"] + 10), random.randrange(1, 100_000)
            pieces[start, length] = guest.fuse.read(node, start, length)
        whole = guest.fuse.read_all(node)
    assert hashlib.sha256(whole).hexdigest() == expected["sha256"]
    assert all(piece == whole[start : start + length] for (start, length), piece in pieces.items())
