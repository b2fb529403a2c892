"""Malformed rings and chains, each against the real socket: the queue is lost or the request fails, nothing else."""

import contextlib
import os
import random
import re
import struct
import threading
from collections.abc import Callable

import pytest
from virtiofsd_nydus._fakeguest import lib

from tests.fakeguest.support import FILES, BackgroundLoad, Image, Load, pattern, wait_until
from tests.vhost.hostile.tools import FILL, GETATTR_REPLY, GETATTR_ROOT, HOLE_GPA, INDIRECT, NEXT, WRITE, Bench
from virtiofsd_nydus.fakeguest.fakeguest import FakeGuest, Region
from virtiofsd_nydus.fakeguest.fuse_client import READ, READ_IN, pack_request
from virtiofsd_nydus.vmm.servers import NydusDaemon

SIZE = 16  # of the ring of `bench`
LOW_END = 0xA0000


def offer_chain(bench: Bench, rows: list[tuple[int, int, int, int]]) -> None:
    bench.put_ring(rows)
    bench.offer([0])


def offer_table(bench: Bench, rows: list[tuple[int, int, int, int]], length: int | None = None, flags: int = 0) -> None:
    size = bench.put_table(rows)
    offer_chain(bench, [(bench.table_gpa, size if length is None else length, INDIRECT | flags, 1)])


def jump_index(bench: Bench) -> None:
    bench.put_ring(bench.good_rows())
    bench.offer([0], jump=SIZE + 1)


def jump_index_far(bench: Bench) -> None:
    bench.put_ring(bench.good_rows())
    bench.offer([0], jump=0x8000)


def step_index_back(bench: Bench) -> None:
    bench.put_ring(bench.good_rows())
    bench.offer([0], jump=-1)


def self_loop(bench: Bench) -> None:
    offer_chain(bench, [(bench.request_gpa, 40, NEXT, 0)])


def long_loop(bench: Bench) -> None:
    offer_chain(bench, [(bench.request_gpa, 1, NEXT, (i + 1) % SIZE) for i in range(SIZE)])


def writable_loop(bench: Bench) -> None:
    offer_chain(bench, [(bench.request_gpa, 56, NEXT, 1), (bench.out_gpa, 16, NEXT | WRITE, 1)])


def read_after_write(bench: Bench) -> None:
    first, second = bench.good_rows()
    offer_chain(bench, [(*second[:2], WRITE | NEXT, 1), (*first[:2], 0, 0)])


def read_between_writes(bench: Bench) -> None:
    offer_chain(
        bench,
        [
            (bench.request_gpa, 40, NEXT, 1),
            (bench.out_gpa, 16, WRITE | NEXT, 2),
            (bench.request_gpa + 40, 16, NEXT, 3),
            (bench.out_gpa + 16, 104, WRITE, 0),
        ],
    )


def indirect_loop(bench: Bench) -> None:
    offer_table(bench, [(bench.request_gpa, 40, NEXT, 1), (bench.request_gpa, 1, NEXT, 0)])


def indirect_nested(bench: Bench) -> None:
    offer_table(bench, [(bench.request_gpa, 56, NEXT, 1), (bench.table_gpa, 32, INDIRECT, 0)])


def indirect_at_itself(bench: Bench) -> None:
    offer_table(bench, [(bench.table_gpa, 16, INDIRECT, 0)])


