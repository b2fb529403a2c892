"""The keeper's one thread: it waits for descriptors and for times, and calls what was registered for them."""

import heapq
import itertools
import select
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

READ, WRITE = select.EPOLLIN, select.EPOLLOUT


class Timer:
    """A call that is due once. cancel() takes it back."""

    __slots__ = ("call",)

    def __init__(self, call: "Callable[[], None]") -> None:
        self.call: Callable[[], None] | None = call

    def cancel(self) -> None:
        self.call = None


class Loop:
    """fault takes an exception that a call let out: a fault of this program costs that call alone."""

    def __init__(self, fault: "Callable[[Exception], None]") -> None:
        self._epoll = select.epoll()
        self._fault = fault
        self._calls: dict[int, Callable[[], None]] = {}
        self._timers: list[tuple[float, int, Timer]] = []
        self._order = itertools.count()
        self._running = True

    def watch(self, fd: int, call: "Callable[[], None]", events: int = READ) -> None:
        """Has call be called while fd is readable (events READ), writable, or hung up; again: instead of before."""
        if fd in self._calls:
            self._epoll.modify(fd, events)
        else:
            self._epoll.register(fd, events)
        self._calls[fd] = call

    def forget(self, fd: int) -> None:
        """Ends that, before fd is closed. Idempotent."""
        if self._calls.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def after(self, seconds: float, call: "Callable[[], None]") -> Timer:
        """Has call be called once, so much later."""
        timer = Timer(call)
        heapq.heappush(self._timers, (time.monotonic() + seconds, next(self._order), timer))
        return timer

    def end(self) -> None:
        """Makes run() return."""
        self._running = False

    def run(self) -> None:
        while self._running:
            self._run_timers()
            if not self._running:
                return
            for fd, _ in self._epoll.poll(self._wait_s()):
                call = self._calls.get(fd)  # None: an earlier call of this round has ended it
                if call is not None:
                    self._call(call)

    def _wait_s(self) -> float:
        return max(0.0, self._timers[0][0] - time.monotonic()) if self._timers else -1

    def _run_timers(self) -> None:
        while self._timers and self._timers[0][0] <= time.monotonic():
            call = heapq.heappop(self._timers)[2].call
            if call is not None:
                self._call(call)

    def _call(self, call: "Callable[[], None]") -> None:
        try:
            call()
        except Exception as error:
            self._fault(error)
