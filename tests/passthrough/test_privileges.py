"""Care 8: what the daemon may do is what serving needs, in each of its threads, and its children get no more."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tests.passthrough.conftest import ShareDaemon
from tests.passthrough.host import PassthroughMount
from tests.passthrough.privileges import KEPT, check_reduced, held, thread_status
from virtiofsd_nydus.fakeguest.fakeguest import FakeGuest
from virtiofsd_nydus.fakeguest.fuse_client import ROOT, Change, FuseClient

PROJECT = Path(__file__).resolve().parents[2]


class WrappedDaemon(ShareDaemon):
    """Started by setpriv with these words."""

    def __init__(self, source: Path, *words: str) -> None:
        super().__init__(source)
        self.words = words

    def command(self, listener: int) -> list[str]:
        return ["setpriv", *self.words, *super().command(listener)]


def use(fuse: FuseClient) -> None:
    """Requests on the queue's thread and on others, of users, and what each kept capability is for."""
    fuse.init()
    fuse.uid, fuse.gid = 1000, 1001
    entry, handle = fuse.create(ROOT, b"f")
    fuse.write(entry.nodeid, handle, 0, b"bytes")
    fuse.fsync(entry.nodeid, handle)
    fuse.uid = fuse.gid = 0
    fuse.setattr(entry.nodeid, Change(valid=1 | 2, mode=0o4755, uid=1002))
    fuse.setxattr(entry.nodeid, b"trusted.overlay.opaque", b"y")
    fuse.setxattr(entry.nodeid, b"security.capability", bytes.fromhex("0100000200040000000000000000000000000000"))
    fuse.mknod(ROOT, b"whiteout", stat.S_IFCHR, 0)


def test_every_thread(source: Path) -> None:
    with ShareDaemon(source) as daemon, FakeGuest(daemon.socket_path, queue_size=64) as guest:
        use(guest.fuse)
        names = [name for pid in daemon.family for name in check_reduced(pid)]
        assert len(names) > 5, names
        assert any(name.startswith("vnd-host-fs") for name in names), names
        assert daemon.stats()["shares"]["/"]["inodes"] == 3


def test_fuse_daemon(source: Path, tmp_path: Path) -> None:
    with PassthroughMount(source, tmp_path) as mount:
        (mount.mountpoint / "f").write_text("bytes")
        assert len(check_reduced(mount.process.pid)) > 3


def test_what_cannot_be_reduced_is_passed_over(source: Path) -> None:
    """Without CAP_SETPCAP the bounding set stays; no_new_privs makes it mean nothing."""
    with (
        WrappedDaemon(source, "--bounding-set", "-setpcap") as daemon,
        FakeGuest(daemon.socket_path, queue_size=64) as guest,
    ):
        use(guest.fuse)
        for pid in daemon.family:
            check_reduced(pid, bounding=False)
        assert held(thread_status(daemon.serving_pid)[0], "CapBnd") & ~KEPT


def test_groups_of_the_daemon_do_not_count(source: Path) -> None:
    """Care 6: a file's set-group-id bit is kept for the caller's group alone."""
    os.chown(source, 0, 2000)
    source.chmod(0o2777)
    with WrappedDaemon(source, "--groups", "2000") as daemon, FakeGuest(daemon.socket_path, queue_size=64) as guest:
        use(guest.fuse)
        guest.fuse.uid, guest.fuse.gid = 1000, 1001
        guest.fuse.create(ROOT, b"not-a-member", 0o2775)
        guest.fuse.gid = 2000
        guest.fuse.create(ROOT, b"member", 0o2775)
        assert not (source / "not-a-member").stat().st_mode & stat.S_ISGID
        assert (source / "member").stat().st_mode & stat.S_ISGID
        for pid in daemon.family:
            check_reduced(pid)


def test_a_plain_user_is_left_alone() -> None:
    """fusermount3 is set-user-id: no_new_privs would end it."""
    if os.geteuid() != 0:
        pytest.skip("to be another user needs root")
    program = (
        "import os\n"
        "from virtiofsd_nydus.engine import reduce_privileges\n"
        "os.setresuid(65534, 65534, 65534)\n"
        "assert reduce_privileges() == ''\n"
        "print(open('/proc/self/status').read())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=PROJECT)
    assert "NoNewPrivs:\t0" in done.stdout
