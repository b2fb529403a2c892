"""A blob whose data is an OCI layer. Only its blob.meta is written, as a small blob of its own."""

from array import array
from dataclasses import replace
from typing import Protocol

from virtiofsd_nydus.rafs import layout
from virtiofsd_nydus.rafs.blob import META_BYTES_MAX, BlobInfo, BlobWriter, Form, ReferencePlace, StoredMeta, Writable
from virtiofsd_nydus.rafs.layout import BlobFeature, ChunkFlag, InfoFlag
from virtiofsd_nydus.rafs.meta import MetaHeader, encode_chunk_infos_v2, encode_header, pack_section, require_table_size
from virtiofsd_nydus.rafs.spill import Arena, copy_pieces


class LayerIndex(Protocol):
    """What is known of the layer once it has been read."""

    size: int

    @property
    def layer_id(self) -> str: ...

    def encode_contexts(self) -> tuple[bytes, int]: ...

    @property
    def windows(self) -> memoryview: ...


class ReferenceBlobWriter(BlobWriter):
    """Takes places instead of data. finish() returns the id of the layer; blob_info tells that of blob.meta."""

    def __init__(self, out: Writable, index: LayerIndex, form: Form) -> None:
        super().__init__(out, replace(form, codec=layout.Codec.GZIP))
        self._index = index
        self._directory = form.directory

    def write_reference(self, digest: bytes, crc: int, usize: int, place: ReferencePlace) -> int:
        number = self._add_entry(digest, crc, usize, place.coff, place.csize, ChunkFlag.COMPRESSED)
        self.table.set_context(number, place.context, place.slice)
        return number

    def finish_data(self) -> BlobInfo | None:
        if not len(self.table):
            return None
        features = (
            BlobFeature.ALIGNED | BlobFeature.CHUNK_INFO_V2 | BlobFeature.ZRAN | BlobFeature.SEPARATE
            | BlobFeature.CAP_TAR_TOC
        )  # fmt: skip
        contexts, windows = self._keep_used_contexts()
        count = len(contexts) // layout.ZRAN_CONTEXT.size
        window_bytes = sum(map(len, windows))
        infos = encode_chunk_infos_v2(self.table, InfoFlag.ZRAN)
        usize = require_table_size(len(infos) + len(contexts) + window_bytes, "convert it without --oci-ref")
        table = Arena(self._directory, usize)
        table.append(infos)
        table.append(contexts)
        for part in windows:
            copy_pieces(part, table.append)
        with pack_section(table.view(), self._directory) as packed:
            csize, codec = packed.size, packed.codec
            header = encode_header(
                MetaHeader(
                    features,
                    codec,
                    len(self.table),
                    0,
                    csize,
                    usize,
                    (len(infos), len(contexts) + window_bytes, count),
                )
            )
            packed.copy(self._write)
            meta = StoredMeta(packed.read(), codec, usize, header) if csize <= META_BYTES_MAX else None
        self._write(header)
        self._flush()
        self._info = BlobInfo(
            blob_id=self._index.layer_id, table=self.table, codec=self.codec, digester=self.digester,
            chunk_size=self.chunk_size, features=features, compressed_size=self._index.size,
            uncompressed_size=self.uncompressed_size, ci_codec=codec, ci_csize=csize, ci_usize=usize,
            meta_digest=self._hash.digest(), meta_size=self.size, meta=meta,
        )  # fmt: skip
        return self._info

    def _keep_used_contexts(self) -> tuple[bytes, list[memoryview]]:
        """The contexts that a chunk is decoded by, encoded, and their windows in order. Each piece of the layer has
        one, but those of chunks that were there already are decoded by none; readers refuse a table that has more
        contexts than chunks can need. The table's chunks are numbered anew where some are left out."""
        every, count = self._index.encode_contexts()
        windows = self._index.windows
        used = bytearray(count)
        for index in range(len(self.table)):
            used[self.table.context(index)[0]] = 1
        if all(used):
            return every, [windows]
        kept = bytearray()
        parts: list[memoryview] = []
        numbers = array("I", bytes(4 * count))
        window_bytes = 0
        for number, fields in enumerate(layout.ZRAN_CONTEXT.iter_unpack(every)):
            if not used[number]:
                continue
            in_off, out_off, window_off, in_len, out_len, window_len, byte, bits = fields
            numbers[number] = len(kept) // layout.ZRAN_CONTEXT.size
            kept += layout.ZRAN_CONTEXT.pack(in_off, out_off, window_bytes, in_len, out_len, window_len, byte, bits)
            parts.append(windows[window_off : window_off + window_len])
            window_bytes += window_len
        for index in range(len(self.table)):
            number, offset = self.table.context(index)
            self.table.set_context(index, numbers[number], offset)
        return bytes(kept), parts

    def finish(self) -> tuple[str, BlobInfo | None]:
        return self._index.layer_id, self._info
