"""The listening socket: made, refused, inherited; several front-ends; what remains after the end."""

import contextlib
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.vhost.conftest import PATIENCE_S, QUEUES
from virtiofsd_nydus.errors import Failure
from virtiofsd_nydus.fakeguest.frontend import HungUp, VhostFrontend
from virtiofsd_nydus.listening import PATH_MAX_BYTES
from virtiofsd_nydus.vhost import messages as m
from virtiofsd_nydus.vhost.device import EngineDevice
from virtiofsd_nydus.vhost.server import VhostServer

NewDevice = Callable[[], EngineDevice]


class Lines:
    """A log that can be waited on."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.more = threading.Condition()

    def __call__(self, level: int, text: str, **fields: object) -> None:
        with self.more:
            self.lines.append(text)
            self.more.notify_all()

    def wait_for(self, part: str, count: int = 1) -> None:
        with self.more:
            assert self.more.wait_for(lambda: sum(part in line for line in self.lines) >= count, PATIENCE_S), self.lines


@pytest.fixture
def say() -> Lines:
    return Lines()


@contextlib.contextmanager
def serving(new_device: NewDevice, say: Lines, **options: Any) -> Iterator[VhostServer]:
    server = VhostServer(new_device, say=say, **options)
    server.start()
    try:
        yield server
    finally:
        server.close()


def queue_count(front: VhostFrontend) -> int:
    return front.get_u64(m.GET_QUEUE_NUM)


def test_several_front_ends_and_another_after_them(new_device: NewDevice, say: Lines, tmp_path: Path) -> None:
    path = tmp_path / "sock"
    with serving(new_device, say, path=str(path)):
        fronts = [VhostFrontend(path) for _ in range(3)]
        assert [queue_count(front) for front in fronts] == [QUEUES] * 3
        fronts[0].send(9999)  # one breaks the protocol
        with pytest.raises(HungUp):
            fronts[0].receive(9999)
        assert queue_count(fronts[1]) == QUEUES
        for front in fronts:
            front.close()
        say.wait_for("front-end disconnected", 2)
        again = VhostFrontend(path)
        assert queue_count(again) == QUEUES
        again.close()
    assert not path.exists()
    assert sum("9999" in line for line in say.lines) == 1


def test_close_hangs_up(new_device: NewDevice, say: Lines, tmp_path: Path) -> None:
    path = tmp_path / "sock"
    with serving(new_device, say, path=str(path)) as server:
        front = VhostFrontend(path)
        assert queue_count(front) == QUEUES
        server.close()
        with pytest.raises(HungUp):
            queue_count(front)
        front.close()


def test_stale_socket_is_replaced(new_device: NewDevice, say: Lines, tmp_path: Path) -> None:
    path = tmp_path / "sock"
    with socket.socket(socket.AF_UNIX) as old:
        old.bind(str(path))
    with serving(new_device, say, path=str(path)):
        front = VhostFrontend(path)
        assert queue_count(front) == QUEUES
        front.close()


@pytest.mark.parametrize("listening", [True, False])
def test_busy_socket(new_device: NewDevice, say: Lines, tmp_path: Path, listening: bool) -> None:
    path = tmp_path / "sock"
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        if listening:
            other.listen()
        with pytest.raises(Failure, match="in use"):
            VhostServer(new_device, say=say, path=str(path))
        if listening:  # the other one was not disturbed
            other.settimeout(0)
            with pytest.raises(BlockingIOError):
                other.accept()
    assert path.exists()


def test_bad_paths(new_device: NewDevice, say: Lines, tmp_path: Path) -> None:
    long = tmp_path / ("x" * (PATH_MAX_BYTES - len(str(tmp_path))))
    with pytest.raises(Failure, match="107"):
        VhostServer(new_device, say=say, path=str(long))
    with serving(new_device, say, path=str(long)[:-1]):
        pass
    with pytest.raises(Failure, match="No such file"):
        VhostServer(new_device, say=say, path=str(tmp_path / "none" / "sock"))
    (tmp_path / "file").write_text("precious")
    with pytest.raises(Failure, match="not a socket"):
        VhostServer(new_device, say=say, path=str(tmp_path / "file"))
    assert (tmp_path / "file").read_text() == "precious"


def test_inherited_listening_socket(new_device: NewDevice, say: Lines, tmp_path: Path) -> None:
    path = tmp_path / "sock"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()
    with serving(new_device, say, fd=listener.detach()):
        for _ in range(2):
            front = VhostFrontend(path)
            assert queue_count(front) == QUEUES
            front.close()
    assert path.exists()  # not ours to remove


def test_inherited_connection(new_device: NewDevice, say: Lines) -> None:
    ours, theirs = socket.socketpair()
    ended = threading.Event()
    with serving(new_device, say, fd=ours.detach(), ended=ended.set):
        theirs.settimeout(PATIENCE_S)
        theirs.sendall(m.HEADER.pack(m.GET_QUEUE_NUM, m.VERSION, 0))
        assert theirs.recv(100) == m.HEADER.pack(m.GET_QUEUE_NUM, 5, 8) + m.U64.pack(QUEUES)
        theirs.close()
        assert ended.wait(PATIENCE_S)


def test_descriptor_that_is_no_socket(new_device: NewDevice, say: Lines) -> None:
    read, write = os.pipe()
    for fd in (read, 9999):
        with pytest.raises(Failure, match=f"--fd {fd}"):
            VhostServer(new_device, say=say, fd=fd)
    with socket.socket(socket.AF_INET) as other, pytest.raises(Failure, match="local"):
        VhostServer(new_device, say=say, fd=other.fileno())
    os.close(read)
    os.close(write)
