"""Malformed vhost-user messages: refused or the connection's end; the daemon and its other guest go on."""

import contextlib
import os
import socket
from collections.abc import Callable

import pytest

from tests.fakeguest.support import FILES, BackgroundLoad, Load, open_fds, pattern, wait_until
from tests.vhost.hostile.messages import MEMORY, USER, Front, add_region, harmless, hung_up, odd_fd, refused
from virtiofsd_nydus.fakeguest import frontend as vhost
from virtiofsd_nydus.fakeguest.fakeguest import FakeGuest
from virtiofsd_nydus.fakeguest.frontend import (
    HEADER,
    U64,
    VRING_ADDR,
    VRING_STATE,
    HungUp,
    Refused,
    Request,
    VhostFrontend,
)
from virtiofsd_nydus.vmm.servers import NydusDaemon


# ---- headers
def test_unknown_request(front: Front) -> None:
    for number in (0, 19, 99, 1 << 31, 0xFFFF_FFFF):
        front.front.send(number, bytes(8), (), vhost.VERSION | vhost.NEED_REPLY)
        body, _ = front.front.receive(number)
        assert U64.unpack(body)[0] != 0
    assert front.front.get_u64(Request.GET_FEATURES)


@pytest.mark.parametrize("flags", [0, 2, 3, vhost.VERSION | vhost.REPLY, 0xFFFF_FFFF])
def test_wrong_flags(front: Front, flags: int) -> None:
    with contextlib.suppress(HungUp, vhost.BadReply):
        front.front.send(Request.GET_FEATURES, b"", (), flags)
        front.front.socket.settimeout(0.3)
        with contextlib.suppress(TimeoutError):
            front.front.receive(Request.GET_FEATURES)


@pytest.mark.parametrize("size", [4097, 65536, 1 << 31, 0xFFFF_FFFF])
def test_oversize_message(front: Front, size: int) -> None:
    with contextlib.suppress(HungUp):
        front.front.send_raw(HEADER.pack(Request.SET_VRING_NUM, vhost.VERSION, size) + bytes(4096))
    hung_up(front.front)


TRUNCATED = [
    Request.SET_FEATURES,
    Request.SET_PROTOCOL_FEATURES,
    Request.SET_MEM_TABLE,
    Request.SET_VRING_NUM,
    Request.SET_VRING_ADDR,
    Request.SET_VRING_BASE,
    Request.SET_VRING_KICK,
    Request.SET_VRING_CALL,
    Request.SET_VRING_ERR,
    Request.SET_VRING_ENABLE,
    Request.ADD_MEM_REG,
    Request.REM_MEM_REG,
    Request.GET_VRING_BASE,
    Request.GET_INFLIGHT_FD,
    Request.SET_INFLIGHT_FD,
    Request.SET_LOG_BASE,
]


@pytest.mark.parametrize("request_id", TRUNCATED, ids=lambda r: r.name)
@pytest.mark.parametrize("size", [0, 3, 7])
def test_truncated_payload(front: Front, request_id: Request, size: int) -> None:
    """The message is whole, its payload shorter than the request's own layout."""
    with pytest.raises((Refused, HungUp, vhost.BadReply)):
        front.front.command(request_id, bytes(size), (), True)


@pytest.mark.parametrize("sent", [1, 4, 11, 12, 13, 19])
def test_hang_up_inside_a_message(front: Front, sent: int) -> None:
    whole = HEADER.pack(Request.SET_VRING_NUM, vhost.VERSION, 8) + VRING_STATE.pack(0, 64)
    front.front.send_raw(whole[:sent])
    front.front.socket.shutdown(socket.SHUT_WR)
    hung_up(front.front)


def test_message_in_single_bytes(front: Front) -> None:
    """A slow front-end is no broken one."""
    whole = HEADER.pack(Request.GET_FEATURES, vhost.VERSION, 0)
    for i in range(len(whole)):
        front.front.send_raw(whole[i : i + 1])
    assert front.front.receive(Request.GET_FEATURES)


