"""The normal life of a device, as VMMs drive it: start, stop, swaps under load, reboot, resume."""

import os

import pytest
from virtiofsd_nydus._fakeguest import lib

from tests.fakeguest.support import FILES, BackgroundLoad, Load, pattern
from virtiofsd_nydus.fakeguest import frontend as vhost
from virtiofsd_nydus.fakeguest.fakeguest import FakeGuest, NoAnswer, Region
from virtiofsd_nydus.fakeguest.frontend import Request
from virtiofsd_nydus.fakeguest.fuse_client import GETATTR, pack_request
from virtiofsd_nydus.vmm.servers import NydusDaemon

GETATTR_ROOT = pack_request(GETATTR, 2, 1, bytes(16))


def read_odd(guest: FakeGuest) -> None:
    assert guest.fuse.read_file("odd") == pattern(FILES["odd"][1], FILES["odd"][0])


def test_kick_before_enable_is_served_on_enable(daemon: NydusDaemon) -> None:
    with FakeGuest(daemon.socket_path) as guest:
        guest.fuse.init()
        queue = guest.queues[1]
        for each in guest.queues:
            guest.enable(each, False)
        queue.submit(GETATTR_ROOT, 104, 0)
        queue.kick()
        with pytest.raises(NoAnswer):
            queue.reap(150)
        guest.enable(queue)  # no kick after it
        assert len(queue.reap()[1]) == 120


def test_request_before_first_enable(daemon: NydusDaemon) -> None:
    guest = FakeGuest(daemon.socket_path)
    try:
        enable, guest.enable = guest.enable, lambda queue, on=True: None  # type: ignore[method-assign,misc]
        guest.connect()
        guest.start()
        guest.queues[1].submit(GETATTR_ROOT, 104, 0)
        with pytest.raises(NoAnswer):
            guest.queues[1].reap(150)
        for queue in guest.queues:
            enable(queue)
        assert guest.queues[1].reap()[1]
    finally:
        guest.close()


@pytest.mark.parametrize("event_idx", [True, False])
def test_call_fd_swapped_under_load(daemon: NydusDaemon, event_idx: bool) -> None:
    with FakeGuest(daemon.socket_path, event_idx=event_idx) as guest:
        guest.fuse.init()
        with BackgroundLoad(guest.queues[1], Load(guest, depth=4)) as load:
            for _ in range(40):
                guest.swap_call(guest.queues[1])
                load.wait_progress(5)


def test_memory_table_swapped_under_load(daemon: NydusDaemon) -> None:
    with FakeGuest(daemon.socket_path) as guest:
        guest.fuse.init()
        whole = guest.memory.wire_regions()
        gpa, size, address, offset = whole[1]
        half = size // 2 // 4096 * 4096
        cut = [whole[0], (gpa, half, address, offset), (gpa + half, size - half, address + half, offset + half)]
        with BackgroundLoad(guest.queues[1], Load(guest, depth=4, block_bytes=16384)) as load:
            for number in range(20):
                guest.send_memory_table(whole if number % 2 else cut)
                load.wait_progress(5)
        read_odd(guest)


def test_memory_plugged_and_unplugged_under_load(guest: FakeGuest) -> None:
    payload = vhost.pack_single_region((1 << 40, 2 << 20, 1 << 45, 0))
    with open(os.memfd_create("dimm", os.MFD_CLOEXEC), "wb") as dimm:
        dimm.truncate(2 << 20)
        with BackgroundLoad(guest.queues[1], Load(guest, depth=4)) as load:
            for _ in range(20):
                guest.front.command(Request.ADD_MEM_REG, payload, [dimm.fileno()], True)
                load.wait_progress(3)
                guest.front.command(Request.REM_MEM_REG, payload, [], True)