LOST: dict[str, Callable[[Bench], None]] = {
    "avail index jumps past the ring": jump_index,
    "avail index jumps half the range": jump_index_far,
    "avail index steps back": step_index_back,
    "head is the ring's size": lambda b: b.offer([SIZE]),
    "head is 65535": lambda b: b.offer([0xFFFF]),
    "next is the ring's size": lambda b: offer_chain(b, [(b.request_gpa, 56, NEXT, SIZE)]),
    "next is 65535": lambda b: offer_chain(b, [(b.request_gpa, 56, NEXT, 0xFFFF)]),
    "loop of one": self_loop,
    "loop of the whole ring": long_loop,
    "loop in the writable part": writable_loop,
    "readable after writable": read_after_write,
    "readable between writables": read_between_writes,
    "indirect of no bytes": lambda b: offer_table(b, b.good_rows(), 0),
    "indirect of 17 bytes": lambda b: offer_table(b, b.good_rows(), 17),
    "indirect of 31 bytes": lambda b: offer_table(b, b.good_rows(), 31),
    "indirect with NEXT": lambda b: offer_table(b, b.good_rows(), None, NEXT),
    "indirect in indirect": indirect_nested,
    "indirect at itself": indirect_at_itself,
    "indirect loop": indirect_loop,
    "indirect next beyond its table": lambda b: offer_table(b, [(b.request_gpa, 56, NEXT, 2), (b.out_gpa, 120, 2, 0)]),
    "indirect next 65535": lambda b: offer_table(b, [(b.request_gpa, 56, NEXT, 0xFFFF)]),
    "indirect of 4 GiB": lambda b: offer_table(b, b.good_rows(), 0xFFFF_FFF0),
}

# The request fails or the queue is lost: the specification leaves it open
EITHER: dict[str, Callable[[Bench], None]] = {
    "address wraps": lambda b: offer_chain(b, [((1 << 64) - 16, 56, NEXT, 1), (b.out_gpa, GETATTR_REPLY, WRITE, 0)]),
    "reply address wraps": lambda b: offer_chain(b, [(b.request_gpa, 56, NEXT, 1), ((1 << 64) - 16, 120, WRITE, 0)]),
    "readable bytes past 4 GiB": lambda b: offer_chain(
        b, [(b.request_gpa, 0xFFFF_FFFF, NEXT, 1), (b.request_gpa, 0xFFFF_FFFF, NEXT, 2), (b.out_gpa, 120, WRITE, 0)]
    ),
    "writable bytes past 4 GiB": lambda b: offer_chain(
        b, [(b.request_gpa, 56, NEXT, 1), (b.out_gpa, 0xFFFF_FFFF, NEXT | WRITE, 2), (b.out_gpa, 0xFFFF_FFFF, WRITE, 0)]
    ),
    "request in a hole": lambda b: offer_chain(b, [(HOLE_GPA, 56, NEXT, 1), (b.out_gpa, GETATTR_REPLY, WRITE, 0)]),
    "request runs into a hole": lambda b: offer_chain(
        b, [(LOW_END - 20, 56, NEXT, 1), (b.out_gpa, GETATTR_REPLY, WRITE, 0)]
    ),
    "reply in a hole": lambda b: offer_chain(b, [(b.request_gpa, 56, NEXT, 1), (HOLE_GPA, GETATTR_REPLY, WRITE, 0)]),
    "reply runs into a hole": lambda b: offer_chain(b, [(b.request_gpa, 56, NEXT, 1), (LOW_END - 20, 120, WRITE, 0)]),
    "reply far above memory": lambda b: offer_chain(b, [(b.request_gpa, 56, NEXT, 1), (1 << 60, 120, WRITE, 0)]),
    "indirect in a hole": lambda b: offer_chain(b, [(HOLE_GPA, 32, INDIRECT, 0)]),
    "indirect runs into a hole": lambda b: offer_chain(b, [(LOW_END - 16, 32, INDIRECT, 0)]),
    "indirect address wraps": lambda b: offer_chain(b, [((1 << 64) - 16, 32, INDIRECT, 0)]),
    "no descriptor has bytes": lambda b: offer_chain(b, [(b.request_gpa, 0, NEXT, 1), (b.out_gpa, 0, WRITE, 0)]),
    "one head twice": lambda b: (b.put_ring(b.good_rows()), b.offer([0, 0]))[1],
}


@pytest.mark.parametrize("name", LOST)
def test_queue_is_lost(bench: Bench, name: str) -> None:
    LOST[name](bench)
    bench.assert_lost()


