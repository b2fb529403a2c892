"""Worker and guard killed at any moment: readers pause and go on, with the image's bytes or, when no process can bring
them, with an error; never with others."""

import hashlib
import os
import signal
import stat
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kernelmount.kernel import KernelMount
from tests.system.daemon import wait_until
from tests.system.range_proxy import RangeProxy
from virtiofsd_nydus.fuse.mounts import find_mount

LARGE = ("large/random", "large/second", "large/text", "sizes/1048575", "sizes/1048576", "sizes/1048577")


def hash_files(root: Path) -> dict[str, str]:
    """Of every regular file below: path to digest, or the error's name."""
    found = {}
    for directory, _, names in os.walk(root):
        for name in names:
            path = Path(directory, name)
            if stat.S_ISREG(path.lstat().st_mode):
                try:
                    found[str(path.relative_to(root))] = hashlib.sha256(path.read_bytes()).hexdigest()
                except OSError as error:
                    found[str(path.relative_to(root))] = str(error.strerror)
    return found


class Reader(threading.Thread):
    """Reads one file; content or error afterwards."""

    def __init__(self, path: Path) -> None:
        super().__init__(daemon=True)
        self.path, self.content, self.error = path, b"", 0
        self.start()

    def run(self) -> None:
        try:
            self.content = self.path.read_bytes()
        except OSError as error:
            self.error = error.errno or -1

    def end(self) -> bytes:
        self.join(60)
        assert not self.is_alive(), f"{self.path} hangs"
        return self.content


@pytest.fixture
def want(unpacked: Path) -> dict[str, str]:
    return hash_files(unpacked)


@pytest.mark.parametrize("victims", [("worker",), ("guard", "worker"), ("worker", "guard")])
def test_a_waiting_reader_goes_on(
    kernel_mount: KernelMount, proxy: RangeProxy, unpacked: Path, victims: tuple[str, ...]
) -> None:
    """Its event was read, and not answered, by a process that is gone."""
    proxy.gate.clear()
    readers = [Reader(kernel_mount.target / path) for path in LARGE]
    assert proxy.held.acquire(timeout=20)
    for victim in victims:
        kernel_mount.kill(victim)
        assert all(reader.is_alive() for reader in readers)
    proxy.gate.set()
    for reader, path in zip(readers, LARGE, strict=True):
        assert reader.end() == (unpacked / path).read_bytes(), path


def test_kills_under_load(kernel_mount: KernelMount, proxy: RangeProxy, want: dict[str, str]) -> None:
    """Four readers of everything, and after every few answers one of the two dies."""
    found: list[dict[str, str]] = []
    threads = [threading.Thread(target=lambda: found.append(hash_files(kernel_mount.target))) for _ in range(4)]
    proxy.gate.clear()
    for thread in threads:
        thread.start()
    for victim in ("worker", "guard", "worker", "worker", "guard"):
        proxy.held.acquire(timeout=20)
        kernel_mount.kill(victim)
        proxy.gate.set()  # lets through what is held
        proxy.gate.clear()
    proxy.gate.set()
    for thread in threads:
        thread.join(120)
    assert [one == want for one in found] == [True] * 4


def test_wrong_bytes_are_an_error_and_are_asked_for_again(
    kernel_mount: KernelMount, proxy: RangeProxy, unpacked: Path
) -> None:
    proxy.damage = lambda sent, body: bytes(len(body))
    reader = Reader(kernel_mount.target / "large/random")
    assert reader.end() == b"" and reader.error == 5
    proxy.damage = None
    assert (kernel_mount.target / "large/random").read_bytes() == (unpacked / "large/random").read_bytes()


@pytest.fixture
def without_bootstrap(kernel_mount: KernelMount) -> Iterator[Path]:
    """Workers cannot start: the bootstrap is elsewhere; the kernel has it open. It is put back at the end."""
    away = kernel_mount.image.bootstrap.with_suffix(".away")
    kernel_mount.image.bootstrap.rename(away)
    yield away
    if away.exists():
        away.rename(kernel_mount.image.bootstrap)


def test_readers_fail_while_no_worker_stays(kernel_mount: KernelMount, without_bootstrap: Path, unpacked: Path) -> None:
    """And read again once one does."""
    os.kill(kernel_mount.pid("worker"), 9)
    reader = Reader(kernel_mount.target / "large/random")
    assert reader.end() == b"" and reader.error == 5
    without_bootstrap.rename(kernel_mount.image.bootstrap)
    wait_until(lambda: "running" in kernel_mount.log().rpartition("fail for")[2], "a worker that stays")
    assert (kernel_mount.target / "large/random").read_bytes() == (unpacked / "large/random").read_bytes()


def test_others_who_read_the_cache_never_wait_for_it(kernel_mount: KernelMount, unpacked: Path) -> None:
    """Its events are for the kernel's reads alone: with both processes stopped the same file reads by name."""
    want = (unpacked / "large/random").read_bytes()
    assert (kernel_mount.target / "large/random").read_bytes() == want
    stopped = [kernel_mount.pid(role) for role in ("worker", "guard")]
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    try:
        contents = [Reader(path).end() for path in kernel_mount.cache.glob("*.blob.data")]
        assert any(want[:4096] in content for content in contents)
    finally:
        for pid in stopped:
            os.kill(pid, signal.SIGCONT)


def test_a_waiting_reader_can_be_killed(kernel_mount: KernelMount, proxy: RangeProxy, unpacked: Path) -> None:
    proxy.gate.clear()
    reader = subprocess.Popen(["cat", str(kernel_mount.target / "large/random")], stdout=subprocess.DEVNULL)
    assert proxy.held.acquire(timeout=20)
    reader.kill()
    assert reader.wait(20) == -signal.SIGKILL
    proxy.gate.set()
    assert (kernel_mount.target / "large/random").read_bytes() == (unpacked / "large/random").read_bytes()


@pytest.mark.parametrize("role", ["worker", "guard"])
def test_sigterm_unmounts(kernel_mount: KernelMount, role: str) -> None:
    os.kill(kernel_mount.pid(role), signal.SIGTERM)
    wait_until(lambda: find_mount(str(kernel_mount.target)) is None, "the unmount")
    wait_until(lambda: not kernel_mount.pids("worker") + kernel_mount.pids("guard"), "the processes' end")
    assert not kernel_mount.place.directory.exists()
