"""The fetch threads: a bandwidth limit holds back prefetch alone; wrong bytes are asked for by another way."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from tests.peers.faulty_server import FaultyServer
from virtiofsd_nydus.builder.options import BuildOptions
from virtiofsd_nydus.cli.build import build_image
from virtiofsd_nydus.engine import Engine, Rafs, Store
from virtiofsd_nydus.net.health import RateLimit
from virtiofsd_nydus.reader.bootstrap import Bootstrap
from virtiofsd_nydus.storage.factory import create_backend
from virtiofsd_nydus.storage.localfs import LocalfsBackend
from virtiofsd_nydus.storage.pump import PREFETCH_SLOTS, FetchPump

MIB = 1 << 20
SIZE = 24 * MIB
JOB_BYTES = 2 * MIB  # what one prefetch job asks for at most (csrc/store/fetcher.h)


class Counting(LocalfsBackend):
    """Notes when what was asked for, and by whom."""

    def __init__(self, directory: str) -> None:
        super().__init__(directory)
        self.asked: list[tuple[float, int, bool]] = []
        self.reader_at = 0  # told by a test: in the file, which is the blob
        self.ahead_bytes = 0  # how far ahead of that the farthest request began
        self.distrusted = 0
        self.lock = threading.Lock()
        self.prepared = threading.Semaphore(0)

    def prepare(self) -> None:
        self.prepared.release()
        raise OSError("not now")

    def read_range(self, blob_id, offset, length, *, prefetch=False, deadline=None):
        with self.lock:
            self.asked.append((time.monotonic(), length, prefetch))
            self.ahead_bytes = max(self.ahead_bytes, offset - self.reader_at)
        return super().read_range(blob_id, offset, length, prefetch=prefetch, deadline=deadline)

    def distrust(self, blob_id: str) -> None:
        self.distrusted += 1


class Setup:
    def __init__(self, directory: Path) -> None:
        source = directory / "source"
        source.mkdir(parents=True)
        self.data = Random(7).randbytes(SIZE)
        (source / "big").write_bytes(self.data)
        self.bootstrap = directory / "image.boot"
        build_image(source, self.bootstrap, directory / "blobs", BuildOptions(compressor="none", chunk_size=64 << 10))
        self.blobs = directory / "blobs"
        with Bootstrap(self.bootstrap) as opened:
            self.ino = opened.lookup(opened.root_ino, "big")


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    return Setup(tmp_path_factory.mktemp("image"))


class Opened:
    def __init__(self, setup: Setup, work_dir: Path, backend, limit: RateLimit | None = None) -> None:
        work_dir.mkdir()
        self.engine = Engine(read_deadline_ms=10_000)
        self.store = Store(self.engine, str(work_dir))
        self.rafs = Rafs(self.engine, str(setup.bootstrap), self.store)
        self.pump = FetchPump(self.engine)
        (blob,) = self.rafs.blobs()
        self.pump.add_backend(blob.key, backend, limit)
        self.pump.start()

    def close(self) -> None:
        self.engine.shutdown()
        self.pump.join(20)
        self.rafs.close()
        self.store.close()
        self.engine.close()

    def wait_ready(self) -> None:
        deadline = time.monotonic() + 60
        while True:
            ready, total = self.rafs.ready_chunks(0)
            if total and ready == total:
                return
            assert time.monotonic() < deadline
            time.sleep(0.01)  # between two polls; the deadline decides


@pytest.fixture
def backend(setup: Setup) -> Iterator[Counting]:
    backend = Counting(str(setup.blobs))
    yield backend
    backend.close()


def test_backends_are_prepared_before_they_are_asked(setup: Setup, backend: Counting, tmp_path: Path) -> None:
    opened = Opened(setup, tmp_path / "cache", backend)
    try:
        assert backend.prepared.acquire(timeout=20)
        assert not backend.asked
        assert opened.rafs.read(setup.ino, 0, 1000) == setup.data[:1000]  # a failure there costs nothing
    finally:
        opened.close()


def test_prefetch_keeps_to_its_limit(setup: Setup, backend: Counting, tmp_path: Path) -> None:
    rate = 6 * MIB
    limit = RateLimit(rate)
    opened = Opened(setup, tmp_path / "cache", backend, limit)
    try:
        began = time.monotonic()
        opened.rafs.prefetch_blob(0)
        deadline = began + 20
        while not limit.debt_s():
            assert time.monotonic() < deadline
            time.sleep(0.001)  # between two polls; the deadline decides
        # In debt: a reader is served at once nevertheless.
        at = time.monotonic()
        assert opened.rafs.read(setup.ino, SIZE - 100_000, 100_000) == setup.data[-100_000:]
        assert time.monotonic() - at < 1.0
        opened.wait_ready()
    finally:
        opened.close()
    sent = 0
    for at, length, prefetch in backend.asked:
        if prefetch:
            # A second's worth is free at the start, and each slot may have one job more.
            assert sent <= rate + (at - began) * rate + PREFETCH_SLOTS * JOB_BYTES
            sent += length
    assert sent > 2 * rate
    # What is left after the first second's worth and the last jobs takes its time.
    assert backend.asked[-1][0] - began >= (sent - rate - PREFETCH_SLOTS * JOB_BYTES) / rate * 0.9


def test_without_a_limit_it_does_not_wait(setup: Setup, backend: Counting, tmp_path: Path) -> None:
    opened = Opened(setup, tmp_path / "cache", backend)
    try:
        opened.rafs.prefetch_blob(0)
        opened.wait_ready()
    finally:
        opened.close()
    assert sum(length for _, length, prefetch in backend.asked if prefetch) >= SIZE


@pytest.mark.parametrize(
    ("amplify", "fetched"),
    [(0, 64 << 10), (4096, 128 << 10), (128 << 10, 128 << 10), (1 << 20, 256 << 10), (2 << 20, 512 << 10)],
)
def test_a_miss_takes_its_neighbours_along(
    setup: Setup, backend: Counting, tmp_path: Path, amplify: int, fetched: int
) -> None:
    """One that follows no other is extended to a quarter of amplify_io; 0 means the chunk alone."""
    opened = Opened(setup, tmp_path / "cache", backend)
    try:
        opened.rafs.set_amplify(amplify)
        at = SIZE // 2 + 100
        assert opened.rafs.read(setup.ino, at, 4096) == setup.data[at : at + 4096]
    finally:
        opened.close()
    assert [(length, prefetch) for _, length, prefetch in backend.asked] == [(fetched, False)]


def test_a_reader_in_order_is_fetched_ahead_of(setup: Setup, backend: Counting, tmp_path: Path) -> None:
    """Not as prefetch, whose limit does not count. Each byte is asked for once."""
    opened = Opened(setup, tmp_path / "cache", backend, RateLimit(1))
    try:
        for at in range(0, SIZE, 128 << 10):
            backend.reader_at = at
            assert opened.rafs.read(setup.ino, at, 128 << 10) == setup.data[at : at + (128 << 10)]
        assert opened.engine.stats()["prefetch_bytes"] == 0
    finally:
        opened.close()
    assert backend.ahead_bytes > 128 << 10
    assert sum(length for _, length, _ in backend.asked) == SIZE
    assert not any(prefetch for _, _, prefetch in backend.asked)


def test_a_proxy_that_corrupts_costs_one_attempt(setup: Setup, tmp_path: Path) -> None:
    (blob,) = [path for path in setup.blobs.iterdir() if not path.name.startswith(".")]
    served = {blob.name: blob.read_bytes()}
    with FaultyServer(served) as registry, FaultyServer(served) as proxy:
        proxy.inject("corrupt", at_bytes=10, times=-1)
        backend = create_backend(
            "registry", {"scheme": "http", "host": registry.host, "repo": "a/b", "proxy": {"url": proxy.url}}
        )
        opened = Opened(setup, tmp_path / "cache", backend)
        try:
            assert opened.rafs.read(setup.ino, 0, SIZE) == setup.data
        finally:
            opened.close()
            backend.close()
        assert registry.ranges() and 1 <= len(proxy.ranges()) <= 8  # as many as were under way at once


def test_wrong_bytes_in_the_cache_are_no_fault_of_the_way(setup: Setup, backend: Counting, tmp_path: Path) -> None:
    """A mark of the chunk map without bytes, as a power cut leaves it."""
    (blob,) = [path for path in setup.blobs.iterdir() if not path.name.startswith(".")]
    opened = Opened(setup, tmp_path / "cache", backend)
    try:
        count = SIZE // (64 << 10)
        marks = b"\xff" + bytes((count + 7) // 8 - 1)
        head = b"".join(word.to_bytes(4, "little") for word in (0x424D4150, 1, 0x434D4150, 0))
        (tmp_path / "cache" / f"{blob.name}.blob.data.chunk_map").write_bytes(head.ljust(4096, b"\0") + marks)
        assert opened.rafs.read(setup.ino, 0, SIZE) == setup.data
        assert opened.engine.stats()["digest_failures"] > 0
    finally:
        opened.close()
    assert backend.distrusted == 0
