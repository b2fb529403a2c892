"""An image opened for the kernel: engine, cache, fetch threads; and fetching all of it."""

import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from types import TracebackType
from typing import Self

from virtiofsd_nydus import log as logs
from virtiofsd_nydus.engine import Engine, Event
from virtiofsd_nydus.errors import Cause, Failure
from virtiofsd_nydus.oci import layers
from virtiofsd_nydus.storage.config import ImageConfig
from virtiofsd_nydus.storage.opened import make_origin, open_with_engine

layers.install()
STALL_S = 60.0
EVENT_MS = 100
EVENTS_END_S = 10.0  # for a line that is being written


class KernelImage:
    """A context manager. Raises Failure for what EROFS cannot read. warn: takes lines about the backend."""

    def __init__(self, bootstrap: str, config: ImageConfig, warn: Callable[[str], None] = lambda line: None) -> None:
        self.bootstrap, self.config, self._warn = bootstrap, config, warn
        self._stack = ExitStack()
        self._event_thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        config = self.config
        if config.cache_compressed:
            raise Failure(
                "the configuration keeps the cache compressed, which EROFS cannot read: leave `compressed` "
                "out of it, or mount without --kernel",
                Cause.FORMAT,
            )
        with ExitStack() as stack:
            opened = stack.enter_context(
                open_with_engine(
                    self.bootstrap,
                    lambda: make_origin(config, self._warn),
                    work_dir=config.work_dir,
                    digest=config.bootstrap_digest,
                    at_end=self._end_events,
                )
            )
            self.engine, self.rafs = opened.engine, opened.rafs
            if self.rafs.info()["fs_version"] != 6:
                raise Failure(
                    f"{self.bootstrap} is RAFS version 5, which EROFS does not know: mount without --kernel",
                    Cause.FORMAT,
                )
            self.blobs = self.rafs.blobs()
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def give_events(self, say: Callable[[Event], None]) -> None:
        """Gives every line of the engine to say, in a thread. It has ended before the engine is freed."""

        def run() -> None:
            for event in self.engine.events():
                say(event)

        self._event_thread = threading.Thread(target=run, name="log", daemon=True)
        self._event_thread.start()

    def _end_events(self, engine: Engine) -> None:
        if self._event_thread is not None:
            self._event_thread.join(EVENTS_END_S)

    def is_complete(self, index: int) -> bool:
        """Every chunk of the blob is in its cache file, and was verified."""
        ready, total = self.rafs.ready_chunks(index)
        return ready == total and (total > 0 or self.blobs[index].chunk_count == 0)

    def complete(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Fetches and verifies every chunk. progress: chunks ready, chunks in all."""
        for blob in self.blobs:
            self.rafs.prefetch_blob(blob.index)
        last_ready, moved_at = -1, time.monotonic()
        while not all(self.is_complete(blob.index) for blob in self.blobs):
            counts = [self.rafs.ready_chunks(blob.index) for blob in self.blobs]
            ready, total = sum(one for one, _ in counts), sum(one for _, one in counts)
            if ready != last_ready:
                last_ready, moved_at = ready, time.monotonic()
                if progress:
                    progress(ready, total)
            if time.monotonic() - moved_at > STALL_S:
                raise Failure(f"only {ready} of {total} chunks came", Cause.NETWORK)
            event = self.engine.next_event(EVENT_MS)
            if event is not None and event.level >= logs.ERROR:
                raise Failure(event.text, event.cause)

    def last_error(self, otherwise: Failure) -> Failure:
        """The engine's last error line; otherwise, where it said none."""
        for event in self.engine.waiting_events():
            if event.level >= logs.ERROR:
                otherwise = Failure(event.text, event.cause)
        return otherwise
