"""The daemon as Kata runs it: both runtimes' arguments, what lies in its way, its ends, and its output's pipes."""

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.fakeguest.support import build_image, wait_until
from virtiofsd_nydus.vmm.servers import call_api

ROOT = Path(__file__).resolve().parents[2]
READY_SECONDS = 30
STOP_SECONDS = 5  # Kata's, from SIGTERM to SIGKILL
GO_LINE_BYTES = 64 << 10  # bufio.Scanner gives up at a longer one, and the log is no longer read
PIPE_BYTES = 16384
FORMS = {"go": ["--log-level", "info"], "rs": ["--hybrid-mode", "--log-level", "info"]}


class Daemon:
    """A running daemon. sock and api: as the tests reach them."""

    def __init__(self, directory: Path, process: "subprocess.Popen[bytes]") -> None:
        self.sock, self.api, self.process = directory / "vhost-fs.sock", directory / "nydusd-api.sock", process

    def call(self, method: str, target: str, body: object = None) -> tuple[int, Any]:
        return call_api(self.api, method, target, body, 10)

    def wait_running(self) -> None:
        """Until RUNNING is answered; by then the VMM's socket must take its one connection."""
        end = time.monotonic() + READY_SECONDS
        while True:
            assert self.process.poll() is None
            try:
                if self.call("GET", "/api/v1/daemon")[1]["state"] == "RUNNING":
                    break
            except (FileNotFoundError, ConnectionRefusedError):
                assert time.monotonic() < end
        with socket.socket(socket.AF_UNIX) as front:
            os.chdir(self.sock.parent)  # its path may be too long for an address
            front.connect(self.sock.name)

    def say_lines(self, count: int) -> None:
        """Has the daemon log that many mounts."""
        for _ in range(count):
            assert self.call(
                "POST", "/api/v1/mount?mountpoint=/x", {"fs_type": "passthrough_fs", "source": "/tmp", "config": ""}
            ) == (204, None)
            assert self.call("DELETE", "/api/v1/mount?mountpoint=/x") == (204, None)


@contextmanager
def start(
    directory: Path, form: str = "go", *extra: str, stdout: int | None = subprocess.PIPE, relative: bool = False
) -> Iterator[Daemon]:
    names = ["vhost-fs.sock", "nydusd-api.sock"]
    sock, api = names if relative else [str(directory / name) for name in names]
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "virtiofsd_nydus.cli.main",
            "virtiofs",
            *FORMS[form],
            "--apisock",
            api,
            "--sock",
            sock,
            *extra,
        ],
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=subprocess.STDOUT if form == "go" else stdout,
        cwd=directory if relative else ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    try:
        yield Daemon(directory, process)
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(autouse=True)
def _come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def leave_stale(directory: Path) -> None:
    for name in ("vhost-fs.sock", "nydusd-api.sock"):
        with socket.socket(socket.AF_UNIX) as stale:
            stale.bind(str(directory / name))


@pytest.mark.parametrize("form", FORMS)
def test_sigterm(tmp_path: Path, form: str) -> None:
    """Over stale sockets, with more arguments at the end; the end, in time, removes both and closes the pipe."""
    leave_stale(tmp_path)
    with start(tmp_path, form, "--thread-num", "4") as daemon:
        daemon.wait_running()
        began = time.monotonic()
        daemon.process.send_signal(signal.SIGTERM)
        daemon.process.communicate(timeout=STOP_SECONDS)
        assert time.monotonic() - began < STOP_SECONDS
        assert daemon.process.returncode == 0
        assert not daemon.sock.exists()
        assert not daemon.api.exists()


def refuses(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        return client.connect_ex(str(path)) == errno.ECONNREFUSED


@pytest.mark.parametrize("form", FORMS)
def test_sigkill(tmp_path: Path, form: str) -> None:
    """Leaves its sockets; the pipe ends at once, and the next one starts over them."""
    for _ in range(2):
        with start(tmp_path, form) as daemon:
            daemon.wait_running()
            daemon.process.kill()
            daemon.process.communicate(timeout=STOP_SECONDS)
            assert daemon.sock.exists()
            assert daemon.api.exists()
            wait_until(lambda: refuses(daemon.api), "its other processes end, too", STOP_SECONDS)


def test_relative_names(tmp_path: Path) -> None:
    """Rootless: both sockets by bare names, in a directory whose path would be too long for a socket's address."""
    directory = tmp_path / ("d" * 60) / ("e" * 60)
    directory.mkdir(parents=True)
    with start(directory, "rs", relative=True) as daemon:
        os.chdir(directory)
        daemon.api = Path(daemon.api.name)
        daemon.wait_running()
        source = tmp_path / "rw"
        source.mkdir()
        assert daemon.call(
            "POST",
            "/api/v1/mount?mountpoint=%2Fcontainers",
            {"fs_type": "passthrough_fs", "source": str(source), "config": ""},
        ) == (204, None)
        daemon.process.terminate()
        daemon.process.communicate(timeout=STOP_SECONDS)
        assert list(directory.iterdir()) == []


def test_a_pipe_nobody_holds_any_more(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    with start(tmp_path, stdout=writer) as daemon:
        os.close(writer)
        daemon.wait_running()
        os.close(reader)
        daemon.say_lines(3)
        daemon.process.terminate()
        assert daemon.process.wait(STOP_SECONDS) == 0


def test_a_pipe_nobody_reads(tmp_path: Path) -> None:
    """Lines are lost, not the daemon; how many is told when there is room again."""
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    with start(tmp_path, stdout=writer) as daemon:
        os.close(writer)
        daemon.wait_running()
        daemon.say_lines(300)
        assert b"host directory mounted" in os.read(reader, 1 << 20)
        daemon.say_lines(1)
        assert b"lines of the log were lost" in os.read(reader, 1 << 20)
        daemon.say_lines(300)
        daemon.process.terminate()
        assert daemon.process.wait(STOP_SECONDS) == 0
    os.close(reader)


def test_lines_are_short(tmp_path: Path) -> None:
    """Here a warning about an unknown key of a configuration."""
    (tmp_path / "tree").mkdir()
    image = build_image(tmp_path / "tree", tmp_path / "image")
    config = json.dumps(
        {
            "device": {
                "backend": {"type": "localfs", "config": {"dir": str(image.blob_dir)}},
                "cache": {"type": "blobcache", "config": {"work_dir": str(tmp_path / "cache")}},
            },
            "x" * 2 * GO_LINE_BYTES: 1,
        }
    )
    with start(tmp_path) as daemon:
        daemon.wait_running()
        assert daemon.call(
            "POST", "/api/v1/mount?mountpoint=/x", {"fs_type": "rafs", "source": str(image.bootstrap), "config": config}
        ) == (204, None)
        daemon.process.terminate()
        output, _ = daemon.process.communicate(timeout=STOP_SECONDS)
    assert b"xxxx" in output
    assert max(map(len, output.splitlines())) < GO_LINE_BYTES
