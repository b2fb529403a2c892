"""A session's state on its way through the pipe that a front-end gives (SET_DEVICE_STATE_FD).

A thread moves the bytes, because the front-end goes on talking meanwhile; it touches nothing but the pipe. The
front-end may be slow or never come to an end, so the wait for it is bounded.
"""

import os
import select
import threading

from virtiofsd_nydus.errors import Cause, Failure
from virtiofsd_nydus.vhost.messages import close_fd
from virtiofsd_nydus.vhost.sessionstate import STATE_MAX_BYTES

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

WAIT_S = 10.0  # at CHECK_DEVICE_STATE: front-ends send it when they have sent or taken all
PIECE_BYTES = 1 << 20


class Transfer:
    """One state being sent or received. The pipe's descriptor is its own."""

    def __init__(self, fd: int, move: "Callable[[Transfer], bytes | None]", events: int) -> None:
        self._fd, self._move = fd, move
        self._stop = os.eventfd(0, os.EFD_CLOEXEC)
        self._done = os.eventfd(0, os.EFD_CLOEXEC)
        self._data: bytes | None = None
        self._failure: Failure | None = None
        self._poll = select.poll()
        self._poll.register(self._fd, events)
        self._poll.register(self._stop, select.POLLIN)
        os.set_blocking(fd, False)
        self._thread = threading.Thread(target=self._run, name="device-state", daemon=True)
        self._thread.start()

    @property
    def fd(self) -> int:
        return self._fd

    def ready(self) -> None:
        """Waits until the pipe takes or gives bytes. Raises Failure when the transfer is ended."""
        if self._stop in dict(self._poll.poll()):
            raise Failure("the transfer was broken off", Cause.GUEST)

    def _run(self) -> None:
        try:
            self._data = self._move(self)
        except Failure as failure:
            self._failure = failure
        except OSError as error:
            self._failure = Failure(f"its pipe: {error.strerror}", Cause.IO)
        finally:
            fd, self._fd = self._fd, -1
            close_fd(fd)  # the other end sees the end of the state
            os.eventfd_write(self._done, 1)

    def wait(self) -> bytes | None:
        """What came, None of a state that was sent. Raises Failure."""
        poll = select.poll()
        poll.register(self._done, select.POLLIN)
        if not poll.poll(WAIT_S * 1000):
            raise Failure(f"it was not through in {WAIT_S:.0f} s", Cause.GUEST)
        if self._failure is not None:
            raise self._failure
        return self._data

    def close(self) -> None:
        """Ends the transfer, through or not."""
        os.eventfd_write(self._stop, 1)
        self._thread.join()
        os.close(self._stop)
        os.close(self._done)


def sending(fd: int, data: bytes) -> Transfer:
    """Begins to write a state into the pipe."""
    left = memoryview(data)

    def move(transfer: Transfer) -> None:
        nonlocal left
        while left:
            transfer.ready()
            try:
                left = left[os.write(transfer.fd, left[:PIECE_BYTES]) :]
            except BlockingIOError:
                continue

    return Transfer(fd, move, select.POLLOUT)


def receiving(fd: int) -> Transfer:
    """Begins to read a state from the pipe, to its end."""

    def move(transfer: Transfer) -> bytes:
        parts: list[bytes] = []
        size = 0
        while True:
            transfer.ready()
            try:
                part = os.read(transfer.fd, PIECE_BYTES)
            except BlockingIOError:
                continue
            if not part:
                return b"".join(parts)
            size += len(part)
            if size > STATE_MAX_BYTES:
                raise Failure(f"it is larger than {STATE_MAX_BYTES} bytes", Cause.FORMAT)
            parts.append(part)

    return Transfer(fd, move, select.POLLIN)
