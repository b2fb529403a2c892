"""A bound on log lines that other processes can cause: front-ends, by messages and by connecting."""

import threading
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

LINES = 20  # in a period: a machine that boots many guests at once comes nowhere near it
PERIOD_S = 1.0


class LineLimit:
    """Passes LINES lines a period on to say; the first line after that tells how many were left out. Thread-safe."""

    def __init__(self, say: "Callable[..., None]", clock: "Callable[[], float]" = time.monotonic) -> None:
        self._say, self._clock = say, clock
        self._lock = threading.Lock()
        self._began, self._said, self._left_out = clock(), 0, 0

    def __call__(self, level: int, text: str, **fields: object) -> None:
        with self._lock:
            now = self._clock()
            if now - self._began >= PERIOD_S:
                self._began, self._said = now, 0
            if self._said >= LINES:
                self._left_out += 1
                return
            self._said += 1
            left_out, self._left_out = self._left_out, 0
        if left_out:
            self._say(level, f"{left_out} lines about front-ends were left out")
        self._say(level, text, **fields)
