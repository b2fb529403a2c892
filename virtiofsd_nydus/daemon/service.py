"""The daemon itself: one engine, one mount table, sockets and fetch threads, and the order they start and stop in.

Ready before connected: start() opens the sockets and is RUNNING before anything talks to a network or imports what
takes long; a thread does that afterwards (docs/architecture.md, start-up).
"""

import os
import select
import signal
import socket
import threading

from virtiofsd_nydus import __version__
from virtiofsd_nydus import log as logs
from virtiofsd_nydus.daemon.answers import unexpected, unsupported
from virtiofsd_nydus.daemon.api import ApiServer
from virtiofsd_nydus.daemon.mounts import ImageMount, MountTable
from virtiofsd_nydus.daemon.report import Report
from virtiofsd_nydus.engine import SESSION_MIXED, SESSION_RAFS, Engine, Vfs
from virtiofsd_nydus.storage.pump import FetchPump
from virtiofsd_nydus.vhost.device import EngineDevice
from virtiofsd_nydus.vhost.server import VhostServer

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

QUEUES = 5  # hiprio and up to four request queues; the front-end uses as many as it has
STOP_TIMEOUT_S = 2.0  # how long a fetch thread stuck in its backend may hold up the end
LATE_TIMEOUT_S = 10.0  # how long what is loaded after RUNNING may, on a busy machine
SWITCH_INTERVAL_S = 0.0005  # a busy Python thread must not starve the fetch threads


def set_switch_interval() -> None:
    """Before the first thread is started."""
    import sys

    sys.setswitchinterval(SWITCH_INTERVAL_S)


class Sockets:
    """Where a daemon listens. sock or fd: for front-ends; apisock: for the API, with listener where it is made."""

    __slots__ = ("apisock", "fd", "listener", "sock")

    def __init__(
        self,
        *,
        sock: str | None = None,
        fd: int | None = None,
        apisock: str | None = None,
        listener: socket.socket | None = None,
    ) -> None:
        self.sock, self.fd, self.apisock, self.listener = sock, fd, apisock, listener


class Service:
    """The daemon. Construct, start(), wait(), stop()."""

    def __init__(
        self,
        log: logs.Log,
        *,
        instance_id: str | None = None,
        supervisor: str | None = None,
        read_deadline_ms: int = 0,
        allow_unverified: bool = False,
    ) -> None:
        self.log = log
        self._supervisor = supervisor
        self._exit_reader, self._exit_writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)  # a byte: end wait()
        self.engine = Engine(read_deadline_ms=read_deadline_ms, allow_unverified=allow_unverified)
        self.pump = FetchPump(self.engine)
        self.table = MountTable(self.pump, log, self._mounts_changed)
        self.report = Report(self.engine, self.table, log, instance_id, supervisor)
        self._vhost: VhostServer | None = None
        self._api: ApiServer | None = None
        self._log_thread: threading.Thread | None = None

    @property
    def state(self) -> str:
        """nydusd's word for it: INIT, READY, RUNNING or STOPPED."""
        return self.report.state

    # ---- life

    def start(self, sockets: Sockets, image: ImageMount | None = None, share: "tuple[str, str] | None" = None) -> None:
        """Returns RUNNING, or raises Failure with nothing left behind but what stop() removes. share: mount point and
        host directory."""
        vfs = self._open_table(image)
        if share:
            self.table.mount_share(*share)
        self._open_vhost(vfs, sockets, self.request_exit)
        if sockets.apisock:
            self._api = ApiServer(sockets.apisock, self, sockets.listener)
        self._run(socket=sockets.sock or f"fd {sockets.fd}")

    def _open_table(self, image: ImageMount | None) -> Vfs:
        """A session that begins with an image is complete: its INIT answers hold for images alone."""
        set_switch_interval()
        vfs = self.table.open(SESSION_RAFS if image else SESSION_MIXED)
        if image:
            self.table.mount_image(image)
        return vfs

    def _open_vhost(self, vfs: Vfs, sockets: Sockets, ended: "Callable[[], None] | None") -> None:
        self._vhost = VhostServer(
            lambda: EngineDevice(self.engine, vfs, QUEUES),
            path=sockets.sock,
            fd=sockets.fd,
            say=self.log.say,
            ended=ended,
        )

    def _run(self, **where: object) -> None:
        """From here on all sockets are answered."""
        if self._vhost:
            self._vhost.start()
        self.report.state = "RUNNING"
        if self._api:
            self._api.start()
        self.log.say(logs.INFO, "running", **where, version=__version__)
        self._start_late()

    def _start_late(self) -> None:
        self._log_thread = threading.Thread(target=self._after_start, name="log", daemon=True)
        self._log_thread.start()

    def catch_signals(self) -> None:
        """From here on SIGTERM and SIGINT end wait(), also one that comes before it. Main thread only."""
        # The interpreter's own handler writes to the pipe at once. A Python handler runs when the main thread comes
        # round to it, which it does not if the signal came just before it went to sleep on a lock.
        signal.set_wakeup_fd(self._exit_writer, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)

    def wait(self) -> None:
        """Returns at SIGTERM, SIGINT or an exit request. Main thread only."""
        self.catch_signals()
        select.select([self._exit_reader], [], [])

    def request_exit(self) -> None:
        """Ends wait(). From any thread."""
        try:
            os.write(self._exit_writer, b"\0")
        except BlockingIOError:  # full of such bytes
            pass

    def exit_by_api(self) -> None:
        """PUT exit: ends the process; host mounts stay."""
        self.request_exit()

    # What only a host mount has (daemon/host.py)

    def start_by_api(self) -> None:
        raise unexpected("Start")

    def send_fd(self) -> None:
        raise unsupported()

    def take_over(self) -> None:
        raise unexpected("Takeover")

    def _mounts_changed(self) -> None:
        pass

    def _close_host(self) -> None:
        pass

    def stop(self) -> None:
        """Ends everything in the order that leaves no pointer behind: queues, jobs, mounts, engine."""
        was_running, self.report.state = self.state == "RUNNING", "STOPPED"
        if self._api:
            self._api.close()
        self._close_host()
        if self._vhost:
            self._vhost.close()
        self.table.cancel_prefetch()
        self.engine.shutdown()
        threads_left = False
        if self._log_thread:  # first: it may be about to start fetch threads
            self._log_thread.join(LATE_TIMEOUT_S)
            threads_left = self._log_thread.is_alive()
        threads_left |= not self.pump.join(STOP_TIMEOUT_S)
        if was_running:  # a start that failed is told in one line, by the verb
            self.log.say(logs.INFO, "stopped")
        self.log.close()
        if threads_left:
            os._exit(0)  # a fetch thread sits in a dead network: the cache is safe at any moment, so just go
        self.table.close()
        self.engine.close()

    def _after_start(self) -> None:
        """Loads what would cost start-up time, the fetch threads' imports and the log's. Then says the engine's lines
        until it is shut down."""
        self.pump.start()
        self._load_backends()
        self.log.activate()
        self.table.begin_prefetch()
        for event in self.engine.events():
            self.report.note_event(event)

    @staticmethod
    def _load_backends() -> None:
        """What the first mount over the API would wait 10 ms for, of a registry 50 ms."""
        import virtiofsd_nydus.storage.factory
        import virtiofsd_nydus.storage.localfs
        import virtiofsd_nydus.storage.registry  # noqa: F401
