"""What a backend was asked for and how long it took, by the keys of nydusd's /api/v1/metrics/backend.

Buckets are nydusd's: sizes below 1K 4K 16K 64K 128K 512K 1M and more, latencies up to 1 20 50 100 500 1000 2000 ms and
more. Every attempt counts, failed ones in count and amount too, as in nydusd. Light.
"""

import threading
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

SIZE_BOUNDS_BYTES = (1 << 10, 4 << 10, 16 << 10, 64 << 10, 128 << 10, 512 << 10, 1 << 20)
LATENCY_BOUNDS_MS = (1, 20, 50, 100, 500, 1000, 2000)


class PrefetchCount:
    """Ranges fetched ahead: how many, their bytes and chunks, the sum of their times, when the last one ended."""

    __slots__ = ("bytes", "chunks", "ended_at", "requests", "took_ms")

    def __init__(self) -> None:
        self.requests = self.bytes = self.chunks = self.took_ms = 0
        self.ended_at = 0.0

    def copy(self) -> "PrefetchCount":
        other = PrefetchCount()
        for name in self.__slots__:
            setattr(other, name, getattr(self, name))
        return other


class BackendMeter:
    """Counters of one backend. Thread-safe."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._lock = threading.Lock()
        self._count = self._errors = self._amount_bytes = self._latency_ms = 0
        self._received_bytes = self._buffered_bytes = 0
        self._prefetched_bytes = self._wasted_bytes = 0
        self._verified_chunks = 0
        self._prefetch = PrefetchCount()
        self._size_latency_ms = [0] * 8
        self._size_count = [0] * 8
        self._size_latency_count = [[0] * 8 for _ in range(8)]
        self._causes: dict[str, int] = {}

    def receive(self, count: int) -> None:
        """Counts bytes that have arrived."""
        with self._lock:
            self._received_bytes += count

    def buffer(self, count: int, prefetch: bool) -> None:
        """Counts bytes that have arrived and are about to be decoded and written. prefetch: no reader waits for
        them."""
        with self._lock:
            self._buffered_bytes += count
            self._prefetched_bytes += count if prefetch else 0

    def unbuffer(self, count: int) -> None:
        """Takes off bytes that buffer() counted and that have been written or dropped."""
        with self._lock:
            self._buffered_bytes -= count

    def waste(self, count: int) -> None:
        """Counts bytes that arrived for nothing."""
        with self._lock:
            self._wasted_bytes += count

    def verify(self, chunks: int) -> None:
        """Counts chunks that were found in the cache and are right, so that they need not be fetched."""
        with self._lock:
            self._verified_chunks += chunks

    def record_prefetch(self, began_s: float, count: int, chunks: int) -> None:
        """The end of one range that was fetched ahead, at began_s (time.monotonic())."""
        with self._lock:
            self._prefetch.requests += 1
            self._prefetch.bytes += count
            self._prefetch.chunks += chunks
            self._prefetch.took_ms += int((time.monotonic() - began_s) * 1000)
            self._prefetch.ended_at = time.time()

    def record(self, began_s: float, wanted_bytes: int, cause: str = "") -> None:
        """The end of one attempt that began at began_s (time.monotonic()). cause: name of the errors.Cause, "" for
        success."""
        took_ms = int((time.monotonic() - began_s) * 1000)
        size = sum(wanted_bytes >= bound for bound in SIZE_BOUNDS_BYTES)
        latency = sum(took_ms > bound for bound in LATENCY_BOUNDS_MS)
        with self._lock:
            self._count += 1
            self._amount_bytes += wanted_bytes
            self._latency_ms += took_ms
            self._size_latency_ms[size] += took_ms
            self._size_count[size] += 1
            self._size_latency_count[size][latency] += 1
            if cause:
                self._errors += 1
                self._causes[cause] = self._causes.get(cause, 0) + 1

    @property
    def prefetch(self) -> PrefetchCount:
        with self._lock:
            return self._prefetch.copy()

    def nydusd_metrics(self) -> "dict[str, Any]":
        with self._lock:
            return {
                "backend_type": self.kind,
                "read_count": self._count,
                "read_errors": self._errors,
                "read_amount_total": self._amount_bytes,
                "read_cumulative_latency_millis_total": self._latency_ms,
                "read_cumulative_latency_millis_dist": list(self._size_latency_ms),
                "read_count_block_size_dist": list(self._size_count),
                "read_latency_sizes_dist": [list(row) for row in self._size_latency_count],
            }

    def own_metrics(self) -> "dict[str, Any]":
        """What nydusd does not tell: bytes that really came and what became of them, and failures by cause."""
        with self._lock:
            return {
                "received_bytes": self._received_bytes,
                "buffered_bytes": self._buffered_bytes,
                "prefetched_bytes": self._prefetched_bytes,
                "wasted_bytes": self._wasted_bytes,
                "verified_chunks": self._verified_chunks,
                "errors_by_cause": dict(self._causes),
            }
