"""A gzip layer decoded in step with its reader, and the index that lets its chunks be decoded alone later."""

import errno
import hashlib
from typing import Any

from virtiofsd_nydus.builder.decoding import READ_BYTES, InPlaceFailure, Readable, TarFailure
from virtiofsd_nydus.errors import Cause, Failure
from virtiofsd_nydus.rafs.blob import ReferencePlace
from virtiofsd_nydus.rafs.spill import Arena, relieve


class ZranIndex:
    """read() the layer; begin_chunk() and end_chunk() round the reading of each chunk."""

    def __init__(self, source: Readable, chunk_size: int, directory: str | None = None) -> None:
        """directory: for the file of the windows."""
        from virtiofsd_nydus.engine import ffi, lib

        self._ffi: Any = ffi
        self._lib: Any = lib
        self._source = source
        self._handle = ffi.gc(lib.vnd_zran_new(chunk_size), lib.vnd_zran_free)
        if self._handle == ffi.NULL:
            raise Failure("no memory for a gzip decoder", Cause.IO)
        self._windows = Arena(directory)
        self._window_bytes = ffi.new("uint32_t *")
        self._contexts = 0
        self._used = ffi.new("size_t *")
        self._offset = ffi.new("uint64_t *")
        self._slice = ffi.new("uint64_t *")
        self._piece = b""
        self._position = 0  # in the piece
        self._hash = hashlib.sha256()
        self.size = 0  # of the layer, as read so far
        self._begun: tuple[int, int, int] = (0, 0, 0)

    @property
    def layer_id(self) -> str:
        """sha256 of the layer as it is, once it is read to its end."""
        return self._hash.hexdigest()

    def _next_piece(self) -> bool:
        # The size never changes: how far the decoder looks ahead depends on it, and the index depends on that.
        parts, left = [], READ_BYTES
        while left and (part := self._source.read(left)):
            parts.append(part)
            left -= len(part)
        self._piece, self._position = b"".join(parts), 0
        self._hash.update(self._piece)
        first = not self.size
        self.size += len(self._piece)
        if first and self._piece[:2] != b"\x1f\x8b":
            raise TarFailure("not a gzip layer, which --oci-ref needs: convert without it")
        return bool(self._piece)

    def read(self, size: int, /) -> bytes:
        out = bytearray(size)
        have = 0
        with self._ffi.from_buffer("uint8_t[]", out) as target:
            while have < size:
                left = len(self._piece) - self._position
                if not left:
                    if self._next_piece():
                        continue
                    if self._lib.vnd_zran_in_member(self._handle):
                        raise TarFailure("the gzip stream ends too early")
                    break
                with self._ffi.from_buffer("uint8_t[]", self._piece) as source:
                    count = self._lib.vnd_zran_read(
                        self._handle, source + self._position, left, self._used, target + have, size - have
                    )
                if count < 0:
                    raise TarFailure("the gzip stream is damaged")
                self._position += self._used[0]
                have += count
        return bytes(out[:have]) if have < size else bytes(out)

    def drain(self) -> None:
        while self.read(READ_BYTES):
            pass
        while self._next_piece():
            pass

    def begin_chunk(self) -> None:
        """The next byte read is a chunk's first."""
        context = self._lib.vnd_zran_begin_chunk(self._handle, self._offset, self._slice)
        if context < 0:
            raise InPlaceFailure("the gzip stream cannot be indexed")
        self._begun = self._offset[0], context, self._slice[0]
        if context == self._contexts:
            self._contexts += 1
            window = self._lib.vnd_zran_window(self._handle, self._window_bytes)
            self._windows.append(bytes(self._ffi.buffer(window, self._window_bytes[0])))
            relieve()

    def end_chunk(self) -> ReferencePlace:
        """The last byte read was the chunk's last."""
        rc = self._lib.vnd_zran_end_chunk(self._handle, self._offset)
        if rc == -errno.E2BIG:
            raise InPlaceFailure("its gzip blocks are too large for reading in place: convert without --oci-ref")
        start, context, offset = self._begun
        # The chunk may take no bytes: it was decoded from bits of the byte before.
        return ReferencePlace(start, self._offset[0] - start, context, offset)

    def encode_contexts(self) -> tuple[bytes, int]:
        """The contexts as blob.meta holds them, and their number. Their windows follow them there."""
        count = self._ffi.new("uint32_t *")
        size = self._lib.vnd_zran_table(self._handle, self._ffi.NULL, 0, count)
        out = bytearray(size)
        with self._ffi.from_buffer("uint8_t[]", out) as target:
            self._lib.vnd_zran_table(self._handle, target, size, count)
        return bytes(out), count[0]

    @property
    def windows(self) -> memoryview:
        """The windows of all contexts; they may be large and not in memory."""
        return self._windows.view()
