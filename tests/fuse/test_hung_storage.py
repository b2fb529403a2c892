"""A host directory whose file system does not answer: the daemon that shares it goes on, and ends when told to.

The file system is a mount of our own whose daemon is stopped: requests to it wait in the kernel, as they do on a
network file system whose server is away.
"""

import contextlib
import json
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakeguest.support import build_image, make_tree
from tests.fuse.host import VERB, has_fuse, umount_below
from tests.system.daemon import wait_until
from virtiofsd_nydus.fakeguest import fuse_client as fc
from virtiofsd_nydus.fakeguest.fakeguest import FakeGuest
from virtiofsd_nydus.fuse.mounts import find_mount
from virtiofsd_nydus.vmm.servers import NydusDaemon, call_api

pytestmark = pytest.mark.skipif(bool(has_fuse()), reason=has_fuse())


@pytest.fixture
def storage(tmp_path: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """The daemon of a mount at tmp_path/share."""
    (tmp_path / "tree").mkdir()
    (tmp_path / "share").mkdir()
    make_tree(tmp_path / "tree")
    image = build_image(tmp_path / "tree", tmp_path / "image")
    words = [
        *VERB, "fuse", "--mountpoint", str(tmp_path / "share"), "--bootstrap", str(image.bootstrap),
        "--localfs-dir", str(image.blob_dir), "--fuse-passthrough", "off",
    ]  # fmt: skip
    with subprocess.Popen(words, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            wait_until(lambda: find_mount(str(tmp_path / "share")) is not None, "the mount")
            yield process
        finally:
            process.kill()
            umount_below(tmp_path)


@contextlib.contextmanager
def hanging_read(daemon: NydusDaemon, storage: "subprocess.Popen[bytes]", path: str = "data") -> Iterator[FakeGuest]:
    """A guest of the share whose read waits for the storage."""
    with FakeGuest(daemon.socket_path) as guest:
        guest.fuse.init()
        node = guest.fuse.walk(path)
        handle = guest.fuse.open(node.nodeid)
        storage.send_signal(signal.SIGSTOP)
        body = fc.READ_IN.pack(handle, 0, 4096, 0, 0, 0, 0)
        guest.queues[1].submit(fc.pack_request(fc.READ, 1000, node.nodeid, body), 0, 4096)
        wait_until(lambda: waits_in_kernel(daemon.serving_pid), "the read in the kernel")
        yield guest


def waits_in_kernel(pid: int) -> bool:
    """A thread of the process waits for an answer of a FUSE server."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):
            stack = (task / "stack").read_text()
            if "request_wait_answer" in stack or "folio_wait_bit" in stack:
                return True
    return False


def test_the_api_answers(storage: "subprocess.Popen[bytes]", tmp_path: Path) -> None:
    with NydusDaemon(["--shared-dir", str(tmp_path / "share")]) as daemon, hanging_read(daemon, storage):
        for route in ("/api/v1/daemon", "/api/ext/v1/stats", "/api/v1/daemon/events"):
            assert daemon.get(route, seconds=10) is not None
        storage.send_signal(signal.SIGCONT)


@pytest.mark.parametrize("how", ["SIGTERM", "exit"])
def test_the_daemon_ends(storage: "subprocess.Popen[bytes]", tmp_path: Path, how: str) -> None:
    with NydusDaemon(["--shared-dir", str(tmp_path / "share")]) as daemon, hanging_read(daemon, storage):
        if how == "exit":
            assert call_api(daemon.api_path, "PUT", "/api/v1/daemon/exit")[0] == 204
        else:
            daemon.process.terminate()
        wait_until(lambda: "stopped without waiting for" in daemon.log_text(), "the end")
        assert not daemon.api_path.exists()
        storage.send_signal(signal.SIGCONT)  # the kernel closes the share's files, which asks their server
        assert daemon.process.wait(30) == 0


def mount_api(daemon: NydusDaemon, path: str, source: Path, fs_type: str, config: str) -> None:
    body = {"source": str(source), "fs_type": fs_type, "config": config}
    status, answer = call_api(daemon.api_path, "POST", f"/api/v1/mount?mountpoint={path}", body, seconds=10)
    assert status == 204, answer


def test_mounts_and_guests_come_and_go(storage: "subprocess.Popen[bytes]", tmp_path: Path) -> None:
    """Only the mount that hangs waits: others are mounted and unmounted, and new guests are served."""
    image = tmp_path / "image"
    backend = {"type": "localfs", "config": {"dir": str(image)}}
    cache = {"type": "blobcache", "config": {"work_dir": str(tmp_path / "cache")}}
    config = json.dumps({"device": {"backend": backend, "cache": cache}, "mode": "direct"})
    (tmp_path / "cache").mkdir()
    [bootstrap] = image.glob("*.boot*")
    with NydusDaemon([]) as daemon:
        wait_until(daemon.api_path.exists, "the API")
        mount_api(daemon, "/share", tmp_path / "share", "passthrough_fs", "")
        with hanging_read(daemon, storage, "share/data"):
            for path in ("/one", "/two"):
                mount_api(daemon, path, bootstrap, "rafs", config)
            assert call_api(daemon.api_path, "DELETE", "/api/v1/mount?mountpoint=/one", seconds=10)[0] == 204
            with FakeGuest(daemon.socket_path) as other:
                other.fuse.init()
                assert other.fuse.read(other.fuse.walk("two/data").nodeid, 0, 4096)
            storage.send_signal(signal.SIGCONT)
