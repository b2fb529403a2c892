"""Numbers of the daemon as Prometheus text (format 0.0.4), at /api/ext/v1/metrics.

What is of one mount has the label mountpoint; sum over it for the daemon. Light.
"""

from virtiofsd_nydus.daemon.metrics import FOP_NAMES, oldest_wait_s

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from virtiofsd_nydus.daemon.mounts import Mount

    Labels = dict[str, str]
    Samples = Iterable[tuple[str, Labels, float]]  # what is added to the name, labels, value

PREFIX = "virtiofsd_nydus_"
READ_SECONDS_BOUNDS = ("0.0002", "0.001", "0.02", "0.05", "0.5", "1", "2")  # VND_LATENCIES, csrc/vnd.h
# Of the whole daemon. Name below PREFIX, help, key of the engine's statistics
ENGINE_COUNTERS = (
    ("fuse_requests_total", "Requests of guests answered", "fuse_requests"),
    ("fuse_errors_total", "Requests that ended in an error a guest did not expect", "fuse_errors"),
    ("reads_expired_total", "Reads that ended in EIO at their deadline", "expired"),
    ("reads_from_disk_total", "Reads of cached data that was not in memory", "pool_reads"),
    ("fetch_jobs_total", "Ranges fetched", "fetch_jobs"),
    ("fetched_chunks_total", "Chunks fetched, verified and kept", "fetched_chunks"),
    ("verified_chunks_total", "Chunks found in the cache and verified", "verified_chunks"),
    ("digest_failures_total", "Chunks refused for a wrong digest", "digest_failures"),
    ("ring_errors_total", "Queues lost to guests that broke the protocol", "ring_errors"),
)


class _Text:
    """Collects the lines."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def add(self, name: str, kind: str, text: str, samples: "Samples") -> None:
        """One metric; nothing where it has no samples."""
        samples = list(samples)
        if not samples:
            return
        self.lines.append(f"# HELP {PREFIX}{name} {text}")
        self.lines.append(f"# TYPE {PREFIX}{name} {kind}")
        for suffix, labels, value in samples:
            shown = ",".join(f'{key}="{escape_label(label)}"' for key, label in labels.items())
            number = f"{value:.6f}" if isinstance(value, float) else str(value)
            self.lines.append(f"{PREFIX}{name}{suffix}{'{' + shown + '}' if shown else ''} {number}")


def prometheus_text(
    mounts: "Iterable[Mount]", stats: dict[str, int], waiting: "list[tuple[int, int, int, int]]"
) -> str:
    """stats and waiting: the engine's. No mount may go meanwhile."""
    text = _Text()
    mounts = list(mounts)
    for name, about, key in ENGINE_COUNTERS:
        text.add(name, "counter", about, [("", {}, stats[key])])
    text.add("mounts", "gauge", "Images mounted", [("", {}, len(mounts))])
    of = [({"mountpoint": mount.path}, mount) for mount in mounts]
    text.add(
        "oldest_wait_seconds",
        "gauge",
        "Age of the request that has waited longest",
        [("", label, oldest_wait_s(waiting, mount)) for label, mount in of],
    )
    _add_files(text, of)
    _add_backends(text, [({**label, "backend": mount.backend.kind}, mount) for label, mount in of])
    blobs = [({**label, "blob": blob.id}, mount, blob) for label, mount in of for blob in mount.image.blobs()]
    text.add(
        "blob_chunks_ready",
        "gauge",
        "Chunks of a blob that are here and verified",
        [("", label, mount.image.ready_chunks(blob.index)[0]) for label, mount, blob in blobs],
    )
    text.add(
        "blob_chunks",
        "gauge",
        "Chunks of a blob, also those that only other images use",
        [("", label, mount.image.ready_chunks(blob.index)[1] or blob.chunk_count) for label, mount, blob in blobs],
    )
    return "\n".join(text.lines) + "\n"


