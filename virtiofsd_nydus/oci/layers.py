"""The backend of plain OCI images: the chunks that an image's bootstrap names, out of the layers as they are.

It stands before the backend that has the layers. What a layer gives by ranges passes through; frames of a table are
decoded and compared with the table's digests; and what only a whole reading gives is made again into a file without a
name (oci/layerbuild.py says which is which). Whatever comes of it, the engine compares with the image's digests.

Light: the daemon imports it before it answers RUNNING.
"""

import os
import threading
import time

from virtiofsd_nydus.errors import Cause, Failure, UsageFailure
from virtiofsd_nydus.net.documents import parse_json
from virtiofsd_nydus.net.failures import DeadlinePassed
from virtiofsd_nydus.storage import factory
from virtiofsd_nydus.storage.localfs import read_pieces
from virtiofsd_nydus.storage.meter import BackendMeter

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from virtiofsd_nydus.storage.backend import Backend

# Frames that lie one behind the other are fetched together up to this many bytes.
RUN_BYTES_MAX = 8 << 20
FRAMES_BYTES_MAX = 256 << 20
PIECE_BYTES_MAX = 64 << 20  # of one frame, decoded
PLACE_MAX = 1 << 44


def install() -> None:
    """Makes the storage know the key `layers` of a backend's settings."""
    factory.wrap_layers = LayerBackend


