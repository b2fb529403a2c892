"""A wrong byte never reaches a guest, wherever it was made wrong; the right ones go on being served."""

import errno
import hashlib
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from tests.peers.registry import LocalRegistry
from tests.system.conftest import CODECS, Converter
from tests.system.daemon import Daemon, ServedImage, data_ends, find_chunks
from tests.system.guest_tree import Record, differences, list_tree
from tests.system.image import SMALL_CHUNK_BYTES
from tests.system.range_proxy import RangeProxy, SentRange
from virtiofsd_nydus.fakeguest.fakeguest import FakeGuest

DEADLINE_MS = 3000
VICTIM = "large/random"  # of many chunks, in the first blob
ELSEWHERE = "large/second"
BATCHED_FILE = "sizes/4097"


def read_all(daemon: Daemon, tree: list[Record]) -> dict[str, str]:
    """Reads every file whose name is text: path -> sha256, or the error's name."""
    found = {}
    with FakeGuest(daemon.socket_path) as guest:
        guest.fuse.init()
        for record in tree:
            if record["kind"] == "file" and record["path"].isprintable():
                try:
                    found[record["path"]] = hashlib.sha256(guest.fuse.read_file(record["path"])).hexdigest()
                except OSError as error:
                    found[record["path"]] = errno.errorcode.get(error.errno or 0, "?")
    return found


def outcome(tree: list[Record], found: dict[str, str]) -> tuple[set[str], set[str]]:
    """Paths that ended in EIO, and those that gave anything but EIO or the right bytes."""
    right = {record["path"]: record["sha256"] for record in tree if record["kind"] == "file"}
    failed = {path for path, got in found.items() if got == "EIO"}
    return failed, {path for path, got in found.items() if got not in ("EIO", right[path])}


def flip_byte(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 0x10]))


class Damage:
    """Flips one byte of a blob in the first `times` answers that hold it."""

    def __init__(self, blob_id: str, offset: int, times: int = 1 << 30) -> None:
        self.blob_id, self.offset, self.times, self.done = blob_id, offset, times, 0

    def __call__(self, sent: SentRange, body: bytes) -> bytes:
        if sent.blob_id != self.blob_id or not sent.start <= self.offset < sent.end or self.done >= self.times:
            return body
        self.done += 1
        at = self.offset - sent.start
        return body[:at] + bytes([body[at] ^ 0x10]) + body[at + 1 :]


@pytest.fixture
def proxy(registry: LocalRegistry) -> Iterator[RangeProxy]:
    with RangeProxy(registry.host) as server:
        yield server


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("place", ["head", "middle", "tail"])
def test_flipped_in_the_served_blob(
    converter: Converter, proxy: RangeProxy, expected_tree: list[Record], tmp_path: Path, codec: str, place: str
) -> None:
    digester = "sha256" if place == "middle" else "blake3"
    image = converter.convert(codec, digester).with_backend(host=proxy.host)
    blob_id, chunk = find_chunks(image, VICTIM)[3]
    damage = Damage(
        blob_id,
        {"head": chunk.coff, "middle": chunk.coff + chunk.csize_bytes // 2, "tail": chunk.coff + chunk.csize_bytes - 1}[
            place
        ],
    )
    proxy.damage = damage
    with Daemon(image, tmp_path / "cache", deadline_ms=DEADLINE_MS) as daemon:
        failed, wrong = outcome(expected_tree, read_all(daemon, expected_tree))
        daemon.wait_for_line("cause=digest")
        assert daemon.counters()["digest_failures"] > 0 or codec != "none"
    assert damage.done > 0
    assert wrong == set()
    assert failed == {VICTIM}


