"""A host directory, our daemon on it, and a guest without a VM that has mounted."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakeguest.support import assert_alive
from virtiofsd_nydus.vmm.fakeguest import FakeGuest
from virtiofsd_nydus.vmm.fuse_client import FuseClient
from virtiofsd_nydus.vmm.servers import NydusDaemon


@pytest.fixture
def source(tmp_path: Path) -> Path:
    if os.geteuid() != 0:
        pytest.skip("a shared directory with the guest's owners needs root")
    place = tmp_path / "source"
    place.mkdir()
    (tmp_path / "outside").write_text("not for guests\n")
    return place


@pytest.fixture
def daemon(source: Path) -> Iterator[NydusDaemon]:
    with NydusDaemon(["--shared-dir", str(source)], die_with_parent=True) as running:
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
