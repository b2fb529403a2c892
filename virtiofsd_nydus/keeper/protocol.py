"""What keeper, template and worker say to each other: packets, their bounds, messages, a device's state in them.

Both sides use this module. A pair of SOCK_SEQPACKET sockets carries messages. A message is a kind, a JSON object and
descriptors; it goes as one packet or several. The first message each way is HELLO; a process that speaks no version
between VERSION_MIN and VERSION is refused. Light: the keeper holds no engine.
"""

import array
import json
import os
import socket
import struct
import threading
from collections import deque

from virtiofsd_nydus.errors import Cause, Failure
from virtiofsd_nydus.vhost.messages import MEMORY_SLOTS, close_all
from virtiofsd_nydus.vhost.state import DeviceState, Region

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    Body = dict[str, Any]

VERSION = 1
VERSION_MIN = 1
KEEPER_FORMAT = 1  # of what a keeper gives to itself over an exec (keeper/renew.py)

# Template to keeper, first of all: {"version": int, "package": str, "keeper_format": int}
HELLO = 1

# Keeper to template
FORK = 10  # {}; descriptors: the worker's channel, its standard error
WARM = 11  # {}: import what a worker needs later

# Template to keeper
FORKED = 20  # {"pid": int}; descriptor: its pidfd
EXITED = 21  # {"pid": int, "status": int as of waitpid}

# Keeper to worker
START = 30  # {"args", "deaths", "api": whether its listener comes, "table", "mounts", "front_ends"}; descriptors
OPEN = 31  # {"device": int, "kind": str, "number": int}
APPLY = 32  # {"device": int, "state": {...}}; descriptors: those that are new
RESET = 33  # {"device": int}
CLOSE = 34  # {"device": int}
KEPT = 35  # {"record": int}: it is kept
STOP = 36  # {}: end in order
UPGRADED = 37  # {"error": str or null}
TRANSFER = 39  # {"device": int, "loads": bool}; descriptor: a pipe for the session's state
TRANSFERRED = 50  # {"device": int}: wait for it, make the device so
GO = 38  # {}: answer the API from now on

# Worker to keeper
READY = 40  # {"features": {kind: int}, "queues": {kind: int}, "saves": bool?}
FAILED = 41  # {"text": str, "usage": bool}: it could not start
DONE = 42  # {"device": int, "error": str or null, "bases": [int]}: of OPEN, APPLY, RESET, CLOSE, in their order
RECORD = 43  # {"record": int, "table": {...}?, "put": {...}?, "drop": str?}; descriptors of what is put
EXIT = 44  # {}: a client of the API wants the daemon's end
UPGRADE = 45  # {"python": str}
ANSWERED = 46  # {}: the client of UPGRADE has its answer

HEADER = struct.Struct("=HHI")  # kind, 1 where more packets of the message follow, bytes of the body in this packet
PACKET_BYTES = 60 << 10
PACKET_FDS = 200  # the kernel takes 253
BODY_MAX_BYTES = 16 << 20
FDS_MAX = MEMORY_SLOTS + 64
QUEUE_MAX_BYTES = 64 << 20  # of what a process that does not read is owed


def malformed(text: str) -> Failure:
    """A message that is none."""
    return Failure(f"keeper and worker: {text}", Cause.FORMAT)


class Message:
    """One message. Its descriptors belong to it until take_fd hands one out; close() closes the rest."""

    __slots__ = ("body", "fds", "kind")

    def __init__(self, kind: int, body: "Body", fds: list[int]) -> None:
        self.kind, self.body, self.fds = kind, body, fds

    def take_fd(self) -> int:
        """The next descriptor. Raises Failure where there is none."""
        if not self.fds:
            raise malformed(f"message {self.kind} lacks a descriptor")
        return self.fds.pop(0)

    def close(self) -> None:
        fds, self.fds = self.fds, []
        close_all(fds)

    def number(self, name: str) -> int:
        """An entry that is a number from 0 on. Raises Failure."""
        value = self.body.get(name)
        if type(value) is not int or not 0 <= value < 1 << 64:
            raise malformed(f"message {self.kind}: {name} is not a number")
        return value

    def text(self, name: str) -> str:
        """An entry that is a text. Raises Failure."""
        value = self.body.get(name)
        if type(value) is not str:
            raise malformed(f"message {self.kind}: {name} is not a text")
        return value