def test_many_messages_in_one_write(front: Front) -> None:
    front.front.send_raw(HEADER.pack(Request.GET_FEATURES, vhost.VERSION, 0) * 50)
    for _ in range(50):
        front.front.receive(Request.GET_FEATURES)


def test_replies_never_read(bystander: FakeGuest, daemon: NydusDaemon) -> None:
    """A front-end that asks and does not listen fills its socket: only it waits."""
    front = VhostFrontend(daemon.socket_path)
    front.socket.settimeout(1)
    with contextlib.suppress(TimeoutError, HungUp):
        for _ in range(200):
            front.send_raw(HEADER.pack(Request.GET_FEATURES, vhost.VERSION, 0) * 100)
    with FakeGuest(daemon.socket_path) as guest:
        guest.fuse.init()
        guest.fuse.getattr(1)
    front.close()


def test_idle_connections(bystander: FakeGuest, daemon: NydusDaemon) -> None:
    """Connections that say nothing keep no other front-end out."""
    fronts = [VhostFrontend(daemon.socket_path) for _ in range(20)]
    with FakeGuest(daemon.socket_path) as guest:
        guest.fuse.init()
        guest.fuse.getattr(1)
    for front in fronts:
        front.close()


# ---- features
def test_features_never_offered(front: Front) -> None:
    for bit in (0, 24, 27, 33, 34, 40, 63):
        offered = front.front.get_u64(Request.GET_FEATURES)
        if not offered & 1 << bit:
            refused_or_gone = False
            try:
                front.front.command(Request.SET_FEATURES, U64.pack(offered | 1 << bit), (), True)
            except (Refused, HungUp):
                refused_or_gone = True
            assert refused_or_gone, bit
            break
    else:
        pytest.fail("every bit is offered")


# ---- rings
def ring_message(request: Request, *values: int) -> Callable[[VhostFrontend], None]:
    return lambda front: refused(front, request, VRING_STATE.pack(*values))


BAD_RINGS = {
    "NUM of ring 16": ring_message(Request.SET_VRING_NUM, 16, 64),
    "NUM of ring 2^32-1": ring_message(Request.SET_VRING_NUM, 0xFFFF_FFFF, 64),
    "BASE of ring 16": ring_message(Request.SET_VRING_BASE, 16, 0),
    "BASE 65536": ring_message(Request.SET_VRING_BASE, 0, 65536),
    "ENABLE of ring 16": ring_message(Request.SET_VRING_ENABLE, 16, 1),
    "ENABLE of ring 2^32-1": ring_message(Request.SET_VRING_ENABLE, 0xFFFF_FFFF, 1),
    "ADDR of ring 16": lambda front: refused(front, Request.SET_VRING_ADDR, VRING_ADDR.pack(16, 0, 0, 0, 0, 0)),
}


@pytest.mark.parametrize("name", BAD_RINGS)
def test_bad_ring_message(front: Front, name: str) -> None:
    BAD_RINGS[name](front.front)


def test_base_of_ring_that_is_none(front: Front) -> None:
    with pytest.raises((HungUp, vhost.BadReply)):
        front.front.send(Request.GET_VRING_BASE, VRING_STATE.pack(200, 0))
        front.front.socket.settimeout(2)
        with contextlib.suppress(TimeoutError):
            front.front.receive(Request.GET_VRING_BASE)
            raise vhost.BadReply("answered")
        raise HungUp("silence")


BAD_ADDRESSES = {
    "outside every region": (USER + MEMORY, USER + MEMORY + 0x10000, USER + MEMORY + 0x20000),
    "descriptors at nothing": (0, USER + 0x10000, USER + 0x20000),
    "descriptors run past the region": (USER + MEMORY - 512, USER + 0x10000, USER + 0x20000),
    "used ring runs past the region": (USER, USER + MEMORY - 256, USER + 0x20000),
    "avail ring runs past the region": (USER, USER + 0x10000, USER + MEMORY - 64),
    "descriptors misaligned": (USER + 8, USER + 0x10000, USER + 0x20000),
    "used ring misaligned": (USER, USER + 0x10002, USER + 0x20000),
    "avail ring misaligned": (USER, USER + 0x10000, USER + 0x20001),
    "address wraps": ((1 << 64) - 16, USER + 0x10000, USER + 0x20000),
    "guest addresses instead of user addresses": (0x1000, 0x2000, 0x3000),
}


