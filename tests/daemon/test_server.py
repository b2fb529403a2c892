"""The API's HTTP server: clients that hold it up, requests that make no sense, and its end."""

import contextlib
import http.client
import json
import os
import resource
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.daemon.conftest import Daemon
from virtiofsd_nydus.daemon.server import HttpServer, Request, listen_api

PATIENCE_S = 20.0


class Server:
    """A server that answers "ok" to everything; to /wait not before `go` is set. said: its own lines."""

    def __init__(self, path: Path, connections_max: int = 100) -> None:
        self.path, self.go, self.waiting = path, threading.Event(), threading.Event()
        self.said: list[str] = []
        self.http = HttpServer(listen_api(str(path)), self._answer, self._say, connections_max)
        self.more = threading.Condition()
        self.http.start()

    def _answer(self, request: Request) -> tuple[int, bytes]:
        if request.target == "/wait":
            self.waiting.set()
            assert self.go.wait(PATIENCE_S)
        return (200, b"ok") if request.method else (400, b"{}")

    def _say(self, line: str) -> None:
        with self.more:
            self.said.append(line)
            self.more.notify_all()

    def connect(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(PATIENCE_S)
        sock.connect(str(self.path))
        return sock


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    made: list[Server] = []

    def make(**options: int) -> Server:
        made.append(Server(tmp_path / "api.sock", **options))
        return made[-1]

    yield make
    for server in made:
        server.go.set()
        assert server.http.close(PATIENCE_S)


def ask(sock: socket.socket, target: str = "/", length: str = "0") -> int:
    """The status of one request on a connection that stays."""
    sock.sendall(f"GET {target} HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n".encode("latin-1"))
    answer = http.client.HTTPResponse(sock)
    answer.begin()
    answer.read()
    return answer.status


@contextlib.contextmanager
def no_descriptors() -> Iterator[None]:
    """Inside, this process cannot open anything."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.dup(0)  # the lowest one
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_moment_without_descriptors(serve: Callable[..., Server]) -> None:
    server = serve()
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(PATIENCE_S)
        with no_descriptors():
            sock.connect(str(server.path))
            with server.more:
                assert server.more.wait_for(lambda: server.said, PATIENCE_S)
        assert ask(sock) == 200
    assert server.said == ["API: cannot take a connection: Too many open files; trying again"]


def test_idle_clients_make_room(serve: Callable[..., Server]) -> None:
    server = serve(connections_max=3)
    idle = [server.connect() for _ in range(3)]
    assert [ask(sock) for sock in idle] == [200] * 3
    assert ask(idle[0]) == 200  # the second is the one that has been idle for longest
    with server.connect() as sock:
        assert ask(sock) == 200
        assert idle[1].recv(1) == b""
        assert [ask(idle[0]), ask(idle[2])] == [200, 200]
    for sock in idle:
        sock.close()


def test_a_client_with_a_request_under_way_is_kept(serve: Callable[..., Server]) -> None:
    server = serve(connections_max=1)
    with server.connect() as busy:
        busy.sendall(b"GET /wait HTTP/1.1\r\nHost: x\r\n\r\n")
        assert server.waiting.wait(PATIENCE_S)
        with server.connect() as sock:
            assert sock.recv(1) == b""
        server.go.set()
        answer = http.client.HTTPResponse(busy)
        answer.begin()
        assert answer.read() == b"ok"


@pytest.mark.parametrize("length", ["\xb2", "-1", "+1", "1_0", "0x1", "1" * 5000, "99999999", ""])
def test_lengths_that_are_none(serve: Callable[..., Server], length: str) -> None:
    server = serve()
    with server.connect() as sock:
        assert ask(sock, length=length) == 400
        assert sock.recv(1) == b""
    assert server.said == []


def test_the_end_waits_for_an_answer(serve: Callable[..., Server]) -> None:
    server = serve()
    with server.connect() as sock, server.connect() as idle:
        assert ask(idle) == 200
        sock.sendall(b"GET /wait HTTP/1.1\r\nHost: x\r\n\r\n")
        assert server.waiting.wait(PATIENCE_S)
        assert not server.http.close(0.01)
        assert idle.recv(1) == b""
        assert not server.path.exists()
        server.go.set()
        assert server.http.close(PATIENCE_S)
        answer = http.client.HTTPResponse(sock)
        answer.begin()
        assert answer.read() == b"ok"


def test_deep_json_is_a_bad_request(daemon: Callable[..., Daemon]) -> None:
    one = daemon(with_image=False)
    connection = http.client.HTTPConnection("localhost", timeout=PATIENCE_S)
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.connect(str(one.api))
    connection.request("PUT", "/api/v1/config", body="[" * 100_000)
    answer = connection.getresponse()
    assert (answer.status, json.loads(answer.read())["message"]) == (
        400,
        'ParseBody(Error("recursion limit exceeded", line: 1, column: 100000))',
    )
    connection.close()
