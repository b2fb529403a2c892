"""A small image, our daemon on it, and guests without a VM: what the socket tests share."""

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from virtiofsd_nydus._fakeguest import ffi, lib

from virtiofsd_nydus.fakeguest.fakeguest import FakeGuest, Queue
from virtiofsd_nydus.vmm.servers import NydusDaemon

# path -> (seed of its pattern, size); bystanders read "data"
FILES = {
    "data": (7, 4 << 20),
    "odd": (8, 12345),
    "empty": (9, 0),
    "page": (10, 4096),
    "over": (11, 4097),
    "sub/deep/file": (12, 70_000),
}
LINKS = {"link": "sub/deep/file", "sub/long": "x" * 300}
MANY = 600  # entries of the directory "many": several listings of 4096 bytes
DEADLINE_S = 10.0


@dataclass(frozen=True)
class Image:
    tree: Path
    bootstrap: Path
    blob_dir: Path


def pattern(size: int, seed: int) -> bytes:
    buffer = ffi.new("uint8_t[]", size or 1)
    lib.fg_pattern_fill(buffer, size, 0, seed)
    return bytes(ffi.buffer(buffer, size))


def make_tree(root: Path) -> None:
    for name, (seed, size) in FILES.items():
        place = root / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(pattern(size, seed))
    for name, target in LINKS.items():
        (root / name).symlink_to(target)
    (root / "many").mkdir()
    for i in range(MANY):
        (root / "many" / f"entry-{i:04}{'x' * (i % 40)}").write_bytes(b"%d" % i)
    os.setxattr(root / "odd", "user.colour", b"green")
    (root / "page").chmod(0o640)
    os.link(root / "over", root / "sub" / "twin")


def build_image(tree: Path, output: Path) -> Image:
    output.mkdir()
    words = ["build", str(tree), "--bootstrap", str(output / "image.boot"), "--blob-dir", str(output)]
    done = subprocess.run(
        [sys.executable, "-m", "virtiofsd_nydus.cli.main", *words],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return Image(tree, output / "image.boot", output)


class DaemonKeeper:
    """One daemon for many tests; a new one after a test that lost it."""

    def __init__(self, image: Image) -> None:
        self.image = image
        self.running: NydusDaemon | None = None

    def get(self) -> NydusDaemon:
        if self.running is None or self.running.process.poll() is not None:
            self.close()
            self.running = NydusDaemon(
                ["--bootstrap", str(self.image.bootstrap), "--localfs-dir", str(self.image.blob_dir)]
            )
            self.running.__enter__()
        return self.running

    def close(self) -> None:
        if self.running is not None:
            self.running.__exit__(None, None, None)
            self.running = None


def assert_alive(daemon: NydusDaemon) -> None:
    status = daemon.process.poll()
    assert status is None, f"the daemon ended with {status}:\n{daemon.log_text()[-3000:]}"


def open_fds(daemon: NydusDaemon) -> int:
    """Of all its processes."""
    return sum(len(list(Path(f"/proc/{pid}/fd").iterdir())) for pid in daemon.family)


def wait_until(test: Callable[[], bool], what: str, seconds: float = DEADLINE_S) -> None:
    """Polls a condition that no event tells of."""
    deadline = time.monotonic() + seconds
    while not test():
        assert time.monotonic() < deadline, f"not in {seconds} s: {what}"
        time.sleep(0.002)


class Load:
    """An fg_load of random 4 KiB reads of "data", every byte checked, as fields change it."""

    def __init__(self, guest: FakeGuest, **fields: Any) -> None:
        data = guest.fuse.walk("data")
        self.files = ffi.new("fg_file[]", [(data.nodeid, 0, data.attr.size, FILES["data"][0])])
        self.names = ffi.new("fg_name[]", [(1, data.nodeid, b"data")])
        values: dict[str, Any] = {
            "kind": lib.FG_LOAD_READ_RANDOM,
            "depth": 2,
            "block_bytes": 4096,
            "check": 1,
            "timeout_ms": 5000,
            "random_seed": 1,
            "files": self.files,
            "file_count": 1,
            "names": self.names,
            "name_count": 1,
        } | fields
        self.handle = ffi.new("fg_load *", values)

    def run(self, queue: Queue) -> Any:
        """The fg_load_result."""
        return queue.load(self.handle)


class BackgroundLoad:
    """A load on a queue from a thread of its own, while the context lasts. may_fail: its end may be any."""

    def __init__(self, queue: Queue, load: Load, may_fail: bool = False) -> None:
        self.queue, self.load, self.may_fail = queue, load, may_fail
        self.error: BaseException | None = None
        self.result: Any = None
        self.thread = threading.Thread(target=self._run)

    def __enter__(self) -> "BackgroundLoad":
        self.thread.start()
        return self

    def __exit__(self, kind: object, value: object, trace: object) -> None:
        self.stop()
        if kind is None and not self.may_fail:
            self.raise_error()
            assert self.result.ops > 0

    def _run(self) -> None:
        try:
            self.result = self.load.run(self.queue)
        except BaseException as error:
            self.error = error

    def progress(self) -> int:
        """Used entries so far, modulo 65536."""
        return self.queue.used_index()

    def wait_progress(self, entries: int = 20) -> None:
        """Until that many more requests have been answered."""
        start = self.progress()
        wait_until(lambda: self.error is not None or (self.progress() - start) & 0xFFFF >= entries, "load progress")
        if not self.may_fail:
            self.raise_error()

    def raise_error(self) -> None:
        if self.error is not None:
            raise AssertionError(f"load: {self.error!r}") from self.error

    def stop(self) -> None:
        """Stops in whatever state it is, waits for what is in flight."""
        while self.thread.is_alive():  # a stop that comes before the loop begins is lost: say it again
            self.queue.stop()
            self.thread.join(self.load.handle.timeout_ms / 1000 + 0.1)


@contextlib.contextmanager
def undisturbed(daemon: NydusDaemon) -> Iterator[FakeGuest]:
    """A second guest on the same daemon that reads all the while; at the end it must have gone on reading, every byte
    right, and the daemon must live."""
    with FakeGuest(daemon.socket_path, slot_count=2, queue_size=16) as guest:
        guest.fuse.init()
        with BackgroundLoad(guest.queues[1], Load(guest, block_bytes=65536, pause_us=500)) as load:
            load.wait_progress(2)
            yield guest
            assert_alive(daemon)
            load.wait_progress(5)
        assert guest.fuse.read_file("odd") == pattern(FILES["odd"][1], FILES["odd"][0])
        assert_alive(daemon)