def test_the_log_says_whose_queue_stopped(image: Image) -> None:
    """The front-end's number, as its connecting was said with, and the queue's. In a daemon of its own: one that had
    many front-ends in the last seconds leaves lines out."""
    with (
        NydusDaemon(["--bootstrap", str(image.bootstrap), "--localfs-dir", str(image.blob_dir)]) as daemon,
        FakeGuest(daemon.socket_path, request_queues=3) as first,
        FakeGuest(daemon.socket_path, request_queues=3) as second,
    ):
        first.fuse.init()
        second.fuse.init()
        numbers = re.findall(r"front-end connected +front_end=(\d+)", daemon.log_text())
        bench = Bench(second, 2)
        jump_index_far(bench)
        bench.assert_lost()
        line = f"front-end {numbers[-1]}: queue 2 stopped: "
        wait_until(lambda: line in daemon.log_text(), line)
        assert daemon.log_text().count(" stopped: ") == 1
        first.fuse.getattr(1)


@pytest.mark.parametrize("name", EITHER)
def test_request_fails_or_queue_is_lost(bench: Bench, name: str) -> None:
    EITHER[name](bench)
    if bench.wait() == "answered":
        bench.assert_answered(room=GETATTR_REPLY)
        bench.assert_serves()
    bench.assert_recovers()


def test_head_offered_again_while_in_flight(bench: Bench) -> None:
    """Two entries with one head: served twice or lost, never a third entry."""
    bench.put_ring(bench.good_rows())
    bench.offer([0, 0, 0, 0])
    if bench.wait() == "lost":
        assert bench.answered() <= 4
    bench.assert_recovers()


def test_indirect_of_many_descriptors(bench: Bench) -> None:
    """60,000 descriptors of one byte: more than any request may have."""
    rows = [(bench.request_gpa + i % 56, 1, NEXT, (i + 1) & 0xFFFF) for i in range(30_000)]
    offer_table(bench, rows)
    bench.wait()
    bench.assert_recovers()


def test_reply_room_larger_than_any_reply(bench: Bench) -> None:
    """The same 512 KiB four thousand times over would be 2 GiB of room: refused or used as far as needed."""
    rows = [(bench.request_gpa, 56, NEXT, 1)]
    rows += [(bench.out_gpa, 0x80000, NEXT | WRITE, i + 2) for i in range(1000)]
    rows.append((bench.out_gpa, 16, WRITE, 0))
    offer_table(bench, rows)
    if bench.wait() == "answered":
        assert bench.used_length() in (0, 16, GETATTR_REPLY)
    bench.assert_recovers()


def test_descriptors_without_bytes_are_skipped(bench: Bench) -> None:
    rows = [
        (HOLE_GPA, 0, NEXT, 1),
        (bench.request_gpa, 40, NEXT, 2),
        (0, 0, NEXT, 3),
        (bench.request_gpa + 40, 16, NEXT, 4),
        (HOLE_GPA, 0, WRITE | NEXT, 5),
        (bench.out_gpa, GETATTR_REPLY, WRITE | NEXT, 6),
        (0, 0, WRITE, 0),
    ]
    offer_chain(bench, rows)
    assert bench.assert_answered(room=GETATTR_REPLY) == GETATTR_REPLY
    bench.assert_serves()


def test_any_cut_of_a_request_works(bench: Bench) -> None:
    """No boundary is assumed: request and reply byte by byte, over direct and indirect chains."""
    rows = [(bench.request_gpa + i, 1, NEXT, i + 1) for i in range(56)]
    rows += [(bench.out_gpa + i, 1, WRITE | NEXT, 57 + i) for i in range(119)] + [(bench.out_gpa + 119, 1, WRITE, 0)]
    offer_table(bench, rows)
    assert bench.assert_answered(room=GETATTR_REPLY) == GETATTR_REPLY
    for cut in (1, 15, 16, 17, 39, 40, 41):
        bench.put_ring(
            [
                (bench.request_gpa, cut, NEXT, 1),
                (bench.request_gpa + cut, 56 - cut, NEXT, 2),
                (bench.out_gpa, cut, WRITE | NEXT, 3),
                (bench.out_gpa + cut, 120 - cut, WRITE, 0),
            ]
        )
        bench.offer([0])
        assert bench.assert_answered(room=GETATTR_REPLY) == GETATTR_REPLY
    bench.assert_serves()


