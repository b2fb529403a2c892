"""What the daemon tells of itself in numbers, by nydusd's names: the documents of /api/v1/metrics, each of one mount.

Keys, units, buckets and meanings are nydusd's (utils/src/metrics.rs); where ours differ, docs/operations.md says how.
Light.
"""

import time

from virtiofsd_nydus.storage.pump import PREFETCH_SLOTS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any

    from virtiofsd_nydus.daemon.mounts import Mount
    from virtiofsd_nydus.engine import FileStats

FOP_NAMES = (
    "getattr",
    "readlink",
    "open",
    "release",
    "read",
    "statfs",
    "getxattr",
    "listxattr",
    "opendir",
    "lookup",
    "readdir",
    "readdirplus",
    "access",
    "forget",
    "batch_forget",
)
FOPS = len(FOP_NAMES)
OPEN_FOP, RELEASE_FOP, READ_FOP = 2, 3, 4
SERIAL_SHIFT = 48  # of a nodeid: above it the number of the mount (docs/architecture.md)
CACHE_FILE_SUFFIX = ".blob.data"


def fs_metrics(mount: "Mount") -> "dict[str, Any]":
    """/api/v1/metrics. nr_opens: files open now; a session of one image answers no OPEN (kernels then send none).
    Latency is measured of reads alone, as nydusd does."""
    stats = mount.image.stats()
    latency_us = [0] * FOPS
    latency_us[READ_FOP] = stats.read_latency_us
    return {
        "files_account_enabled": mount.config.iostats_files,
        "access_pattern_enabled": mount.config.access_pattern,
        "record_latest_read_files_enabled": mount.config.latest_read_files,
        "measure_latency": True,
        "id": mount.path,
        "nr_opens": max(0, stats.hits[OPEN_FOP] - stats.hits[RELEASE_FOP]),
        "data_read": stats.read_bytes,
        "block_count_read": stats.read_sizes,
        "fop_hits": stats.hits,
        "fop_errors": stats.errors,
        "fop_cumulative_latency_total": latency_us,
        "read_latency_dist": stats.read_latencies,
    }


def _merged(files: "Iterable[FileStats]") -> "dict[int, FileStats]":
    """One record an inode: the sum of those of several threads, the earliest first read."""
    found: dict[int, FileStats] = {}
    for one in files:
        all_of = found.setdefault(one.ino, one)
        if all_of is one:
            continue
        if one.reads and (not all_of.reads or one.first_read < all_of.first_read):
            all_of.first_read = one.first_read
        all_of.data_read += one.data_read
        all_of.reads += one.reads
        for name in ("hits", "errors", "read_sizes"):
            setattr(all_of, name, [a + b for a, b in zip(getattr(all_of, name), getattr(one, name), strict=True)])
    return found


def files_metrics(mount: "Mount") -> "dict[str, Any]":
    """/api/v1/metrics/files: of each inode that something was done with. Empty unless iostats_files is on."""
    if not mount.config.iostats_files:
        return {}
    return {
        str(ino): {
            "total_fops": sum(one.hits) + sum(one.errors),
            "data_read": one.data_read,
            "block_count_read": one.read_sizes,
            "fop_hits": one.hits,
            "fop_errors": one.errors,
        }
        for ino, one in _merged(mount.image.file_stats()).items()
    }


def latest_read_files(mount: "Mount") -> list[list[int]]:
    """/api/v1/metrics/files?latest=true: inodes read since the last call, as [inode] and [first, last]."""
    if not mount.config.latest_read_files:
        return []
    ranges: list[list[int]] = []
    for ino in sorted(mount.image.latest_read()):
        if ranges and ranges[-1][-1] == ino - 1:
            ranges[-1] = [ranges[-1][0], ino]
        else:
            ranges.append([ino])
    return ranges


def pattern_metrics(mount: "Mount") -> "list[dict[str, int]]":
    """/api/v1/metrics/pattern: inodes that were read, how often and first when. Empty unless access_pattern is on."""
    if not mount.config.access_pattern:
        return []
    return [
        {
            "ino": ino,
            "nr_read": one.reads,
            "first_access_time_secs": one.first_read[0],
            "first_access_time_nanos": one.first_read[1],
        }
        for ino, one in _merged(mount.image.file_stats()).items()
        if one.reads
    ]


def blobcache_metrics(mount: "Mount") -> "dict[str, Any]":
    """/api/v1/metrics/blobcache. entries_count: chunks that are here. partial_hits: reads answered from the cache at
    once; whole_hits: chunks found in the cache that had to be verified first; total: reads."""
    blobs = mount.image.blobs()
    ready = [mount.image.ready_chunks(blob.index) for blob in blobs]
    chunks = sum(total or blob.chunk_count for blob, (_, total) in zip(blobs, ready, strict=True))
    here = sum(count for count, _ in ready)
    stats, meter = mount.image.stats(), mount.backend.meter
    own, ahead = meter.own_metrics(), meter.prefetch
    began, ended = mount.prefetch.began_at, ahead.ended_at
    return {
        "underlying_files": sorted(blob.id + CACHE_FILE_SUFFIX for blob in blobs),
        "store_path": mount.config.work_dir,
        "partial_hits": stats.reads_at_once,
        "whole_hits": own["verified_chunks"],
        "total": stats.reads_at_once + stats.reads_waited,
        "entries_count": here,
        "prefetch_data_amount": ahead.bytes,
        "prefetch_requests_count": ahead.requests,
        "prefetch_workers": PREFETCH_SLOTS if began else 0,
        "prefetch_unmerged_chunks": ahead.chunks,
        "prefetch_cumulative_time_millis": ahead.took_ms,
        "prefetch_begin_time_secs": int(began),
        "prefetch_begin_time_millis": int(began % 1 * 1000),
        "prefetch_end_time_secs": int(ended),
        "prefetch_end_time_millis": int(ended % 1 * 1000),
        "buffered_backend_size": own["buffered_bytes"],
        "data_all_ready": bool(blobs) and here >= chunks,
    }


def backend_metrics(mount: "Mount") -> "dict[str, Any]":
    """/api/v1/metrics/backend."""
    return mount.backend.meter.nydusd_metrics()


DOCUMENTS: "dict[str, Callable[[Mount], object]]" = {
    "fs": fs_metrics,
    "files": files_metrics,
    "latest": latest_read_files,
    "pattern": pattern_metrics,
    "backend": backend_metrics,
    "blobcache": blobcache_metrics,
}


def inflight_metrics(waiting: "Iterable[tuple[int, int, int, int]]") -> "list[dict[str, int]] | None":
    """/api/v1/metrics/inflight: requests that wait for data, which is what tells a hang; None when none does."""
    now = time.time()
    return [
        {"inode": nodeid, "opcode": opcode, "unique": unique, "timestamp_secs": int(now - wait_us / 1e6)}
        for nodeid, opcode, unique, wait_us in waiting
    ] or None


def oldest_wait_s(waiting: "Iterable[tuple[int, int, int, int]]", mount: "Mount") -> float:
    """Age of the request that has waited longest for data of a mount; 0 when none does."""
    return max(
        (wait_us / 1e6 for nodeid, _, _, wait_us in waiting if nodeid >> SERIAL_SHIFT == mount.serial), default=0.0
    )