def test_reply_lands_in_plugged_memory_only_while_plugged(daemon: NydusDaemon) -> None:
    """An out buffer in a region that comes late works, and after the region went the request fails alone."""
    regions = [Region(0, 0xA0000, 0), Region(0xC0000, 8 << 20, 0xC0000), Region(1 << 32, 1 << 20, 16 << 20)]
    with FakeGuest(daemon.socket_path, regions=regions, slot_count=2) as guest:
        guest.fuse.init()
        queue, late = guest.queues[1], guest.memory.wire_regions()[2]
        guest.memory.write(guest.scratch_gpa, GETATTR_ROOT)
        segments = [(guest.scratch_gpa, len(GETATTR_ROOT), False), (1 << 32, 120, True)]
        queue.add(segments)
        queue.publish()
        assert queue.pop() == 120
        before = guest.memory.read(1 << 32, 120)
        guest.front.command(Request.REM_MEM_REG, vhost.pack_single_region(late), [], True)
        queue.add(segments)
        queue.publish()
        assert queue.pop() == 0
        guest.front.command(Request.ADD_MEM_REG, vhost.pack_single_region(late), [guest.memory.fd], True)
        assert guest.memory.read(1 << 32, 120) == before
        queue.add(segments)
        queue.publish()
        assert queue.pop() == 120
        read_odd(guest)


def test_disable_quiesces(guest: FakeGuest) -> None:
    """ENABLE 0 is what a pause is: once it is acknowledged nothing moves; ENABLE 1 goes on."""
    queue = guest.queues[1]
    for number in range(10):
        guest.enable(queue, False)
        for slot in range(4):
            queue.submit(GETATTR_ROOT, 104, 0, slot)
        at = queue.used_index()
        with pytest.raises(NoAnswer):
            queue.reap(20)
        assert queue.used_index() == at, number
        guest.enable(queue)
        assert sorted(queue.reap()[0] for _ in range(4)) == [0, 1, 2, 3]


def test_stop_and_resume_with_the_same_rings(guest: FakeGuest) -> None:
    """QEMU's stop and cont: GET_VRING_BASE, then the same rings again from that base."""
    queue = guest.queues[1]
    read_odd(guest)
    for _ in range(5):
        at = queue.avail_index()
        guest.enable(queue, False)
        assert guest.get_base(queue) == at
        queue.submit(GETATTR_ROOT, 104, 0)  # the guest may still queue
        with pytest.raises(NoAnswer):
            queue.reap(20)
        guest.send_ring(queue, at)
        guest.enable(queue)
        assert len(queue.reap()[1]) == 120
        read_odd(guest)


def test_base_skips_requests(guest: FakeGuest) -> None:
    """SET_VRING_BASE is obeyed: what lies before it is not served."""
    queue = guest.queues[1]
    guest.enable(queue, False)
    base = guest.get_base(queue)
    queue.submit(GETATTR_ROOT, 104, 0, 0)
    queue.submit(GETATTR_ROOT, 104, 0, 1)
    guest.send_ring(queue, base + 1)
    guest.enable(queue)
    assert queue.reap()[0] == 1
    with pytest.raises(NoAnswer):
        queue.reap(20)


def test_guest_reboot_on_the_same_socket(guest: FakeGuest) -> None:
    for _ in range(5):
        node = guest.fuse.walk("sub/deep").nodeid
        guest.reboot()
        assert guest.queues[1].used_index() == 0
        guest.fuse.init()
        read_odd(guest)
        assert guest.fuse.lookup(node, b"file").attr.size == FILES["sub/deep/file"][1]


def test_reboot_under_load(guest: FakeGuest) -> None:
    """The rings stop while requests are in flight; what was fetched was answered, the rest is dropped for good."""
    queue = guest.queues[1]
    for _ in range(5):
        with BackgroundLoad(queue, Load(guest, depth=8, block_bytes=65536, timeout_ms=100), may_fail=True) as load:
            load.wait_progress(1)
            for each in guest.queues:
                guest.enable(each, False)
            base = [guest.get_base(each) for each in guest.queues][1]
            stood = queue.used_index()
        assert queue.used_index() == stood == base
        guest.start()
        guest.fuse.init()
        read_odd(guest)


