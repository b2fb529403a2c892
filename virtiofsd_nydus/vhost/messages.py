"""vhost-user on the wire: numbers, structures, and one socket's messages with their descriptors.

Source: the vhost-user specification (QEMU docs/interop/vhost-user.rst), checked against real QEMU and Cloud
Hypervisor traffic. Everything is in host byte order. Light: loaded before the daemon answers RUNNING.
"""

import array
import os
import socket
import struct

from virtiofsd_nydus.errors import Cause, Failure

# Requests of the front-end.
GET_FEATURES = 1
SET_FEATURES = 2
SET_OWNER = 3
RESET_OWNER = 4
SET_MEM_TABLE = 5
SET_LOG_BASE = 6
SET_LOG_FD = 7
SET_VRING_NUM = 8
SET_VRING_ADDR = 9
SET_VRING_BASE = 10
GET_VRING_BASE = 11
SET_VRING_KICK = 12
SET_VRING_CALL = 13
SET_VRING_ERR = 14
GET_PROTOCOL_FEATURES = 15
SET_PROTOCOL_FEATURES = 16
GET_QUEUE_NUM = 17
SET_VRING_ENABLE = 18
SET_BACKEND_REQ_FD = 21
GET_CONFIG = 24
SET_CONFIG = 25
GET_INFLIGHT_FD = 31
SET_INFLIGHT_FD = 32
RESET_DEVICE = 34
GET_MAX_MEM_SLOTS = 36
ADD_MEM_REG = 37
REM_MEM_REG = 38
SET_DEVICE_STATE_FD = 42
CHECK_DEVICE_STATE = 43

# Header flags: bits 0-1 are the version.
VERSION = 1
VERSION_MASK = 3
REPLY = 4
NEED_REPLY = 8

# virtio feature bits that the session itself looks at.
F_LOG_ALL = 1 << 26
F_PROTOCOL_FEATURES = 1 << 30

# Protocol features.
P_MQ = 1 << 0
P_LOG_SHMFD = 1 << 1
P_REPLY_ACK = 1 << 3
P_BACKEND_REQ = 1 << 5
P_CONFIG = 1 << 9  # QEMU 7.1 to 8.0 crash where a device of virtio-fs offers it
P_BACKEND_SEND_FD = 1 << 10
P_INFLIGHT_SHMFD = 1 << 12
P_RESET_DEVICE = 1 << 13
P_CONFIGURE_MEM_SLOTS = 1 << 15
P_DEVICE_STATE = 1 << 19  # offered where a session's state can be saved and loaded
PROTOCOL_FEATURES = (
    P_MQ
    | P_LOG_SHMFD
    | P_REPLY_ACK
    | P_BACKEND_REQ
    | P_BACKEND_SEND_FD
    | P_INFLIGHT_SHMFD
    | P_RESET_DEVICE
    | P_CONFIGURE_MEM_SLOTS
)

VRING_INDEX_MASK = 0xFF  # KICK, CALL, ERR: bits of the index,
VRING_NO_FD = 0x100  # and "no descriptor comes with this"

STATE_SAVE, STATE_LOAD = 0, 1  # SET_DEVICE_STATE_FD: direction
STATE_STOPPED = 0  # its phase
STATE_NO_FD = 0x100  # its answer: accepted, and the descriptor that came is used
STATE_REFUSED = 1

PAYLOAD_MAX = 4096  # bytes; the largest real one is a memory table of 8 + 32 * 32
FDS_MAX = 32  # descriptors of one message; QEMU sends 8 at most, rust-vmm 32
MEMORY_SLOTS = 509  # QEMU takes at most 512; csrc/vnd.h VND_REGION_MAX

HEADER = struct.Struct("=III")  # request, flags, payload bytes
U64 = struct.Struct("=Q")
VRING_STATE = struct.Struct("=II")  # index, number
VRING_ADDR = struct.Struct("=IIQQQQ")  # index, flags, descriptors, used, available, log
MEMORY_HEAD = struct.Struct("=II")  # regions, padding
REGION = struct.Struct("=QQQQ")  # guest address, bytes, user address, offset in the file
SINGLE_REGION = struct.Struct("=QQQQQ")  # padding, then a region
LOG = struct.Struct("=QQ")  # bytes, offset
DEVICE_STATE = struct.Struct("=II")  # direction, phase
CONFIG_HEAD = struct.Struct("=III")  # offset, bytes, flags; then the bytes
INFLIGHT = struct.Struct("=QQHH")  # bytes, offset, queues, entries; some senders pad it to 24


