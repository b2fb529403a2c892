"""Backend `localfs`: blobs are files of this host. Configuration as nydusd has it. Light."""

import errno
import os
import threading
import time

from virtiofsd_nydus.errors import Cause, Failure
from virtiofsd_nydus.net.answers import PIECE_BYTES
from virtiofsd_nydus.storage.backoff import Backoff
from virtiofsd_nydus.storage.meter import BackendMeter

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

BLOB_ID_CHARACTERS = frozenset("0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ_-")


class LocalfsBackend:
    """See storage.backend.Backend. `blob_file`, else DIR/<id>, else the first alt_dirs/<id> that is there."""

    kind = "localfs"

    def __init__(self, directory: str = "", blob_file: str = "", alt_dirs: "tuple[str, ...]" = ()) -> None:
        self._directory = directory
        self._blob_file = blob_file
        self._alt_dirs = alt_dirs
        self._files: dict[str, tuple[int, str]] = {}  # blob id -> descriptor kept open, path
        self._left: list[int] = []  # descriptors of files that were replaced
        self._lock = threading.Lock()
        self.meter = BackendMeter(self.kind)
        self.source = f"{self.kind} {directory or blob_file}"
        self.backoff = Backoff(self.source)

    def close(self) -> None:
        with self._lock:
            files, self._files = self._files, {}
            left, self._left = self._left, []
        for fd in [*left, *(fd for fd, _ in files.values())]:
            os.close(fd)

    def distrust(self, blob_id: str) -> None:
        """There is no other way to a local file."""

    def status(self) -> "dict[str, object]":
        return {}

    def blob_size(self, blob_id: str) -> int:
        return os.fstat(self._open(blob_id)[0]).st_size

    def prepare(self) -> None:
        pass

    def read_range(
        self, blob_id: str, offset: int, length: int, *, prefetch: bool = False, deadline: float | None = None
    ) -> "Iterator[memoryview]":
        if offset < 0 or length < 0:
            raise ValueError(f"range of {length} bytes at {offset}")
        return self._read_range(blob_id, offset, length)

    def _read_range(self, blob_id: str, offset: int, length: int) -> "Iterator[memoryview]":
        end = offset + length
        fd, path = self._open(blob_id)
        try:
            for piece in read_pieces(fd, path, offset, length, self.meter):
                offset += len(piece)
                yield piece
        except Failure:
            if not self._is_replaced(blob_id):
                raise
            fd, path = self._open(blob_id)
            yield from read_pieces(fd, path, offset, end - offset, self.meter)

    def _is_replaced(self, blob_id: str) -> bool:
        """Whether another file is there by now, or a NAS that was away no longer knows ours: it is opened anew then."""
        with self._lock:
            kept = self._files.get(blob_id)
            if kept is None:
                return True  # another thread has seen it
            fd, path = kept
            try:
                if os.path.samestat(os.fstat(fd), os.stat(path)):  # noqa: PTH116
                    return False
            except OSError:
                pass
            del self._files[blob_id]
            self._left.append(fd)  # another thread may be reading it
        return True

    def _candidates(self, blob_id: str) -> list[str]:
        if self._blob_file:
            return [self._blob_file]
        # The id comes from an image: it must not lead out of the directory.
        if not 1 <= len(blob_id) <= 64 or not BLOB_ID_CHARACTERS.issuperset(blob_id):
            raise Failure(f"blob id {blob_id[:80]!r} is not one: letters, digits, - and _ only", Cause.FORMAT)
        return [f"{folder}/{blob_id}" for folder in (self._directory, *self._alt_dirs) if folder]

    def _open(self, blob_id: str) -> tuple[int, str]:
        with self._lock:
            opened = self._files.get(blob_id)
            if opened is not None:
                return opened
            paths = self._candidates(blob_id)
            for path in paths:
                try:
                    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                except OSError as error:
                    if error.errno in (errno.ENOENT, errno.ENOTDIR):
                        continue
                    raise Failure(f"cannot open the blob file {path}: {error.strerror}", Cause.IO) from error
                opened = self._files[blob_id] = fd, path
                return opened
        raise Failure(f"no blob file {' or '.join(paths)}: is it the image's blob directory?", Cause.MISSING)


def read_pieces(fd: int, path: str, offset: int, length: int, meter: BackendMeter) -> "Iterator[memoryview]":
    """length bytes from offset of an open file in pieces; each is valid until the next is asked for."""
    began_s = time.monotonic()
    buffer = bytearray(min(PIECE_BYTES, length))
    view = memoryview(buffer)
    end = offset + length
    cause = ""
    try:
        while offset < end:
            try:
                got = os.preadv(fd, [view[: end - offset]], offset)
            except OSError as error:
                cause = "io"
                raise Failure(f"cannot read {path}: {error.strerror}", Cause.IO) from error
            if got == 0:
                cause = "format"
                raise Failure(
                    f"{path} has {os.fstat(fd).st_size} bytes, the image wants {end - offset} at "
                    f"{offset}: it is not the blob the image was made with, or was copied only in part",
                    Cause.FORMAT,
                )
            offset += got
            meter.receive(got)
            yield view[:got]
    finally:
        meter.record(began_s, length, cause)
