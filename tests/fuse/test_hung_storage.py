"""A host directory whose file system does not answer: the daemon that shares it goes on, and ends when told to.

The file system is a mount of our own whose daemon is stopped: requests to it wait in the kernel, as they do on a
network file system whose server is away.
"""

import contextlib
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
def hanging_read(daemon: NydusDaemon, storage: "subprocess.Popen[bytes]") -> Iterator[FakeGuest]:
    """A guest of the share whose read waits for the storage."""
    with FakeGuest(daemon.socket_path) as guest:
        guest.fuse.init()
        node = guest.fuse.walk("data")
        handle = guest.fuse.open(node.nodeid)
        storage.send_signal(signal.SIGSTOP)
        body = fc.READ_IN.pack(handle, 0, 4096, 0, 0, 0, 0)
        guest.queues[1].submit(fc.pack_request(fc.READ, 1000, node.nodeid, body), 0, 4096)
        wait_until(lambda: waits_in_kernel(daemon.process.pid), "the read in the kernel")
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
        wait_until(lambda: "stopped without waiting for front-ends" in daemon.log_text(), "the end")
        assert not daemon.api_path.exists()
        storage.send_signal(signal.SIGCONT)  # the kernel closes the share's files, which asks their server
        assert daemon.process.wait(30) == 0