@pytest.mark.parametrize("codec", CODECS)
def test_flipped_once_on_the_way(
    converter: Converter, proxy: RangeProxy, expected_tree: list[Record], tmp_path: Path, codec: str
) -> None:
    """Asked for again, the range is right: the guest notices nothing."""
    image = converter.convert(codec).with_backend(host=proxy.host)
    blob_id, chunk = find_chunks(image, VICTIM)[3]
    proxy.damage = damage = Damage(blob_id, chunk.coff + 5, times=1)
    with Daemon(image, tmp_path / "cache", deadline_ms=10_000) as daemon:
        assert outcome(expected_tree, read_all(daemon, expected_tree)) == (set(), set())
    assert damage.done == 1


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("codec", CODECS)
def test_flipped_in_a_stopped_daemons_cache(
    converter: Converter,
    proxy: RangeProxy,
    expected_tree: list[Record],
    tmp_path: Path,
    codec: str,
    how: signal.Signals,
) -> None:
    """The chunk's bits are set, in our map and in Nydus's: all the same, it is noticed, and fetched anew."""
    image = converter.convert(codec).with_backend(host=proxy.host)
    cache = tmp_path / "cache"
    with Daemon(image, cache) as daemon:
        assert outcome(expected_tree, read_all(daemon, expected_tree)) == (set(), set())
        daemon.kill(how)
    proxy.clear()
    blob_id, chunk = find_chunks(image, VICTIM)[3]
    data = cache / f"{blob_id}.blob.data"
    before = data.stat()
    chunk_map = (cache / f"{blob_id}.blob.data.chunk_map").read_bytes()
    assert chunk_map[4096 + chunk.chunk_index // 8] & 0x80 >> chunk.chunk_index % 8
    flip_byte(data, chunk.uoff + 100)
    os.utime(data, ns=(before.st_atime_ns, before.st_mtime_ns))
    with Daemon(image, cache) as daemon:
        assert outcome(expected_tree, read_all(daemon, expected_tree)) == (set(), set())
    assert 0 < proxy.sent_bytes() < sum(image.blobs.values()) / 4, "the one bad chunk costs no more than its range"


def test_a_bit_set_by_somebody_else_is_a_hint(
    image: ServedImage, proxy: RangeProxy, expected_tree: list[Record], tmp_path: Path
) -> None:
    """Without our own side files, Nydus's chunk_map alone: verified in place, nothing fetched but what is wrong."""
    served = image.with_backend(host=proxy.host)
    cache = tmp_path / "cache"
    with Daemon(served, cache) as daemon:
        read_all(daemon, expected_tree)
    shutil.rmtree(cache / ".virtiofsd-nydus")
    proxy.clear()
    blob_id, chunk = find_chunks(served, VICTIM)[3]
    flip_byte(cache / f"{blob_id}.blob.data", chunk.uoff + 100)
    with Daemon(served, cache) as daemon:
        assert outcome(expected_tree, read_all(daemon, expected_tree)) == (set(), set())
        counters = daemon.counters()
    assert counters["verified_chunks"] > 100 and counters["digest_failures"] >= 1
    assert [one for one in proxy.ranges if one.start <= chunk.coff < one.end]
    assert proxy.sent_bytes() < sum(image.blobs.values()) / 4


def test_a_cache_file_that_lost_its_tail(
    image: ServedImage, proxy: RangeProxy, expected_tree: list[Record], tmp_path: Path
) -> None:
    served = image.with_backend(host=proxy.host)
    cache = tmp_path / "cache"
    with Daemon(served, cache) as daemon:
        read_all(daemon, expected_tree)
    for data in cache.glob("*.blob.data"):
        os.truncate(data, data.stat().st_size // 2)
    with Daemon(served, cache) as daemon:
        assert outcome(expected_tree, read_all(daemon, expected_tree)) == (set(), set())


# Where small chunks are compressed together, only the blob's own table says where they lie: such an image needs its
# blob.meta. (Others do without: what the bootstrap says is enough.)
BATCHED = [("zstd", "blake3"), ("lz4_block", "sha256")]


@pytest.mark.parametrize(("codec", "digester"), BATCHED)
def test_flipped_in_a_cached_chunk_table(
    converter: Converter, proxy: RangeProxy, expected_tree: list[Record], tmp_path: Path, codec: str, digester: str
) -> None:
    """Right bytes or EIO come of it, whether the chunks' bytes are in the cache or not."""
    image = converter.convert(codec, digester, batch_bytes=SMALL_CHUNK_BYTES).with_backend(host=proxy.host)
    filled = tmp_path / "filled"
    with Daemon(image, filled) as daemon:
        assert outcome(expected_tree, read_all(daemon, expected_tree)) == (set(), set())
    blob_id, chunk = find_chunks(image, BATCHED_FILE)[0]
    size = (filled / f"{blob_id}.blob.meta").stat().st_size
    random = Random(codec)
    # The chunk's own entry, the header at the end, and anywhere
    for number, place in enumerate(
        (24 * chunk.chunk_index + random.randrange(24), size - 4096 + random.randrange(64), random.randrange(size))
    ):
        cache = tmp_path / f"cache-{number}"
        shutil.copytree(filled, cache)
        if number % 2 == 0:
            for path in cache.glob("*.blob.data*"):
                path.unlink()
        flip_byte(cache / f"{blob_id}.blob.meta", place)
        with Daemon(image, cache, deadline_ms=DEADLINE_MS) as daemon:
            _, wrong = outcome(expected_tree, read_all(daemon, expected_tree))
        assert wrong == set(), f"byte {place} of {size}"


@pytest.mark.parametrize(("codec", "digester"), BATCHED)
def test_flipped_in_a_served_chunk_table(
    converter: Converter, proxy: RangeProxy, expected_tree: list[Record], tmp_path: Path, codec: str, digester: str
) -> None:
    """The registry sends a wrong one: no wrong byte, no crash; the other blobs are served."""
    image = converter.convert(codec, digester, batch_bytes=SMALL_CHUNK_BYTES).with_backend(host=proxy.host)
    blob_id, _ = find_chunks(image, BATCHED_FILE)[0]
    start, size = data_ends(image)[blob_id], image.blobs[blob_id]
    random = Random(codec)
    for number, place in enumerate((start + random.randrange(200), random.randrange(start, size))):
        proxy.damage = damage = Damage(blob_id, place)
        with Daemon(image, tmp_path / f"cache-{number}", deadline_ms=DEADLINE_MS) as daemon:
            failed, wrong = outcome(expected_tree, read_all(daemon, expected_tree))
            assert daemon.process.poll() is None
        assert wrong == set(), f"byte {place} of {size}"
        assert ELSEWHERE not in failed
        assert damage.done > 0 or number > 0


def test_undamaged_tree_through_the_proxy(
    image: ServedImage, proxy: RangeProxy, expected_tree: list[Record], tmp_path: Path
) -> None:
    """Of these tests themselves: without damage the proxy changes nothing."""
    served = image.with_backend(host=proxy.host)
    with Daemon(served, tmp_path / "cache") as daemon, FakeGuest(daemon.socket_path) as guest:
        guest.fuse.init()
        assert differences(expected_tree, list(list_tree(guest.fuse))) == []
