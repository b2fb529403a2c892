"""A server that makes its clients wait: each kind keeps one step of an exchange from ending, as long as the server is
open. What a client does about it is the test's affair.
"""

import socket
import threading
from typing import Self

KINDS = {
    "deaf": "takes no connection: the queue of those that wait for accept() is full",
    "mute": "takes connections and says nothing, not even TLS",
    "tls": "sends a TLS record, a byte at a time",
    "headers": "sends a status line, then headers, a byte at a time",
    "body": "sends an answer to a range, its body a byte at a time",
    "error": "sends status 500, its body a byte at a time",
    "redirect": "sends a redirect to itself, its body a byte at a time",
    "redirects": "redirects to itself, each answer half a second late",
    "retry": "sends status 503 at once, and Retry-After with many seconds",
}
PAUSE_S = 0.1


class SickServer:
    """host: where it is. requests: how many connections said something."""

    def __init__(self, kind: str) -> None:
        assert kind in KINDS, kind
        self.kind = kind
        self.requests = 0
        self._closing = threading.Event()
        self._held: list[socket.socket] = []
        self._listener = socket.socket()
        self._listener.bind(("127.0.0.1", 0))
        self._listener.listen(0 if kind == "deaf" else 64)
        self.host = f"127.0.0.1:{self._listener.getsockname()[1]}"

    def __enter__(self) -> Self:
        if self.kind == "deaf":
            self._fill_queue()
        else:
            threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._closing.set()
        self._listener.close()
        for one in self._held:
            one.close()

    def _fill_queue(self) -> None:
        """Connects until one connection does not come about any more."""
        for _ in range(64):
            one = socket.socket()
            one.settimeout(0.3)
            self._held.append(one)
            try:
                one.connect(self._listener.getsockname())
            except TimeoutError:
                return

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self._held.append(connection)
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        try:
            while connection.recv(65536):
                self.requests += 1
                self._answer(connection)
        except OSError:
            pass

    def _answer(self, connection: socket.socket) -> None:
        kind = self.kind
        if kind == "mute":
            self._closing.wait()
        elif kind == "tls":
            self._trickle(connection, b"\x16\x03\x03\x3f\xff\x02\x00\x3f\xf0" + bytes(4096))
        elif kind == "headers":
            self._trickle(connection, b"HTTP/1.1 206 Partial Content\r\nX: " + b"x" * 4096)
        elif kind == "body":
            connection.sendall(b"HTTP/1.1 206 Partial Content\r\nContent-Range: bytes 0-4095/1000000\r\n")
            connection.sendall(b"Content-Length: 4096\r\n\r\n")
            self._trickle(connection, bytes(4096))
        elif kind == "error":
            connection.sendall(b"HTTP/1.1 500 Sick\r\nContent-Length: 4096\r\n\r\n")
            self._trickle(connection, bytes(4096))
        elif kind == "redirect":
            connection.sendall(b"HTTP/1.1 307 There\r\nLocation: /there\r\nContent-Length: 4096\r\n\r\n")
            self._trickle(connection, bytes(4096))
        elif kind == "redirects":
            self._closing.wait(0.5)
            connection.sendall(b"HTTP/1.1 307 There\r\nLocation: /there\r\nContent-Length: 0\r\n\r\n")
        elif kind == "retry":
            connection.sendall(b"HTTP/1.1 503 Later\r\nRetry-After: 20\r\nContent-Length: 0\r\n\r\n")

    def _trickle(self, connection: socket.socket, data: bytes) -> None:
        for byte in data:
            connection.sendall(bytes([byte]))
            if self._closing.wait(PAUSE_S):
                return
