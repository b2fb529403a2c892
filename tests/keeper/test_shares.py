"""Shared directories of the host over a worker's death: nodes, open files and what each guest holds of them."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.keeper.conftest import KeptDaemon, wait_until
from virtiofsd_nydus.fakeguest.fakeguest import FakeGuest
from virtiofsd_nydus.fakeguest.fuse_client import ROOT

RW = os.O_RDWR


@pytest.fixture
def source(tmp_path: Path) -> Path:
    if os.geteuid() != 0:
        pytest.skip("a shared directory with the guest's owners needs root")
    place = tmp_path / "source"
    place.mkdir()
    return place


@pytest.fixture
def daemon(source: Path) -> Iterator[KeptDaemon]:
    with KeptDaemon(["--shared-dir", str(source)]) as running:
        yield running
        running.check_alive()


@pytest.fixture
def guest(daemon: KeptDaemon) -> Iterator[FakeGuest]:
    with FakeGuest(daemon.socket_path) as started:
        started.fuse.init()
        yield started


def test_nodes_and_open_files_go_on(daemon: KeptDaemon, guest: FakeGuest, source: Path) -> None:
    """By the numbers the guest knows, with what was open, and with the counts that it will give back."""
    fuse = guest.fuse
    directory = fuse.mkdir(ROOT, b"directory").nodeid
    entry, handle = fuse.create(directory, b"file")
    fuse.write(entry.nodeid, handle, 0, b"before")
    listing = fuse.open(directory, directory=True)
    for round_ in range(2):
        os.kill(daemon.worker, signal.SIGKILL)
        assert fuse.write(entry.nodeid, handle, 6, b" after%d" % round_) == 7
        assert fuse.getattr(entry.nodeid).size == 13
        assert fuse.lookup(directory, b"file").nodeid == entry.nodeid
        assert [one.name for one in fuse.readdir(directory)] != []
    assert (source / "directory" / "file").read_bytes() == b"before after1"
    fuse.release(entry.nodeid, handle)
    fuse.release(directory, listing, directory=True)
    with pytest.raises(OSError, match=r"Errno 9\b"):
        fuse.write(entry.nodeid, handle, 0, b"x")
    fuse.forget(entry.nodeid, 3)
    fuse.forget(directory, 1)
    assert daemon.stats()["shares"]["/"]["files"] == 0


def test_numbers_are_not_given_twice(daemon: KeptDaemon, guest: FakeGuest) -> None:
    """An fh of the last worker's does not name a file that was opened after it."""
    fuse = guest.fuse
    entry, first = fuse.create(ROOT, b"one")
    fuse.release(entry.nodeid, first)
    os.kill(daemon.worker, signal.SIGKILL)
    second = fuse.open_flags(entry.nodeid, RW)
    assert second != first
    with pytest.raises(OSError, match=r"Errno 9\b"):
        fuse.read(entry.nodeid, 0, 1, first)


def test_a_guest_that_went_with_the_worker_holds_nothing(daemon: KeptDaemon, guest: FakeGuest) -> None:
    """What a front-end held that is gone by the time of the next worker is given back."""
    entry, handle = guest.fuse.create(ROOT, b"kept")
    with FakeGuest(daemon.socket_path) as other:
        other.fuse.init()
        gone, _ = other.fuse.create(ROOT, b"gone")
        os.kill(daemon.worker, signal.SIGSTOP)
        other.front.close()
        dead = daemon.worker
        os.kill(dead, signal.SIGKILL)
    assert guest.fuse.write(entry.nodeid, handle, 0, b"x") == 1
    wait_until(lambda: daemon.stats()["shares"]["/"]["files"] == 1, "the other's file is closed")
    with pytest.raises(OSError, match=r"Errno 116"):
        guest.fuse.getattr(gone.nodeid)


def test_what_the_host_removed_meanwhile(daemon: KeptDaemon, guest: FakeGuest, source: Path) -> None:
    """A file that is gone by the time of the next worker fails, and nothing else does."""
    fuse = guest.fuse
    gone, gone_handle = fuse.create(ROOT, b"gone")
    kept, kept_handle = fuse.create(ROOT, b"kept")
    worker = daemon.worker
    os.kill(worker, signal.SIGSTOP)
    (source / "gone").unlink()
    os.kill(worker, signal.SIGKILL)
    assert fuse.write(kept.nodeid, kept_handle, 0, b"x") == 1
    with pytest.raises(OSError, match=r"Errno (9|116)"):
        fuse.write(gone.nodeid, gone_handle, 0, b"x")
    daemon.await_line("1 open files could not be opened again")
