"""The vhost-user socket: ours to listen on, or inherited. Each front-end gets a thread and a device of its own."""

import errno
import os
import select
import socket
import stat
import threading

from virtiofsd_nydus import log as logs
from virtiofsd_nydus.errors import Cause, Failure
from virtiofsd_nydus.vhost.session import Session

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from virtiofsd_nydus.vhost.session import Say
    from virtiofsd_nydus.vhost.state import Device

PATH_MAX_BYTES = 107  # struct sockaddr_un's sun_path is 108 with its NUL
BACKLOG = 16
JOIN_TIMEOUT_S = 10.0


def listen_at(path: str) -> socket.socket:
    """Makes a listening socket at path. A socket file without a living server is replaced. Raises Failure."""
    raw = os.fsencode(path)
    if len(raw) > PATH_MAX_BYTES:
        raise Failure(
            f"socket path {path} has {len(raw)} bytes, at most {PATH_MAX_BYTES} are possible: use a shorter one",
            Cause.IO,
        )
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        _remove_stale(path)
        sock.bind(raw)
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        raise Failure(f"cannot listen on socket {path}: {error.strerror}", Cause.IO) from error
    except Failure:
        sock.close()
        raise
    return sock


def _remove_stale(path: str) -> None:
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise Failure(f"socket path {path} exists and is not a socket: remove it or use another", Cause.IO)
    # A datagram socket cannot connect to a stream socket, so a living server is told apart and never disturbed.
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as probe:
        code = probe.connect_ex(path)
    if code != errno.ECONNREFUSED:
        raise Failure(f"socket {path} is in use by another process: stop it or use another path", Cause.IO)
    os.unlink(path)  # noqa: PTH108


def adopt_fd(fd: int) -> tuple[socket.socket, bool]:
    """An inherited descriptor, and whether it listens (else it is connected). Raises Failure."""
    try:
        sock = socket.socket(fileno=fd)
    except OSError as error:
        raise Failure(f"--fd {fd} is not an open socket: {error.strerror}", Cause.IO) from error
    if sock.family != socket.AF_UNIX or sock.type != socket.SOCK_STREAM:
        sock.detach()
        raise Failure(f"--fd {fd} is not a stream socket of the local machine", Cause.IO)
    os.set_inheritable(fd, False)
    sock.setblocking(True)
    return sock, bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))


class VhostServer:
    """Listens from construction on, serves from start() to close().

    new_device makes the device of one front-end. path or fd, not both. ended is called when a connected fd's only
    front-end has hung up.
    """

    def __init__(
        self,
        new_device: "Callable[[], Device]",
        *,
        path: str | None = None,
        fd: int | None = None,
        say: "Say",
        ended: "Callable[[], None] | None" = None,
    ) -> None:
        self._new_device, self._say, self._ended = new_device, say, ended
        self._path: str | None = None
        self._inode = 0
        if fd is not None:
            self._sock, self._listens = adopt_fd(fd)
        elif path is not None:
            self._sock, self._listens = listen_at(path), True
            self._path, self._inode = path, os.stat(path).st_ino  # noqa: PTH116
        else:
            raise Failure("give a socket path or a descriptor", Cause.IO)
        self._stop = os.eventfd(0, os.EFD_CLOEXEC)
        self._lock = threading.Lock()
        self._closing = False
        self._connections: dict[threading.Thread, socket.socket] = {}
        self._acceptor: threading.Thread | None = None

    def start(self) -> None:
        """Begins to take front-ends."""
        if self._listens:
            self._acceptor = threading.Thread(target=self._accept, name="vhost-accept", daemon=True)
            self._acceptor.start()
        else:
            self._begin(self._sock)

    def close(self) -> None:
        """Hangs up on every front-end, waits for their devices to be gone, removes the socket. Idempotent."""
        with self._lock:
            if self._closing:
                return
            self._closing = True
            open_now = list(self._connections.items())
            for _, sock in open_now:
                try:
                    sock.shutdown(socket.SHUT_RDWR)
                except OSError:
                    pass
        os.eventfd_write(self._stop, 1)
        if self._acceptor:
            self._acceptor.join()
        for thread, _ in open_now:
            thread.join(JOIN_TIMEOUT_S)
        self._sock.close()
        os.close(self._stop)
        if self._path is not None:
            try:
                if os.lstat(self._path).st_ino == self._inode:
                    os.unlink(self._path)  # noqa: PTH108
            except OSError:
                pass

    def _accept(self) -> None:
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        poll.register(self._stop, select.POLLIN)
        self._sock.setblocking(False)  # another process may hold the same socket and take the front-end
        while True:
            ready = dict(poll.poll())
            if self._stop in ready:
                return
            try:
                connection, _ = self._sock.accept()
            except (BlockingIOError, ConnectionAbortedError, InterruptedError):
                continue
            except OSError as error:
                self._say(logs.ERROR, f"cannot take a front-end: {error.strerror}")
                if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    return
                # It stays in the backlog: look again when something may have been closed.
                stopping = select.poll()
                stopping.register(self._stop, select.POLLIN)
                if stopping.poll(1000):
                    return
                continue
            connection.setblocking(True)
            self._begin(connection)

    def _begin(self, sock: socket.socket) -> None:
        thread = threading.Thread(target=self._serve, args=(sock,), name="vhost", daemon=True)
        with self._lock:
            if self._closing:
                sock.close()
                return
            self._connections[thread] = sock
            try:
                thread.start()
            except RuntimeError:
                del self._connections[thread]
                sock.close()
                self._say(logs.ERROR, "a front-end was turned away: no more threads can be started")

    def _serve(self, sock: socket.socket) -> None:
        session = None
        try:
            self._say(logs.INFO, "front-end connected")
            session = Session(sock, self._new_device(), self._say)
            session.run()
            self._say(logs.INFO, "front-end disconnected")
        except Failure as failure:
            self._say(logs.ERROR, str(failure), cause=failure.cause.name.lower())
        except Exception as error:  # a fault of ours must cost this front-end only
            self._say(logs.ERROR, f"vhost-user session ended by a fault of this program: {error!r}")
        finally:
            if session is not None:
                session.close()
            with self._lock:
                self._connections.pop(threading.current_thread(), None)
                sock.close()
        if not self._listens and self._ended is not None and not self._closing:
            self._ended()