class Message:
    """One request. Its descriptors belong to it until take_fd hands one out; close() closes the rest."""

    __slots__ = ("fds", "flags", "payload", "request")

    def __init__(self, request: int, flags: int, payload: bytes, fds: list[int]) -> None:
        self.request, self.flags, self.payload, self.fds = request, flags, payload, fds

    def take_fd(self) -> int:
        return self.fds.pop(0)

    def close(self) -> None:
        fds, self.fds = self.fds, []
        close_all(fds)


def close_fd(fd: int) -> OSError | None:
    """Closes a descriptor that a front-end gave, -1 is none; the error of that. Linux has closed it also where
    close(2) fails, as it does for files of some file systems: it must never be closed again."""
    if fd >= 0:
        try:
            os.close(fd)
        except OSError as error:
            return error
    return None


def close_all(fds: list[int]) -> None:
    """Closes each once, whatever closing another says."""
    for fd in fds:
        close_fd(fd)


def malformed(text: str) -> Failure:
    return Failure(f"vhost-user: {text}; the connection is closed", Cause.FORMAT)


class MessageReader:
    """Makes requests of one connection's bytes, of a socket that blocks or does not. It owns the descriptors of a
    request that is not complete yet; close() closes them."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._fds: list[int] = []
        self._head: tuple[int, int, int] | None = None  # request, flags, payload bytes

    def read(self, sock: socket.socket) -> Message | None:
        """Reads once: the request that is complete with that, or None.

        EOFError: the proper end of the stream. BlockingIOError where the socket does not block. Raises Failure when the
        bytes make no request.
        """
        due = HEADER.size if self._head is None else self._head[2]
        part = self._receive(sock, due - len(self._data))
        if not part:
            raise self._end()
        self._data += part
        if len(self._data) < due:
            return None
        data, self._data = bytes(self._data), bytearray()
        if self._head is None:
            self._head = _check_head(data)
            if self._head[2]:
                return None
            data = b""
        request, flags, _ = self._head
        fds, self._fds, self._head = self._fds, [], None
        return Message(request, flags, data, fds)

    def _receive(self, sock: socket.socket, size: int) -> bytes:
        """Bytes of this request, none at the end of the stream. What descriptors come are kept."""
        try:
            part, ancillary, flags, _ = sock.recvmsg(size, socket.CMSG_SPACE(FDS_MAX * 4), socket.MSG_CMSG_CLOEXEC)
        except ConnectionResetError:
            return b""
        for level, kind, body in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                got = array.array("i")
                got.frombytes(body[: len(body) // got.itemsize * got.itemsize])
                self._fds.extend(got)
        if flags & socket.MSG_CTRUNC or len(self._fds) > FDS_MAX:
            raise malformed(f"more than {FDS_MAX} descriptors in a message")
        return part

    def _end(self) -> Exception:
        if self._head is None:
            if not self._data:
                return EOFError()
            return malformed(f"the front-end hung up after {len(self._data)} bytes of a header")
        request, _, size = self._head
        return malformed(f"the front-end hung up after {len(self._data)} of {size} bytes of request {request}")

    @property
    def rests(self) -> bool:
        """No request is half here."""
        return self._head is None and not self._data

    def close(self) -> None:
        """Closes what came for a request that is not complete. Idempotent."""
        fds, self._fds = self._fds, []
        close_all(fds)


def _check_head(data: bytes) -> tuple[int, int, int]:
    request, flags, size = HEADER.unpack(data)
    if flags & VERSION_MASK != VERSION:
        raise malformed(f"request {request} has version {flags & VERSION_MASK}, {VERSION} is spoken here")
    if flags & REPLY:
        raise malformed(f"a reply (to {request}) where a request is due")
    if size > PAYLOAD_MAX:
        raise malformed(f"request {request} with {size} bytes, at most {PAYLOAD_MAX} are taken")
    return request, flags, size


def send_reply(sock: socket.socket, request: int, payload: bytes, fd: int = -1) -> None:
    """Answers a request. Front-ends insist on these flags exactly. Raises OSError if the other end is gone."""
    data = HEADER.pack(request, VERSION | REPLY, len(payload)) + payload
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))] if fd >= 0 else []
    sent = sock.sendmsg([data], rights, socket.MSG_NOSIGNAL)
    if sent < len(data):
        sock.sendall(data[sent:], socket.MSG_NOSIGNAL)