def test_table_scattered_in_any_order(bench: Bench) -> None:
    """An indirect table need not be in order, nor used whole."""
    rows = [
        (bench.request_gpa, 40, NEXT, 3),
        (HOLE_GPA, 99, 0, 0),
        (bench.out_gpa, GETATTR_REPLY, WRITE, 0),
        (bench.request_gpa + 40, 16, NEXT, 2),
    ]
    offer_table(bench, rows)
    assert bench.assert_answered(room=GETATTR_REPLY) == GETATTR_REPLY
    bench.assert_serves()


def test_indirect_behind_direct_descriptors(bench: Bench) -> None:
    """virtio 1.2, 2.7.5.3.2: a device must take direct descriptors followed by an indirect one, and ignore its write
    flag."""
    rows = [(bench.request_gpa + 40, 16, NEXT, 1), (bench.out_gpa, GETATTR_REPLY, WRITE, 0)]
    for flags in (INDIRECT, INDIRECT | WRITE):
        size = bench.put_table(rows)
        offer_chain(bench, [(bench.request_gpa, 40, NEXT, 1), (bench.table_gpa, size, flags, 0)])
        assert bench.assert_answered(room=GETATTR_REPLY) == GETATTR_REPLY
    bench.assert_serves()


def test_request_and_reply_straddle_regions(bystander: FakeGuest, daemon: NydusDaemon) -> None:
    """Two regions that touch in guest memory and nowhere else: a range over the seam is one range."""
    regions = [Region(0, 0x200000, 0x400000), Region(0x200000, 0x100000, 0), Region(0x300000, 0x800000, 0x700000)]
    seam = 0x300000
    with FakeGuest(daemon.socket_path, regions=regions, slot_count=1, slot_data_bytes=16384) as guest:
        guest.fuse.init()
        node, queue = guest.fuse.walk("data").nodeid, guest.queues[1]
        request = pack_request(READ, 2, node, READ_IN.pack(0, 4096, 12288, 0, 0, 0, 0))
        for cut in (1, 16, 40, 79):  # the request over the seam at 2 MiB
            guest.memory.write(0x200000 - cut, request[:cut])
            guest.memory.write(0x200000, request[cut:])
            for shift in (1, 16, 17, 5000, 12303):  # the reply over the seam at 3 MiB
                guest.memory.write(seam - 16384, bytes([FILL]) * 16384)
                before = guest.memory.read(guest.scratch_gpa, 64)
                start = seam - shift
                saved = guest.memory.read(seam, 16384)
                queue.add([(0x200000 - cut, 80, False), (start, 12304, True)])
                queue.publish()
                assert queue.pop() == 12304
                reply = guest.memory.read(start, shift) + guest.memory.read(seam, 12304 - shift)
                assert struct.unpack_from("=Ii", reply) == (12304, 0)
                assert reply[16:] == pattern(16384, FILES["data"][0])[4096:]
                assert guest.memory.read(seam - 16384, 16384 - shift) == bytes([FILL]) * (16384 - shift)
                guest.memory.write(seam, saved)
                assert guest.memory.read(guest.scratch_gpa, 64) == before