class Channel:
    """One end of a socket pair. It owns the socket. Any thread may send; one receives.

    blocking False, for the keeper: send queues what cannot go at once, and flush() goes on with it.
    """

    def __init__(self, sock: socket.socket, *, blocking: bool) -> None:
        self.sock = sock
        sock.setblocking(blocking)
        self._lock = threading.Lock()
        self._queue: deque[tuple[bytes, list[int]]] = deque()
        self._queued_bytes = 0
        self._kind = 0
        self._body = bytearray()
        self._fds: list[int] = []

    def fileno(self) -> int:
        return self.sock.fileno()

    @property
    def waits(self) -> bool:
        """Something is queued: flush() is due when the socket can be written to."""
        return bool(self._queue)

    def send(self, kind: int, body: "Body | None" = None, fds: "Sequence[int]" = ()) -> None:
        """Sends a message; the descriptors stay the caller's. Raises OSError if the other end is gone."""
        data = json.dumps(body or {}, separators=(",", ":")).encode()
        if len(data) > BODY_MAX_BYTES or len(fds) > FDS_MAX:
            raise malformed(f"message {kind} of {len(data)} bytes and {len(fds)} descriptors is too large")
        with self._lock:
            at = sent_fds = 0
            while True:
                piece = data[at : at + PACKET_BYTES]
                some = fds[sent_fds : sent_fds + PACKET_FDS]
                at, sent_fds = at + len(piece), sent_fds + len(some)
                more = at < len(data) or sent_fds < len(fds)
                self._send_packet(HEADER.pack(kind, more, len(piece)) + piece, some)
                if not more:
                    return

    def _send_packet(self, packet: bytes, fds: "Sequence[int]") -> None:
        if not self._queue:
            try:
                self._send_now(packet, fds)
                return
            except BlockingIOError:
                pass
        if self._queued_bytes + len(packet) > QUEUE_MAX_BYTES:
            raise ConnectionAbortedError("the other process does not read")
        self._queue.append((packet, [os.dup(fd) for fd in fds]))
        self._queued_bytes += len(packet)

    def _send_now(self, packet: bytes, fds: "Sequence[int]") -> None:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        self.sock.sendmsg([packet], rights, socket.MSG_NOSIGNAL)

    def flush(self) -> None:
        """Sends of what is queued as much as goes. Raises OSError if the other end is gone."""
        with self._lock:
            while self._queue:
                packet, fds = self._queue[0]
                try:
                    self._send_now(packet, fds)
                except BlockingIOError:
                    return
                self._queue.popleft()
                self._queued_bytes -= len(packet)
                close_all(fds)

    def receive(self) -> Message | None:
        """The next message; None: not all of it is here yet. EOFError: the other end is gone. Raises Failure for what
        is no message."""
        while True:
            try:
                packet, ancillary, flags, _ = self.sock.recvmsg(
                    HEADER.size + PACKET_BYTES, socket.CMSG_SPACE(PACKET_FDS * 4), socket.MSG_CMSG_CLOEXEC
                )
            except BlockingIOError:
                return None
            except ConnectionError:
                raise EOFError from None
            for level, kind, body in ancillary:
                if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                    got = array.array("i")
                    got.frombytes(body[: len(body) // got.itemsize * got.itemsize])
                    self._fds.extend(got)
            if not packet:
                raise EOFError
            if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC) or len(packet) < HEADER.size:
                raise malformed("a packet that is too large or too small")
            if (message := self._add(packet)) is not None:
                return message

    def _add(self, packet: bytes) -> Message | None:
        kind, more, size = HEADER.unpack_from(packet)
        if size != len(packet) - HEADER.size or more > 1 or (self._kind and kind != self._kind):
            raise malformed(f"a packet of message {kind} is not sound")
        self._kind = kind
        self._body += packet[HEADER.size :]
        if len(self._body) > BODY_MAX_BYTES or len(self._fds) > FDS_MAX:
            raise malformed(f"message {kind} is too large")
        if more:
            return None
        data, fds = bytes(self._body), self._fds
        self._kind, self._body, self._fds = 0, bytearray(), []
        message = Message(kind, {}, fds)
        try:
            message.body = json.loads(data)
        except (ValueError, RecursionError):
            message.body = None  # type: ignore[assignment]
        if type(message.body) is not dict:
            message.close()
            raise malformed(f"message {kind} holds no object")
        return message

    @property
    def rests(self) -> bool:
        """No message is half sent or half received."""
        return not self._queue and not self._kind

    def close(self) -> None:
        """Closes the socket and what was not sent or not taken. Idempotent."""
        self.sock.close()
        for _, fds in self._queue:
            close_all(fds)
        self._queue.clear()
        fds, self._fds = self._fds, []
        close_all(fds)


def pair() -> tuple[socket.socket, socket.socket]:
    """Two ends for two channels."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def agree(hello: Message) -> None:
    """Takes the other side's first message. Raises Failure where it speaks another version."""
    version = hello.number("version")
    if hello.kind != HELLO or not VERSION_MIN <= version <= VERSION:
        raise malformed(f"version {version} is spoken there, {VERSION_MIN} to {VERSION} here")


# ---- a device's state

RING_PLAIN = ("num", "flags", "desc_addr", "used_addr", "avail_addr", "log_addr", "base", "started", "enabled")
RING_FDS = ("kick", "call", "err")
STATE_PLAIN = ("features", "region_gen", "inflight_goes_on", "inflight_died", "carries_inflight")
BLOCKS = ("inflight", "log")  # a descriptor with offset and size each
RINGS_MAX = 16  # csrc/vnd.h VND_QUEUE_MAX


class Sent:
    """Which descriptors of a device's state a worker has already, by their generations."""

    __slots__ = ("gens",)

    def __init__(self) -> None:
        self.gens: dict[str, int] = {}

    def is_new(self, name: str, gen: int) -> bool:
        """Whether that generation was not sent yet; from now on it was."""
        new = self.gens.get(name) != gen
        self.gens[name] = gen
        return new


def plain_rings(state: DeviceState) -> "list[list[int]]":
    """The numbers of all rings, in the order of RING_PLAIN."""
    return [[int(getattr(ring, name)) for name in RING_PLAIN] for ring in state.rings]


def pack_state(state: DeviceState, sent: Sent, rings: "list[list[int]]") -> "tuple[Body, list[int]]":
    """The state as a message's body, and the descriptors that go with it. rings: numbers to send in place of the
    state's own."""
    fds: list[int] = []

    def place(name: str, gen: int, fd: int) -> "list[int]":
        """Generation, and 1 where the descriptor comes with the message, 0 where the worker has it, -1: there is
        none."""
        if fd < 0 or not sent.is_new(name, gen):
            return [gen, -1 if fd < 0 else 0]
        fds.append(fd)
        return [gen, 1]

    body: Body = {name: int(getattr(state, name)) for name in STATE_PLAIN}
    body["rings"] = [
        [
            *numbers,
            *(place(f"{kind}{at}", getattr(ring, f"{kind}_gen"), getattr(ring, f"{kind}_fd")) for kind in RING_FDS),
        ]
        for at, (numbers, ring) in enumerate(zip(rings, state.rings, strict=True))
    ]
    for name in BLOCKS:
        body[name] = [
            *place(name, getattr(state, f"{name}_gen"), getattr(state, f"{name}_fd")),
            getattr(state, f"{name}_offset"),
            getattr(state, f"{name}_size_bytes"),
        ]
    body["inflight"] += [state.inflight_queues, state.inflight_queue_size]
    if sent.is_new("regions", state.region_gen):
        body["regions"] = [[one.gpa, one.size_bytes, one.user_addr, one.mmap_offset] for one in state.regions]
        fds += [one.fd for one in state.regions]
    return body, fds


def unpack_state(message: Message, state: DeviceState) -> None:
    """Makes state be what the message says, with the descriptors that came. What the device has already has -1 and its
    generation. Raises Failure. The caller closes the state's descriptors when the device has its own."""
    body = message.body["state"]
    try:
        for name in STATE_PLAIN:
            setattr(state, name, int(body.get(name, 0)))
        if len(body["rings"]) != len(state.rings):
            raise malformed(f"{len(body['rings'])} rings where {len(state.rings)} are")
        for ring, numbers in zip(state.rings, body["rings"], strict=True):
            for name, value in zip(RING_PLAIN, numbers, strict=False):
                setattr(ring, name, value)
            for kind, (gen, comes) in zip(RING_FDS, numbers[len(RING_PLAIN) :], strict=True):
                setattr(ring, f"{kind}_gen", int(gen))
                setattr(ring, f"{kind}_fd", message.take_fd() if comes > 0 else -1)
        for name in BLOCKS:
            gen, comes, offset, size_bytes = body[name][:4]
            setattr(state, f"{name}_gen", int(gen))
            setattr(state, f"{name}_fd", message.take_fd() if comes > 0 else -1)
            setattr(state, f"{name}_offset", int(offset))
            setattr(state, f"{name}_size_bytes", int(size_bytes))
        state.inflight_queues, state.inflight_queue_size = map(int, body["inflight"][4:])
        if "regions" in body:
            state.regions = [
                Region(int(gpa), int(size), int(user), int(offset), message.take_fd())
                for gpa, size, user, offset in body["regions"]
            ]
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise malformed(f"a device's state makes no sense: {error!r}") from None