class LayerBackend:
    """See storage.backend.Backend. path: the file that tells each layer's kind (oci/shelf.py, KEY.layers)."""

    def __init__(self, inner: "Backend", path: str) -> None:
        self.inner = inner
        self.kind, self.source, self.meter, self.backoff = inner.kind, inner.source, inner.meter, inner.backoff
        self._directory = os.path.dirname(path)  # noqa: PTH120
        try:
            with open(path, "rb") as file:
                self._layers: dict[str, dict[str, Any]] = parse_json(file.read())["layers"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageFailure(f"backend: layers {path} cannot be read: {error}") from None
        self._lock = threading.Lock()
        self._tables: dict[str, FrameTable] = {}
        self._made: dict[str, Remaking] = {}
        self._closed = False

    def close(self) -> None:
        with self._lock:
            self._closed = True
            made, self._made = self._made, {}
        for one in made.values():
            one.close()
        self.inner.close()

    @property
    def piece_bytes(self) -> int:
        found: int = getattr(self.inner, "piece_bytes", 0)
        return found

    def prepare(self) -> None:
        self.inner.prepare()

    def distrust(self, blob_id: str) -> None:
        self.inner.distrust(blob_id)

    def status(self) -> "dict[str, object]":
        return self.inner.status()

    def blob_size(self, blob_id: str) -> int:
        layer = self._layers.get(blob_id)
        return int(layer["virtual"]) if layer is not None else self.inner.blob_size(blob_id)

    def read_range(
        self, blob_id: str, offset: int, length: int, *, prefetch: bool = False, deadline: float | None = None
    ) -> "Iterator[memoryview]":
        if offset < 0 or length < 0:
            raise ValueError(f"range of {length} bytes at {offset}")
        layer = self._layers.get(blob_id)
        kind = layer["kind"] if layer is not None else ""
        if layer is not None and kind == "table":
            return self._read_frames(layer, blob_id, offset, length, prefetch, deadline)
        if layer is not None and kind == "stored":
            return self._remaking(layer, blob_id).read(offset, length, deadline)
        at = int(layer["at"]) if layer is not None else 0
        return self.inner.read_range(blob_id, at + offset, length, prefetch=prefetch, deadline=deadline)

    def _read_frames(
        self, layer: "dict[str, Any]", blob_id: str, offset: int, length: int, prefetch: bool, deadline: float | None
    ) -> "Iterator[memoryview]":
        with self._lock:
            table = self._tables.get(blob_id)
        if table is None:
            table = FrameTable(os.path.join(self._directory, layer["frames"]))  # noqa: PTH118
            with self._lock:
                self._tables[blob_id] = table
        at, stop = int(layer["at"]), offset + length

        def fetch(start: int, size: int) -> bytes:
            parts = self.inner.read_range(blob_id, at + start, size, prefetch=prefetch, deadline=deadline)
            return b"".join(bytes(part) for part in parts)

        for virtual, data in table.decode(offset, stop, fetch, f"layer {blob_id[:12]}"):
            begin, end = max(0, offset - virtual), min(len(data), stop - virtual)
            if begin < end:
                yield memoryview(data)[begin:end]

    def _remaking(self, layer: "dict[str, Any]", blob_id: str) -> "Remaking":
        with self._lock:
            found = self._made.get(blob_id)
            if found is not None and found.failure is None:
                return found
            if self._closed:
                raise Failure("the backend is closed", Cause.NETWORK)
            if found is not None:
                found.close()
            found = self._made[blob_id] = Remaking(self.inner, layer, blob_id, self._directory)
            return found


class FrameTable:
    """Where the bytes of a layer's files are: (virtual offset, bytes, place, stored bytes, offset in the frame,
    codec)."""

    def __init__(self, path: str) -> None:
        import zstandard

        try:
            with open(path, "rb") as file:
                data = zstandard.ZstdDecompressor().stream_reader(file).read(FRAMES_BYTES_MAX)
            frames, digests = parse_json(data)
            self.frames: list[tuple[int, ...]] = [check_frame(one) for one in frames]
            self.digests: list[str] = [str(one) for one in digests]
            self.starts = [one[0] for one in self.frames]
            ends = [one[0] + one[1] for one in self.frames]
            if len(self.frames) != len(self.digests) or self.starts[1:] != ends[:-1]:
                raise ValueError("its frames do not follow each other")
        except (OSError, ValueError, TypeError, RecursionError, zstandard.ZstdError) as error:
            raise Failure(f"{path} cannot be read: {error}", Cause.FORMAT) from None

    def decode(self, offset: int, stop: int, fetch: "Any", what: str) -> "Iterator[tuple[int, bytes]]":
        """(virtual offset, bytes) of each frame that meets the range, in order, compared with the table's digests."""
        from bisect import bisect_right

        number = max(0, bisect_right(self.starts, offset) - 1)
        while number < len(self.frames) and self.frames[number][0] < stop:
            last = self._extend(number, stop)
            _, _, coff, _, _, _ = self.frames[number]
            end = max(one[2] + one[3] for one in self.frames[number : last + 1])
            stored = fetch(coff, end - coff) if end > coff else b""
            for at in range(number, last + 1):
                virtual, usize, codec = self.frames[at][0], self.frames[at][1], self.frames[at][5]
                if not codec:  # zeroes, however many: only those that are asked for
                    begin, end = max(virtual, offset), min(virtual + usize, stop)
                    yield begin, bytes(max(0, end - begin))
                    continue
                yield virtual, decode_frame(self.frames[at], stored, coff, self.digests[at], what)
            number = last + 1

    def _extend(self, number: int, stop: int) -> int:
        """The last frame of those that are fetched with this one."""
        start = self.frames[number][2]
        last = number
        while last + 1 < len(self.frames):
            virtual, _, coff, csize, _, codec = self.frames[last + 1]
            before = self.frames[last]
            follows = coff in (before[2] + before[3], before[2])
            if virtual >= stop or not codec or not before[5] or not follows or coff + csize - start > RUN_BYTES_MAX:
                break
            last += 1
        return last


def check_frame(value: "Any") -> "tuple[int, ...]":
    """A frame as a table tells it; an index that others made may say anything. Raises ValueError, TypeError."""
    virtual, usize, coff, csize, inner, codec = value
    places_ok = all(type(one) is int and 0 <= one < PLACE_MAX for one in (virtual, coff, csize))
    sizes_ok = type(usize) is int and 0 < usize <= (PIECE_BYTES_MAX if codec else PLACE_MAX)
    if not places_ok or not sizes_ok or type(inner) is not int or not 0 <= inner <= PIECE_BYTES_MAX:
        raise ValueError("a frame that cannot be")
    if codec not in (0, 1, 2):
        raise ValueError("a frame of an unknown kind")
    return virtual, usize, coff, csize, inner, codec


def decode_frame(frame: "tuple[int, ...]", stored: bytes, base: int, digest: str, what: str) -> bytes:
    """The bytes of one frame; stored: of the layer from `base` on. Raises Failure (DIGEST, FORMAT)."""
    from hashlib import sha256

    _, usize, coff, csize, inner, codec = frame
    if not codec:
        return bytes(usize)
    packed = stored[coff - base : coff - base + csize]
    data = inflate(packed, inner + usize, codec, what)[inner : inner + usize]
    if len(data) != usize or sha256(data).hexdigest() != digest:
        raise Failure(
            f"{what}: chunk at {coff}: not the bytes of its digest in the layer's table: damaged",
            Cause.DIGEST,
        )
    return data


def inflate(packed: bytes, limit: int, codec: int, what: str) -> bytes:
    import zlib

    try:
        if codec == 1:
            return zlib.decompressobj(31).decompress(packed, limit)
        import zstandard

        try:
            return zstandard.ZstdDecompressor().stream_reader(packed).read(limit)
        except zstandard.ZstdError as error:
            raise Failure(f"{what}: a frame does not decode: {error}", Cause.DIGEST) from None
    except zlib.error as error:
        raise Failure(f"{what}: a frame does not decode: {error}", Cause.DIGEST) from None


class Remaking:
    """A layer that is read from its start, because a chunk of it is wanted that is nowhere else. Its chunks come into a
    file without a name; a reader waits until his are there. Ends with the backend."""

    def __init__(self, inner: "Backend", layer: "dict[str, Any]", blob_id: str, directory: str) -> None:
        import tempfile

        self._inner, self._layer, self._id = inner, layer, blob_id
        self.failure: Failure | None = None
        self._written = 0
        self._ended = self._closed = False
        self._changed = threading.Condition()
        self._meter = BackendMeter(inner.kind)  # what is read here again was counted when it came
        self._file: Any = tempfile.TemporaryFile(dir=directory, prefix="virtiofsd-nydus-")  # noqa: SIM115
        threading.Thread(target=self._run, name=f"layer-{blob_id[:8]}", daemon=True).start()

    def read(self, offset: int, length: int, deadline: float | None) -> "Iterator[memoryview]":
        with self._changed:
            while self._written < offset + length and not self._ended:
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    raise DeadlinePassed(
                        f"layer {self._id[:12]} is read again and has come to {self._written} bytes", Cause.NETWORK
                    )
                self._changed.wait(left)
            if self._written < offset + length:
                raise self.failure or Failure(f"layer {self._id[:12]} ends early", Cause.FORMAT)
        yield from read_pieces(self._file.fileno(), f"layer {self._id[:12]}", offset, length, self._meter)

    def write(self, data: memoryview, /) -> int:
        """Of the layer's reader."""
        if self._closed:
            raise Failure("the backend is closed", Cause.NETWORK)
        self._file.write(data)
        self._file.flush()
        with self._changed:
            self._written += len(data)
            self._changed.notify_all()
        return len(data)

    def close(self) -> None:
        """The file goes with the last who reads it."""
        self._closed = True

    def _run(self) -> None:
        from virtiofsd_nydus.oci.layerbuild import STORED, make_form, read_layer
        from virtiofsd_nydus.oci.manifest import Descriptor
        from virtiofsd_nydus.oci.store import VerifiedReader

        what = f"layer {self._id[:12]}"
        try:
            size = int(self._layer["size"])
            reader = VerifiedReader(self._pieces(size), Descriptor("", f"sha256:{self._id}", size), what)
            read_layer(
                reader,
                kind=STORED,
                hex_digest=self._id,
                size=size,
                form=make_form(int(self._layer["chunk_size"]), self._layer.get("spill_dir")),
                label=what,
                out=self,
            )
            reader.finish()
        except Failure as failure:
            self.failure = failure
        except OSError as error:
            self.failure = Failure(f"{what} cannot be read again: {error.strerror or error}", Cause.IO)
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()

    def _pieces(self, size: int) -> "Iterator[memoryview]":
        from virtiofsd_nydus.storage.blobs import HttpBackend, read_patiently

        at = int(self._layer["at"])
        if isinstance(self._inner, HttpBackend):
            return read_patiently(self._inner, self._id, at, size)
        return self._inner.read_range(self._id, at, size)
