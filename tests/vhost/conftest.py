"""A vhost-user session in this process: a socket pair, the real engine's device, an empty mount table behind it."""

import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from virtiofsd_nydus.engine import SESSION_RAFS, Engine, Vfs
from virtiofsd_nydus.errors import Failure
from virtiofsd_nydus.fakeguest.frontend import VhostFrontend
from virtiofsd_nydus.vhost.device import EngineDevice
from virtiofsd_nydus.vhost.session import Session

QUEUES = 3
PATIENCE_S = 10.0


class SocketFrontend(VhostFrontend):
    """The front-end's half over a socket that is connected already."""

    def __init__(self, sock: socket.socket) -> None:
        sock.settimeout(PATIENCE_S)
        self.socket = sock
        self.reply_ack = False


class Backend:
    """A session served by a thread. said: its log lines. failure: how it ended, None after a proper hang-up."""

    def __init__(self, new_device: Callable[[], EngineDevice]) -> None:
        ours, theirs = socket.socketpair()
        self.said: list[str] = []
        self.failure: Failure | None = None
        self.session = Session(ours, new_device(), self._say)
        self.front = SocketFrontend(theirs)
        self._sock = ours
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    @property
    def session_fd(self) -> int:
        return self._sock.fileno()

    def _say(self, level: int, text: str, **fields: object) -> None:
        self.said.append(text)

    def _run(self) -> None:
        try:
            self.session.run()
        except Failure as failure:
            self.failure = failure
        finally:
            self._sock.close()

    def end(self) -> Failure | None:
        """Waits for the session's end, after hanging up if it has not ended itself."""
        self.front.close()
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive()
        return self.failure

    def close(self) -> None:
        self.end()
        self.session.close()


@pytest.fixture
def engine() -> Iterator[Engine]:
    engine = Engine()
    yield engine
    engine.shutdown()
    engine.close()


@pytest.fixture
def new_device(engine: Engine) -> Iterator[Callable[[], EngineDevice]]:
    vfs = Vfs(engine, SESSION_RAFS)
    yield lambda: EngineDevice(engine, vfs, QUEUES)
    vfs.close()


@pytest.fixture
def backend(new_device: Callable[[], EngineDevice]) -> Iterator[Any]:
    running = Backend(new_device)
    yield running
    running.close()
