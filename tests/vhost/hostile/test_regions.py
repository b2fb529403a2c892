"""Guest memory as a hostile front-end describes it: refused or the connection's end; the other guest goes on."""

import contextlib
import os
import struct

import pytest

from tests.fakeguest.support import BackgroundLoad, Load
from tests.vhost.hostile.messages import MEMORY, PAGE, USER, Front, add_region, harmless, odd_fd, refused
from virtiofsd_nydus.fakeguest import frontend as vhost
from virtiofsd_nydus.fakeguest.fakeguest import FakeGuest
from virtiofsd_nydus.fakeguest.frontend import HungUp, Refused, Request
from virtiofsd_nydus.vmm.servers import NydusDaemon

BAD_REGIONS = {
    "no bytes": (0, 0, USER, 0),
    "guest address wraps": ((1 << 64) - PAGE, 2 * PAGE, USER, 0),
    "user address wraps": (0, 2 * PAGE, (1 << 64) - PAGE, 0),
    "offset wraps": (0, 2 * PAGE, USER, (1 << 64) - PAGE),
    "larger than the file": (0, MEMORY + PAGE, USER, 0),
    "offset past the file": (0, PAGE, USER, MEMORY),
    "offset and size past the file": (0, MEMORY, USER, PAGE),
    "as large as the address space": (0, (1 << 64) - PAGE, USER, 0),
    "2^62 bytes": (0, 1 << 62, USER, 0),
}


@pytest.mark.parametrize("name", BAD_REGIONS)
def test_bad_region(front: Front, name: str) -> None:
    with pytest.raises((Refused, HungUp)):
        add_region(front, *BAD_REGIONS[name])


@pytest.mark.parametrize("name", BAD_REGIONS)
def test_bad_region_in_a_table(front: Front, name: str) -> None:
    good = (1 << 32, PAGE, USER + (1 << 32), 0)
    refused(front.front, Request.SET_MEM_TABLE, vhost.pack_regions([good, BAD_REGIONS[name]]), (front.fd, front.fd))


@pytest.mark.parametrize(
    "second",
    [
        (0, 16 * PAGE, USER, 0),
        (PAGE, PAGE, USER + (1 << 32), 0),
        (15 * PAGE, 2 * PAGE, USER + (1 << 32), 0),
        (1 << 32, PAGE, USER + PAGE, 0),
    ],
    ids=["the same", "inside", "over its end", "user addresses overlap"],
)
def test_overlapping_regions(front: Front, second: tuple[int, int, int, int]) -> None:
    add_region(front, 0, 16 * PAGE, USER, 0)
    with pytest.raises((Refused, HungUp)):
        add_region(front, *second)


def test_overlapping_regions_in_a_table(front: Front) -> None:
    table = vhost.pack_regions([(0, 2 * PAGE, USER, 0), (PAGE, 2 * PAGE, USER + (1 << 32), 0)])
    refused(front.front, Request.SET_MEM_TABLE, table, (front.fd, front.fd))


def test_too_many_regions_one_by_one(front: Front) -> None:
    slots = front.front.get_u64(Request.GET_MAX_MEM_SLOTS)
    with pytest.raises((Refused, HungUp)):
        for i in range(slots + 1):
            add_region(front, i * PAGE, PAGE, USER + i * PAGE, 0)
    assert i == slots


@pytest.mark.parametrize("count", [127, 1 << 16, 1 << 31, 0xFFFF_FFFF])
def test_table_claims_more_regions_than_it_has(front: Front, count: int) -> None:
    payload = struct.pack("=II", count, 0) + vhost.REGION.pack(0, PAGE, USER, 0)
    refused(front.front, Request.SET_MEM_TABLE, payload, (front.fd,))


