"""The keeper's other processes: the template, which has imported everything and forks, and the worker.

A death is seen by pidfd. The next worker is forked at once from the template. Workers that die young, one after the
other, are started with a growing pause.
"""

import os
import signal
import time

from virtiofsd_nydus import log as logs
from virtiofsd_nydus.errors import Failure
from virtiofsd_nydus.keeper import protocol
from virtiofsd_nydus.keeper.protocol import Channel, Message

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from virtiofsd_nydus.keeper.loop import Loop
    from virtiofsd_nydus.keeper.protocol import Body
    from virtiofsd_nydus.keeper.say import LightLog

YOUNG_S = 0.5  # a worker that dies so soon after it was ready, or before, may do so again
PAUSE_FIRST_S = 0.1
PAUSE_MAX_S = 5.0
STATUS_WAIT_S = 1.0  # for the template's word on how a worker ended
WORDS_BYTES = 4096  # of a worker's last words
WORDS_SHOWN = 300
READ_BYTES = 64 << 10


class Process:
    """One other process: its channel and its death. ended is called once, when it is gone."""

    def __init__(self, loop: "Loop", channel: Channel, ended: "Callable[[], None]") -> None:
        self.loop, self.channel, self._ended = loop, channel, ended
        self.pid, self.pidfd = 0, -1
        self.gone = False
        self.purpose = ""  # why it was ended, where that was meant
        loop.watch(channel.fileno(), self._ready)

    def take_message(self, message: Message) -> None:
        raise NotImplementedError

    def born(self, pid: int, pidfd: int) -> None:
        self.pid, self.pidfd = pid, pidfd
        self.loop.watch(pidfd, self.end)

    def send(self, kind: int, body: "Body | None" = None, fds: "Sequence[int]" = ()) -> None:
        """What a process that is about to be found dead no longer takes is lost."""
        if self.gone:
            return
        try:
            self.channel.send(kind, body, fds)
        except OSError:
            self.kill()
            return
        if self.channel.waits:
            self.loop.watch(self.channel.fileno(), self._ready, 1 | 4)

    def _ready(self) -> None:
        try:
            if self.channel.waits:
                self.channel.flush()
                if not self.channel.waits:
                    self.loop.watch(self.channel.fileno(), self._ready)
            while not self.gone and (message := self.channel.receive()) is not None:
                try:
                    self.take_message(message)
                finally:
                    message.close()
        except (EOFError, OSError):
            self.loop.forget(self.channel.fileno())  # its pidfd tells the rest
            self.kill()
        except Failure as failure:
            self.fault(failure)
            self.loop.forget(self.channel.fileno())
            self.kill()

    def fault(self, failure: Failure) -> None:
        """It sent what is no message."""

    def kill(self) -> None:
        if self.pidfd >= 0:
            try:
                signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
            except OSError:
                pass
        else:
            self.end()

    def end(self) -> None:
        """It is gone. Idempotent."""
        if self.gone:
            return
        self.gone = True
        for fd in (self.channel.fileno(), self.pidfd):
            if fd >= 0:
                self.loop.forget(fd)
        self.channel.close()
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1
        self._ended()


