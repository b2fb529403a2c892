"""A layer of an OCI image read once, front to end: its tree, its chunk table, and how a chunk is had again from the
layer as it is. One function for the first reading and for the one that makes a lost chunk again.

    ZRAN    gzip: chunks are decoded from the middle, by an index (builder/zran.py)
    PLACED  not compressed: a chunk is a range of the layer
    STORED  all else (zstd, sparse members, huge gzip blocks): chunks are ranges of what reading the layer again gives
    TABLE   eStargz, zstd:chunked: chunks are frames that the layer's own table names (oci/toc.py)
"""

import hashlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from virtiofsd_nydus.builder.chunker import Chunker
from virtiofsd_nydus.builder.decoding import READ_BYTES, Readable
from virtiofsd_nydus.builder.source_tar import TarSource
from virtiofsd_nydus.builder.zran import ZranIndex
from virtiofsd_nydus.rafs import layout
from virtiofsd_nydus.rafs.blob import BlobInfo, BlobWriter, Form, PlainBlobWriter, ReferencePlace, Writable
from virtiofsd_nydus.rafs.blob_reference import ReferenceBlobWriter
from virtiofsd_nydus.rafs.chunktable import ChunkTable
from virtiofsd_nydus.rafs.layout import BlobFeature
from virtiofsd_nydus.rafs.tree import Tree

ZRAN, PLACED, STORED, TABLE = "zran", "placed", "stored", "table"
OnChunk = Callable[[ChunkTable, int, bytes], None]
GZIP_MAGIC = b"\x1f\x8b"
TAR_MAGIC_AT, TAR_MAGIC = 257, b"ustar"


@dataclass
class ReadLayer:
    """What reading a layer gave. info: None where it has no file data. diff_id: digest of the decoded tar."""

    kind: str
    tree: Tree
    table: ChunkTable
    info: BlobInfo | None
    diff_id: str


class PlainIndex:
    """Tells where chunks are in a layer that is not compressed; what ZranIndex does for gzip."""

    def __init__(self, source: Readable) -> None:
        self._source = source
        self._begun = 0
        self.size = 0

    def read(self, size: int, /) -> bytes:
        data = self._source.read(size)
        while len(data) < size and (more := self._source.read(size - len(data))):
            data += more
        self.size += len(data)
        return data

    def drain(self) -> None:
        while self.read(READ_BYTES):
            pass

    def begin_chunk(self) -> None:
        self._begun = self.size

    def end_chunk(self) -> ReferencePlace:
        return ReferencePlace(self._begun, self.size - self._begun, 0, 0)


class VirtualBlobWriter(PlainBlobWriter):
    """A blob that is nowhere as such: what the layer's chunks make, one behind the other, or (PLACED) where they are in
    the layer. Its name is the layer's digest."""

    def __init__(self, out: Writable, form: Form, layer_hex: str, layer_bytes: int = 0) -> None:
        """layer_bytes: of a PLACED layer; 0: chunks are written to out."""
        super().__init__(out, form, aligned=True)
        self._layer_hex, self._layer_bytes = layer_hex, layer_bytes

    def write_reference(self, digest: bytes, crc: int, usize: int, place: ReferencePlace) -> int:
        return self._add_entry(digest, crc, usize, place.coff, place.csize, 0)

    def finish(self) -> tuple[str, BlobInfo | None]:
        self._flush()
        return self._layer_hex, describe_virtual(self, self._layer_hex, self._layer_bytes or self.size)


def describe_virtual(writer: BlobWriter, layer_hex: str, size: int) -> BlobInfo | None:
    """The blob table's entry of such a blob, which is not compressed and has no blob.meta."""
    if not len(writer.table):
        return None
    return BlobInfo(
        blob_id=layer_hex,
        table=writer.table,
        codec=layout.Codec.NONE,
        digester=writer.digester,
        chunk_size=writer.chunk_size,
        features=BlobFeature.ALIGNED,
        compressed_size=size,
        uncompressed_size=writer.uncompressed_size,
    )


class _Nowhere:
    """Takes a blob that is not kept."""

    def write(self, data: memoryview, /) -> int:
        return len(data)


def make_form(chunk_size: int, spill_dir: str | None = None) -> Form:
    """What all layers of plain images share: digests are SHA-256, which tables of contents have too."""
    return Form(chunk_size, layout.Codec.NONE, layout.Digester.SHA256, spill_dir)


def choose_kind(head: bytes) -> str:
    """How a layer that begins so is read."""
    if head[:2] == GZIP_MAGIC:
        return ZRAN
    return PLACED if head[TAR_MAGIC_AT : TAR_MAGIC_AT + 5] == TAR_MAGIC else STORED


def read_layer(
    source: Readable,
    *,
    kind: str,
    hex_digest: str,
    size: int,
    form: Form,
    label: str,
    out: Writable | None = None,
    meta_out: Writable | None = None,
    on_chunk: OnChunk | None = None,
) -> ReadLayer:
    """Reads a layer to its end. out: gets the chunks of a STORED layer, one behind the other. meta_out: gets blob.meta
    of a ZRAN layer. on_chunk: gets each chunk with its table and index, as it is made.

    Raises decoding.InPlaceFailure where only STORED will do, else Failure (FORMAT) for what is no layer."""
    buffered = io.BufferedReader(source, READ_BYTES) if isinstance(source, io.RawIOBase) else source
    index: Any = None
    writer: BlobWriter
    if kind == ZRAN:
        index = ZranIndex(buffered, form.chunk_size, form.directory)
        writer = ReferenceBlobWriter(meta_out or _Nowhere(), index, form)
    elif kind == PLACED:
        index = PlainIndex(buffered)
        writer = VirtualBlobWriter(_Nowhere(), form, hex_digest, size)
    else:
        writer = VirtualBlobWriter(out or _Nowhere(), form, hex_digest)
    observe = None if on_chunk is None else (lambda number, data: on_chunk(writer.table, number, data))
    chunker = Chunker(writer, level=1, observe=observe)
    hashed = hashlib.sha256()
    try:
        reader = TarSource(buffered, chunker, form, label=label, index=index, hashed=hashed)
        tree = reader.read()
        chunker.close()
    except BaseException:
        chunker.cancel()
        raise
    writer.finish_data()
    _, info = writer.finish()
    return ReadLayer(kind, tree, writer.table, info, f"sha256:{hashed.hexdigest()}")
