"""Every hostile test runs beside a second guest that reads on undisturbed."""

from collections.abc import Iterator

import pytest

from tests.fakeguest.support import undisturbed
from tests.vhost.hostile.tools import Bench
from virtiofsd_nydus.fakeguest.fakeguest import FakeGuest
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
