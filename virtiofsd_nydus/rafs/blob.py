"""Writes a data blob of a RAFS v6 layer: chunk data, blob.meta, chunk digests, the layer's own bootstrap, and the table
of contents that finds them from the blob's end.

Each section is followed (not preceded) by a tar header, because its size is known only then: the blob is a stream, and
its id is the sha256 of all of it.
"""

import hashlib
from typing import Protocol

from virtiofsd_nydus.errors import Cause, Failure
from virtiofsd_nydus.rafs import layout
from virtiofsd_nydus.rafs.bootstrap import BlobInfo
from virtiofsd_nydus.rafs.tree import ChunkTable

FLUSH_BYTES = 1 << 20


class Writable(Protocol):
    """Where a blob goes: a file, a pipe, an upload."""

    def write(self, data: memoryview, /) -> object: ...


def encode_tar_header(name: str, size: int) -> bytes:
    """The 512-byte header behind a section; GNU magic, mode and owner left NUL as Nydus leaves them."""
    header = bytearray(layout.TAR_HEADER_BYTES)
    header[: len(name)] = name.encode()
    if size < 8 << 30:
        header[124:136] = b"%011o\0" % size
    else:
        header[124:136] = b"\x80" + size.to_bytes(11, "big")
    header[136:148] = b"%011o\0" % 0
    header[148:156] = b" " * 8
    header[156] = ord("0")
    header[257:265] = b"ustar  \0"
    header[148:156] = b"%07o\0" % sum(header)
    return bytes(header)


def compress_section(data: bytes | bytearray, codec: layout.Codec, level: int = 3) -> tuple[bytes, layout.Codec]:
    """A metadata section in the given codec, or as it is when that does not make it smaller."""
    packed: bytes
    if codec is layout.Codec.ZSTD:
        import zstandard

        packed = zstandard.ZstdCompressor(level=level).compress(data)
    elif codec is layout.Codec.LZ4_BLOCK:
        import lz4.block

        packed = lz4.block.compress(data, store_size=False)
    else:
        packed = bytes(data)
    if codec is layout.Codec.NONE or len(packed) >= len(data):
        return bytes(data), layout.Codec.NONE
    return packed, codec


def encode_chunk_infos(table: ChunkTable) -> bytearray:
    """blob.meta's array, v1: two words a chunk."""
    import sys
    from array import array

    words = array("Q")
    for uoff, usize, coff, csize in zip(table.uoffs, table.usizes, table.coffs, table.csizes, strict=True):
        words.append(uoff | (usize - 1 & 0xFFFFF) << 44 | (usize - 1 >> 20) << 8)
        words.append(coff | (csize - 1 & 0xFFFFF) << 44 | (csize - 1 >> 20) << 40)
    if sys.byteorder == "big":
        words.byteswap()
    return bytearray(words.tobytes())


