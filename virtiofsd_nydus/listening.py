"""Listening unix sockets: made at a path, told from another process's, accepted on, removed. For the API and for
front-ends. Light: the daemon makes the API's before it imports what takes long."""

import errno
import os
import select
import socket
import stat
import time

from virtiofsd_nydus.errors import Cause, Failure

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

GROUP_MODE = 0o660
PATH_MAX_BYTES = 107  # struct sockaddr_un's sun_path is 108 with its NUL
ENDING_S = 0.5  # what the last processes of a killed daemon have to end in
RETRY_S = 0.2  # between two looks for a descriptor
GONE = (errno.EBADF, errno.EINVAL, errno.ENOTSOCK)  # what accept(2) says of a listener that is none any more


class UnixListener:
    """A socket that listens at path. what: how messages name it ("socket", "API socket").

    A socket file without a living server is replaced; one that another process listens on is left alone. group: the
    file is given to this group, whose members may connect. Raises Failure.
    """

    def __init__(self, path: str, what: str, backlog: int, group: str | None = None) -> None:
        raw = os.fsencode(path)
        if len(raw) > PATH_MAX_BYTES:
            raise Failure(
                f"{what} path {path} has {len(raw)} bytes, at most {PATH_MAX_BYTES} are possible: use a shorter one",
                Cause.IO,
            )
        gid = None if group is None else _find_group(group)
        self.path = path
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            _remove_stale(path, what)
            self.socket.bind(raw)
            self._inode = os.stat(path).st_ino  # noqa: PTH116
            if gid is not None:  # a socket that does not listen yet refuses every process
                os.chown(path, -1, gid, follow_symlinks=False)
                os.chmod(path, GROUP_MODE)  # noqa: PTH101
            self.socket.listen(backlog)
        except OSError as error:
            self.socket.close()
            raise Failure(f"cannot listen on {what} {path}: {error.strerror}", Cause.IO) from error
        except Failure:
            self.socket.close()
            raise

    @classmethod
    def adopt(cls, path: str, fd: int, inode: int) -> "UnixListener":
        """One that this process had before an exec: socket, path and the file's inode number."""
        made = cls.__new__(cls)
        made.path, made.socket, made._inode = path, socket.socket(fileno=fd), inode
        return made

    @property
    def inode(self) -> int:
        """Of the socket's file, as it was made."""
        return self._inode

    def remove(self) -> None:
        """Removes the file, unless it is another process's by now."""
        try:
            if os.lstat(self.path).st_ino == self._inode:
                os.unlink(self.path)  # noqa: PTH108
        except OSError:
            pass

    def close(self) -> None:
        """Removes the file and closes the socket. Idempotent."""
        if self.socket.fileno() >= 0:
            self.remove()
            self.socket.close()


def _find_group(name: str) -> int:
    import grp

    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        raise Failure(f"--socket-group {name}: this host has no such group", Cause.IO) from None


def _remove_stale(path: str, what: str) -> None:
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise Failure(f"{what} path {path} exists and is not a socket: remove it or use another", Cause.IO)
    # The processes of a daemon that was killed hold its sockets for a moment more.
    until = time.monotonic() + ENDING_S
    while _is_served(path):
        if time.monotonic() < until:
            time.sleep(ENDING_S / 50)
            continue
        raise Failure(f"{what} {path} is in use by another process: stop it or use another path", Cause.IO)
    os.unlink(path)  # noqa: PTH108


def _is_served(path: str) -> bool:
    """A datagram socket cannot connect to a stream socket, so a living server is told apart and never disturbed."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as probe:
        return probe.connect_ex(path) != errno.ECONNREFUSED


def accept_all(listener: socket.socket, stop_fd: int, say: "Callable[[str], None]") -> "Iterator[socket.socket]":
    """Gives each connection, until stop_fd is readable.

    A connection that cannot be taken for want of descriptors or memory stays in the backlog and is tried again. say
    takes a line when that begins, and when the listener itself is of no use any more, which ends it.
    """
    poll, stopping = select.poll(), select.poll()
    poll.register(listener, select.POLLIN)
    poll.register(stop_fd, select.POLLIN)
    stopping.register(stop_fd, select.POLLIN)
    listener.setblocking(False)  # another process may hold the same socket and take the connection
    short = False
    while True:
        if stop_fd in dict(poll.poll()):
            return
        try:
            connection, _ = listener.accept()
        except (BlockingIOError, ConnectionAbortedError, InterruptedError):
            continue
        except OSError as error:
            if error.errno in GONE:
                say(f"cannot take connections any more: {error.strerror}")
                return
            if not short:
                say(f"cannot take a connection: {error.strerror}; trying again")
            short = True
            if stopping.poll(RETRY_S * 1000):
                return
            continue
        short = False
        connection.setblocking(True)
        yield connection
