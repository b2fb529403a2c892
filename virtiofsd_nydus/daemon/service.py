"""The daemon itself: one engine, one mount table, sockets and fetch threads, and the order they start and stop in.

Ready before connected: start() opens the sockets and is RUNNING before anything talks to a network or imports what
takes long; a thread does that afterwards (docs/architecture.md, start-up).
"""

import os
import select
import signal
import sys
import threading
from contextlib import contextmanager

from virtiofsd_nydus import __version__
from virtiofsd_nydus import log as logs
from virtiofsd_nydus.daemon.answers import unexpected, unsupported
from virtiofsd_nydus.daemon.api import make_server
from virtiofsd_nydus.daemon.migration import Migration
from virtiofsd_nydus.daemon.mounts import ImageMount, MountTable
from virtiofsd_nydus.daemon.report import Report
from virtiofsd_nydus.daemon.server import HttpServer, listen_api
from virtiofsd_nydus.engine import SESSION_MIXED, SESSION_RAFS, Engine, Vfs, default_seccomp
from virtiofsd_nydus.errors import Failure
from virtiofsd_nydus.listening import UnixListener
from virtiofsd_nydus.storage.pump import FetchPump
from virtiofsd_nydus.vhost.device import DiskDevice, EngineDevice
from virtiofsd_nydus.vhost.server import VhostServer

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import NoReturn

    from virtiofsd_nydus.storage.config import ImageConfig

QUEUES = 5  # hiprio and up to four request queues; the front-end uses as many as it has
STOP_TIMEOUT_S = 2.0  # how long a fetch thread stuck in its backend may hold up the end
STOP_DEADLINE_S = 4.0  # of a daemon's whole stop; launchers wait five seconds before they kill
API_CLOSE_S = 1.0  # how long a request of the API may hold up the end
LAST_LINE_S = 0.8  # more, for the line that says so; the rest of the five
LATE_TIMEOUT_S = 10.0  # how long what is loaded after RUNNING may, on a busy machine
SWITCH_INTERVAL_S = 0.0005  # a busy Python thread must not starve the fetch threads


def set_switch_interval() -> None:
    """Before the first thread is started."""
    sys.setswitchinterval(SWITCH_INTERVAL_S)


class StopWatch:
    """Ends the process when stopping takes longer than within_s, and says at which step."""

    def __init__(self, log: logs.Log, within_s: float | None, failure: Failure | None) -> None:
        self._log, self._failure, self._step = log, failure, ""
        self._done = threading.Event()
        if within_s is not None:
            threading.Thread(target=self._watch, args=(within_s,), name="stop", daemon=True).start()

    @contextmanager
    def step(self, waits_for: str) -> "Iterator[None]":
        """What is waited for inside the context."""
        self._step = waits_for
        yield

    def done(self) -> None:
        """Whether all has ended."""
        self._done.set()

    def end_now(self) -> "NoReturn":
        """Ends the process as it is."""
        if self._failure is not None:
            print(f"virtiofsd-nydus: {self._failure}", file=sys.stderr, flush=True)
        # The log may be waiting for an import that another thread does
        saying = threading.Thread(target=self._say_left, daemon=True)
        saying.start()
        saying.join(LAST_LINE_S)
        os._exit(0 if self._failure is None else 1)

    def _say_left(self) -> None:
        self._log.say(logs.WARNING, f"stopped without waiting for {self._step}")
        self._log.close()

    def _watch(self, within_s: float) -> None:
        if not self._done.wait(within_s):
            self.end_now()


class Sockets:
    """Where a daemon listens. sock or fd: for front-ends; apisock: for the API, with listener where it is made."""

    __slots__ = ("apisock", "fd", "listener", "sock")

    def __init__(
        self,
        *,
        sock: str | None = None,
        fd: int | None = None,
        apisock: str | None = None,
        listener: UnixListener | None = None,
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
        poll_us: int = 0,
        allow_unverified: bool = False,
        seccomp: str | None = None,
        device: str = "fs",
    ) -> None:
        self.log, self.device_kind = log, device
        self._supervisor = supervisor
        self._exit_reader, self._exit_writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)  # a byte: end wait()
        self.engine = Engine(
            read_deadline_ms=read_deadline_ms,
            poll_us=poll_us,
            allow_unverified=allow_unverified,
            seccomp=seccomp or default_seccomp("kill"),
        )
        self.pump = FetchPump(self.engine)
        self.table = MountTable(self.pump, log, self._mounts_changed)
        self.report = Report(self.engine, self.table, log, instance_id, supervisor)
        self.migration_config: Callable[[], ImageConfig] | None = None  # of images that only a migration's state names
        self._vhost: VhostServer | None = None
        self._api: HttpServer | None = None
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
            self._api = make_server(self, sockets.listener or listen_api(sockets.apisock))
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
            lambda: self.make_device(self.device_kind),
            path=sockets.sock,
            fd=sockets.fd,
            say=self.log.say,
            ended=ended,
            new_migrator=lambda device: Migration(
                device, self.table, self.log, self.migration_config, self._count_front_ends
            ),
        )

    def _count_front_ends(self) -> int:
        return self._vhost.count_connections() if self._vhost else 0

    def make_device(self, kind: str) -> EngineDevice:
        """A device for one front-end: fs of the mount table, blk of the one image that is mounted. Raises Failure."""
        assert self.table.vfs is not None
        if kind == "fs":
            return EngineDevice(self.engine, self.table.vfs, QUEUES)
        if kind != "blk":
            raise Failure(f"there are no devices of kind {kind!r}")
        return DiskDevice(self.engine, self.table.vfs, QUEUES, self.table.pinned_image())

    def _run(self, **where: object) -> None:
        """Answers all sockets from here on."""
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
        """Makes SIGTERM and SIGINT end wait(), also one that comes before wait() is called. Main thread only."""
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

    # What only a worker has (keeper/worker.py)

    def upgrade(self, python: str) -> None:
        raise unsupported()

    def note_answer(self) -> None:
        pass

    def _mounts_changed(self) -> None:
        pass

    def _close_host(self) -> None:
        pass

    def stop(self, within_s: float | None = None, failure: Failure | None = None) -> None:
        """Ends everything in the order that leaves no pointer behind: queues, jobs, mounts, engine.

        What waits for storage that does not answer must not hold the end up. After within_s (None: the steps' own
        limits) the process ends, whatever is left; so it does when a thread is left that may use what would be freed.
        The cache is safe at any moment. failure: why a start failed, told then, with status 1.
        """
        was_running, self.report.state = self.state == "RUNNING", "STOPPED"
        watch = StopWatch(self.log, within_s, failure)
        ended = True
        with watch.step("requests of the API"):
            if self._api:
                ended &= self._api.close(API_CLOSE_S)
            ended &= self.table.end_changes(API_CLOSE_S)
        with watch.step("the host mount"):
            self._close_host()
        with watch.step("front-ends, a request of which waits for its storage"):
            if self._vhost:
                ended &= self._vhost.close()
        if not ended:
            watch.end_now()
        with watch.step("threads that fetch"):
            self.table.cancel_prefetch()
            self.engine.shutdown()
            if self._log_thread:  # first: it may be about to start fetch threads
                self._log_thread.join(LATE_TIMEOUT_S)
                ended = not self._log_thread.is_alive()
            ended &= self.pump.join(STOP_TIMEOUT_S)
        if was_running:  # a start that failed is told in one line, by the verb
            self.log.say(logs.INFO, "stopped")
        self.log.close()
        if not ended:
            watch.end_now()
        with watch.step("files of the mounts"):
            self.table.close()
            self.engine.close()
        watch.done()

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
