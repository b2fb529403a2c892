"""The keeper: sockets, front-ends, what workers must find again, and the order of starts, deaths and the end."""

import os
import signal
import socket
import sys
import time

from virtiofsd_nydus import log as logs
from virtiofsd_nydus.errors import Failure, UsageFailure
from virtiofsd_nydus.keeper import protocol, workers
from virtiofsd_nydus.keeper.frontends import FrontEnd
from virtiofsd_nydus.keeper.loop import Loop
from virtiofsd_nydus.keeper.mounts import Mounts
from virtiofsd_nydus.keeper.protocol import Channel, Message
from virtiofsd_nydus.keeper.say import LightLog
from virtiofsd_nydus.keeper.upgrade import Upgrades
from virtiofsd_nydus.keeper.workers import Pause, Template, Worker
from virtiofsd_nydus.vhost.lines import LineLimit

TYPE_CHECKING = False
if TYPE_CHECKING:
    from virtiofsd_nydus.keeper.protocol import Body
    from virtiofsd_nydus.listening import UnixListener

STOP_S = 4.7  # a worker ends itself within 4 s; launchers kill after 5
WARM_AFTER_S = 2.0  # the template's imports must not meet the worker's own after a start
ACCEPT_RETRY_S = 0.2  # where descriptors are short


class Listener:
    """A listening socket for front-ends, and the kind of device they get. unix: where the file is ours."""

    __slots__ = ("kind", "sock", "unix")

    def __init__(self, sock: socket.socket, kind: str, unix: "UnixListener | None") -> None:
        self.sock, self.kind, self.unix = sock, kind, unix