@pytest.mark.parametrize("name", BAD_ADDRESSES)
def test_ring_addresses(front: Front, name: str) -> None:
    """Refused at ADDR or when the ring is to run; no thread ever touches them."""
    add_region(front, 0, MEMORY, USER, 0)
    with pytest.raises((Refused, HungUp)):
        start_ring(front, 64, *BAD_ADDRESSES[name])


@pytest.mark.parametrize("size", [3, 100, 2048, 65536, 1 << 31, 0xFFFF_FFFF])
def test_ring_sizes(front: Front, size: int) -> None:
    """Not a power of two, or larger than any ring: it does not run."""
    add_region(front, 0, MEMORY, USER, 0)
    with pytest.raises((Refused, HungUp)):
        start_ring(front, size, USER, USER + 0x10000, USER + 0x20000)


def start_ring(front: Front, size: int, desc: int, used: int, avail: int) -> None:
    """All that makes ring 0 run; every message acknowledged."""
    kick = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    try:
        for request, payload, fds in (
            (Request.SET_VRING_NUM, VRING_STATE.pack(0, size), ()),
            (Request.SET_VRING_BASE, VRING_STATE.pack(0, 0), ()),
            (Request.SET_VRING_ADDR, VRING_ADDR.pack(0, 0, desc, used, avail, 0), ()),
            (Request.SET_VRING_KICK, U64.pack(0), (kick,)),
            (Request.SET_VRING_ENABLE, VRING_STATE.pack(0, 1), ()),
        ):
            front.front.command(request, payload, fds, True)
    finally:
        os.close(kick)


def test_ring_without_addresses_or_memory(front: Front) -> None:
    kick = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    harmless(front.front, Request.SET_VRING_KICK, U64.pack(0), (kick,))
    harmless(front.front, Request.SET_VRING_ENABLE, VRING_STATE.pack(0, 1))
    os.eventfd_write(kick, 1)
    os.close(kick)


# ---- descriptors that are no event descriptors
ODD = [
    "regular file",
    "directory",
    "null",
    "closed pipe",
    "write end of a closed pipe",
    "full pipe",
    "full eventfd",
    "semaphore",
    "socket",
]


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize(
    "request_id", [Request.SET_VRING_CALL, Request.SET_VRING_KICK, Request.SET_VRING_ERR], ids=lambda r: r.name
)
def test_odd_event_descriptors(bystander: FakeGuest, daemon: NydusDaemon, request_id: Request, kind: str) -> None:
    """The queue may go deaf or mute; nothing blocks and nothing dies, not even when the queue is to signal an error."""
    before = open_fds(daemon)
    guest = FakeGuest(daemon.socket_path, poll=False, event_idx=False)
    try:
        guest.connect()
        guest.start()
        guest.fuse.init()
        with odd_fd(kind) as fd:
            queue = guest.queues[1]
            with contextlib.suppress(HungUp, Refused):
                guest.front.command(request_id, U64.pack(queue.index), (fd,), True)
                request = bytes(40)
                guest.memory.write(guest.scratch_gpa, request)
                queue.add([(guest.scratch_gpa, 40, False), (guest.scratch_gpa + 4096, 4096, True)])
                queue.publish()
                queue.kick()
                queue.offer([0xFFFF])  # an error to be signalled
                guest.front.get_u64(Request.GET_FEATURES)
                guest.stop()
    finally:
        guest.close()
    wait_until(lambda: open_fds(daemon) <= before, "the daemon closes every descriptor it was given")