def test_memory_changes_while_it_is_read(bystander: FakeGuest, daemon: NydusDaemon) -> None:
    """Descriptors, tables and headers flip while requests are served: copies are checked, so nothing but this guest
    suffers."""
    flips = random.Random(5)
    with FakeGuest(daemon.socket_path, queue_size=16, slot_count=4, slot_data_bytes=16384, indirect=True) as guest:
        queue = guest.queues[1]
        for _ in range(6):
            guest.fuse.init()
            with BackgroundLoad(queue, Load(guest, depth=4, timeout_ms=50), may_fail=True):
                for _ in range(400):
                    slot = queue.slot_gpa + flips.randrange(4) * lib.fg_slot_bytes(16384)
                    desc = queue.desc_gpa + 16 * flips.randrange(16)
                    place = flips.choice(
                        [
                            slot,
                            slot + 8,
                            slot + 12,
                            slot + 14,
                            slot + 16,
                            slot + 0x2000,
                            slot + 0x2004,
                            desc,
                            desc + 8,
                            desc + 12,
                            desc + 14,
                        ]
                    )
                    old = guest.memory.read(place, 4)
                    guest.memory.write(place, struct.pack("=I", flips.choice([0, 1, 0xFFFF, 0xFFFFFFFF, HOLE_GPA])))
                    if flips.random() < 0.5:
                        guest.memory.write(place, old)
            guest.reboot()
        guest.fuse.init()
        guest.fuse.getattr(1)


def test_random_rings(bystander: FakeGuest, daemon: NydusDaemon) -> None:
    """Descriptors at random, seeded; a reset after each batch."""
    chance = random.Random(11)
    with FakeGuest(daemon.socket_path, queue_size=16, slot_count=1, slot_data_bytes=16384) as guest:
        bench = Bench(guest)
        places = [
            bench.request_gpa,
            bench.table_gpa,
            bench.out_gpa,
            HOLE_GPA,
            LOW_END - 24,
            0,
            (1 << 64) - 24,
            guest.queues[1].desc_gpa,
        ]
        lengths = [0, 1, 15, 16, 17, 40, 56, 120, 4096, 65536, 0x7FFFFFFF, 0xFFFFFFFF]

        def random_row() -> tuple[int, int, int, int]:
            return (
                chance.choice(places),
                chance.choice(lengths),
                chance.randrange(8),
                chance.choice([*range(16), 16, 255, 0xFFFF]),
            )

        for _ in range(120):
            guest.fuse.init()
            bench.put_request(GETATTR_ROOT)
            bench.put_table([random_row() for _ in range(16)])
            bench.put_ring([random_row() for _ in range(16)])
            bench.queue.offer([chance.randrange(16) for _ in range(4)])
            guest.reboot()
        guest.fuse.init()
        guest.fuse.getattr(1)


def test_used_ring_in_reply_room(bench: Bench) -> None:
    """A reply onto the rings themselves spoils only this queue."""
    offer_chain(bench, [(bench.request_gpa, 56, NEXT, 1), (bench.queue.used_gpa, GETATTR_REPLY, WRITE, 0)])
    bench.guest.reboot()
    bench.assert_recovers()


def test_kick_storm(bench: Bench) -> None:
    """Kicks without work write nothing and cost no answer."""
    used = bench.queue.used_index()
    for _ in range(50_000):
        bench.queue.kick()
    assert bench.queue.used_index() == used
    bench.assert_serves()
    for _ in range(2000):
        os.eventfd_write(bench.guest.queues[0].kick_fd, 0x7FFF_FFFF)
    bench.assert_serves()


def test_kicks_stolen(bench: Bench) -> None:
    """The guest reads its own kicks away: the daemon must not block in a read of the kick descriptor."""
    done = threading.Event()

    def steal() -> None:
        while not done.is_set():
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(bench.queue.kick_fd)

    os.set_blocking(bench.queue.kick_fd, True)  # O_NONBLOCK is of the open file: the daemon's too
    thread = threading.Thread(target=steal)
    thread.start()
    for _ in range(3000):
        os.eventfd_write(bench.queue.kick_fd, 1)
    done.set()
    while thread.is_alive():
        os.eventfd_write(bench.queue.kick_fd, 1)
        thread.join(0.01)
    bench.guest.reboot()
    bench.assert_recovers()


def test_wrong_queue_for_requests(bench: Bench) -> None:
    """A READ-like request on the hiprio queue is answered, not trusted to be FORGET."""
    other = Bench(bench.guest, 0)
    other.put_ring(other.good_rows())
    other.offer([0])
    other.assert_answered(room=GETATTR_REPLY)
    bench.assert_serves()
