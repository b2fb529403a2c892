"""Every hostile test runs beside a second guest that reads on undisturbed."""

import os
from collections.abc import Iterator

import pytest

from tests.fakeguest.support import open_fds, undisturbed, wait_until
from tests.vhost.hostile.messages import MEMORY, Front
from tests.vhost.hostile.tools import Bench
from virtiofsd_nydus.fakeguest.fakeguest import FakeGuest
from virtiofsd_nydus.fakeguest.frontend import U64, Request
from virtiofsd_nydus.vmm.servers import NydusDaemon


@pytest.fixture
def bystander(daemon: NydusDaemon) -> Iterator[FakeGuest]:
    """A second guest on the same daemon; the test fails where it was disturbed or the daemon died."""
    with undisturbed(daemon) as other:
        yield other


@pytest.fixture
def bench(bystander: FakeGuest, daemon: NydusDaemon) -> Iterator[Bench]:
    """A guest about to misbehave."""
    guest = FakeGuest(daemon.socket_path, queue_size=16, slot_count=1, slot_data_bytes=16384)
    try:
        guest.connect()
        guest.start()
        guest.fuse.init()
        yield Bench(guest)
        guest.memory.check_gaps()
    finally:
        guest.close()


@pytest.fixture
def front(bystander: FakeGuest, daemon: NydusDaemon) -> Iterator[Front]:
    """A connection past feature negotiation; the test fails where the daemon keeps a descriptor of it."""
    before = open_fds(daemon)
    guest = FakeGuest(daemon.socket_path)
    guest.connect()
    guest.front.send(Request.SET_FEATURES, U64.pack(guest.features))
    fd = os.memfd_create("hostile", os.MFD_CLOEXEC)
    os.ftruncate(fd, MEMORY)
    try:
        yield Front(guest.front, fd)
    finally:
        os.close(fd)
        guest.close()
        wait_until(lambda: open_fds(daemon) <= before, "the daemon closes every descriptor it was given")
