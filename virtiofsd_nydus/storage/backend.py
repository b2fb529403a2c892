"""What a backend is. A backend knows where blobs lie and how to get a range of one; it knows nothing of chunks.

Light: no HTTP library is imported here (the daemon reads configurations before it answers RUNNING).
"""

from collections.abc import Iterator

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Protocol

    from virtiofsd_nydus.storage.meter import BackendMeter

    class Backend(Protocol):
        """All calls may come from several threads at once. They raise errors.Failure with its cause (AUTH, SCHEME,
        NETWORK, MISSING, DIGEST never, IO) once retries are used up or the deadline has passed."""

        kind: str  # "registry", "localfs", ...
        meter: BackendMeter

        def read_range(
            self, blob_id: str, offset: int, length: int, *, prefetch: bool = False, deadline: float | None = None
        ) -> Iterator[memoryview]:
            """Yields exactly `length` bytes from `offset` in pieces of at most 1 MiB; a piece is valid until the next
            is asked for. A short, long or mislabelled answer is retried from where it stopped, then NETWORK. deadline:
            time.monotonic() value."""
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
