"""One opened image: its cache, its reader, and where its blobs come from; and the one order in which all of it ends.

The order: the fetch threads (Engine.shutdown, FetchPump.join), what serves the image, the image, its store, its
backend, the engine. Light: the daemon imports it before it answers RUNNING.
"""

from contextlib import contextmanager

from virtiofsd_nydus.engine import Engine, Rafs, Store
from virtiofsd_nydus.errors import Cause, Failure
from virtiofsd_nydus.net.health import RateLimit
from virtiofsd_nydus.storage.pump import FetchPump

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from virtiofsd_nydus.storage.backend import Backend
    from virtiofsd_nydus.storage.config import ImageConfig

STOP_S = 10.0  # how long fetch threads that are stuck in a backend may hold up a tool's end


class Origin:
    """Where an image's blobs come from. prefetch_limit: what prefetch may use of it; None: all."""

    __slots__ = ("backend", "prefetch_limit")

    def __init__(self, backend: "Backend", prefetch_limit: RateLimit | None = None) -> None:
        self.backend, self.prefetch_limit = backend, prefetch_limit


def make_origin(config: "ImageConfig", warn: "Callable[[str], None]") -> Origin:
    """The origin that a configuration describes. warn takes lines about what has no effect. Raises Failure."""
    from virtiofsd_nydus.storage.factory import create_backend

    for line in config.warnings:
        warn(line)
    rate = config.prefetch_bandwidth_bytes_s
    return Origin(
        create_backend(config.backend_type, config.backend_config, warn=warn), RateLimit(rate) if rate else None
    )


def require_digest(bootstrap: str, digest: str) -> None:
    """Raises Failure (DIGEST) for a bootstrap that is not the one that its image's manifest leads to."""
    from hashlib import sha256

    hashed = sha256()
    try:
        with open(bootstrap, "rb") as file:
            while piece := file.read(1 << 20):
                hashed.update(piece)
    except OSError as error:
        raise Failure(f"cannot read the bootstrap {bootstrap}: {error.strerror}", Cause.IO) from error
    if f"sha256:{hashed.hexdigest()}" != digest:
        raise Failure(
            f"bootstrap {bootstrap}: not the bytes that the image's manifest leads to: it was changed on this node; "
            "remove it, it is made again",
            Cause.DIGEST,
        )


class OpenedImage:
    """One image that the fetch threads of pump serve. It owns what it was given; close() ends it.

    compressed: the cache keeps chunks as their blobs store them. blob_id: real id of an inlined single blob.
    Raises Failure, and then has closed the origin's backend.
    """

    def __init__(
        self,
        pump: FetchPump,
        bootstrap: str,
        origin: Origin,
        *,
        work_dir: str,
        compressed: bool = False,
        blob_id: str | None = None,
        digest: str = "",
    ) -> None:
        """digest: what the bootstrap's bytes must be, "sha256:...", "": not told."""
        self.pump, self.engine, self.origin = pump, pump.engine, origin
        try:
            if digest:
                require_digest(bootstrap, digest)
            self.store = Store(self.engine, work_dir, compressed=compressed)
            try:
                self.rafs = Rafs(self.engine, bootstrap, self.store, blob_id)
            except BaseException:
                self.store.close()
                raise
        except BaseException:
            origin.backend.close()
            raise
        self._add_origin()

    def _add_origin(self) -> None:
        for blob in self.rafs.blobs():
            self.pump.add_backend(blob.key, self.origin.backend, self.origin.prefetch_limit)

    def _remove_origin(self, origin: Origin) -> None:
        for blob in self.rafs.blobs():
            self.pump.remove_backend(blob.key, origin.backend, origin.prefetch_limit)

    def change_origin(self, origin: Origin) -> None:
        """Takes blobs from this origin, from the next fetch on."""
        old, self.origin = self.origin, origin
        self._add_origin()
        self._remove_origin(old)
        old.backend.close()

    def close(self) -> None:
        """Ends it; nothing may serve it any more."""
        self._remove_origin(self.origin)
        self.rafs.close()
        self.store.close()
        self.origin.backend.close()


@contextmanager
def open_with_engine(
    bootstrap: str,
    make: "Callable[[], Origin]",
    *,
    work_dir: str,
    blob_id: str | None = None,
    digest: str = "",
    allow_unverified: bool = False,
    at_end: "Callable[[Engine], None]" = lambda engine: None,
    patience_s: float = 0.0,
) -> "Iterator[OpenedImage]":
    """An image with an engine and fetch threads of its own, for tools and kernel mounts.

    make gives its origin. at_end is called once the threads have ended: they tell why a read failed after they have
    let it go. patience_s: FetchPump's. A thread that is stuck in a backend for STOP_S leaves all open, for it may still
    use it.
    """
    engine = Engine(allow_unverified=allow_unverified)
    pump = FetchPump(engine, patience_s=patience_s)
    image: OpenedImage | None = None
    failed = True
    try:
        image = OpenedImage(pump, bootstrap, make(), work_dir=work_dir, blob_id=blob_id, digest=digest)
        pump.start()
        yield image
        failed = False
    finally:
        engine.shutdown()
        ended = pump.join(STOP_S)
        at_end(engine)
        if ended:
            if image is not None:
                image.close()
            engine.close()
        elif not failed:
            raise Failure("a fetch thread does not end", Cause.IO)
