"""When a backend that failed is asked again: after pauses that double and are spread, until it answers.

Nothing sleeps here. A fetch that fails is given a time, and the engine keeps its chunks queued until then, so that no
fetch thread waits for a server that is away (docs/datapath.md 5). Light: no HTTP library.
"""

import random
import threading
import time

from virtiofsd_nydus.errors import Failure
from virtiofsd_nydus.net.failures import RetriableFailure

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

FIRST_PAUSE_S = 0.1
LAST_PAUSE_S = 1.0  # a reader waits that long at most after the server is back
# One failure is no state yet: a line is said when the attempt after the first pause fails too.
SAID_AFTER = 2
# A server that comes and goes is told of once in so long.
QUIET_S = 10.0


class _Pause:
    """Failures in a row, and the time (time.monotonic()) before which there is no other attempt."""

    __slots__ = ("failures", "until_s")

    def __init__(self) -> None:
        self.failures = 0
        self.until_s = 0.0

    def extend(self, now_s: float, after_s: float) -> float:
        """Counts a failure. Those of attempts that were under way together count once."""
        if now_s >= self.until_s:
            pause_s = min(FIRST_PAUSE_S * 2.0 ** min(self.failures, 16), LAST_PAUSE_S)
            self.failures += 1
            self.until_s = now_s + pause_s * random.uniform(0.5, 1.0)
        self.until_s = max(self.until_s, now_s + after_s)
        return self.until_s


class Backoff:
    """What is known of one backend's failures: of its server as a whole, and of single blobs. Thread-safe.

    say gets one line when it keeps failing and one when it answers again."""

    def __init__(self, name: str, say: "Callable[[str], None] | None" = None) -> None:
        self._name = name
        self._say = say
        self._lock = threading.Lock()
        self._server = _Pause()
        self._blobs: dict[str, _Pause] = {}  # those that failed and have not been had since
        self._failing = False  # there was a failure since all went well
        self._told = False
        self._told_at_s = -QUIET_S
        self._last = Failure("no failure")

    @property
    def state(self) -> str:
        """open, or shut while it keeps failing."""
        with self._lock:
            return "shut" if self._worst() >= SAID_AFTER else "open"

    @property
    def last(self) -> Failure:
        return self._last

    def failures(self, blob_id: str) -> int:
        """Failed attempts in a row: the server's or the blob's, whichever are more."""
        if not self._failing:
            return 0
        with self._lock:
            blob = self._blobs.get(blob_id)
            return max(self._server.failures, blob.failures if blob is not None else 0)

    def until_s(self, blob_id: str) -> float:
        """The time (time.monotonic()) before which the blob is not to be asked for."""
        if not self._failing:
            return 0.0
        with self._lock:
            blob = self._blobs.get(blob_id)
            return max(self._server.until_s, blob.until_s if blob is not None else 0.0)

    def failed(self, blob_id: str, failure: Failure) -> float:
        """Notes a failure that another attempt may mend; the time (time.monotonic()) of that attempt."""
        whole = isinstance(failure, RetriableFailure) and failure.whole
        after_s = failure.after_s if isinstance(failure, RetriableFailure) else 0.0
        line = ""
        with self._lock:
            self._failing = True
            self._last = failure
            now_s = time.monotonic()
            pause = self._server if whole else self._blobs.setdefault(blob_id, _Pause())
            until_s = pause.extend(now_s, after_s)
            if pause.failures >= SAID_AFTER and not self._told and now_s - self._told_at_s >= QUIET_S:
                self._told, self._told_at_s = True, now_s
                line = f"{self._name}: fetching fails, readers wait and it is asked again: {failure}"
        self._tell(line)
        return until_s

    def succeeded(self, blob_id: str) -> None:
        """A range of the blob has come, or a good part of one: a few bytes before a failure are no success."""
        if not self._failing:
            return
        line = ""
        with self._lock:
            self._server = _Pause()
            self._blobs.pop(blob_id, None)
            self._failing = bool(self._blobs)
            if self._told and not self._failing:
                self._told = False
                line = f"{self._name}: answers again"
        self._tell(line)

    def _worst(self) -> int:
        return max(self._server.failures, *(pause.failures for pause in self._blobs.values()), 0)

    def _tell(self, line: str) -> None:
        if line and self._say is not None:
            self._say(line)
