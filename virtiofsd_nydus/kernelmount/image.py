"""An image opened for the kernel: engine, cache, fetch threads; and fetching all of it."""

import time
from collections.abc import Callable
from contextlib import ExitStack
from types import TracebackType
from typing import Self

from virtiofsd_nydus.engine import Engine, Rafs, Store
from virtiofsd_nydus.errors import Cause, Failure
from virtiofsd_nydus.net.health import RateLimit
from virtiofsd_nydus.storage.config import ImageConfig
from virtiofsd_nydus.storage.factory import create_backend
from virtiofsd_nydus.storage.pump import FetchPump

STALL_SECONDS = 60.0
EVENT_MS = 100
ERROR_LEVEL = 40
STOP_SECONDS = 5.0


class KernelImage:
    """A context manager. Raises Failure for what EROFS cannot read. warn: takes lines about the backend."""

    def __init__(self, bootstrap: str, config: ImageConfig, warn: Callable[[str], None] = lambda line: None) -> None:
        self.bootstrap, self.config, self._warn = bootstrap, config, warn
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        if self.config.cache_compressed:
            raise Failure(
                "the configuration keeps the cache compressed, which EROFS cannot read: leave `compressed` "
                "out of it, or mount without --kernel",
                Cause.FORMAT,
            )
        with ExitStack() as stack:
            self.engine = Engine()
            stack.callback(self.engine.close)
            backend = create_backend(self.config.backend_type, self.config.backend_config, warn=self._warn)
            stack.callback(backend.close)
            store = Store(self.engine, self.config.work_dir)
            stack.callback(store.close)
            self.rafs = Rafs(self.engine, self.bootstrap, store)
            stack.callback(self.rafs.close)
            if self.rafs.info()["fs_version"] != 6:
                raise Failure(
                    f"{self.bootstrap} is RAFS version 5, which EROFS does not know: mount without --kernel",
                    Cause.FORMAT,
                )
            self.blobs = self.rafs.blobs()
            rate = self.config.prefetch_bandwidth_bytes_s
            limit = RateLimit(rate) if rate else None
            pump = FetchPump(self.engine)
            for blob in self.blobs:
                pump.add_backend(blob.key, backend, limit)
            pump.start()
            stack.callback(pump.join, STOP_SECONDS)
            stack.callback(self.engine.shutdown)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

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
            if time.monotonic() - moved_at > STALL_SECONDS:
                raise Failure(f"only {ready} of {total} chunks came", Cause.NETWORK)
            event = self.engine.next_event(EVENT_MS)
            if event is not None and event.level >= ERROR_LEVEL:
                raise Failure(event.text, event.cause)

    def last_error(self, otherwise: Failure) -> Failure:
        """What the engine said last of what went wrong."""
        while (event := self.engine.next_event(0)) is not None:
            if event.level >= ERROR_LEVEL:
                otherwise = Failure(event.text, event.cause)
        return otherwise
