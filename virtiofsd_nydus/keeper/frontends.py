"""Front-ends of the keeper: each has a session here and a device in whichever worker lives.

A session runs as a generator: it pauses while the worker is at work, and goes on when the worker has answered. When the
worker dies meanwhile, it stays paused until another one has the device again, and the call is made once more.
"""

import socket
from functools import partial

from virtiofsd_nydus import log as logs
from virtiofsd_nydus.errors import Cause, Failure
from virtiofsd_nydus.keeper import protocol
from virtiofsd_nydus.keeper.protocol import Message, Sent
from virtiofsd_nydus.vhost.inflight import create_inflight
from virtiofsd_nydus.vhost.messages import MessageReader
from virtiofsd_nydus.vhost.session import Session
from virtiofsd_nydus.vhost.state import ApplyFailure, DeviceState

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator
    from typing import Protocol

    from virtiofsd_nydus.keeper.loop import Loop
    from virtiofsd_nydus.keeper.protocol import Body
    from virtiofsd_nydus.keeper.workers import Worker
    from virtiofsd_nydus.vhost.session import Say

    class Owner(Protocol):
        """What front-ends ask of the keeper."""

        loop: Loop
        facts: Body  # of the last worker that was ready (protocol.READY)

        def say(self, level: int, text: str, **fields: object) -> None: ...

        def restore_failed(self, worker: Worker) -> None: ...

        def front_end_ended(self, front_end: "FrontEnd") -> None: ...


RING_ENTRIES = 1024  # of the keeper's own in-flight region: what a ring has at most (csrc/vnd.h VND_RING_MAX)
DEATHS_MAX = 2  # a call that two workers died of is not tried a third time
MESSAGES_AT_ONCE = 32  # of one front-end, before the others have their turn
ALL_RINGS = 0xFFFF


class RemoteDevice:
    """A device in a worker, as the session wants it. One call at a time.

    id: its number between keeper and worker. died: the last worker died, and was not ended on purpose.
    """

    def __init__(self, owner: "Owner", number: int, kind: str) -> None:
        self._owner, self.id, self.kind = owner, number, kind
        self._features: int = owner.facts["features"][kind]
        self.queue_count: int = owner.facts["queues"][kind]
        self._config = bytes.fromhex(owner.facts.get("config", {}).get(kind, ""))
        self.worker: Worker | None = None  # the one that has the device as the session left it
        self._restoring: Worker | None = None
        self._sent = Sent()
        self._state: DeviceState | None = None
        self._acked: list[list[int]] | None = None  # numbers of the rings at the last answer
        self._answer: Message | None = None
        self._asked = 0  # answers that are due
        self.wake: Callable[[], None] = lambda: None  # goes on with the session

    def features(self) -> int:
        return self._features

    def config(self) -> bytes:
        return self._config

    def fits(self, facts: "Body") -> bool:
        """Whether a worker with these facts can go on with it."""
        features = facts.get("features", {}).get(self.kind, 0)
        used = self._state.features if self._state is not None else 0
        same = facts.get("config", {}).get(self.kind, "") == self._config.hex()
        return same and not used & ~features and facts.get("queues", {}).get(self.kind) == self.queue_count

    # ---- what the session calls

    def own_inflight(self) -> tuple[int, int, int, int, int]:
        """A region of the keeper's, for a front-end that has none: QEMU."""
        fd, size_bytes = create_inflight(self.queue_count, RING_ENTRIES)
        return fd, size_bytes, 0, self.queue_count, RING_ENTRIES

    def apply(self, state: DeviceState) -> "Generator[None, None, None]":
        self._state = state
        answer = yield from self._call(protocol.APPLY)
        self._take_bases(answer, state)
        error = answer.body.get("error")
        if error is not None:
            self._sent = Sent()  # which descriptors the device took is not known
            raise ApplyFailure(str(error), Cause.GUEST)
        self._acked = protocol.plain_rings(state)

    def reset(self) -> "Generator[None, None, None]":
        yield from self._call(protocol.RESET)

    @property
    def saves(self) -> bool:
        return bool(self._owner.facts.get("saves"))

    def begin_transfer(self, loads: bool, fd: int) -> "Generator[None, None, None]":
        self._raise(
            (yield from self._call(protocol.TRANSFER, {"loads": loads}, [fd])), "the session cannot be taken along"
        )

    def end_transfer(self) -> "Generator[None, None, None]":
        self._raise((yield from self._call(protocol.TRANSFERRED)), "the state cannot be taken")

    @staticmethod
    def _raise(answer: Message, otherwise: str) -> None:
        error = answer.body.get("error")
        if error is not None:
            raise ApplyFailure(str(error) or otherwise, Cause.GUEST)

    def close(self) -> None:
        worker = self.worker or self._restoring  # it may not have said yet that it has the device
        if worker is not None:
            worker.send(protocol.CLOSE, {"device": self.id})
        self.worker = self._restoring = None

    def _take_bases(self, answer: Message, state: DeviceState) -> None:
        bases = answer.body.get("bases")
        if type(bases) is list and len(bases) == len(state.rings):
            for ring, base in zip(state.rings, bases, strict=True):
                ring.base = int(base) & 0xFFFF

    def _call(
        self, kind: int, more: "Body | None" = None, fds: "list[int] | None" = None
    ) -> "Generator[None, None, Message]":
        """Has the worker do it; again by the next where it died."""
        deaths = 0
        while True:
            while self.worker is None:
                yield
            worker = self.worker
            self._answer = None
            if more is None:
                self._send(worker, kind)
            else:
                self._asked += 1
                worker.send(kind, {"device": self.id, **more}, fds or [])
            while self._answer is None and self.worker is worker:
                yield
            if self._answer is not None:
                answer, self._answer = self._answer, None
                return answer
            deaths += 1
            if deaths == DEATHS_MAX:
                raise ApplyFailure("two workers died of it", Cause.IO)

    def _send(self, worker: "Worker", kind: int, rings: "list[list[int]] | None" = None) -> None:
        body: Body = {"device": self.id}
        fds: list[int] = []
        if kind == protocol.APPLY and self._state is not None:
            body["state"], fds = protocol.pack_state(
                self._state, self._sent, rings or protocol.plain_rings(self._state)
            )
        self._asked += 1
        worker.send(kind, body, fds)

    # ---- what the keeper calls

    def restore(self, worker: "Worker", died: bool) -> None:
        """Makes the device in a new worker and brings it to where the last one had it."""
        self._sent, self._asked, self._restoring = Sent(), 1, worker
        worker.send(protocol.OPEN, {"device": self.id, "kind": self.kind, "number": self.id})
        state = self._state
        if state is None:
            return
        given, rings = state.inflight_goes_on, None
        if self._acked is not None:
            rings = self._acked
            started = protocol.RING_PLAIN.index("started")
            state.inflight_goes_on = given or sum(1 << at for at, ring in enumerate(rings) if ring[started])
        state.inflight_died = died
        self._send(worker, protocol.APPLY, rings)
        state.inflight_goes_on, state.inflight_died = given, False

    def take_answer(self, worker: "Worker", message: Message) -> None:
        """DONE of this device."""
        self._asked -= 1
        error = message.body.get("error")
        if self._restoring is worker:
            if error is not None:
                self._sent = Sent()
                self._owner.say(logs.ERROR, f"a front-end's device could not be made again: {error}", front_end=self.id)
                self._owner.restore_failed(worker)
            if self._asked == 0:
                self._restoring, self.worker = None, worker
        elif self.worker is worker:
            self._answer = message
        self.wake()

    def worker_died(self) -> None:
        self.worker = self._restoring = None
        self.wake()

    @property
    def rests(self) -> bool:
        """It is in the worker, and no answer is due."""
        return self.worker is not None and self._asked == 0


