"""The API's HTTP server, on a unix socket.

A small one of our own: http.server costs 60 ms at start. One thread a connection, keep-alive, so that no client waits
for another's request. A client without a request under way is idle; when CONNECTIONS_MAX are connected, the one that
has been idle for longest makes room for a new one.
"""

import os
import socket
import struct
import threading
import time

from virtiofsd_nydus.listening import UnixListener, accept_all

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Protocol

    class Listener(Protocol):
        """A listening socket, as the server uses it (listening.UnixListener)."""

        socket: socket.socket

        def remove(self) -> None:
            """Removes its file."""

        def close(self) -> None:
            """The same, and closes the socket."""


BACKLOG = 128
HEAD_MAX_BYTES = 16 << 10
BODY_MAX_BYTES = 1 << 20
LENGTH_DIGITS_MAX = 10  # of a Content-Length; int() refuses thousands of digits by an exception
CONNECTIONS_MAX = 1000  # a thread each
SEND_MAX_S = 10  # a client that does not take its answer for this long is hung up on
REASONS = {
    200: "OK",
    204: "No Content",
    400: "Bad Request",
    404: "Not Found",
    500: "Internal Server Error",
    501: "Not Implemented",
    503: "Service Unavailable",
}


def listen_api(path: str) -> UnixListener:
    """Makes the API's socket. Launchers look for the file at once and then after 100 ms and more, so it is made before
    what takes long is imported; a client that connects early is answered once the daemon runs."""
    return UnixListener(path, "API socket", BACKLOG)


class Request:
    """One request. method "": its head makes no sense."""

    __slots__ = ("body", "keep", "method", "target")

    def __init__(self, method: str, target: str, body: bytes, keep: bool) -> None:
        self.method, self.target, self.body, self.keep = method, target, body, keep


class _Connection:
    """One client. idle_since: on the monotonic clock; 0 while a request is answered."""

    __slots__ = ("idle_since", "sock")

    def __init__(self, sock: socket.socket) -> None:
        self.sock, self.idle_since = sock, time.monotonic()


class HttpServer:
    """Listens from construction on, answers from start() to close().

    answer gives a request's status and body; it is called from many threads, and its exceptions end in status 500.
    answered is called by the same thread when that has been sent.
    say takes a line about this server's own troubles.
    """

    def __init__(
        self,
        listener: "Listener",
        answer: "Callable[[Request], tuple[int, bytes]]",
        say: "Callable[[str], None]",
        connections_max: int = CONNECTIONS_MAX,
        answered: "Callable[[], None]" = lambda: None,
    ) -> None:
        self._listener, self._answer, self._say, self._max = listener, answer, say, connections_max
        self._answered = answered
        self._stop = os.eventfd(0, os.EFD_CLOEXEC)
        self._changed = threading.Condition()
        self._connections: set[_Connection] = set()
        self._closing = False
        self._acceptor = threading.Thread(target=self._accept, name="api", daemon=True)

    def start(self) -> None:
        """Begins to answer."""
        self._acceptor.start()

    def close(self, within_s: float) -> bool:
        """Hangs up on all clients and removes the socket; a request that is being answered gets its answer. Whether
        all were answered within that time. Idempotent."""
        self._listener.remove()
        with self._changed:
            first, self._closing = not self._closing, True
        if first:
            os.eventfd_write(self._stop, 1)
            if self._acceptor.ident is not None:
                self._acceptor.join()
            os.close(self._stop)
            self._listener.close()
        with self._changed:
            for one in self._connections:
                _shut(one.sock, socket.SHUT_RD)  # no further request; the answer to the present one still goes out
            return self._changed.wait_for(lambda: not any(not one.idle_since for one in self._connections), within_s)

    def _accept(self) -> None:
        for sock in accept_all(self._listener.socket, self._stop, lambda line: self._say(f"API: {line}")):
            self._begin(sock)

    def _begin(self, sock: socket.socket) -> None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", SEND_MAX_S, 0))
        connection = _Connection(sock)
        with self._changed:
            if not self._make_room():
                sock.close()
                return
            self._connections.add(connection)
        try:
            threading.Thread(target=self._converse, args=(connection,), name="api-client", daemon=True).start()
        except RuntimeError:  # no thread to be had
            self._end(connection)

    def _make_room(self) -> bool:
        """Hangs up on the client that has been idle for longest where all places are taken. False: none is idle."""
        if len(self._connections) < self._max:
            return True
        oldest = min((one for one in self._connections if one.idle_since), key=lambda one: one.idle_since, default=None)
        if oldest is None:
            return False
        self._connections.discard(oldest)
        _shut(oldest.sock, socket.SHUT_RDWR)
        return True

    def _end(self, connection: _Connection) -> None:
        with self._changed:
            self._connections.discard(connection)
            self._changed.notify_all()
        connection.sock.close()

    # ---- one client

    def _converse(self, connection: _Connection) -> None:
        try:
            self._serve(connection)
        except OSError:
            pass  # the client went away
        except Exception as error:  # a fault of ours must cost this client only
            self._say(f"API: a client was hung up on by a fault of this program: {error!r}")
        finally:
            self._end(connection)

    def _serve(self, connection: _Connection) -> None:
        sock, pending = connection.sock, b""
        while True:
            while b"\r\n\r\n" not in pending:
                if len(pending) > HEAD_MAX_BYTES:
                    return
                more = sock.recv(65536)
                if not more:
                    return
                pending += more
            head, pending = pending.split(b"\r\n\r\n", 1)
            lines = head.decode("latin-1").split("\r\n")
            headers = {k.strip().lower(): v.strip() for k, _, v in (line.partition(":") for line in lines[1:])}
            if headers.get("expect", "").lower() == "100-continue":
                sock.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
            size = read_length(headers.get("content-length", "0"))
            if size > BODY_MAX_BYTES or size < 0:
                self._respond(connection, Request("", "", b"", False))
                return
            while len(pending) < size:
                more = sock.recv(65536)
                if not more:
                    return
                pending += more
            body, pending = pending[:size], pending[size:]
            words = lines[0].split(" ")
            keep = headers.get("connection", "").lower() != "close" and words[-1] != "HTTP/1.0"
            method, target = words[:2] if len(words) == 3 else ("", "")
            if not self._respond(connection, Request(method, target, body, keep)):
                return

    def _respond(self, connection: _Connection, request: Request) -> bool:
        """Answers. False: the connection is over."""
        with self._changed:
            if self._closing or connection not in self._connections:
                return False
            connection.idle_since = 0.0
        try:
            status, body = self._answer(request)
            _send(connection.sock, status, body, request.keep)
            self._answered()
        finally:
            with self._changed:
                connection.idle_since = time.monotonic()
                self._changed.notify_all()
        return request.keep


def read_length(text: str) -> int:
    """A Content-Length; -1: it is none."""
    return int(text) if text.isascii() and text.isdigit() and len(text) <= LENGTH_DIGITS_MAX else -1


def _send(sock: socket.socket, status: int, body: bytes, keep: bool) -> None:
    head = [
        f"HTTP/1.1 {status} {REASONS.get(status, 'Error')}",
        "Server: Nydus API",
        f"Connection: {'keep-alive' if keep else 'close'}",
    ]
    if status != 204:
        kind = "application/json" if body[:1] in (b"{", b"[") else "text/plain; version=0.0.4; charset=utf-8"
        head += [f"Content-Type: {kind}", f"Content-Length: {len(body)}"]
    sock.sendall("\r\n".join([*head, "", ""]).encode() + body)


def _shut(sock: socket.socket, how: int) -> None:
    try:
        sock.shutdown(how)
    except OSError:
        pass
