"""A virtio-fs guest without a VM: the front-end in QEMU's order; guest memory and rings come from the C half.

`with FakeGuest(path) as guest:` connects, starts the device and offers guest.fuse. Each step is also a method of
its own, so that a test can leave one out, repeat it or do it wrong: front (raw messages), memory (raw bytes), queues
(raw rings).
"""

import errno
import os
import struct
import threading
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from virtiofsd_nydus._fakeguest import ffi as ffi
from virtiofsd_nydus._fakeguest import lib as lib
from virtiofsd_nydus.cffi_types import realize_types
from virtiofsd_nydus.fakeguest import frontend as vhost
from virtiofsd_nydus.fakeguest.frontend import Feature, Protocol, Request, VhostFrontend
from virtiofsd_nydus.fakeguest.fuse_client import FuseClient

STRUCTS = realize_types(ffi, lib)  # before any thread is started
PAGE = 4096
# As QEMU cuts PC memory: low memory, the hole at 640 KiB, the rest; both from one memfd
LOW_BYTES = 0xA0000
HIGH_GPA = 0xC0000
SCRATCH_BYTES = 1 << 20  # for tests, before the rings
REPLY_MAX = 4 << 20
FEATURES = Feature.VERSION_1 | Feature.INDIRECT | Feature.EVENT_IDX | Feature.PROTOCOL
PROTOCOL = (
    Protocol.MQ
    | Protocol.REPLY_ACK
    | Protocol.BACKEND_REQ
    | Protocol.BACKEND_SEND_FD
    | Protocol.CONFIGURE_MEM_SLOTS
    | Protocol.DEVICE_STATE
)


