"""What the daemon tells of itself: its state and mounts, counters, metrics, the errors it met. Light."""

import time

from virtiofsd_nydus import log as logs
from virtiofsd_nydus.daemon import metrics
from virtiofsd_nydus.daemon.mounts import find_mount
from virtiofsd_nydus.version import version_info

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from virtiofsd_nydus.daemon.mounts import MountTable
    from virtiofsd_nydus.engine import Engine, Event

ERRORS_MAX, ERRORS_MAX_BYTES = 500, 51200  # nydusd's bounds of its error events


class Report:
    """Answers about a daemon. state is the daemon's, which the service sets."""

    def __init__(
        self, engine: "Engine", table: "MountTable", log: logs.Log, instance_id: str | None, supervisor: str | None
    ) -> None:
        self.state = "INIT"
        self._engine, self._table, self._log = engine, table, log
        self._id, self._supervisor = instance_id, supervisor
        self._errors: list[str] = []  # the last ERRORS_MAX, of _error_count
        self._error_count = 0

    # ---- errors

    def note_fault(self, text: str) -> None:
        """A fault of this program's own, for the log and the API's events."""
        self._note_error(text)
        self._log.say(logs.ERROR, text)

    def note_event(self, event: "Event") -> None:
        """One line of the engine, for the log; an error for the API's events too."""
        if event.level >= logs.ERROR:
            self._note_error(event.text)
        self._log.say(event.level, event.text, **event.fields())

    def _note_error(self, text: str) -> None:
        self._error_count += 1
        self._errors.append(time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime()) + f" - {text}")
        del self._errors[:-ERRORS_MAX]

    def events(self) -> "dict[str, Any]":
        """The errors, as nydusd lists them."""
        errors = list(self._errors)
        return {
            "max_errors": ERRORS_MAX,
            "total_errors": self._error_count,
            "max_size": ERRORS_MAX_BYTES,
            "total_size": sum(map(len, errors)),
            "errors": errors,
        }

    # ---- mounts

    def superblock(self, path: str) -> "dict[str, Any]":
        """The facts of the image at path, by nydusd's names. Raises Failure where none is mounted."""
        info = self._table.require_image(path).image.info()
        v6 = info["fs_version"] == 6
        forever = {"secs": 365 * 24 * 3600, "nanos": 0}
        return {
            "magic": 0xE0F5E1E2 if v6 else 0x52414653,
            "version": 0x600 if v6 else 0x500,
            "sb_size": 128 + 1024 if v6 else 8192,
            "root_inode": info["root_ino"],
            "chunk_size": info["chunk_size_bytes"],
            "batch_size": 0,
            "inodes_count": info["inode_count"],
            "flags": {"bits": info["flags"]},
            "inode_table_entries": 0,
            "inode_table_offset": 0,
            "blob_table_size": info["blob_table_size_bytes"],
            "blob_table_offset": info["blob_table_offset"],
            "extended_blob_table_offset": 0,
            "extended_blob_table_entries": 0,
            "blob_device_table_count": 0,
            "blob_device_table_offset": 0,
            "prefetch_table_offset": info["prefetch_table_offset"],
            "prefetch_table_entries": info["prefetch_count"],
            "attr_timeout": forever,
            "entry_timeout": forever,
            "is_chunk_dict": False,
            "meta_blkaddr": info["meta_blkaddr"],
            "root_nid": info["root_ino"] & 0xFFFF,
            "chunk_table_offset": info["chunk_table_offset"],
            "chunk_table_size": info["chunk_table_size_bytes"],
        }

    def daemon_info(self) -> "dict[str, Any]":
        """State and mounts, by nydusd's names."""
        found: dict[str, Any] = {
            mount.path: {
                "backend_type": "Rafs",
                "mountpoint": mount.path,
                "mounted_time": show_time(mount.mounted_at),
                "config": mount.config.public(),
            }
            for mount in self._table.images()
        }
        for share in self._table.shares():
            found[share.path] = {
                "backend_type": "PassthroughFs",
                "mountpoint": share.path,
                "mounted_time": show_time(share.mounted_at),
                "config": None,
            }
        return {
            "version": version_info(),
            "id": self._id,
            "supervisor": self._supervisor,
            "state": self.state,
            "backend_collection": found,
        }

    def prefetch_progress(self) -> "dict[str, Any]":
        """Mountpoint -> how far its prefetch is."""
        with self._table.held() as (mounts, _):
            return {mount.path: mount.prefetch.progress() for mount in mounts}

    # ---- numbers

    def mount_metrics(self, kind: str, wanted: str | None) -> object:
        """A document of nydusd's metrics: kind is one of metrics.DOCUMENTS, wanted the `id` of the query. Raises
        LookupError where that names no mount."""
        with self._table.held() as (mounts, _):
            mount = find_mount(mounts, wanted)
            if mount is None:
                raise LookupError(wanted)
            return metrics.DOCUMENTS[kind](mount)

    def inflight_metrics(self) -> "list[dict[str, int]] | None":
        """Requests that wait for data."""
        return metrics.inflight_metrics(self._engine.waiting())

    def prometheus_text(self) -> str:
        """All numbers as Prometheus text."""
        from virtiofsd_nydus.daemon.prometheus import prometheus_text

        with self._table.held() as (mounts, _):
            return prometheus_text(mounts, self._engine.stats(), self._engine.waiting())

    def stats(self) -> "dict[str, Any]":
        """Counters of the engine, and readiness of each mounted blob."""
        with self._table.held() as (mounts, shares):
            blobs = {}
            for mount in mounts:
                for blob in mount.image.blobs():
                    ready, total = mount.image.ready_chunks(blob.index)
                    blobs[blob.id] = {
                        "ready_chunks": ready,
                        "chunks": total or blob.chunk_count,
                        "compressed_bytes": blob.compressed_size_bytes,
                        "uncompressed_bytes": blob.uncompressed_size_bytes,
                    }
            backends = {
                mount.path: {"type": mount.backend.kind, **mount.backend.status(), **mount.backend.meter.own_metrics()}
                for mount in mounts
            }
            shared = {share.path: share.directory.stats() for share in shares}
        return {"engine": self._engine.stats(), "blobs": blobs, "backends": backends, "shares": shared}


def show_time(seconds: float) -> str:
    """A time since 1970 as nydusd writes it."""
    return f"{time.strftime('%Y-%m-%d %H:%M:%S', time.gmtime(seconds))}.{int(seconds % 1 * 1e9):09d} +00:00:00"
