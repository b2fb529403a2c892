"""The vhost-user socket: ours to listen on, or inherited. Each front-end gets a thread and a device of its own."""

import os
import socket
import threading
import time
from functools import partial

from virtiofsd_nydus import log as logs
from virtiofsd_nydus.errors import Cause, Failure
from virtiofsd_nydus.listening import UnixListener, accept_all
from virtiofsd_nydus.vhost.lines import LineLimit
from virtiofsd_nydus.vhost.session import Session

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from virtiofsd_nydus.vhost.device import EngineDevice
    from virtiofsd_nydus.vhost.session import Say
    from virtiofsd_nydus.vhost.state import Migrator

BACKLOG = 16
CLOSE_S = 10.0


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
    front-end has hung up. new_migrator makes what takes a device's session to other processes and back.
    """

    def __init__(
        self,
        new_device: "Callable[[], EngineDevice]",
        *,
        path: str | None = None,
        fd: int | None = None,
        say: "Say",
        ended: "Callable[[], None] | None" = None,
        new_migrator: "Callable[[EngineDevice], Migrator] | None" = None,
    ) -> None:
        self._new_device, self._say, self._ended = new_device, say, ended
        self._new_migrator = new_migrator
        # A front-end that floods must not hide who else comes and goes
        self._tell, self._complain = LineLimit(say), LineLimit(say)
        self._count = 0  # front-ends so far
        self._listener: UnixListener | None = None
        if fd is not None:
            self._sock, self._listens = adopt_fd(fd)
        elif path is not None:
            self._listener = UnixListener(path, "socket", BACKLOG)
            self._sock, self._listens = self._listener.socket, True
        else:
            raise Failure("give a socket path or a descriptor", Cause.IO)
        self._stop = os.eventfd(0, os.EFD_CLOEXEC)
        self._lock = threading.Lock()
        self._closing = False
        self._connections: dict[threading.Thread, socket.socket] = {}
        self._acceptor: threading.Thread | None = None

    def count_connections(self) -> int:
        """How many front-ends are connected."""
        with self._lock:
            return len(self._connections)

    def start(self) -> None:
        """Begins to take front-ends."""
        if self._listens:
            self._acceptor = threading.Thread(target=self._accept, name="vhost-accept", daemon=True)
            self._acceptor.start()
        else:
            self._begin(self._sock)

    def close(self, within_s: float = CLOSE_S) -> bool:
        """Hangs up on every front-end, removes the socket, waits for the devices to be gone. Idempotent.

        False: some were not gone within that time, because a request in them waits for storage. What they use, the
        mount table and the engine, must not be freed then.
        """
        until = time.monotonic() + within_s
        with self._lock:
            first, self._closing = not self._closing, True
            open_now = list(self._connections.items())
            for _, sock in open_now:
                try:
                    sock.shutdown(socket.SHUT_RDWR)
                except OSError:
                    pass
        if first:
            os.eventfd_write(self._stop, 1)
            if self._acceptor:
                self._acceptor.join()
            if self._listener:
                self._listener.close()
            self._sock.close()
        for thread, _ in open_now:
            thread.join(max(0.0, until - time.monotonic()))
        return not any(thread.is_alive() for thread, _ in open_now)

    def _accept(self) -> None:
        for connection in accept_all(self._sock, self._stop, lambda line: self._say(logs.ERROR, f"vhost-user: {line}")):
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
        with self._lock:
            self._count += 1
            number = self._count
        try:
            self._tell(logs.INFO, "front-end connected", front_end=number)
            device = self._new_device()
            device.set_number(number)
            if self._new_migrator:
                device.migrator = self._new_migrator(device)
            session = Session(sock, device, partial(self._complain, front_end=number))
            session.run()
            self._tell(logs.INFO, "front-end disconnected", front_end=number)
        except Failure as failure:
            self._complain(logs.ERROR, str(failure), front_end=number, cause=failure.cause.name.lower())
        except Exception as error:  # a fault of ours must cost this front-end only
            text = f"vhost-user session ended by a fault of this program: {error!r}"
            self._complain(logs.ERROR, text, front_end=number)
        finally:
            self._end(session, sock)
        if not self._listens and self._ended is not None and not self._closing:
            self._ended()

    def _end(self, session: Session | None, sock: socket.socket) -> None:
        """Frees what the front-end had. An error of that must not keep its place."""
        try:
            if session is not None:
                session.close()
        except Exception as error:
            self._complain(logs.ERROR, f"vhost-user session not ended in order: {error!r}")
        finally:
            with self._lock:
                self._connections.pop(threading.current_thread(), None)
                sock.close()