class GuestFault(RuntimeError):
    """The server broke the virtio or FUSE protocol. code is one of csrc's enum fg_fault."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


class NoAnswer(TimeoutError):
    """No answer came in time."""


@dataclass(frozen=True, slots=True)
class Region:
    gpa: int
    size_bytes: int
    file_offset: int


class Memory:
    """Guest memory: a memfd, and a bump allocator over its largest region."""

    def __init__(self, regions: Sequence[Region], seal: bool = True) -> None:
        self.regions = list(regions)
        table = ffi.new("fg_region[]", [(r.gpa, r.size_bytes, r.file_offset) for r in self.regions])
        self.handle = lib.fg_ram_new(table, len(self.regions), int(seal))
        if self.handle == ffi.NULL:
            raise OSError(ffi.errno, os.strerror(ffi.errno), "guest memory")
        largest = max(self.regions, key=lambda r: r.size_bytes)
        self.next_gpa, self.end_gpa = largest.gpa, largest.gpa + largest.size_bytes

    @property
    def fd(self) -> int:
        fd: int = lib.fg_ram_fd(self.handle)
        return fd

    def close(self) -> None:
        handle, self.handle = self.handle, None
        if handle is not None:
            lib.fg_ram_free(handle)

    def allocate(self, size_bytes: int, align: int = PAGE) -> int:
        gpa = (self.next_gpa + align - 1) // align * align
        if gpa + size_bytes > self.end_gpa:
            raise MemoryError(f"guest memory: no {size_bytes} bytes left")
        self.next_gpa = gpa + size_bytes
        return gpa

    def pointer(self, gpa: int, size_bytes: int) -> Any:
        at = lib.fg_ram_at(self.handle, gpa, size_bytes)
        if at == ffi.NULL:
            raise ValueError(f"{gpa:#x}+{size_bytes} is not guest memory")
        return at

    def user_address(self, gpa: int) -> int:
        address: int = int(ffi.cast("uintptr_t", self.pointer(gpa, 1)))
        return address

    def read(self, gpa: int, size_bytes: int) -> bytes:
        return bytes(ffi.buffer(self.pointer(gpa, size_bytes), size_bytes))

    def write(self, gpa: int, data: bytes) -> None:
        ffi.memmove(self.pointer(gpa, len(data)), data, len(data))

    def wire_regions(self) -> list[tuple[int, int, int, int]]:
        """The regions as messages carry them: gpa, size, user address, offset."""
        return [(r.gpa, r.size_bytes, self.user_address(r.gpa), r.file_offset) for r in self.regions]

    def check_gaps(self) -> None:
        """Raises GuestFault when a byte between the regions, in the same memfd, was written."""
        if lib.fg_ram_check_gaps(self.handle):
            raise GuestFault(lib.FG_OVERRUN, "memory outside every region was written")


class Queue:
    """A virtqueue with its event descriptors. One thread at a time, but set_call, stop and close."""

    def __init__(self, memory: Memory, index: int, size: int, slot_count: int, slot_data_bytes: int) -> None:
        self.memory, self.index, self.size = memory, index, size
        self.slot_count, self.slot_data_bytes = slot_count, slot_data_bytes
        self.desc_gpa = memory.allocate(16 * size)
        self.avail_gpa = memory.allocate(6 + 2 * size)
        self.used_gpa = memory.allocate(6 + 8 * size)
        self.slot_gpa = memory.allocate(lib.fg_slot_bytes(slot_data_bytes) * slot_count)
        self.kick_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.call_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.err_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.timeout_ms = 20_000
        self.header_len = False  # fg_queue_config.header_len
        # None before reset() and after close(): the C half is never given a null pointer
        self.handle: Any = None
        self._in_use = threading.Lock()  # by the thread that submits and waits
        self._stopping = threading.Lock()  # by a thread that stops it
        self.reply = ffi.new("uint8_t[]", REPLY_MAX)

    def reset(self, event_idx: bool, indirect: bool, poll: bool, scatter: bool, first: int = 0) -> None:
        """Makes empty rings, first being the next index of both."""
        self._free()
        config = ffi.new(
            "fg_queue_config *",
            {
                "num": self.size,
                "desc_gpa": self.desc_gpa,
                "avail_gpa": self.avail_gpa,
                "used_gpa": self.used_gpa,
                "event_idx": int(event_idx),
                "indirect": int(indirect),
                "poll": int(poll),
                "slot_gpa": self.slot_gpa,
                "slot_count": self.slot_count,
                "slot_data_bytes": self.slot_data_bytes,
                "scatter": int(scatter),
                "header_len": int(self.header_len),
            },
        )
        handle = lib.fg_queue_new(self.memory.handle, config, first)
        if handle == ffi.NULL:
            raise OSError(ffi.errno, os.strerror(ffi.errno), f"queue {self.index}")
        lib.fg_queue_set_kick(handle, self.kick_fd)
        lib.fg_queue_set_call(handle, self.call_fd)
        self.handle = handle

    def _free(self) -> None:
        """A thread that waits in the C half is made to leave first: its wait ends in OSError (ECANCELED)."""
        handle = self.handle
        if handle is not None:
            lib.fg_queue_abandon(handle)
            with self._in_use, self._stopping:
                self.handle = None
                lib.fg_queue_free(handle)

    def close(self) -> None:
        self._free()
        for fd in (self.kick_fd, self.call_fd, self.err_fd):
            os.close(fd)

    def check(self, code: int) -> int:
        """Turns a negative result of the C half into its exception."""
        if code >= 0:
            return code
        text = ffi.string(lib.fg_queue_error(self.handle)).decode()
        if code == -errno.ETIMEDOUT:
            raise NoAnswer(f"queue {self.index}: {text}")
        if code <= -lib.FG_BAD_USED:
            raise GuestFault(-code, f"queue {self.index}: {text}")
        raise OSError(-code, f"queue {self.index}: {text}")

    # ---- requests in slots
    def submit(self, request: bytes, out_fixed: int, data_bytes: int, slot: int = 0) -> None:
        with self._in_use:
            self.check(lib.fg_submit(self.handle, slot, request, len(request), out_fixed, data_bytes))

    def reap(self, timeout_ms: int | None = None) -> tuple[int, bytes]:
        """Waits for any completion: its slot and the whole reply, header first (empty when none came)."""
        slot = ffi.new("uint32_t *")
        wait = self.timeout_ms if timeout_ms is None else timeout_ms
        with self._in_use:
            length = self.check(lib.fg_reap(self.handle, slot, self.reply, REPLY_MAX, wait))
        return slot[0], bytes(ffi.buffer(self.reply, length))

    def reap_length(self) -> tuple[int, int]:
        """The same, but the reply stays in guest memory, as a guest's page cache keeps it: its slot and bytes."""
        slot = ffi.new("uint32_t *")
        with self._in_use:
            length = self.check(lib.fg_reap(self.handle, slot, ffi.NULL, 0, self.timeout_ms))
        return slot[0], length

    def call(self, request: bytes, out_fixed: int, data_bytes: int) -> bytes:
        self.submit(request, out_fixed, data_bytes)
        return self.reap()[1]

    # ---- raw chains
    def add(self, segments: Sequence[tuple[int, int, bool]], table_gpa: int = 0) -> int:
        """A chain of (gpa, length, writable) into the ring; publish makes it visible. Its head."""
        table = ffi.new("fg_segment[]", [(gpa, length, int(write)) for gpa, length, write in segments])
        return self.check(lib.fg_queue_add(self.handle, table, len(segments), table_gpa, 1 << 32))

    def publish(self) -> None:
        lib.fg_queue_publish(self.handle)

    def kick(self) -> None:
        lib.fg_queue_kick(self.handle)

    def pop(self, timeout_ms: int | None = None) -> int:
        """Waits for the completion of a raw chain: its used length."""
        cookie, length = ffi.new("uint64_t *"), ffi.new("uint32_t *")
        wait = self.timeout_ms if timeout_ms is None else timeout_ms
        with self._in_use:
            while not self.check(lib.fg_queue_pop(self.handle, cookie, length)):
                self.check(lib.fg_queue_wait(self.handle, wait))
        used: int = length[0]
        return used

    def write_desc(self, index: int, gpa: int, length: int, flags: int, following: int = 0) -> None:
        self.memory.write(self.desc_gpa + 16 * index, struct.pack("=QIHH", gpa, length, flags, following))

    def offer(self, heads: Sequence[int], jump: int | None = None) -> None:
        """Writes heads to the avail ring by hand, moves its index (by jump if given) and kicks."""
        at = self.avail_index()
        for i, head in enumerate(heads):
            self.memory.write(self.avail_gpa + 4 + 2 * ((at + i) % self.size), struct.pack("=H", head))
        new = (at + (len(heads) if jump is None else jump)) & 0xFFFF
        lib.fg_store16(self.memory.pointer(self.avail_gpa + 2, 2), new)
        self.kick()

    def avail_index(self) -> int:
        index: int = lib.fg_load16(self.memory.pointer(self.avail_gpa + 2, 2))
        return index

    def used_index(self) -> int:
        index: int = lib.fg_load16(self.memory.pointer(self.used_gpa + 2, 2))
        return index

    def used_element(self, index: int) -> tuple[int, int]:
        """id and len of the used ring's entry for that index."""
        head, length = struct.unpack("=II", self.memory.read(self.used_gpa + 4 + 8 * (index % self.size), 8))
        return head, length

    # ---- events and load
    def replace_call_fd(self) -> int:
        """A fresh call descriptor, waited on from now on; the caller tells the back-end. The old one is closed."""
        old, self.call_fd = self.call_fd, os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        lib.fg_queue_set_call(self.handle, self.call_fd)
        os.close(old)
        return self.call_fd

    def stop(self) -> None:
        """Ends a running load."""
        with self._stopping:
            if self.handle is not None:
                lib.fg_queue_stop(self.handle)

    def load(self, load: Any) -> Any:
        """Runs an fg_load; an fg_load_result."""
        result = ffi.new("fg_load_result *")
        with self._in_use:
            self.check(lib.fg_load_run(self.handle, load, result))
        return result


