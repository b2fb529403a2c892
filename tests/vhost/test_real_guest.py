"""What real QEMU does to a device while reads are missing: stop and cont, reset. The server that holds the image's
blob answers only when the test lets it."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from json import dumps
from pathlib import Path

import pytest

from virtiofsd_nydus.vmm.guest import Deadline
from virtiofsd_nydus.vmm.qemu import GuestFiles, Machine, MachineConfig, Share
from virtiofsd_nydus.vmm.servers import NydusDaemon

pytestmark = pytest.mark.guest

ROOT = Path(__file__).resolve().parents[2]
BUSYBOX = Path("/bin/busybox")
BOOT_SECONDS = 90
BIG_BYTES = 3 << 20
DRAIN_LIMIT_S = 5.0  # for a stop whose bounded drain is 0.2 s a queue, on a busy machine


class GatedRegistry(ThreadingHTTPServer):
    """Blobs of a directory under a registry's routes. While the gate is closed requests wait."""

    daemon_threads = True

    def __init__(self, directory: Path) -> None:
        super().__init__(("127.0.0.1", 0), GatedHandler)
        self.directory = directory
        self.gate = threading.Event()
        self.gate.set()


class GatedHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        assert isinstance(self.server, GatedRegistry)
        self.server.gate.wait()
        name = self.path.rpartition(":")[2]
        path = self.server.directory / name
        if not path.is_file():
            self.send_response(200 if self.path == "/v2/" else 404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        data = path.read_bytes()
        total = len(data)
        if wanted := self.headers.get("Range"):
            first, last = wanted.removeprefix("bytes=").split("-")
            start, end = int(first), min(int(last or total - 1), total - 1)
            data = data[start : end + 1]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{end}/{total}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    do_HEAD = do_GET

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[GatedRegistry]:
    """Serves an image of busybox and a file `big`."""
    tree, blobs = tmp_path / "tree", tmp_path / "blobs"
    (tree / "bin").mkdir(parents=True)
    blobs.mkdir()
    (tree / "bin" / "busybox").write_bytes(BUSYBOX.read_bytes())
    (tree / "bin" / "busybox").chmod(0o755)
    for applet in ("sha256sum", "true"):
        (tree / "bin" / applet).symlink_to("busybox")
    (tree / "big").write_bytes(os.urandom(BIG_BYTES))
    subprocess.run(
        [
            sys.executable,
            "-m",
            "virtiofsd_nydus.cli.main",
            "build",
            str(tree),
            "--bootstrap",
            str(tmp_path / "image.boot"),
            "--blob-dir",
            str(blobs),
        ],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    server = GatedRegistry(blobs)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.gate.set()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def daemon(registry: GatedRegistry, tmp_path: Path) -> Iterator[NydusDaemon]:
    config = tmp_path / "config.json"
    config.write_text(
        dumps(
            {
                "device": {
                    "backend": {
                        "type": "registry",
                        "config": {"scheme": "http", "host": f"127.0.0.1:{registry.server_port}", "repo": "test/image"},
                    },
                    "cache": {"type": "blobcache", "config": {"work_dir": str(tmp_path / "cache")}},
                }
            }
        )
    )
    with NydusDaemon(["--bootstrap", str(tmp_path / "image.boot"), "--config", str(config)]) as running:
        yield running


@pytest.fixture
def machine(daemon: NydusDaemon) -> Iterator[Machine]:
    """A guest whose root is mounted and that has run one command."""
    with Machine(MachineConfig(GuestFiles.find(), [Share(daemon.socket_path)])) as booted:
        boot(booted)
        yield booted


def boot(machine: Machine) -> None:
    deadline = Deadline(BOOT_SECONDS, "the boot")
    machine.guest.wait_hello(deadline)
    machine.guest.mount("vfs", deadline)
    assert machine.guest.run(["/bin/true"], deadline).status == 0


def await_stuck_read(daemon: NydusDaemon) -> None:
    deadline = Deadline(BOOT_SECONDS, "a read that waits")
    while daemon.stats()["engine"]["oldest_wait_us"] < 100_000:
        deadline.remaining()
        time.sleep(0.02)


def digest(tmp_path: Path) -> str:
    return sha256((tmp_path / "tree" / "big").read_bytes()).hexdigest()


def test_stop_and_cont_with_a_read_that_misses(
    machine: Machine, daemon: NydusDaemon, registry: GatedRegistry, tmp_path: Path
) -> None:
    registry.gate.clear()
    job = machine.guest.start(["/bin/sha256sum", "/big"])
    await_stuck_read(daemon)
    before = time.monotonic()
    machine.pause()
    assert time.monotonic() - before < DRAIN_LIMIT_S
    registry.gate.set()  # the bytes come while the guest stands still
    deadline = Deadline(BOOT_SECONDS, "the fetch")
    while daemon.stats()["engine"]["fetched_chunks"] < 2:
        deadline.remaining()
        time.sleep(0.02)
    machine.resume()
    done = machine.guest.wait(job, Deadline(BOOT_SECONDS, "the checksum"))
    assert (done.status, done.text.split()[0]) == (0, digest(tmp_path))
    assert daemon.stats()["engine"]["ring_errors"] == 0


def test_reset_with_a_read_that_misses(
    machine: Machine, daemon: NydusDaemon, registry: GatedRegistry, tmp_path: Path
) -> None:
    registry.gate.clear()
    machine.guest.start(["/bin/sha256sum", "/big"])
    await_stuck_read(daemon)
    machine.reset()
    deadline = Deadline(BOOT_SECONDS, "the second boot")
    machine.guest.wait_hello(deadline)
    registry.gate.set()
    machine.guest.mount("vfs", deadline)
    done = machine.guest.run(["/bin/sha256sum", "/big"], deadline)
    assert (done.status, done.text.split()[0]) == (0, digest(tmp_path))
    assert daemon.stats()["engine"]["ring_errors"] == 0
    assert daemon.log_text().count("front-end connected") == 1