class Keeper:
    """Construct, add sockets, run()."""

    def __init__(self, args: "Body", log: LightLog) -> None:
        self._args, self.log = args, log
        self.loop = Loop(self._fault)
        self.worker: Worker | None = None
        self.facts: Body = {}
        self._coming: Worker | None = None  # started and not ready
        self.template: Template | None = None
        self.python = sys.executable
        self._api: UnixListener | None = None
        self._listeners: list[Listener] = []
        self.front_ends: dict[int, FrontEnd] = {}
        self._count = 0  # front-ends so far
        self.mounts = Mounts()
        self._pause = Pause()
        self._deaths = 0
        self._ended_at = 0.0  # the last death
        self._was_ready = False
        self.stopping = False
        self._statuses: dict[int, int] = {}
        self._upgrades = Upgrades(self)
        self._tell, self._complain = LineLimit(log.say), LineLimit(log.say)
        self._connected_fd: socket.socket | None = None
        self.failure: Failure | None = None

    def say(self, level: int, text: str, **fields: object) -> None:
        self.log.say(level, text, **fields)

    def _fault(self, error: Exception) -> None:
        self.say(logs.ERROR, f"a fault of this program in the keeper: {error!r}")

    # ---- life

    def add_api(self, listener: "UnixListener") -> None:
        self._api = listener

    def add_listener(self, sock: socket.socket, kind: str, unix: "UnixListener | None" = None) -> None:
        sock.setblocking(False)
        self._listeners.append(Listener(sock, kind, unix))

    def add_connected(self, sock: socket.socket) -> None:
        """The only front-end there will be: the keeper ends with it."""
        self._connected_fd = sock

    def catch_signals(self) -> None:
        """Makes SIGTERM and SIGINT end run()."""
        reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)

        def stop() -> None:
            os.read(reader, 64)
            self.stop()

        self.loop.watch(reader, stop)

    def run(self) -> None:
        """Until the end. failure says why a start failed. After add_template."""
        self._start_worker()
        self.loop.run()

    def stop(self) -> None:
        """Ends all in order: the worker within STOP_S. Idempotent."""
        if self.stopping:
            return
        self.stopping = True
        for listener in self._listeners:
            self.loop.forget(listener.sock.fileno())
            if listener.unix is not None:
                listener.unix.remove()
        if self._api is not None:
            self._api.remove()
        if self._coming is not None:
            self._coming.kill()
        if self.worker is None:
            self._finish()
            return
        self.worker.purpose = "the daemon ends"
        self.worker.send(protocol.STOP)
        self.loop.after(STOP_S, self._finish)

    def _finish(self) -> None:
        for process in (self.worker, self._coming):
            if process is not None and not process.gone:
                process.kill()
        for front_end in list(self.front_ends.values()):
            front_end.end(None)
        for listener in self._listeners:
            listener.sock.close()
        self.loop.end()

    # ---- workers

    def add_template(self, sock: socket.socket, pid: int) -> None:
        """A template that was started."""
        self.template = self._new_template(sock, pid)

    def spawn_template(self, python: str) -> Template:
        ours, theirs = protocol.pair()
        try:
            pid = workers.spawn_template(python, theirs.fileno())
        except OSError:
            ours.close()
            raise
        finally:
            theirs.close()
        return self._new_template(ours, pid)

    def _new_template(self, sock: socket.socket, pid: int) -> Template:
        made = Template(
            self.loop,
            Channel(sock, blocking=False),
            exited=self._worker_exited,
            greeted=self._template_greeted,
            ended=self._template_ended,
        )
        made.born(pid, os.pidfd_open(pid))
        return made

    def _template_greeted(self, template: Template, failure: "Failure | None") -> None:
        if not self._upgrades.template_greeted(template, failure) and failure is not None:
            self.say(logs.ERROR, str(failure))

    def _template_ended(self, template: Template) -> None:
        try:
            os.waitpid(template.pid, os.WNOHANG)
        except ChildProcessError:
            pass
        self._upgrades.template_ended(template)
        if self.stopping or template is not self.template:
            return
        self.say(logs.WARNING, "the process that workers are forked from ended; another one is started")
        self.template = None
        self.template = self.spawn_template(self.python)
        for worker in template.unborn:
            worker.end()

    def _start_worker(self) -> None:
        if not self.stopping and self.template is not None:
            self._coming = self.fork_worker(self.template)

    def fork_worker(self, template: Template, *, waits: bool = False) -> Worker:
        """waits: it answers no client of the API before GO."""
        ours, theirs = protocol.pair()
        reader, writer = os.pipe2(os.O_CLOEXEC)
        worker = Worker(
            self.loop,
            Channel(ours, blocking=False),
            reader,
            take=self._take,
            ended=self._worker_ended,
            log=self.log,
        )
        template.fork(worker, theirs.fileno(), writer)
        theirs.close()
        os.close(writer)
        body: Body = {"args": self._args, "deaths": self._deaths, "api": self._api is not None, "waits": waits}
        fds = [self._api.socket.fileno()] if self._api is not None else []
        if self.mounts.table:
            body["table"] = self.mounts.table
            body["mounts"] = []
            body["front_ends"] = list(self.front_ends)
            for record, kept in self.mounts.records.values():
                body["mounts"].append({**record, "fds": len(kept)})
                fds += kept
        worker.front_ends = list(self.front_ends)
        worker.send(protocol.START, body, fds)
        return worker

    def _worker_exited(self, pid: int, status: int) -> None:
        self._statuses[pid] = status

    def _worker_ended(self, worker: Worker) -> None:
        known = True
        if worker is self.worker:
            self.worker = None
            for front_end in list(self.front_ends.values()):
                front_end.device.worker_died()
        elif worker is self._coming:
            self._coming = None
        else:
            known = False
        if self._upgrades.worker_ended(worker):
            return
        if not known and not self.stopping:
            worker.close_errors()
            return
        if self.stopping:
            worker.close_errors()
            if self.worker is None and self._coming is None:
                self._finish()
            return
        self._ended_at = time.monotonic()
        self._deaths += 1
        pause = self._pause.next_s(worker.died_young)
        if self.failure is None or self._was_ready:
            self.loop.after(pause, self._start_worker) if pause else self._start_worker()
        self._tell_death(worker, self._deaths, pause, time.monotonic() + workers.STATUS_WAIT_S)

    def _tell_death(self, worker: Worker, number: int, pause: float, until: float) -> None:
        """One line, once the template has said how it ended."""
        if worker.pid not in self._statuses and time.monotonic() < until:
            self.loop.after(0.01, lambda: self._tell_death(worker, number, pause, until))
            return
        status = self._statuses.pop(worker.pid, None)
        words = worker.last_words()
        worker.close_errors()
        text = f"the worker {workers.describe_end(status)}; " + (
            f"another one is started in {pause:g} s" if pause else "another one goes on"
        )
        more: Body = {"last_words": words} if words else {}
        self._complain(logs.ERROR, text, pid=worker.pid, deaths=number, **more)

    # ---- what workers say

    def _take(self, worker: Worker, message: Message) -> None:
        if message.kind == protocol.READY:
            self._worker_ready(worker)
        elif message.kind == protocol.DONE:
            front_end = self.front_ends.get(message.number("device"))
            if front_end is not None:
                front_end.device.take_answer(worker, message)
                self._upgrades.note_restored()
        elif message.kind == protocol.RECORD:
            if worker in (self.worker, self._coming):  # not of one that an upgrade tries
                self.mounts.take(message)
            worker.send(protocol.KEPT, {"record": message.number("record")})
        elif message.kind == protocol.FAILED:
            kind = UsageFailure if message.body.get("usage") else Failure
            failure = kind(message.text("text"))
            if self._upgrades.worker_failed(worker, failure):
                pass
            elif self._was_ready:
                self.say(logs.ERROR, f"a worker could not start: {failure}")
            else:
                self.failure = failure
                self.stop()
        elif message.kind == protocol.EXIT:
            self.stop()
        elif message.kind == protocol.UPGRADE:
            self._upgrades.begin(worker, message.text("python"))
        elif message.kind == protocol.ANSWERED:
            self._upgrades.answered(worker)

    def _worker_ready(self, worker: Worker) -> None:
        if self._upgrades.worker_ready(worker):
            return
        self._coming = None
        if self.stopping:
            worker.kill()
            return
        self.take_over(worker, self._deaths > 0)
        if not self._was_ready:
            self._was_ready = True
            self.loop.after(WARM_AFTER_S, self.warm)
            for listener in self._listeners:
                self._watch_listener(listener)
            if self._connected_fd is not None:
                self._begin(self._connected_fd, str(self._args["device"]))

    def warm(self) -> None:
        if self.template is not None:
            self.template.send(protocol.WARM)

    def take_over(self, worker: Worker, died: bool) -> None:
        """That worker is the one from here on, and gets all devices. died: the one before it died."""
        self.worker, self.facts = worker, worker.facts or {}
        for front_end in self.front_ends.values():
            front_end.device.restore(worker, died)
        for number in set(worker.front_ends).difference(self.front_ends):  # gone meanwhile: what it held is given back
            worker.send(protocol.OPEN, {"device": number, "kind": "fs", "number": number})
            worker.send(protocol.CLOSE, {"device": number})

    def restore_failed(self, worker: Worker) -> None:
        self._upgrades.restore_failed(worker)

    # ---- front-ends

    def _watch_listener(self, listener: Listener) -> None:
        if not self.stopping:
            self.loop.watch(listener.sock.fileno(), lambda: self._accept(listener))

    def _accept(self, listener: Listener) -> None:
        try:
            sock, _ = listener.sock.accept()
        except (BlockingIOError, ConnectionAbortedError, InterruptedError):
            return
        except OSError as error:
            self.loop.forget(listener.sock.fileno())
            self._complain(logs.ERROR, f"vhost-user: cannot take a connection: {error.strerror}; trying again")
            self.loop.after(ACCEPT_RETRY_S, lambda: self._watch_listener(listener))
            return
        self._begin(sock, listener.kind)

    def _begin(self, sock: socket.socket, kind: str) -> None:
        self._count += 1
        self._tell(logs.INFO, "front-end connected", front_end=self._count)
        front_end = FrontEnd(self, sock, self._count, kind, self._complain)
        self.front_ends[self._count] = front_end
        if self.worker is not None:
            front_end.device.restore(self.worker, False)
        front_end.start()

    def front_end_ended(self, front_end: FrontEnd) -> None:
        self.front_ends.pop(front_end.number, None)
        if self._connected_fd is front_end.sock and not self.stopping:
            self.stop()
