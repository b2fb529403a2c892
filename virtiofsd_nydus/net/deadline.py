"""Until when this thread waits for a server. Light.

A socket's timeout is for one wait: a server that sends a byte now and then stretches it without end. The sockets of
net.connect therefore cut every wait at the time that the thread has set here.
"""

import threading
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Protocol

    class Timed(Protocol):
        def gettimeout(self) -> float | None: ...

        def settimeout(self, value: float | None, /) -> None: ...


class _Current(threading.local):
    until: float | None = None


_current = _Current()


def wait_until(until: float | None) -> None:
    """Sets the end of all waits of this thread for bytes from a server, a time.monotonic() value; None: no end. It
    holds until it is set again, so whatever waits sets it first."""
    _current.until = until


def cut_wait(sock: "Timed") -> None:
    """Shortens the timeout of sock, for the wait that comes, to what is left. Raises TimeoutError when nothing is."""
    until = _current.until
    if until is None:
        return
    left_s = until - time.monotonic()
    if left_s <= 0:
        raise TimeoutError("the deadline passed")
    limit_s = sock.gettimeout()
    if limit_s is None or limit_s > left_s:
        sock.settimeout(left_s)