def test_connection_comes_again(daemon: NydusDaemon) -> None:
    for _ in range(5):
        with FakeGuest(daemon.socket_path) as guest:
            guest.fuse.init()
            read_odd(guest)


def test_index_wrap(daemon: NydusDaemon) -> None:
    with FakeGuest(daemon.socket_path, queue_size=64) as guest:
        guest.fuse.init()
        load = Load(guest, kind=lib.FG_LOAD_LOOKUP, depth=8, max_ops=140_000)
        assert load.run(guest.queues[1]).ops == 140_000
        read_odd(guest)


def test_rings_start_near_the_wrap(daemon: NydusDaemon) -> None:
    guest = FakeGuest(daemon.socket_path)
    try:
        guest.connect()
        guest.start(first=65530)
        guest.fuse.init()
        for _ in range(5):
            read_odd(guest)
        assert guest.queues[1].used_index() < 100
    finally:
        guest.close()


@pytest.mark.parametrize(
    ("indirect", "event_idx", "poll", "size"),
    [
        (False, True, False, 64),
        (True, False, False, 64),
        (False, False, False, 64),
        (True, True, True, 64),
        (True, False, True, 64),
        (True, True, False, 2),
        (True, True, False, 1024),
        (False, False, False, 1024),
    ],
)
def test_ring_variants(daemon: NydusDaemon, indirect: bool, event_idx: bool, poll: bool, size: int) -> None:
    with FakeGuest(
        daemon.socket_path, indirect=indirect, event_idx=event_idx, poll=poll, queue_size=size, scatter=True
    ) as guest:
        guest.fuse.init()
        read_odd(guest)
        depth = 1 if size == 2 else 4
        load = Load(guest, depth=depth, block_bytes=16384, max_ops=500)
        assert load.run(guest.queues[1]).ops == 500


def test_two_request_queues_at_once(daemon: NydusDaemon) -> None:
    with FakeGuest(daemon.socket_path, request_queues=2) as guest:
        guest.fuse.init()
        loads = [Load(guest, depth=4, random_seed=seed) for seed in (1, 2)]
        first, second = (BackgroundLoad(queue, load) for queue, load in zip(guest.queues[1:], loads, strict=True))
        with first, second:
            first.wait_progress(500)
            second.wait_progress(500)


def test_interrupts_are_batched(daemon: NydusDaemon) -> None:
    """16 requests in flight: far fewer interrupts than requests, and none lost."""
    with FakeGuest(daemon.socket_path, slot_count=16) as guest:
        guest.fuse.init()
        load = Load(guest, depth=16, max_ops=8000)
        result = load.run(guest.queues[1])
        assert result.ops == 8000
        assert result.calls < 8000


def test_no_call_fd_at_all(daemon: NydusDaemon) -> None:
    """Bit 8: the front-end polls."""
    with FakeGuest(daemon.socket_path, poll=True) as guest:
        guest.fuse.init()
        guest.front.send(Request.SET_VRING_CALL, vhost.U64.pack(1 | vhost.NO_FD))
        read_odd(guest)


def test_queue_count_and_slots(daemon: NydusDaemon) -> None:
    guest = FakeGuest(daemon.socket_path)
    try:
        guest.connect()
        assert guest.front.get_u64(Request.GET_QUEUE_NUM) >= 2
        assert guest.front.get_u64(Request.GET_MAX_MEM_SLOTS) == 509
    finally:
        guest.close()


def test_reset_device_forgets_the_session(daemon: NydusDaemon) -> None:
    with FakeGuest(daemon.socket_path) as guest:
        guest.fuse.init()
        if not guest.front.get_u64(Request.GET_PROTOCOL_FEATURES) & vhost.Protocol.RESET_DEVICE:
            pytest.fail("RESET_DEVICE is not offered")
        guest.front.command(Request.RESET_DEVICE, b"", (), True)
        guest.start()
        with pytest.raises(OSError):
            guest.fuse.getattr(1)
        guest.fuse.init()
        read_odd(guest)