class BlobWriter:
    """Writes one blob from front to end: write_chunk for all chunks, finish_data, write_bootstrap, finish."""

    def __init__(
        self, out: Writable, *, chunk_size: int, codec: layout.Codec, digester: layout.Digester
    ) -> None:
        self.table = ChunkTable()
        self.size = 0
        self.codec = codec
        self.digester = digester
        self.chunk_size = chunk_size
        self.uncompressed_size = 0
        self._out = out
        self._hash = hashlib.sha256()
        self._buffer = bytearray()
        self._toc = bytearray()
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

    def write_chunk(self, digest: bytes, payload: bytes | memoryview, usize: int) -> int:
        """Appends a chunk, compressed iff the payload is shorter than usize; returns its index."""
        table = self.table
        index = len(table)
        if index >= layout.CHUNKS_PER_BLOB_MAX:
            raise Failure(f"a layer has more than {index} chunks; use a larger chunk size", Cause.FORMAT)
        table.digests += digest
        table.uoffs.append(self.uncompressed_size)
        table.coffs.append(self.size)
        table.csizes.append(len(payload))
        table.usizes.append(usize)
        self._write(payload)
        self.uncompressed_size += usize + (-usize & layout.BLOCK_BYTES - 1)
        if self.size > layout.BLOB_BYTES_MAX or self.uncompressed_size > layout.BLOB_UNCOMPRESSED_MAX:
            raise Failure("a layer is too large for one RAFS blob (1 TiB compressed, 16 TiB not)", Cause.FORMAT)
        return index

    def _add_toc(self, name: str, codec: layout.Codec, digest: bytes, coff: int, csize: int, usize: int) -> None:
        self._toc += layout.TOC_ENTRY.pack(layout.TOC_FLAG[codec], 0, name.encode(), digest, coff, csize, usize)

    def _write_section(
        self, name: str, data: bytes | bytearray, codec: layout.Codec, digest: bytes, usize: int
    ) -> None:
        offset = self.size
        self._write(data)
        self._write(encode_tar_header(name, len(data)))
        self._add_toc(name, codec, digest, offset, len(data), usize)

    def finish_data(self) -> BlobInfo | None:
        """Ends the chunk data and writes blob.meta and blob.digest. Returns what the layer's own bootstrap says of its
        blob (a placeholder for an id, sizes so far); None when there are no chunks and so nothing to say."""
        features = (
            layout.BlobFeature.ALIGNED | layout.BlobFeature.INLINED_FS_META | layout.BlobFeature.HAS_TAR_HEADER
            | layout.BlobFeature.HAS_TOC | layout.BlobFeature.CAP_TAR_TOC
        )  # fmt: skip
        if not len(self.table):
            return None
        features |= layout.BlobFeature.INLINED_CHUNK_DIGEST
        data_bytes = self.size
        self._write(encode_tar_header("image.blob", data_bytes))
        self._flush()
        # the one digest of the table of contents that covers a tar header too
        self._add_toc("image.blob", layout.Codec.NONE, self._hash.digest(), 0, data_bytes, self.uncompressed_size)

        infos = encode_chunk_infos(self.table)
        packed, ci_codec = compress_section(infos, self.codec)
        offset = self.size
        header = layout.META_HEADER.pack(
            layout.META_MAGIC, features, ci_codec, len(self.table), offset, len(packed), len(infos), 0, 0, 0,
            layout.META_MAGIC,
        )  # fmt: skip
        self._write(packed)
        self._write(header)
        self._write(encode_tar_header("blob.meta", len(packed) + len(header)))
        self._add_toc("blob.meta", ci_codec, hashlib.sha256(infos).digest(), offset, len(packed), len(infos))
        self._add_toc(
            "blob.meta.header", layout.Codec.NONE, hashlib.sha256(header).digest(), offset + len(packed), len(header),
            len(header),
        )  # fmt: skip
        digests = self.table.digests
        self._write_section("blob.digest", digests, layout.Codec.NONE, hashlib.sha256(digests).digest(), len(digests))
        self._info = BlobInfo(
            blob_id=layout.PLACEHOLDER_ID, table=self.table, codec=self.codec, digester=self.digester,
            chunk_size=self.chunk_size, features=features, compressed_size=self.size,
            uncompressed_size=self.uncompressed_size, ci_codec=ci_codec, ci_offset=offset, ci_csize=len(packed),
            ci_usize=len(infos),
        )  # fmt: skip
        return self._info

    def write_bootstrap(self, bootstrap: bytes | bytearray) -> None:
        """The layer's own bootstrap. Always zstd where that helps, whatever the data's codec: readers know no other."""
        packed, codec = compress_section(bootstrap, layout.Codec.ZSTD)
        self._write_section("image.boot", packed, codec, hashlib.sha256(bootstrap).digest(), len(bootstrap))

    def finish(self) -> tuple[str, BlobInfo | None]:
        """Writes the table of contents. Returns the blob's id and what a merged bootstrap says of it, None without
        chunks."""
        toc = bytes(self._toc)
        header = encode_tar_header("rafs.blob.toc", len(toc))
        self._write(toc)
        self._write(header)
        self._flush()
        blob_id = self._hash.hexdigest()
        info = self._info
        if info is not None:
            info.blob_id = blob_id
            # true of the blob, but the merged bootstrap is not the one in it
            info.features &= ~layout.BlobFeature.INLINED_FS_META
            info.compressed_size = self.size
            info.toc_size = len(toc) + len(header)
            info.toc_digest = hashlib.sha256(toc + header).digest()
        return blob_id, info