def _add_files(text: _Text, of: "list[tuple[Labels, Mount]]") -> None:
    """What guests did with each image."""
    counted = [(label, mount.image.stats()) for label, mount in of]
    text.add(
        "needed_bytes_total",
        "counter",
        "File bytes that readers asked for and got",
        [("", label, stats.read_bytes) for label, stats in counted],
    )
    text.add(
        "reads_hit_total",
        "counter",
        "Reads answered from the cache at once",
        [("", label, stats.reads_at_once) for label, stats in counted],
    )
    text.add(
        "reads_waited_total",
        "counter",
        "Reads that had to wait, for a fetch or for the disk",
        [("", label, stats.reads_waited) for label, stats in counted],
    )
    buckets: list[tuple[str, Labels, float]] = []
    for label, stats in counted:
        below = 0
        for bound, count in zip((*READ_SECONDS_BOUNDS, "+Inf"), stats.read_latencies, strict=True):
            below += count
            buckets.append(("_bucket", {**label, "le": bound}, below))
        buckets.append(("_sum", label, stats.read_latency_us / 1e6))
        buckets.append(("_count", label, below))
    text.add("read_seconds", "histogram", "How long reads took, waiting for data included", buckets)
    text.add(
        "file_operations_total",
        "counter",
        "Requests answered, by operation",
        [
            ("", {**label, "operation": name}, count)
            for label, stats in counted
            for name, count in zip(FOP_NAMES, stats.hits, strict=True)
        ],
    )
    text.add(
        "file_operation_errors_total",
        "counter",
        "Requests answered with an error, by operation",
        [
            ("", {**label, "operation": name}, count)
            for label, stats in counted
            for name, count in zip(FOP_NAMES, stats.errors, strict=True)
        ],
    )


def _add_backends(text: _Text, of: "list[tuple[Labels, Mount]]") -> None:
    """What was fetched for each image, and how the place it comes from does."""
    own = [(label, mount.backend.meter.own_metrics()) for label, mount in of]
    text.add(
        "fetched_bytes_total",
        "counter",
        "Bytes that came from the backend, as stored in blobs",
        [("", label, found["received_bytes"]) for label, found in own],
    )
    text.add(
        "prefetched_bytes_total",
        "counter",
        "Part of fetched_bytes_total that was fetched ahead",
        [("", label, found["prefetched_bytes"]) for label, found in own],
    )
    text.add(
        "wasted_bytes_total",
        "counter",
        "Part of fetched_bytes_total that was of no use: here already, not wanted any more, or wrong",
        [("", label, found["wasted_bytes"]) for label, found in own],
    )
    meters = [(label, mount.backend.meter.nydusd_metrics()) for label, mount in of]
    text.add(
        "backend_requests_total",
        "counter",
        "Attempts to read from the backend",
        [("", label, found["read_count"]) for label, found in meters],
    )
    text.add(
        "backend_request_seconds_total",
        "counter",
        "Time those attempts took",
        [("", label, found["read_cumulative_latency_millis_total"] / 1000) for label, found in meters],
    )
    text.add(
        "backend_errors_total",
        "counter",
        "Attempts that failed, by cause",
        [
            ("", {**label, "cause": cause}, count)
            for label, found in own
            for cause, count in sorted(found["errors_by_cause"].items())
        ],
    )
    health = [(label, mount.backend.status()) for label, mount in of]
    text.add(
        "backend_healthy",
        "gauge",
        "1 while the backend answers, 0 while fetching from it keeps failing",
        [("", label, int(status.get("breaker", "open") == "open")) for label, status in health],
    )
    text.add(
        "backend_login_refused",
        "gauge",
        "1 while the registry refuses the login",
        [("", label, int(status.get("login") == "refused")) for label, status in health if "login" in status],
    )
    _add_peers(text, health)


def _add_peers(text: _Text, health: "list[tuple[Labels, dict[str, object]]]") -> None:
    """How far a peer-to-peer network helps: of what its daemon answered, what it had already."""
    found = []
    for label, status in health:
        for way, part in (("mirror", status), ("proxy", status.get("proxy"))):
            count = part.get("p2p") if isinstance(part, dict) else None
            if isinstance(count, dict):
                found.append(({**label, "way": way}, count))
    text.add(
        "backend_p2p_answers_total",
        "counter",
        "Answers of a peer daemon (Dragonfly) to reads of blobs",
        [("", label, count["answers"]) for label, count in found],
    )
    text.add(
        "backend_p2p_hits_total",
        "counter",
        "Part of backend_p2p_answers_total that the peer had whole before it was asked",
        [("", label, count["hits"]) for label, count in found],
    )


def escape_label(text: str) -> str:
    """A label's value as it stands between quotes. What is no UTF-8 becomes question marks."""
    text = text.encode("utf-8", "replace").decode()
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
