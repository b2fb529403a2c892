"""The daemon under test: the real process with its real log, on an image and a cache directory."""

import json
import re
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from virtiofsd_nydus._engine import ffi, lib

from virtiofsd_nydus.errors import Failure
from virtiofsd_nydus.reader.bootstrap import Bootstrap, Chunk
from virtiofsd_nydus.vmm.servers import NydusDaemon

# All waits here end by an event or fail after this; a loaded machine takes many times what a free one does
WAIT_SECONDS = 30.0


def wait_until(condition: Callable[[], object], what: str, seconds: float = WAIT_SECONDS) -> Any:
    """Polls until the condition gives something true, which is returned."""
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"{what}: not within {seconds:g} s")
        time.sleep(0.005)  # between two polls; the deadline decides


@dataclass(frozen=True)
class ServedImage:
    """A Nydus image and where it is had from. blobs: id to size of the blob file. compressed: how its cache is kept."""

    bootstrap: Path
    backend_type: str
    backend_config: dict[str, Any]
    blobs: dict[str, int]
    compressed: bool = False

    def with_backend(self, **changes: object) -> "ServedImage":
        """The same image, asked for elsewhere or otherwise."""
        return replace(self, backend_config={**self.backend_config, **changes})

    def from_directory(self, directory: Path) -> "ServedImage":
        return replace(self, backend_type="localfs", backend_config={"dir": str(directory)})

    def write_config(self, path: Path, work_dir: Path) -> Path:
        path.write_text(
            json.dumps(
                {
                    "version": 2,
                    "backend": {"type": self.backend_type, self.backend_type: self.backend_config},
                    "cache": {
                        "type": "blobcache",
                        "compressed": self.compressed,
                        "filecache": {"work_dir": str(work_dir)},
                    },
                }
            )
        )
        return path


class Daemon(NydusDaemon):
    """virtiofsd-nydus virtiofs, RUNNING on its API once entered. Its log is read by log_text()."""

    def __init__(
        self, image: ServedImage, work_dir: Path, *, deadline_ms: int = 10_000, extra: Sequence[str] = ()
    ) -> None:
        super().__init__([], die_with_parent=True)
        self.image, self.work_dir = image, work_dir
        self.kept_log: str | None = None  # once the directory it was in is gone
        self.extra = ["--read-deadline-ms", str(deadline_ms), *extra]

    def command(self, listener: int) -> list[str]:
        self.work_dir.mkdir(parents=True, exist_ok=True)
        config = self.image.write_config(self.directory / "config.json", self.work_dir)
        self.options = ["--bootstrap", str(self.image.bootstrap), "--config", str(config), *self.extra]
        return super().command(listener)

    def __enter__(self) -> Self:
        super().__enter__()
        try:
            wait_until(lambda: self.state() == "RUNNING", "the daemon's start")
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kept_log = self.log_text()
        super().__exit__(kind, error, trace)

    def log_text(self) -> str:
        return super().log_text() if self.kept_log is None else self.kept_log

    def state(self) -> str:
        """What the API says; "" while it does not answer."""
        try:
            return str(self.get("/api/v1/daemon")["state"])
        except Failure:
            self.check_alive()
            return ""

    def counters(self) -> dict[str, int]:
        """The engine's counters."""
        counters: dict[str, int] = self.get("/api/ext/v1/stats")["engine"]
        return counters

    def ready_chunks(self) -> int:
        """Chunks of all blobs that are in the cache and trusted."""
        return sum(blob["ready_chunks"] for blob in self.get("/api/ext/v1/stats")["blobs"].values())

    def kill(self, how: signal.Signals = signal.SIGKILL) -> int:
        """Ends it and waits; its exit status."""
        self.process.send_signal(how)
        return self.process.wait(WAIT_SECONDS)

    def wait_for_line(self, pattern: str) -> str:
        """The first line of the log that matches."""
        return wait_until(lambda: self.find_line(pattern), f"a log line like {pattern!r} in:\n{self.log_text()}")

    def find_line(self, pattern: str) -> str | None:
        return next((line for line in self.log_text().splitlines() if re.search(pattern, line)), None)


def find_chunks(image: ServedImage, path: str) -> list[tuple[str, Chunk]]:
    """Where a file's chunks lie: blob id and the bootstrap's record of each."""
    with Bootstrap(image.bootstrap) as opened:
        ids = [blob.id for blob in opened.blobs]
        return [(ids[chunk.blob_index], chunk) for chunk in opened.chunks(opened.resolve(path))]


def data_ends(image: ServedImage) -> dict[str, int]:
    """For each blob that files refer to, where its chunks end and what describes them begins."""
    raw = ffi.new("vnd_blob_info *")
    ends = {}
    with Bootstrap(image.bootstrap) as opened:
        for blob in opened.blobs:
            assert lib.vnd_rafs_blob_info(opened.image.handle, blob.index, raw) == 0
            ends[blob.id] = int(raw.ci_offset)
    return ends
