"""What a backend is. A backend knows where blobs lie and how to get a range of one; it knows nothing of chunks.

Light: no HTTP library is imported here (the daemon reads configurations before it answers RUNNING).
"""

from collections.abc import Iterator

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Protocol

    from virtiofsd_nydus.storage.backoff import Backoff
    from virtiofsd_nydus.storage.meter import BackendMeter

    class Backend(Protocol):
        """All calls may come from several threads at once. They raise errors.Failure with its cause (AUTH, SCHEME,
        NETWORK, MISSING, DIGEST never, IO)."""

        kind: str  # "registry", "localfs", ...
        source: str  # the server that is asked, with its kind: backends of one source share its fetch slots
        meter: BackendMeter
        backoff: Backoff  # who reads tells it how it went, and keeps to its times

        def read_range(
            self, blob_id: str, offset: int, length: int, *, prefetch: bool = False, deadline: float | None = None
        ) -> Iterator[memoryview]:
            """Yields exactly `length` bytes from `offset` in pieces of at most 1 MiB; a piece is valid until the next
            is asked for. Waits for the server only, until deadline (a time.monotonic() value), never for another
            attempt: it makes one at once where that may do, else raises (RetriableFailure where a later one may
            do)."""
            ...

        def prepare(self) -> None:
            """Does now what the first request would do first: imports, certificates. May raise
            anything: the first request meets it again."""
            ...

        def blob_size(self, blob_id: str) -> int:
            """Size of the blob in bytes."""
            ...

        def distrust(self, blob_id: str) -> None:
            """What came of this blob was not the image's: go another way where there is one."""
            ...

        def status(self) -> dict[str, object]:
            """Health of what is asked, for the API; no secrets."""
            ...

        def close(self) -> None: ...
