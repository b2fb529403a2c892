"""A host directory, our daemon on it, and a guest without a VM that has mounted.

Tests run twice: with file handles, and by a daemon that may open none (as on overlayfs, or without
CAP_DAC_READ_SEARCH) and keeps a descriptor for each node instead.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakeguest.support import assert_alive
from virtiofsd_nydus.fakeguest.fakeguest import FakeGuest
from virtiofsd_nydus.fakeguest.fuse_client import FuseClient
from virtiofsd_nydus.vmm.servers import NydusDaemon

HANDLES, DESCRIPTORS = "handles", "descriptors"
DROP_HANDLES = ("setpriv", "--bounding-set", "-dac_read_search")
only_handles = pytest.mark.parametrize("daemon", [HANDLES], indirect=True)


class ShareDaemon(NydusDaemon):
    """Our daemon on a directory; how: HANDLES or DESCRIPTORS. open_files: its RLIMIT_NOFILE, 0 as it comes."""

    def __init__(self, source: Path, how: str = HANDLES, open_files: int = 0) -> None:
        options = ["--shared-dir", str(source)] + (["--rlimit-nofile", "0"] if open_files else [])
        super().__init__(options, die_with_parent=True)
        self.how, self.open_files = how, open_files

    def command(self, listener: int) -> list[str]:
        words = super().command(listener)
        if self.open_files:
            words = ["prlimit", f"--nofile={self.open_files}", *words]
        if self.how == DESCRIPTORS:
            words = [*DROP_HANDLES, *words]
        return words


@pytest.fixture
def source(tmp_path: Path) -> Path:
    if os.geteuid() != 0:
        pytest.skip("a shared directory with the guest's owners needs root")
    place = tmp_path / "source"
    place.mkdir()
    (tmp_path / "outside").write_text("not for guests\n")
    return place


@pytest.fixture(params=[HANDLES, DESCRIPTORS])
def daemon(request: pytest.FixtureRequest, source: Path) -> Iterator[NydusDaemon]:
    with ShareDaemon(source, request.param) as running:
        yield running
        assert_alive(running)


@pytest.fixture
def guest(daemon: NydusDaemon) -> Iterator[FakeGuest]:
    with FakeGuest(daemon.socket_path, queue_size=64, slot_data_bytes=1 << 20) as started:
        started.fuse.init()
        yield started


@pytest.fixture
def fuse(guest: FakeGuest) -> FuseClient:
    return guest.fuse
