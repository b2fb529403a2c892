"""A blob whose data is an OCI layer: what is written is its blob.meta alone, a small blob of its own."""

from typing import Protocol

from virtiofsd_nydus.rafs import layout
from virtiofsd_nydus.rafs.blob import BlobInfo, BlobWriter, ReferencePlace, StoredMeta, Writable
from virtiofsd_nydus.rafs.layout import BlobFeature, ChunkFlag, InfoFlag
from virtiofsd_nydus.rafs.meta import compress_section, encode_chunk_infos_v2, encode_header


class LayerIndex(Protocol):
    """What is known of the layer once it has been read."""

    size: int

    @property
    def layer_id(self) -> str: ...

    def encode_table(self) -> tuple[bytes, int]: ...


class ReferenceBlobWriter(BlobWriter):
    """Takes places instead of data. finish() returns the id of the layer; blob_info tells that of blob.meta."""

    def __init__(
        self, out: Writable, index: LayerIndex, *, chunk_size: int, digester: layout.Digester,
        directory: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__(
            out, chunk_size=chunk_size, codec=layout.Codec.GZIP, digester=digester, directory=directory
        )  # fmt: skip
        self._index = index

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
        infos = encode_chunk_infos_v2(self.table, InfoFlag.ZRAN)
        contexts, count = self._index.encode_table()
        table = bytes(infos) + contexts
        packed, codec = compress_section(table, layout.Codec.ZSTD)
        header = encode_header(
            features, codec, len(self.table), 0, len(packed), len(table), (len(infos), len(contexts), count)
        )
        self._write(packed)
        self._write(header)
        self._flush()
        self._info = BlobInfo(
            blob_id=self._index.layer_id, table=self.table, codec=self.codec, digester=self.digester,
            chunk_size=self.chunk_size, features=features, compressed_size=self._index.size,
            uncompressed_size=self.uncompressed_size, ci_codec=codec, ci_csize=len(packed), ci_usize=len(table),
            meta_digest=self._hash.digest(), meta_size=self.size,
            meta=StoredMeta(packed, codec, len(table), header),
        )  # fmt: skip
        return self._info

    def finish(self) -> tuple[str, BlobInfo | None]:
        return self._index.layer_id, self._info
