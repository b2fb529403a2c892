"""A real daemon with keeper and worker, on a small image that lies in a directory."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest

from virtiofsd_nydus.fakeguest.fakeguest import FakeGuest
from virtiofsd_nydus.vmm.servers import NydusDaemon, call_api

WAIT_S = 30.0
FILES = 24


def wait_until(condition: Callable[[], Any], what: str) -> Any:
    """Polls until the condition gives something true, which is returned."""
    deadline = time.monotonic() + WAIT_S
    while not (found := condition()):
        assert time.monotonic() < deadline, f"{what}: not within {WAIT_S:g} s"
        time.sleep(0.005)
    return found


def children(pid: int) -> list[int]:
    """The processes that a process has started."""
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


class Image:
    """An image of a few files, with its blobs beside it. files: name to bytes."""

    def __init__(self, directory: Path, seed: int = 1) -> None:
        random = Random(seed)
        self.tree, self.bootstrap, self.blobs = directory / "tree", directory / "boot", directory / "blobs"
        self.tree.mkdir(parents=True)
        self.files = {f"file{i}": random.randbytes(random.randrange(1, 200_000)) for i in range(FILES)}
        for name, data in self.files.items():
            (self.tree / name).write_bytes(data)
        words = ["build", "--bootstrap", str(self.bootstrap), "--blob-dir", str(self.blobs), str(self.tree)]
        subprocess.run([sys.executable, "-m", "virtiofsd_nydus.cli.main", *words], check=True, capture_output=True)

    @property
    def options(self) -> list[str]:
        return ["--bootstrap", str(self.bootstrap), "--localfs-dir", str(self.blobs)]


class KeptDaemon(NydusDaemon):
    """`virtiofs` with its keeper."""

    def __init__(self, options: Sequence[str]) -> None:
        super().__init__(options, die_with_parent=True)

    def _start(self) -> None:
        super()._start()
        wait_until(self.is_running, "the daemon's start")

    def call(self, method: str, route: str, body: object = None) -> tuple[int, Any]:
        """One request of the API, after which a worker that was about to be is there."""
        return call_api(self.api_path, method, route, body)

    @property
    def template(self) -> int:
        """The process that workers are forked from."""
        found: int = wait_until(lambda: children(self.process.pid), "the template")[0]
        return found

    @property
    def worker(self) -> int:
        """The worker's pid, once there is one."""
        found: int = wait_until(lambda: children(self.template), "a worker")[-1]
        return found

    def kill_worker(self, how: signal.Signals = signal.SIGKILL) -> int:
        """Kills the worker; the pid of the next one, which is ready."""
        dead = self.worker
        os.kill(dead, how)
        return self.await_worker(dead)

    def await_worker(self, dead: int) -> int:
        """The worker after that one, which answers the API."""
        found: int = wait_until(lambda: self.worker not in (0, dead) and self.worker, "the next worker")
        wait_until(self.is_running, "the next worker's start")
        return found

    def is_running(self) -> bool:
        try:
            return bool(self.call("GET", "/api/v1/daemon")[1]["state"] == "RUNNING")
        except OSError:
            return False  # the worker that took the connection died

    def await_line(self, text: str) -> str:
        """The first line of the log with the text in it."""
        found: str = wait_until(
            lambda: next((line for line in self.log_text().splitlines() if text in line), None), f"a line with {text!r}"
        )
        return found


@pytest.fixture(scope="session")
def image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    return Image(tmp_path_factory.mktemp("image"))


@pytest.fixture
def daemon(image: Image) -> Iterator[KeptDaemon]:
    with KeptDaemon(image.options) as running:
        yield running
        running.check_alive()


@pytest.fixture
def guest(daemon: KeptDaemon) -> Iterator[FakeGuest]:
    with FakeGuest(daemon.socket_path) as started:
        started.fuse.init()
        yield started
