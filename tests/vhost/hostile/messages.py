"""What hostile front-ends say, and what the back-end must answer."""

import contextlib
import os
import socket
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from virtiofsd_nydus.fakeguest import frontend as vhost
from virtiofsd_nydus.fakeguest.frontend import HungUp, Refused, Request, VhostFrontend

PAGE = 4096
MEMORY = 1 << 20
USER = 0x7000_0000_0000


class Front(NamedTuple):
    """A connection past feature negotiation, and a file of guest memory."""

    front: VhostFrontend
    fd: int


def refused(front: VhostFrontend, request: int, payload: bytes = b"", fds: tuple[int, ...] = ()) -> None:
    """The back-end says no, or hangs up."""
    with pytest.raises((Refused, HungUp)):
        front.command(request, payload, fds, True)


def hung_up(front: VhostFrontend) -> None:
    assert front.hung_up(), "the back-end kept the connection"


def harmless(front: VhostFrontend, request: int, payload: bytes = b"", fds: tuple[int, ...] = ()) -> None:
    """Whatever it says."""
    with contextlib.suppress(Refused, HungUp, vhost.BadReply):
        front.command(request, payload, fds, True)


def add_region(
    front: Front, gpa: int, size: int, address: int, offset: int, fds: tuple[int, ...] | None = None
) -> None:
    front.front.command(
        Request.ADD_MEM_REG,
        vhost.pack_single_region((gpa, size, address, offset)),
        (front.fd,) if fds is None else fds,
        True,
    )


@contextlib.contextmanager
def odd_fd(kind: str) -> Iterator[int]:
    with contextlib.ExitStack() as stack:
        if kind == "regular file":
            fd = os.open("/proc/self/exe", os.O_RDONLY)
        elif kind == "directory":
            fd = os.open("/", os.O_RDONLY)
        elif kind == "null":
            fd = os.open("/dev/null", os.O_RDWR)
        elif kind == "closed pipe":
            fd, other = os.pipe()
            os.close(other)
        elif kind == "write end of a closed pipe":
            other, fd = os.pipe()
            os.close(other)
        elif kind == "full pipe":
            other, fd = os.pipe()
            stack.callback(os.close, other)
            os.set_blocking(fd, False)
            with contextlib.suppress(BlockingIOError):
                while True:
                    os.write(fd, bytes(65536))
            os.set_blocking(fd, True)
        elif kind == "full eventfd":
            fd = os.eventfd(0, os.EFD_CLOEXEC)
            os.eventfd_write(fd, 0xFFFF_FFFF_FFFF_FFFE)
        elif kind == "semaphore":
            fd = os.eventfd(0x7FFF_FFFF, os.EFD_CLOEXEC | os.EFD_NONBLOCK | os.EFD_SEMAPHORE)
        else:
            fd = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM).detach()
        stack.callback(os.close, fd)
        yield fd