def default_regions(size_bytes: int) -> list[Region]:
    return [Region(0, LOW_BYTES, 0), Region(HIGH_GPA, size_bytes, HIGH_GPA)]


@dataclass(eq=False)
class FakeGuest:
    """A guest with a hiprio queue and request_queues more. Its steps are those traced from QEMU 7.2."""

    path: Path  # of the back-end's socket
    _: KW_ONLY
    request_queues: int = 1
    queue_size: int = 256
    slot_count: int = 8  # requests at a time, of a request queue
    slot_data_bytes: int = 131072
    indirect: bool = True
    event_idx: bool = True
    poll: bool = False
    scatter: bool = False
    regions: Sequence[Region] | None = None  # None: default_regions of what the queues need
    seal: bool = True
    hiprio_size: int = 128

    def __post_init__(self) -> None:
        self.memory = Memory(self._make_regions() if self.regions is None else self.regions, self.seal)
        self.scratch_gpa = self.memory.allocate(SCRATCH_BYTES)
        self.queues = [Queue(self.memory, 0, self.hiprio_size, 4, PAGE)]
        self.queues += [
            Queue(self.memory, i + 1, self.queue_size, self.slot_count, self.slot_data_bytes)
            for i in range(self.request_queues)
        ]
        self.features = 0
        self.protocol = 0
        self.memory_sent = False
        self.running = False
        self.front: VhostFrontend = None  # type: ignore[assignment]  # set by connect
        self.fuse = FuseClient(self.queues[1])
        self.hiprio = FuseClient(self.queues[0])

    def _make_regions(self) -> list[Region]:
        each = lib.fg_slot_bytes(self.slot_data_bytes) * self.slot_count + 32 * self.queue_size + 4 * PAGE
        small = lib.fg_slot_bytes(PAGE) * 4 + 32 * self.hiprio_size + 4 * PAGE
        total = SCRATCH_BYTES + each * self.request_queues + small
        return default_regions((total + PAGE - 1) // PAGE * PAGE)

    def __enter__(self) -> "FakeGuest":
        try:
            self.connect()
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.memory.check_gaps()
        finally:
            self.close()

    def close(self) -> None:
        """Hangs up and gives the memory back."""
        if self.front is not None:
            self.front.close()
        for queue in self.queues:
            queue.close()
        self.queues = []
        self.memory.close()

    # ---- step 1: at construction of the VM
    def connect(self) -> None:
        self.front = front = VhostFrontend(self.path)
        self.memory_sent = self.running = False
        offered = front.get_u64(Request.GET_FEATURES)
        wanted = FEATURES
        if not self.indirect:
            wanted &= ~Feature.INDIRECT
        if not self.event_idx:
            wanted &= ~Feature.EVENT_IDX
        self.features = offered & wanted
        self.protocol = front.get_u64(Request.GET_PROTOCOL_FEATURES) & PROTOCOL
        front.send(Request.SET_PROTOCOL_FEATURES, vhost.U64.pack(self.protocol))
        front.reply_ack = False  # used where QEMU uses it, below
        if self.protocol & Protocol.MQ:
            count = front.get_u64(Request.GET_QUEUE_NUM)
            if count < len(self.queues):
                raise vhost.Refused(f"the back-end has {count} queues, {len(self.queues)} wanted")
        if self.protocol & Protocol.CONFIGURE_MEM_SLOTS:
            front.get_u64(Request.GET_MAX_MEM_SLOTS)
        front.send(Request.SET_OWNER)
        front.get_u64(Request.GET_FEATURES)
        for queue in self.queues:
            self.send_fd(Request.SET_VRING_CALL, queue, queue.call_fd)
            self.send_fd(Request.SET_VRING_ERR, queue, queue.err_fd)

    @property
    def acks(self) -> bool:
        return bool(self.protocol & Protocol.REPLY_ACK)

    def send_fd(self, request: Request, queue: Queue, fd: int) -> None:
        self.front.send(request, vhost.U64.pack(queue.index), [fd])

    # ---- step 2: the driver is ready
    def send_memory(self) -> None:
        """Sends the memory by regions where the back-end takes them, else as a whole table."""
        regions = self.memory.wire_regions()
        if self.protocol & Protocol.CONFIGURE_MEM_SLOTS:
            for region in regions:
                payload = vhost.pack_single_region(region)
                self.front.command(Request.ADD_MEM_REG, payload, [self.memory.fd], self.acks)
        else:
            self.send_memory_table(regions)
        self.memory_sent = True

    def send_memory_table(self, regions: Sequence[tuple[int, int, int, int]]) -> None:
        fds = [self.memory.fd] * len(regions)
        self.front.command(Request.SET_MEM_TABLE, vhost.pack_regions(regions), fds, self.acks)

    def send_ring(self, queue: Queue, base: int = 0) -> None:
        """Size, base, addresses, kick: a ring ready to be enabled."""
        at = self.memory.user_address
        self.front.send(Request.SET_VRING_NUM, vhost.VRING_STATE.pack(queue.index, queue.size))
        self.front.send(Request.SET_VRING_BASE, vhost.VRING_STATE.pack(queue.index, base))
        addresses = vhost.VRING_ADDR.pack(
            queue.index, 0, at(queue.desc_gpa), at(queue.used_gpa), at(queue.avail_gpa), queue.used_gpa
        )
        self.front.command(Request.SET_VRING_ADDR, addresses, (), self.acks)
        self.send_fd(Request.SET_VRING_KICK, queue, queue.kick_fd)

    def enable(self, queue: Queue, on: bool = True) -> None:
        self.front.command(Request.SET_VRING_ENABLE, vhost.VRING_STATE.pack(queue.index, int(on)), (), self.acks)

    def start(self, first: int = 0) -> None:
        """Goes from driver ready to rings that run; first is the index that rings start at (0 for a fresh guest)."""
        for queue in self.queues:
            queue.reset(
                bool(self.features & Feature.EVENT_IDX),
                bool(self.features & Feature.INDIRECT),
                self.poll,
                self.scatter,
                first,
            )
            self.send_fd(Request.SET_VRING_CALL, queue, queue.call_fd)
        self.front.send(Request.SET_FEATURES, vhost.U64.pack(self.features))
        if not self.memory_sent:
            self.send_memory()
        for queue in self.queues:
            self.send_ring(queue, first)
        for queue in self.queues:
            self.enable(queue)
        for queue in self.queues:
            self.send_fd(Request.SET_VRING_CALL, queue, queue.call_fd)
        self.running = True

    # ---- step 3: stop, reboot
    def get_base(self, queue: Queue) -> int:
        """Stops a ring: its next avail index."""
        self.front.send(Request.GET_VRING_BASE, vhost.VRING_STATE.pack(queue.index, 0))
        body, _ = self.front.receive(Request.GET_VRING_BASE)
        index, base = vhost.VRING_STATE.unpack(body)
        if index != queue.index:
            raise vhost.BadReply(f"base of ring {index} instead of {queue.index}")
        return int(base)

    def stop(self) -> list[int]:
        """Disables and stops all rings: their bases."""
        for queue in self.queues:
            self.enable(queue, False)
        bases = [self.get_base(queue) for queue in self.queues]
        for queue in self.queues:
            self.send_fd(Request.SET_VRING_CALL, queue, queue.call_fd)
        self.running = False
        return bases

    def reboot(self) -> None:
        """Reboots the guest: stop, then start with empty rings on the same socket and unchanged memory."""
        self.stop()
        self.start()

    # ---- migration: this guest's memory and rings go on at another back-end
    def move_to(self, path: Path) -> bytes:
        """Stops the rings, saves the back-end's state, loads it at the one of path, goes on there. Returns it. Refused:
        the guest stands still, at the back-end that refused."""
        bases = self.stop()
        state = self.front.save_state()
        self.front.close()
        self.path = path
        self.connect()
        self.front.load_state(state)
        self.go_on(bases)
        return state

    def go_on(self, bases: Sequence[int]) -> None:
        """Starts rings where they stood."""
        self.front.send(Request.SET_FEATURES, vhost.U64.pack(self.features))
        if not self.memory_sent:
            self.send_memory()
        for queue, base in zip(self.queues, bases, strict=True):
            self.send_ring(queue, base)
        for queue in self.queues:
            self.enable(queue)
            self.send_fd(Request.SET_VRING_CALL, queue, queue.call_fd)
        self.running = True

    def swap_call(self, queue: Queue) -> None:
        """Replaces the call descriptor while the ring runs."""
        self.send_fd(Request.SET_VRING_CALL, queue, queue.replace_call_fd())
