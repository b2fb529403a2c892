"""The chunk data of a blob: what every kind of blob starts with, and the blob of RAFS v5, which holds nothing else.

A blob is a stream, written from front to end, and its id is the sha256 of all of it.
"""

import hashlib
from dataclasses import dataclass
from typing import Protocol

from virtiofsd_nydus.errors import Cause, Failure
from virtiofsd_nydus.rafs import layout
from virtiofsd_nydus.rafs.chunktable import ChunkRecord, ChunkTable
from virtiofsd_nydus.rafs.cipher import Cipher
from virtiofsd_nydus.rafs.layout import ChunkFlag

FLUSH_BYTES = 1 << 20
# A packed blob.meta larger than this is neither kept nor put beside the bootstrap.
META_BYTES_MAX = 8 << 20


class Writable(Protocol):
    """Where a blob goes: a file, a pipe, an upload."""

    def write(self, data: memoryview, /) -> object: ...


@dataclass(frozen=True, slots=True)
class Form:
    """What all blobs and the bootstrap of an image share. directory: where tables go that are too large for memory
    (default: TMPDIR)."""

    chunk_size: int
    codec: layout.Codec
    digester: layout.Digester
    directory: str | None = None


@dataclass(frozen=True, slots=True)
class StoredMeta:
    """A blob's blob.meta, kept packed (never encrypted): what goes beside the bootstrap."""

    packed: bytes
    codec: layout.Codec
    usize: int
    header: bytes


@dataclass(slots=True, kw_only=True)
class BlobInfo:
    """One data blob as the blob table tells it. Sizes and offsets in bytes. meta_digest and meta_size: of the blob
    that holds blob.meta, where that is another one (zran). prefetch_size: stored bytes at the blob's start that a mount
    is to prefetch (v5, policy blob)."""

    blob_id: str
    table: ChunkTable
    codec: layout.Codec
    digester: layout.Digester
    chunk_size: int
    features: int
    compressed_size: int
    uncompressed_size: int
    ci_codec: layout.Codec = layout.Codec.NONE
    ci_offset: int = 0
    ci_csize: int = 0
    ci_usize: int = 0
    toc_size: int = 0
    toc_digest: bytes = bytes(32)
    meta_digest: bytes = bytes(32)
    meta_size: int = 0
    prefetch_size: int = 0
    meta: StoredMeta | None = None
    cipher: Cipher | None = None


@dataclass(frozen=True, slots=True)
class ReferencePlace:
    """Where a chunk is in a gzip layer: the compressed bytes round it, the context that decodes it, and its offset in
    what that gives."""

    coff: int
    csize: int
    context: int
    slice: int


class BlobWriter:
    """Takes the chunks of one blob in the order of their indexes. A subclass says what follows them: finish_data, then
    write_bootstrap, then finish."""

    alignment = layout.BLOCK_BYTES  # of uncompressed offsets

    def __init__(self, out: Writable, form: Form, *, cipher: Cipher | None = None) -> None:
        self.table = ChunkTable(form.directory)
        self.size = 0
        self.data_size = 0  # of it, chunks; once finish_data is called
        self.codec = form.codec
        self.digester = form.digester
        self.chunk_size = form.chunk_size
        self.cipher = cipher
        self.uncompressed_size = 0
        self.chunk_bytes = 0  # of all chunks, not compressed
        self._out = out
        self._hash = hashlib.sha256()
        self._buffer = bytearray()
        self._info: BlobInfo | None = None

    def _flush(self) -> None:
        if self._buffer:
            with memoryview(self._buffer) as view:
                self._hash.update(view)
                done = 0
                while done < len(view):  # an unbuffered file may take less than it is given
                    written = self._out.write(view[done:])
                    done += written if isinstance(written, int) else len(view)
            self._buffer = bytearray()

    def _write(self, data: bytes | bytearray | memoryview) -> None:
        self.size += len(data)
        self._buffer += data
        if len(self._buffer) >= FLUSH_BYTES:
            self._flush()

    def _add_entry(self, digest: bytes, crc: int, usize: int, coff: int, csize: int, flags: int) -> int:
        index = len(self.table)
        if index >= layout.CHUNKS_PER_BLOB_MAX:
            raise Failure(f"a layer has more than {index} chunks; use a larger chunk size", Cause.FORMAT)
        flags |= ChunkFlag.HAS_CRC32C if crc else 0
        self.table.append(ChunkRecord(digest, self.uncompressed_size, coff, csize, usize, crc, flags))
        self.chunk_bytes += usize
        self.uncompressed_size += usize + (-usize & self.alignment - 1)
        if self.size > layout.BLOB_BYTES_MAX or self.uncompressed_size > layout.BLOB_UNCOMPRESSED_MAX:
            raise Failure("a layer is too large for one RAFS blob (1 TiB compressed, 16 TiB not)", Cause.FORMAT)
        return index

    def write_chunk(self, digest: bytes, crc: int, payload: bytes | memoryview, usize: int, flags: int) -> int:
        """Appends a chunk as it is to be stored; flags of ChunkFlag. Returns its index."""
        index = self._add_entry(digest, crc, usize, self.size, len(payload), flags)
        self._write(payload)
        return index

    def write_batched(self, digest: bytes, crc: int, data: bytes) -> int:
        """Appends a small chunk to the batch being collected, not compressed."""
        raise NotImplementedError

    def write_reference(self, digest: bytes, crc: int, usize: int, place: ReferencePlace) -> int:
        """Appends a chunk that lies in an OCI layer."""
        raise NotImplementedError

    def finish_data(self) -> BlobInfo | None:
        """Ends the chunk data. Returns what the layer's own bootstrap says of its blob; None when there are no chunks
        and so nothing to say."""
        raise NotImplementedError

    def write_bootstrap(self, bootstrap: memoryview) -> None:
        """Takes the layer's own bootstrap, where the blob has a place for it."""

    @property
    def holds_bootstrap(self) -> bool:
        return False

    def finish(self) -> tuple[str, BlobInfo | None]:
        """Returns the blob's id and what a merged bootstrap says of it, None without chunks."""
        raise NotImplementedError


class PlainBlobWriter(BlobWriter):
    """A blob of RAFS v5: chunk data alone. Uncompressed offsets run on without gaps, unless aligned."""

    def __init__(self, out: Writable, form: Form, *, aligned: bool = False) -> None:
        super().__init__(out, form)
        if not aligned:
            self.alignment = 1

    def finish_data(self) -> BlobInfo | None:
        self.data_size = self.size
        if len(self.table):
            self._info = BlobInfo(
                blob_id=layout.PLACEHOLDER_ID,
                table=self.table,
                codec=self.codec,
                digester=self.digester,
                chunk_size=self.chunk_size,
                features=layout.BlobFeature.CAP_TAR_TOC,
                compressed_size=self.size,
                uncompressed_size=self.uncompressed_size,
            )
        return self._info

    def finish(self) -> tuple[str, BlobInfo | None]:
        self._flush()
        blob_id = self._hash.hexdigest()
        if self._info is not None:
            self._info.blob_id = blob_id
        return blob_id, self._info
