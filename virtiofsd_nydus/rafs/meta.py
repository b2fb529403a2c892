"""blob.meta and the small structures round the chunk data of a RAFS v6 blob (docs/rafs-format.md 1.2, 4)."""

import hashlib
import struct
import sys
import tempfile
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import BinaryIO, NamedTuple

from virtiofsd_nydus.errors import Cause, Failure
from virtiofsd_nydus.rafs import layout
from virtiofsd_nydus.rafs.blob import StoredMeta
from virtiofsd_nydus.rafs.chunktable import ChunkTable
from virtiofsd_nydus.rafs.layout import ChunkFlag, InfoFlag
from virtiofsd_nydus.rafs.spill import PIECE_BYTES, RELIEVE_EVERY, copy_pieces, relieve

# What is compressed at one go; in pieces the bytes come out a little different. So the limit is part of the format of
# our images: their digests change with it.
ONE_PIECE_BYTES_MAX = 32 << 20


def require_table_size(size: int, cure: str) -> int:
    """size bytes of a chunk table, decoded. Raises Failure where no reader would take it: cure says what to do."""
    if size > layout.TABLE_BYTES_MAX:
        raise Failure(
            f"a layer's chunk table would take {size >> 20} MiB, readers take {layout.TABLE_BYTES_MAX >> 20}: {cure}",
            Cause.FORMAT,
        )
    return size


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


def compress_section(
    data: bytes | bytearray | memoryview, codec: layout.Codec, level: int = 3
) -> tuple[bytes, layout.Codec]:
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


class PackedSection:
    """A metadata section as it is stored: packed with zstd, in a file, or the data itself where that is not smaller."""

    def __init__(self, file: BinaryIO, data: memoryview) -> None:
        import zstandard

        self._file, self._data = file, data
        if len(data) <= ONE_PIECE_BYTES_MAX:
            file.write(zstandard.ZstdCompressor(level=3).compress(data))
        else:
            compressor = zstandard.ZstdCompressor(level=3).compressobj(size=len(data))
            copy_pieces(data, lambda piece: file.write(compressor.compress(piece)))
            file.write(compressor.flush())
        self.size, self.codec = file.tell(), layout.Codec.ZSTD
        if self.size >= len(data):
            self.size, self.codec = len(data), layout.Codec.NONE

    def copy(self, take: Callable[[bytes | memoryview], object]) -> None:
        """Hands it over in pieces."""
        if self.codec is layout.Codec.NONE:
            copy_pieces(self._data, take)
            return
        self._file.seek(0)
        while piece := self._file.read(PIECE_BYTES):
            take(piece)

    def read(self) -> bytes:
        parts: list[bytes | memoryview] = []
        self.copy(parts.append)
        return b"".join(parts)


@contextmanager
def pack_section(data: memoryview, directory: str | None = None) -> Iterator[PackedSection]:
    """Packs data, which may be larger than memory should be. directory: for the file."""
    with tempfile.TemporaryFile(dir=directory) as file:
        yield PackedSection(file, data)


def encode_toc_entry(name: str, codec: layout.Codec, digest: bytes, coff: int, csize: int, usize: int) -> bytes:
    return layout.TOC_ENTRY.pack(layout.TOC_FLAG[codec], 0, name.encode(), digest, coff, csize, usize)


def _to_little_endian(words: "array[int]") -> bytearray:
    if sys.byteorder == "big":
        words.byteswap()
    return bytearray(words.tobytes())


def encode_chunk_infos_v1(table: ChunkTable) -> bytearray:
    """Two words a chunk: enough where every chunk is a piece of the blob of its own."""
    words = array("Q")
    for index in range(len(table)):
        _, uoff, coff, csize, usize, _, _ = table.record(index)
        words.append(uoff | (usize - 1 & 0xFFFFF) << 44 | (usize - 1 >> 20) << 8)
        words.append(coff | (csize - 1 & 0xFFFFF) << 44 | (csize - 1 >> 20) << 40)
        if not index % RELIEVE_EVERY:
            relieve()
    return _to_little_endian(words)


def encode_chunk_infos_v2(table: ChunkTable, kind: InfoFlag) -> bytearray:
    """Three words a chunk. kind: what a chunk with a context is, batched or zran."""
    words = array("Q")
    for index in range(len(table)):
        _, uoff, coff, csize, usize, crc, flag = table.record(index)
        context, offset = table.context(index)
        info = InfoFlag.ENCRYPTED if flag & ChunkFlag.ENCRYPTED else InfoFlag(0)
        if context >= 0:
            info |= kind | InfoFlag.COMPRESSED
            data = offset | context << 32
        else:
            info |= InfoFlag.COMPRESSED if flag & ChunkFlag.COMPRESSED else InfoFlag(0)
            data = crc
            if crc:
                info |= InfoFlag.HAS_CRC32C
        words.append(uoff >> layout.BLOCK_BITS | usize - 1 << 32 | int(info) << 56)
        words.append(coff | csize << 40)
        words.append(data)
        if not index % RELIEVE_EVERY:
            relieve()
    return _to_little_endian(words)


class MetaHeader(NamedTuple):
    """What blob.meta's header says of the table."""

    features: int
    codec: layout.Codec
    entries: int
    offset: int  # in the blob
    csize: int
    usize: int
    contexts: tuple[int, int, int]  # offset in the table, bytes, count


def encode_header(header: MetaHeader) -> bytes:
    *facts, contexts = header
    return layout.META_HEADER.pack(layout.META_MAGIC, *facts, *contexts, layout.META_MAGIC)


def decode_cache_file(meta: StoredMeta) -> bytes:
    """blob.meta as readers keep it in their cache: the table, zeroes to a whole block, the header."""
    table: bytes
    if meta.codec is layout.Codec.ZSTD:
        import zstandard

        table = zstandard.ZstdDecompressor().decompress(meta.packed, max_output_size=meta.usize)
    elif meta.codec is layout.Codec.LZ4_BLOCK:
        import lz4.block

        table = lz4.block.decompress(meta.packed, uncompressed_size=meta.usize)
    else:
        table = meta.packed
    return table + bytes(-len(table) % layout.BLOCK_BYTES) + meta.header


def encode_batch_context(csize: int, usize: int) -> bytes:
    return struct.pack("<II32x", csize, usize)


def digest_section(data: bytes | bytearray) -> bytes:
    return hashlib.sha256(data).digest()
