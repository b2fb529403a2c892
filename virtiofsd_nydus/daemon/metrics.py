"""What the daemon tells of itself in numbers: nydusd's JSON documents, and Prometheus text of our own.

Keys and units are those of nydusd-interface.md 6. The engine counts per daemon, not per mount, and measures no
latencies: keys for these are there and 0 (docs/operations.md names them). Light.
"""

import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

    from virtiofsd_nydus.daemon.service import Mount

FOP_NAMES = ("getattr", "readlink", "open", "release", "read", "statfs", "getxattr", "listxattr", "opendir", "lookup",
             "readdir", "readdirplus", "access", "forget", "batch_forget")
FOPS = len(FOP_NAMES)
OPEN_FOP, RELEASE_FOP = 2, 3
BUCKETS = 8
OPCODE_READ = 15        # FUSE_READ, linux/fuse.h
PREFIX = "virtiofsd_nydus_"


def find_mount(mounts: "dict[str, Mount]", wanted: str | None) -> "Mount | None":
    """The mount that an `id` names (its mountpoint or the id of its configuration); without one the only mount."""
    if wanted is None:
        return next(iter(mounts.values())) if len(mounts) == 1 else None
    found = mounts.get(wanted)
    if found is None:
        found = next((mount for mount in mounts.values() if mount.config.id and mount.config.id == wanted), None)
    return found


def fs_metrics(mount: "Mount", stats: dict[str, int], fops: dict[str, list[int]]) -> "dict[str, Any]":
    """/api/v1/metrics. nr_opens: files open now; a session of one image answers no OPEN (kernels then send none)."""
    return {
        "files_account_enabled": mount.config.iostats_files,
        "access_pattern_enabled": mount.config.access_pattern,
        "record_latest_read_files_enabled": mount.config.latest_read_files,
        "measure_latency": False,
        "id": mount.path,
        "nr_opens": max(0, fops["hits"][OPEN_FOP] - fops["hits"][RELEASE_FOP]),
        "data_read": stats["read_bytes"],
        "block_count_read": fops["read_sizes"],
        "fop_hits": fops["hits"],
        "fop_errors": fops["errors"],
        "fop_cumulative_latency_total": [0] * FOPS,
        "read_latency_dist": [0] * BUCKETS,
    }


def blobcache_metrics(mount: "Mount", stats: dict[str, int], prefetch_workers: int) -> "dict[str, Any]":
    """/api/v1/metrics/blobcache. entries_count: chunks that are here; hits: reads answered at once."""
    blobs = mount.image.blobs()
    ready = [mount.image.ready_chunks(blob.index) for blob in blobs]
    chunks = sum(total or blob.chunk_count for blob, (_, total) in zip(blobs, ready, strict=True))
    here = sum(count for count, _ in ready)
    done = bool(blobs) and here >= chunks
    if done and not mount.complete_at:
        mount.complete_at = time.time()
    began, ended = (mount.mounted_at, mount.complete_at) if mount.config.prefetch else (0.0, 0.0)
    return {
        "id": mount.config.id or mount.path,
        "underlying_files": sorted(blob.id for blob in blobs),
        "store_path": mount.config.work_dir,
        "partial_hits": 0,
        "whole_hits": stats["hits"],
        "total": stats["hits"] + stats["parked"],
        "entries_count": here,
        "prefetch_data_amount": stats["prefetch_bytes"],
        "prefetch_requests_count": 0,
        "prefetch_workers": prefetch_workers if mount.config.prefetch else 0,
        "prefetch_unmerged_chunks": 0,
        "prefetch_cumulative_time_millis": 0,
        "prefetch_begin_time_secs": int(began),
        "prefetch_begin_time_millis": int(began % 1 * 1000),
        "prefetch_end_time_secs": int(ended),
        "prefetch_end_time_millis": int(ended % 1 * 1000),
        "buffered_backend_size": 0,
        "data_all_ready": done,
    }


def inflight_metrics(stats: dict[str, int]) -> "list[dict[str, int]] | None":
    """/api/v1/metrics/inflight: the oldest read that waits, which is what tells a hang; None when none does."""
    if not stats["oldest_wait_us"]:
        return None
    return [{"inode": 0, "opcode": OPCODE_READ, "unique": 0,
             "timestamp_secs": int(time.time() - stats["oldest_wait_us"] / 1e6)}]


# ---- Prometheus

