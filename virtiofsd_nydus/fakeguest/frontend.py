"""The front-end's half of vhost-user: messages over the real socket, fds by SCM_RIGHTS. No device logic.

For the fake guest (fakeguest.py). Anything can be sent, well-formed or not; what comes back is checked to be a
reply as QEMU insists on: version 1, REPLY set, NEED_REPLY clear, the request's own number. Numbers and structures are
written out here although vhost/messages.py has them: this side judges that one, and a shared mistake would pass.
"""

import array
import contextlib
import enum
import os
import socket
import struct
import time
from collections.abc import Sequence
from pathlib import Path

HEADER = struct.Struct("=III")
U64 = struct.Struct("=Q")
VRING_STATE = struct.Struct("=II")
VRING_ADDR = struct.Struct("=IIQQQQ")
REGION = struct.Struct("=QQQQ")
INFLIGHT = struct.Struct("=QQHH")

VERSION = 1
REPLY = 4
NEED_REPLY = 8
LISTEN_WAIT_S = 1.0
NO_FD = 0x100  # in the u64 of KICK, CALL and ERR


class Request(enum.IntEnum):
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
    SET_STATUS = 39
    GET_STATUS = 40
    SET_DEVICE_STATE_FD = 42
    CHECK_DEVICE_STATE = 43


class Feature(enum.IntFlag):
    INDIRECT = 1 << 28
    EVENT_IDX = 1 << 29
    PROTOCOL = 1 << 30
    VERSION_1 = 1 << 32


class Protocol(enum.IntFlag):
    MQ = 1 << 0
    LOG_SHMFD = 1 << 1
    REPLY_ACK = 1 << 3
    BACKEND_REQ = 1 << 5
    BACKEND_SEND_FD = 1 << 10
    INFLIGHT_SHMFD = 1 << 12
    RESET_DEVICE = 1 << 13
    CONFIGURE_MEM_SLOTS = 1 << 15
    STATUS = 1 << 16
    DEVICE_STATE = 1 << 19


SAVE, LOAD = 0, 1  # direction of SET_DEVICE_STATE_FD


class HungUp(ConnectionError):
    """The back-end closed the connection."""


class BadReply(RuntimeError):
    """The back-end's reply breaks the protocol."""


class Refused(RuntimeError):
    """The back-end acknowledged a request with an error."""


def connect_socket(path: Path, timeout_s: float) -> socket.socket:
    """Connects. Waits a little for a server that has bound its socket and does not listen yet, or has other
    connections to accept first."""
    deadline = time.monotonic() + LISTEN_WAIT_S
    while True:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.settimeout(timeout_s)
        try:
            connection.connect(str(path))
            return connection
        except (ConnectionRefusedError, BlockingIOError):
            connection.close()
            if time.monotonic() > deadline:
                raise
            time.sleep(0.005)
        except BaseException:
            connection.close()
            raise