def test_more_descriptors_than_fit(front: Front) -> None:
    with contextlib.suppress(HungUp, Refused):
        front.front.command(Request.SET_VRING_NUM, VRING_STATE.pack(0, 64), (front.fd,) * 200, True)


def test_descriptors_where_none_belong(front: Front) -> None:
    for request, payload in (
        (Request.SET_VRING_NUM, VRING_STATE.pack(0, 64)),
        (Request.SET_OWNER, b""),
        (Request.SET_VRING_ENABLE, VRING_STATE.pack(0, 0)),
    ):
        harmless(front.front, request, payload, (front.fd, front.fd))


# ---- hang-ups
class Enough(Exception):
    pass


def test_hang_up_after_each_message(bystander: FakeGuest, daemon: NydusDaemon) -> None:
    """Start-up cut off after 1, 2, 3 ... messages, to the last: nothing is left behind."""
    before = open_fds(daemon)
    send_raw = VhostFrontend.send_raw
    for count in range(1, 100):
        guest = FakeGuest(daemon.socket_path, slot_count=1, slot_data_bytes=4096)
        sent = 0

        def limited(front: VhostFrontend, data: bytes, fds: object = (), count: int = count) -> None:
            nonlocal sent
            if sent == count:
                raise Enough
            sent += 1
            send_raw(front, data, fds)  # type: ignore[arg-type]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(VhostFrontend, "send_raw", limited)
            try:
                guest.connect()
                guest.start()
                break
            except Enough:
                pass
            finally:
                guest.close()
    assert count > 20
    wait_until(lambda: open_fds(daemon) <= before, "the daemon closes every descriptor it was given")


def test_hang_up_under_load(bystander: FakeGuest, daemon: NydusDaemon) -> None:
    before = open_fds(daemon)
    for _ in range(10):
        with FakeGuest(daemon.socket_path, slot_count=8) as guest:
            guest.fuse.init()
            load = Load(guest, depth=8, block_bytes=131072, timeout_ms=50)
            with BackgroundLoad(guest.queues[1], load, may_fail=True) as running:
                running.wait_progress(2)
                guest.front.close()
    wait_until(lambda: open_fds(daemon) <= before, "the daemon closes every descriptor it was given")


def test_hang_up_in_every_stop_step(bystander: FakeGuest, daemon: NydusDaemon) -> None:
    for step in range(4):
        guest = FakeGuest(daemon.socket_path, slot_count=1, slot_data_bytes=4096)
        guest.connect()
        guest.start()
        guest.fuse.init()
        for queue in guest.queues[:step]:
            guest.enable(queue, False)
        if step > 2:
            guest.front.send(Request.GET_VRING_BASE, VRING_STATE.pack(1, 0))
        guest.close()
    with FakeGuest(daemon.socket_path) as guest:
        guest.fuse.init()
        assert guest.fuse.read_file("odd") == pattern(FILES["odd"][1], FILES["odd"][0])


def test_messages_at_random(bystander: FakeGuest, daemon: NydusDaemon) -> None:
    """Seeded nonsense of every request number and size, with and without descriptors."""
    import random

    chance = random.Random(3)
    fd = os.memfd_create("random", os.MFD_CLOEXEC)
    os.ftruncate(fd, MEMORY)
    before = open_fds(daemon)
    for _ in range(60):
        front = VhostFrontend(daemon.socket_path)
        with contextlib.suppress(HungUp, TimeoutError):
            for _ in range(12):
                request = chance.choice([*range(0, 46), 99])
                size = chance.choice([0, 4, 8, 12, 20, 24, 40, 72, 200, 4096])
                payload = bytes(chance.choice([0, 0, 1, 2, 255]) for _ in range(size))
                front.send(request, payload, [fd] * chance.choice([0, 0, 1, 2]), chance.choice([1, 1, 9]))
        front.close()
    os.close(fd)
    wait_until(lambda: open_fds(daemon) <= before, "the daemon closes every descriptor it was given")
