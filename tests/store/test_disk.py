"""Real disks that are full or cannot be written, from the start or from some moment on: every read is right, the log
names file, cause and cure, and what was taken away is used again when it is back."""

import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.proofs.power_cut import attached, can_mount, make_disk, mounted
from tests.store.conftest import Image
from virtiofsd_nydus.engine import Engine, Event, Store
from virtiofsd_nydus.errors import Cause
from virtiofsd_nydus.reader.bootstrap import Bootstrap
from virtiofsd_nydus.storage.localfs import LocalfsBackend
from virtiofsd_nydus.storage.pump import FetchPump

WAIT_S = 30.0
pytestmark = pytest.mark.skipif(bool(can_mount()), reason=f"no disk can be mounted: {can_mount()}")


class Opened:
    """The image on a cache directory, and the lines the engine says."""

    def __init__(self, image: Image, work_dir: Path) -> None:
        self.files = image.files
        self.engine = Engine()
        self.store = Store(self.engine, str(work_dir))
        self.image = Bootstrap(image.bootstrap, engine=self.engine, store=self.store)
        self.pump = FetchPump(self.engine)
        self.lines: list[Event] = []
        (self.blob,) = self.image.blobs
        self.pump.add_backend(self.blob.key, LocalfsBackend(str(image.blob_dir)))
        self.pump.start()

    def close(self) -> None:
        self.engine.shutdown()
        assert self.pump.join(10)
        self.image.close()
        self.store.close()
        self.engine.close()

    def read(self, count: int = 1 << 20) -> None:
        for name in list(self.files)[:count]:
            assert self.image.read(self.image.lookup(self.image.root_ino, name)) == self.files[name]

    def ready(self) -> int:
        return self.image.image.ready_chunks(0)[0]

    def said(self, *parts: str) -> Event:
        """The first line with all the parts; waits for it."""
        until = time.monotonic() + WAIT_S
        while True:
            for line in self.lines:
                if all(part in line.text for part in parts):
                    return line
            assert time.monotonic() < until, (parts, [line.text for line in self.lines])
            event = self.engine.next_event(100)
            self.lines += [event] if event is not None else []


@contextmanager
def opened(image: Image, work_dir: Path) -> Iterator[Opened]:
    found = Opened(image, work_dir)
    try:
        yield found
    finally:
        found.close()


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    return Image(tmp_path_factory.mktemp("image"), "zstd", "blake3")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """An ext4 file system of its own."""
    mountpoint = tmp_path / "disk"
    mountpoint.mkdir()
    make_disk(tmp_path / "image")
    with attached(tmp_path / "image") as device, mounted(device, mountpoint):
        yield mountpoint


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB in memory; all of it is taken by the file ballast."""
    mountpoint = tmp_path / "small"
    mountpoint.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(mountpoint)], check=True)
    try:
        yield mountpoint
    finally:
        subprocess.run(["umount", str(mountpoint)], check=True)


def fill(directory: Path) -> Path:
    ballast = directory / "ballast"
    with ballast.open("wb", buffering=0) as stream, suppress(OSError):
        while stream.write(bytes(4096)):
            pass
    return ballast


def wait_until(true: Callable[[], bool]) -> None:
    until = time.monotonic() + WAIT_S
    while not true():
        assert time.monotonic() < until
        time.sleep(0.05)


def test_read_only_from_the_start(image: Image, disk: Path) -> None:
    cache = disk / "cache"
    cache.mkdir()
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    with opened(image, cache) as found:
        found.read()
        found.read()
        line = found.said(str(cache), "Read-only file system", "mount its file system read-write")
        assert line.cause == Cause.SPACE and found.ready() == 0
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
        wait_until(lambda: found.ready() > 0)
        found.said("is written again")
        found.read()
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    with opened(image, cache) as found:  # what is there is verified and used
        found.read()
        assert found.ready() > 0


def test_read_only_while_it_runs(image: Image, disk: Path) -> None:
    """As the kernel does it when it finds the file system damaged."""
    cache = disk / "cache"
    cache.mkdir()
    with opened(image, cache) as found:
        found.read(4)
        subprocess.run(["mount", "-o", "remount,abort", str(disk)], check=False, capture_output=True)
        with pytest.raises(OSError, match="Read-only"):
            (disk / "other").touch()
        for _ in range(2):
            found.read()
        line = found.said(f"{found.blob.id}.blob.data cannot be written", "kernel's log")
        assert line.cause == Cause.SPACE


def test_full_while_it_runs(image: Image, small: Path) -> None:
    cache = small / "cache"
    cache.mkdir()
    with opened(image, cache) as found:
        found.read(2)
        ballast = fill(small)
        found.read()
        before = found.ready()
        line = found.said(f"{found.blob.id}.blob.data cannot be written", "No space left on device", "free space")
        assert line.cause == Cause.SPACE
        found.read()
        ballast.unlink()
        wait_until(lambda: found.ready() > before)  # by itself, out of memory
        found.said("is written again")
        found.read()


def test_full_from_the_start(image: Image, small: Path) -> None:
    cache = small / "cache"
    cache.mkdir()
    ballast = fill(small)
    with opened(image, cache) as found:
        found.read()
        found.said("No space left on device", "free space")
        ballast.unlink()
        wait_until(lambda: found.ready() > 0)
        found.read()
    assert (cache / f"{found.blob.id}.blob.data").stat().st_blocks > 0


def test_a_foreign_file(image: Image, work_dir: Path) -> None:
    """A file that is too large for this image's table of the blob is another's: left alone, and the image read."""
    with opened(image, work_dir) as found:
        path = work_dir / f"{found.blob.id}.blob.data"
        path.write_bytes(b"x" * (found.blob.uncompressed_size_bytes + 1))
        found.read()
        assert found.said("larger than this image says").cause == Cause.NONE
        assert path.read_bytes() == b"x" * (found.blob.uncompressed_size_bytes + 1)