# Name below PREFIX, kind, help, key of the engine's statistics, divisor
ENGINE_METRICS = (
    ("fuse_requests_total", "counter", "Requests of guests answered", "fuse_requests", 1),
    ("fuse_errors_total", "counter", "Requests that ended in an error a guest did not expect", "fuse_errors", 1),
    ("needed_bytes_total", "counter", "File bytes that readers asked for and got", "read_bytes", 1),
    ("reads_hit_total", "counter", "Reads answered from the cache at once", "hits", 1),
    ("reads_waited_total", "counter", "Reads that had to wait for a fetch", "parked", 1),
    ("reads_expired_total", "counter", "Reads that ended in EIO at their deadline", "expired", 1),
    ("reads_from_disk_total", "counter", "Reads of cached data that was not in memory", "pool_reads", 1),
    ("fetch_jobs_total", "counter", "Ranges fetched", "fetch_jobs", 1),
    ("fetched_bytes_total", "counter", "Bytes fetched, as stored in blobs", "fetched_bytes", 1),
    ("prefetched_bytes_total", "counter", "Part of fetched_bytes that nobody waited for", "prefetch_bytes", 1),
    ("fetched_chunks_total", "counter", "Chunks fetched, verified and kept", "fetched_chunks", 1),
    ("verified_chunks_total", "counter", "Chunks found in the cache and verified", "verified_chunks", 1),
    ("digest_failures_total", "counter", "Chunks refused for a wrong digest", "digest_failures", 1),
    ("ring_errors_total", "counter", "Queues lost to guests that broke the protocol", "ring_errors", 1),
    ("oldest_wait_seconds", "gauge", "Age of the read that has waited longest", "oldest_wait_us", 1_000_000),
)


def settled_bytes(mounts: "Iterable[Mount]") -> int:
    """Bytes that came from the backends of mounts and were used or dropped."""
    return sum(mount.backend.meter.settled_bytes for mount in mounts)


def prometheus_text(mounts: "Iterable[Mount]", stats: dict[str, int], fops: dict[str, list[int]],
                    wasted_bytes: int) -> str:
    """Text format 0.0.4."""
    mounts = list(mounts)
    lines: list[str] = []

    def add(name: str, kind: str, text: str, samples: "Iterable[tuple[dict[str, str], float]]") -> None:
        samples = list(samples)
        if not samples:
            return
        lines.append(f"# HELP {PREFIX}{name} {text}")
        lines.append(f"# TYPE {PREFIX}{name} {kind}")
        for labels, value in samples:
            shown = ",".join(f'{key}="{_escape(label)}"' for key, label in labels.items())
            number = f"{value:.6f}" if isinstance(value, float) else str(value)
            lines.append(f"{PREFIX}{name}{'{' + shown + '}' if shown else ''} {number}")

    for name, kind, text, key, divisor in ENGINE_METRICS:
        add(name, kind, text, [({}, stats[key] if divisor == 1 else stats[key] / divisor)])
    add("file_operations_total", "counter", "Requests of guests answered, by operation",
        [({"operation": name}, count) for name, count in zip(FOP_NAMES, fops["hits"], strict=True)])
    add("file_operation_errors_total", "counter", "Requests answered with an error, by operation",
        [({"operation": name}, count) for name, count in zip(FOP_NAMES, fops["errors"], strict=True)])
    add("wasted_bytes_total", "counter", "Bytes that arrived and were not used: asked for twice or not wanted any more",
        [({}, wasted_bytes)])
    add("mounts", "gauge", "Images mounted", [({}, len(mounts))])
    blobs = [(mount, blob) for mount in mounts for blob in mount.image.blobs()]
    add("blob_chunks_ready", "gauge", "Chunks of a blob that are here and verified",
        [({"mountpoint": mount.path, "blob": blob.id}, mount.image.ready_chunks(blob.index)[0])
         for mount, blob in blobs])
    add("blob_chunks", "gauge", "Chunks of a blob",
        [({"mountpoint": mount.path, "blob": blob.id}, blob.chunk_count) for mount, blob in blobs])
    labels = [({"mountpoint": mount.path, "backend": mount.backend.kind}, mount) for mount in mounts]
    meters = [(label, mount.backend.meter.nydusd_metrics()) for label, mount in labels]
    add("backend_requests_total", "counter", "Attempts to read from a backend",
        [(label, found["read_count"]) for label, found in meters])
    add("backend_request_seconds_total", "counter", "Time those attempts took",
        [(label, found["read_cumulative_latency_millis_total"] / 1000) for label, found in meters])
    add("backend_received_bytes_total", "counter", "Bytes that came from a backend",
        [(label, mount.backend.meter.own_metrics()["received_bytes"]) for label, mount in labels])
    add("backend_errors_total", "counter", "Attempts that failed, by cause",
        [({**label, "cause": cause}, count) for label, mount in labels
         for cause, count in sorted(mount.backend.meter.own_metrics()["errors_by_cause"].items())])
    add("backend_healthy", "gauge", "1 while the backend is asked, 0 while its circuit breaker holds requests back",
        [(label, int(mount.backend.status().get("breaker", "open") == "open")) for label, mount in labels])
    add("backend_login_refused", "gauge", "1 while the registry refuses the login",
        [(label, int(mount.backend.status().get("login") == "refused")) for label, mount in labels
         if "login" in mount.backend.status()])
    return "\n".join(lines) + "\n"


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