@pytest.mark.parametrize("fd_count", [0, 1, 3, 8])
def test_table_with_other_than_its_descriptors(front: Front, fd_count: int) -> None:
    table = vhost.pack_regions([(0, PAGE, USER, 0), (PAGE, PAGE, USER + PAGE, 0)])
    refused(front.front, Request.SET_MEM_TABLE, table, (front.fd,) * fd_count)


@pytest.mark.parametrize("fd_count", [0, 2, 8])
def test_region_with_other_than_one_descriptor(front: Front, fd_count: int) -> None:
    with pytest.raises((Refused, HungUp)):
        add_region(front, 0, PAGE, USER, 0, (front.fd,) * fd_count)


@pytest.mark.parametrize("kind", ["directory", "null", "closed pipe", "socket", "full eventfd"])
def test_memory_that_is_no_memory(front: Front, kind: str) -> None:
    with odd_fd(kind) as fd, pytest.raises((Refused, HungUp)):
        add_region(front, 0, PAGE, USER, 0, (fd,))


def test_memory_that_cannot_be_written(front: Front) -> None:
    fd = os.open(f"/proc/self/fd/{front.fd}", os.O_RDONLY)
    try:
        with pytest.raises((Refused, HungUp)):
            add_region(front, 0, PAGE, USER, 0, (fd,))
    finally:
        os.close(fd)


def test_removal_of_a_region_that_is_none(front: Front) -> None:
    add_region(front, 0, 4 * PAGE, USER, 0)
    for region in ((PAGE, PAGE, USER + PAGE, 0), (0, 8 * PAGE, USER, 0), (0, 4 * PAGE, USER + PAGE, 0)):
        refused(front.front, Request.REM_MEM_REG, vhost.pack_single_region(region))
        break


def test_region_of_running_rings_removed(bystander: FakeGuest, daemon: NydusDaemon) -> None:
    """Memory goes while its rings run under load: the rings stop or the connection ends."""
    with FakeGuest(daemon.socket_path) as guest:
        guest.fuse.init()
        with BackgroundLoad(guest.queues[1], Load(guest, depth=4, timeout_ms=200), may_fail=True) as load:
            load.wait_progress(5)
            with contextlib.suppress(Refused, HungUp):
                for region in guest.memory.wire_regions():
                    guest.front.command(Request.REM_MEM_REG, vhost.pack_single_region(region), (), True)


def test_empty_table_under_load(bystander: FakeGuest, daemon: NydusDaemon) -> None:
    with FakeGuest(daemon.socket_path) as guest:
        guest.fuse.init()
        with BackgroundLoad(guest.queues[1], Load(guest, depth=4, timeout_ms=200), may_fail=True) as load:
            load.wait_progress(5)
            harmless(guest.front, Request.SET_MEM_TABLE, vhost.pack_regions([]))


@pytest.mark.parametrize("keep", [0, 0xC0000, 0x200000], ids=["all", "all but low memory", "the end"])
def test_memory_truncated_under_the_daemon(bystander: FakeGuest, daemon: NydusDaemon, keep: int) -> None:
    """Pages vanish (SIGBUS): that device is lost or its request fails."""
    guest = FakeGuest(daemon.socket_path, seal=False, slot_count=2)
    try:
        guest.connect()
        guest.start()
        guest.fuse.init()
        queue = guest.queues[1]
        end = max(r.gpa + r.size_bytes for r in guest.memory.regions)
        guest.memory.write(guest.scratch_gpa, vhost.HEADER.pack(56, 3, 2) + bytes(44))
        queue.add([(guest.scratch_gpa, 56, False), (end - PAGE, PAGE, True)])
        kick = os.dup(queue.kick_fd)
        os.ftruncate(guest.memory.fd, keep)
        os.eventfd_write(kick, 1)
        os.close(kick)
        with contextlib.suppress(Refused, HungUp):
            guest.front.get_u64(Request.GET_FEATURES)
            for each in guest.queues:
                guest.enable(each, False)
            for each in guest.queues:
                guest.get_base(each)
    finally:
        guest.close()