class VhostFrontend:
    """One connection. Not safe for several threads."""

    def __init__(self, path: Path, timeout_s: float = 20.0) -> None:
        self.socket = connect_socket(path, timeout_s)
        self.reply_ack = False

    def close(self) -> None:
        self.socket.close()

    def send_raw(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Sends exactly these bytes; descriptors go with the first of them."""
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        try:
            sent = self.socket.sendmsg([data], ancillary)
            if sent < len(data):
                self.socket.sendall(data[sent:])
        except (BrokenPipeError, ConnectionResetError) as error:
            raise HungUp(f"send: {error}") from error

    def send(self, request: int, payload: bytes = b"", fds: Sequence[int] = (), flags: int = VERSION) -> None:
        self.send_raw(HEADER.pack(request, flags, len(payload)) + payload, fds)

    def receive(self, request: int) -> tuple[bytes, list[int]]:
        """The reply to request: its payload and descriptors. HungUp, BadReply."""
        head, fds = self._receive_exactly(HEADER.size, want_fds=True)
        got, flags, size = HEADER.unpack(head)
        if got != request or flags != VERSION | REPLY:
            raise BadReply(f"request {request}: reply to {got} with flags {flags:#x}")
        payload, _ = self._receive_exactly(size) if size else (b"", [])
        return payload, fds

    def _receive_exactly(self, size: int, want_fds: bool = False) -> tuple[bytes, list[int]]:
        data, fds = bytearray(), array.array("i")
        while len(data) < size:
            try:
                room = socket.CMSG_SPACE(8 * 4) if want_fds else 0
                part, ancillary, _, _ = self.socket.recvmsg(size - len(data), room)
            except ConnectionResetError as error:
                raise HungUp(f"receive: {error}") from error
            if not part:
                raise HungUp(f"end of stream after {len(data)} of {size} bytes")
            for level, kind, body in ancillary:
                if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                    fds.frombytes(body[: len(body) - len(body) % fds.itemsize])
            data += part
        return bytes(data), list(fds)

    def get_u64(self, request: int, payload: bytes = b"") -> int:
        """A request whose reply is a u64."""
        self.send(request, payload)
        body, _ = self.receive(request)
        if len(body) != U64.size:
            raise BadReply(f"request {request}: {len(body)} bytes instead of a u64")
        value: int = U64.unpack(body)[0]
        return value

    def command(self, request: int, payload: bytes = b"", fds: Sequence[int] = (), ack: bool | None = None) -> None:
        """A request without a reply of its own; waits for its acknowledgement where that was negotiated (or as ack
        says). Refused when it is not zero."""
        if not (self.reply_ack if ack is None else ack):
            self.send(request, payload, fds)
            return
        self.send(request, payload, fds, VERSION | NEED_REPLY)
        body, _ = self.receive(request)
        if len(body) != U64.size:
            raise BadReply(f"request {request}: acknowledgement of {len(body)} bytes")
        if U64.unpack(body)[0]:
            raise Refused(f"request {Request(request).name}: refused")

    def save_state(self) -> bytes:
        """The back-end's state, its rings stopped. Refused."""
        ours, theirs = os.pipe()
        try:
            self._offer_state(SAVE, theirs)
        finally:
            os.close(theirs)
            with os.fdopen(ours, "rb") as stream:
                data = stream.read()
        self._check_state()
        return data

    def load_state(self, data: bytes) -> None:
        """Gives the back-end a state, its rings not started. Refused."""
        theirs, ours = os.pipe()
        try:
            self._offer_state(LOAD, theirs)
        finally:
            os.close(theirs)
            with contextlib.suppress(BrokenPipeError), os.fdopen(ours, "wb") as stream:
                stream.write(data)
        self._check_state()

    def _offer_state(self, direction: int, fd: int) -> None:
        self.send(Request.SET_DEVICE_STATE_FD, struct.pack("=II", direction, 0), [fd])
        body, fds = self.receive(Request.SET_DEVICE_STATE_FD)
        value = U64.unpack(body)[0]
        if value & 0xFF:
            raise Refused("SET_DEVICE_STATE_FD: refused")
        if value != NO_FD or fds:
            raise BadReply(f"SET_DEVICE_STATE_FD: {value:#x} with {len(fds)} descriptors")

    def _check_state(self) -> None:
        if self.get_u64(Request.CHECK_DEVICE_STATE):
            raise Refused("CHECK_DEVICE_STATE: refused")

    def hung_up(self, timeout_s: float = 5.0) -> bool:
        """True once the back-end has closed the connection; reads and drops what it sent before."""
        self.socket.settimeout(timeout_s)
        try:
            while self.socket.recv(4096):
                pass
        except ConnectionResetError:
            return True
        except TimeoutError:
            return False
        return True


def pack_regions(regions: Sequence[tuple[int, int, int, int]]) -> bytes:
    """Payload of SET_MEM_TABLE: (gpa, size, user address, offset in the descriptor) each."""
    return struct.pack("=II", len(regions), 0) + b"".join(REGION.pack(*r) for r in regions)


def pack_single_region(region: tuple[int, int, int, int]) -> bytes:
    """Payload of ADD_MEM_REG and REM_MEM_REG."""
    return U64.pack(0) + REGION.pack(*region)
