"""Chains written by hand and what became of them."""

import select
import struct
import time

from tests.fakeguest.support import FILES, pattern
from virtiofsd_nydus.fakeguest.fakeguest import FakeGuest, Queue
from virtiofsd_nydus.fakeguest.fuse_client import GETATTR, OUT_HEADER, pack_request

NEXT, WRITE, INDIRECT = 1, 2, 4
GETATTR_ROOT = pack_request(GETATTR, 2, 1, bytes(16))
GETATTR_REPLY = 120
HOLE_GPA = 0xB0000  # between the regions
FILL = 0xA5
WAIT_S = 5.0


class Bench:
    """The scratch memory of a guest, laid out: a request, an indirect table, a reply; and its first request queue."""

    def __init__(self, guest: FakeGuest, queue_index: int = 1) -> None:
        self.guest = guest
        self.queue: Queue = guest.queues[queue_index]
        self.request_gpa = guest.scratch_gpa
        self.table_gpa = guest.scratch_gpa + 0x2000
        self.out_gpa = guest.scratch_gpa + 0x80000
        guest.memory.write(guest.scratch_gpa, bytes([FILL]) * 0x100000)
        self.put_request(GETATTR_ROOT)

    def put_request(self, request: bytes) -> None:
        self.request = request
        self.guest.memory.write(self.request_gpa, request)

    def put_table(self, rows: list[tuple[int, int, int, int]]) -> int:
        """An indirect table of (address, length, flags, next): its bytes."""
        data = b"".join(struct.pack("=QIHH", *row) for row in rows)
        self.guest.memory.write(self.table_gpa, data)
        return len(data)

    def good_rows(self, first: int = 0) -> list[tuple[int, int, int, int]]:
        """A right chain of the request and room for the reply, first being its index."""
        return [(self.request_gpa, len(self.request), NEXT, first + 1), (self.out_gpa, GETATTR_REPLY, WRITE, 0)]

    def put_ring(self, rows: list[tuple[int, int, int, int]], first: int = 0) -> None:
        for i, row in enumerate(rows):
            self.queue.write_desc(first + i, *row)

    def offer(self, heads: list[int], jump: int | None = None) -> None:
        self.before = self.guest.memory.read(self.guest.scratch_gpa, 0x100000)
        self.used_before = self.queue.used_index()
        self.queue.offer(heads, jump)
        self.offered = len(heads)

    # ---- what became of it
    def wait(self) -> str:
        """ "lost": the queue's error descriptor was signalled; "answered": the used ring holds all that was offered."""
        poller = select.poll()
        poller.register(self.queue.err_fd, select.POLLIN)
        deadline = time.monotonic() + WAIT_S
        while time.monotonic() < deadline:
            if self.answered() >= self.offered:
                return "answered"
            if poller.poll(2):
                return "lost"
        raise AssertionError("neither answered nor lost")

    def answered(self) -> int:
        return (self.queue.used_index() - self.used_before) & 0xFFFF

    def used_length(self, number: int = 0) -> int:
        return self.queue.used_element(self.used_before + number)[1]

    def changed(self, gpa: int, length: int) -> bool:
        """Whether scratch memory outside [gpa, gpa+length) is other than when the chain was offered."""
        now = self.guest.memory.read(self.guest.scratch_gpa, 0x100000)
        at = gpa - self.guest.scratch_gpa
        return now[:at] != self.before[:at] or now[at + length :] != self.before[at + length :]

    def assert_lost(self) -> None:
        """The queue is lost, nothing was written, and a reset of the device brings it back."""
        assert self.wait() == "lost"
        assert self.answered() == 0
        assert not self.changed(self.out_gpa, 0)
        self.assert_hiprio_serves()
        self.assert_recovers()

    def assert_answered(self, gpa: int | None = None, room: int = 0) -> int:
        """All was answered; memory outside the reply is as it was. The first used length."""
        assert self.wait() == "answered"
        length = self.used_length()
        assert length <= room
        assert not self.changed(self.out_gpa if gpa is None else gpa, length)
        return length

    def assert_error(self, room: int, *errors: int) -> None:
        """Answered by an error header (one of errors, if given) where there is room for one, else by nothing."""
        length = self.assert_answered(room=room)
        if room < OUT_HEADER.size:
            assert length == 0
        else:
            assert length == OUT_HEADER.size
            size, error, _ = OUT_HEADER.unpack(self.guest.memory.read(self.out_gpa, OUT_HEADER.size))
            assert size == length
            assert -error in errors if errors else -512 < error < 0
        self.assert_serves()

    def assert_serves(self) -> None:
        """The queue goes on: a right chain is answered."""
        self.put_request(GETATTR_ROOT)
        self.put_ring(self.good_rows(8), 8)
        self.offer([8])
        assert self.assert_answered(room=GETATTR_REPLY) == GETATTR_REPLY

    def assert_hiprio_serves(self) -> None:
        self.guest.hiprio.forget(1, 0)

    def assert_recovers(self) -> None:
        self.guest.reboot()
        self.guest.fuse.init()
        node = self.guest.fuse.walk("odd").nodeid
        assert self.guest.fuse.read_all(node, 8192) == pattern(FILES["odd"][1], FILES["odd"][0])
