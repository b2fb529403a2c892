"""Which server to ask: a gate that closes before a server that keeps failing, and a budget of bytes or requests a
second.

Light: no HTTP library.
"""

import threading
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

# A probe is forgotten after so long: the thread that should tell its outcome may have died.
PROBE_LIMIT_S = 60.0


class Gate:
    """A circuit breaker. `failures_max` failures in a row shut it for first_pause_s; then one request goes through as a
    probe, and opens it again or shuts it for twice as long, at most last_pause_s. Thread-safe.

    say: gets one line when the gate shuts or opens, not one for each failure."""

    def __init__(
        self,
        name: str,
        failures_max: int,
        first_pause_s: float,
        last_pause_s: float,
        say: "Callable[[str], None] | None" = None,
    ) -> None:
        self.name = name
        self._failures_max = failures_max
        self._first_pause_s = first_pause_s
        self._last_pause_s = last_pause_s
        self._say = say
        self._lock = threading.Lock()
        self._failures = 0
        self._pause_s = 0.0  # 0: open
        self._shut_until = 0.0
        self._probe_until = 0.0  # a probe is on its way
        self._last = ""

    @property
    def state(self) -> str:
        """open, shut, or probing (shut, but the next request is let through or on its way)."""
        with self._lock:
            if not self._pause_s:
                return "open"
            return "shut" if time.monotonic() < self._shut_until else "probing"

    def enter(self) -> bool:
        """Whether a request may go. Each True is followed by succeeded() or failed()."""
        with self._lock:
            if not self._pause_s:
                return True
            now = time.monotonic()
            if now < self._shut_until or now < self._probe_until:
                return False
            self._probe_until = now + PROBE_LIMIT_S
            return True

    def succeeded(self) -> None:
        """The server answered, whatever it said."""
        if not self._failures and not self._pause_s:
            return
        with self._lock:
            reopened = self._pause_s > 0
            self._failures, self._pause_s, self._probe_until, self._last = 0, 0.0, 0.0, ""
        if reopened:
            self._tell(f"{self.name}: answers again")

    def failed(self, why: str) -> None:
        """The server could not be reached or did not answer in time."""
        with self._lock:
            self._failures += 1
            self._last = why
            now = time.monotonic()
            was_open = not self._pause_s
            if was_open and self._failures < self._failures_max:
                return
            if not was_open and now < self._shut_until:
                return  # one that was under way when it shut
            self._shut(now)
        if was_open:
            self._tell(f"{self.name}: not asked for a while after {self._failures} failures in a row, the last: {why}")

    def trip(self, why: str) -> None:
        """Shuts it until reprieve() (a health check failed)."""
        with self._lock:
            was_open = not self._pause_s
            self._last = why
            self._pause_s = self._first_pause_s
            self._shut_until = float("inf")
            self._probe_until = 0.0
        if was_open:
            self._tell(f"{self.name}: not asked: {why}")

    def reprieve(self) -> None:
        """The health check is well again: the next request is the probe."""
        with self._lock:
            if self._pause_s and self._shut_until == float("inf"):
                self._shut_until = 0.0

    def refusal(self) -> str:
        """Why nothing goes through, for the line a person reads. It stays the same between two attempts, so that an
        outage's many refusals are one line of the log, with a count."""
        with self._lock:
            count = max(self._failures, 1)
            return f"{self.name}: not asked for now after {count} failures in a row; the last: {self._last}"

    def _shut(self, now: float) -> None:
        self._pause_s = min(self._pause_s * 2, self._last_pause_s) if self._pause_s else self._first_pause_s
        self._shut_until = now + self._pause_s
        self._probe_until = 0.0

    def _tell(self, line: str) -> None:
        if self._say is not None:
            self._say(line)


class RateLimit:
    """So much a second, in the long run: what is taken beyond it is a debt that time pays. Thread-safe."""

    def __init__(self, per_second: float, burst: float | None = None) -> None:
        self._per_second = per_second
        self._burst = per_second if burst is None else burst
        self._level = self._burst
        self._at = time.monotonic()
        self._lock = threading.Lock()

    def take(self, amount: float) -> float:
        """Takes it whatever the level; seconds until the debt is paid, 0 for none."""
        with self._lock:
            self._refill()
            self._level -= amount
            return max(0.0, -self._level / self._per_second)

    def debt_s(self) -> float:
        """Seconds until something may be taken again."""
        with self._lock:
            self._refill()
            return max(0.0, -self._level / self._per_second)

    def _refill(self) -> None:
        now = time.monotonic()
        self._level = min(self._burst, self._level + (now - self._at) * self._per_second)
        self._at = now