class Worker(Process):
    """A worker. facts: what READY said; None until then. Its standard error comes through a pipe."""

    def __init__(
        self,
        loop: "Loop",
        channel: Channel,
        errors_fd: int,
        *,
        take: "Callable[[Worker, Message], None]",
        ended: "Callable[[Worker], None]",
        log: "LightLog",
    ) -> None:
        super().__init__(loop, channel, lambda: ended(self))
        self.facts: Body | None = None
        self.ready_at = 0.0
        self.front_ends: list[int] = []  # for whom it keeps what they held
        self._take, self._log = take, log
        self._errors_fd = errors_fd
        self._line = b""
        self._words = b""
        os.set_blocking(errors_fd, False)
        loop.watch(errors_fd, self._read_errors)

    def take_message(self, message: Message) -> None:
        if message.kind == protocol.READY:
            self.facts, self.ready_at = message.body, time.monotonic()
        self._take(self, message)

    def fault(self, failure: Failure) -> None:
        self._log.say(logs.ERROR, str(failure), worker=self.pid)

    @property
    def died_young(self) -> bool:
        return not self.ready_at or time.monotonic() - self.ready_at < YOUNG_S

    def _read_errors(self) -> None:
        try:
            data = os.read(self._errors_fd, READ_BYTES)
        except BlockingIOError:
            return
        if not data:
            self.loop.forget(self._errors_fd)
            os.close(self._errors_fd)
            self._errors_fd = -1
            data = b"\n" if self._line else b""
        *lines, self._line = (self._line + data).split(b"\n")
        for line in lines:
            self._log.write(line + b"\n")
            if not is_log_line(line):
                self._words = (self._words + line + b"\n")[-WORDS_BYTES:]
        if len(self._line) > READ_BYTES:
            self._line = b""

    def last_words(self) -> str:
        """What it wrote beside its log, the end of it."""
        while self._errors_fd >= 0:
            before = self._errors_fd, self._line
            self._read_errors()
            if (self._errors_fd, self._line) == before:
                break
        return " | ".join(self._words.decode(errors="replace").splitlines())[-WORDS_SHOWN:]

    def close_errors(self) -> None:
        if self._errors_fd >= 0:
            self.loop.forget(self._errors_fd)
            os.close(self._errors_fd)
            self._errors_fd = -1


def is_log_line(line: bytes) -> bool:
    """Of the daemon's log, by its first characters."""
    return line[:1] == b"{" or (line[:1] == b"2" and line[4:5] == b"-") or not line


class Template(Process):
    """The process that forks workers. package: its version, once it has said HELLO."""

    def __init__(
        self,
        loop: "Loop",
        channel: Channel,
        *,
        exited: "Callable[[int, int], None]",
        greeted: "Callable[[Template, Failure | None], None]",
        ended: "Callable[[Template], None]",
    ) -> None:
        super().__init__(loop, channel, lambda: ended(self))
        self.package: str | None = None
        self.keeper_format = 0
        self._exited, self._greeted = exited, greeted
        self.unborn: list[Worker] = []  # their forks were asked for

    def take_message(self, message: Message) -> None:
        if self.package is None:
            try:
                protocol.agree(message)
                self.package = message.text("package")
                self.keeper_format = message.number("keeper_format")
            except Failure as failure:
                self._greeted(self, failure)
                raise
            self._greeted(self, None)
        elif message.kind == protocol.FORKED:
            worker = self.unborn.pop(0)
            pid, pidfd = message.number("pid"), message.take_fd()
            if worker.gone:
                os.close(pidfd)
            else:
                worker.born(pid, pidfd)
        elif message.kind == protocol.EXITED:
            self._exited(message.number("pid"), message.number("status"))

    def fork(self, worker: Worker, channel_fd: int, errors_fd: int) -> None:
        """Has that worker be born, with these descriptors."""
        self.unborn.append(worker)
        self.send(protocol.FORK, None, [channel_fd, errors_fd])


def spawn_template(python: str, channel_fd: int) -> int:
    """A template that another interpreter runs: another installed version, or this one anew. Its pid."""
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    try:
        return os.posix_spawn(
            python,
            [python, "-m", "virtiofsd_nydus.keeper.template"],
            {**os.environ, "PYTHONUNBUFFERED": "1"},
            file_actions=[
                (os.POSIX_SPAWN_DUP2, channel_fd, 3),
                (os.POSIX_SPAWN_DUP2, null, 0),
                (os.POSIX_SPAWN_DUP2, null, 1),
                (os.POSIX_SPAWN_DUP2, 2, 2),
            ],
        )
    finally:
        os.close(null)


def describe_end(status: int | None) -> str:
    """How a process ended, by its status of waitpid."""
    if status is None:
        return "ended"
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        try:
            name = signal.Signals(number).name
        except ValueError:
            name = f"signal {number}"
        return f"was ended by {name}"
    return f"ended with status {os.waitstatus_to_exitcode(status)}"


class Pause:
    """How long to wait before the next worker is started."""

    def __init__(self) -> None:
        self._seconds = 0.0

    def next_s(self, young: bool) -> float:
        """After a death. The first young one is not waited for."""
        if not young:
            self._seconds = 0.0
            return 0.0
        now, self._seconds = self._seconds, min(max(self._seconds * 2, PAUSE_FIRST_S), PAUSE_MAX_S)
        return now