class FrontEnd:
    """One connection: socket, session and device."""

    def __init__(self, owner: "Owner", sock: socket.socket, number: int, kind: str, say: "Say") -> None:
        self._owner, self.sock, self.number = owner, sock, number
        sock.setblocking(False)
        self._say = say
        self.device = RemoteDevice(owner, number, kind)
        self.session = Session(sock, self.device, partial(say, front_end=number))
        self.device.wake = self._step
        self.reader = MessageReader()
        self._running: Iterator[None] | None = None  # the message that is being served
        self._stepping = False
        self._ended = False

    @property
    def rests(self) -> bool:
        """No message is being served."""
        return self._running is None and self.device.rests

    def start(self) -> None:
        """Once the device is known to the worker, or will be."""
        self._owner.loop.watch(self.sock.fileno(), self._read)

    def _read(self) -> None:
        try:
            for _ in range(MESSAGES_AT_ONCE):
                if self._running is not None or self._ended:
                    return
                message = self.reader.read(self.sock)
                if message is not None:
                    self._running = self.session.serve(message)
                    self._step()
        except BlockingIOError:
            return
        except EOFError:
            self.end(None)
        except Failure as failure:
            self.end(failure)
        except OSError as error:
            self.end(Failure(f"vhost-user: the connection failed: {error.strerror}", Cause.IO))

    def _step(self) -> None:
        """Goes on with the message that is being served, as far as it goes now."""
        if self._running is None or self._stepping or self._ended:
            return
        self._stepping = True
        try:
            next(self._running)
            self._owner.loop.forget(self.sock.fileno())  # one that hangs up meanwhile would be told again and again
        except StopIteration:
            self._running = None
            self._owner.loop.watch(self.sock.fileno(), self._read)
        except Failure as failure:
            self.end(failure)
        except OSError as error:
            self.end(Failure(f"vhost-user: the connection failed: {error.strerror}", Cause.IO))
        except Exception as error:  # a fault of ours must cost this front-end only
            self.end(Failure(f"vhost-user session ended by a fault of this program: {error!r}"))
        finally:
            self._stepping = False

    def end(self, failure: Failure | None) -> None:
        """Frees all that the front-end had. Idempotent."""
        if self._ended:
            return
        self._ended = True
        self._owner.loop.forget(self.sock.fileno())
        if failure is None:
            self._say(logs.INFO, "front-end disconnected", front_end=self.number)
        else:
            self._say(logs.ERROR, str(failure), front_end=self.number, cause=failure.cause.name.lower())
        self.reader.close()
        self._running = None  # closes its message
        self.session.close()
        self.sock.close()
        self._owner.front_end_ended(self)
