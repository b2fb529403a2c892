"""A blob whose data is an OCI layer. Only its blob.meta is written, as a small blob of its own."""

from typing import Protocol

from virtiofsd_nydus.rafs import layout
from virtiofsd_nydus.rafs.blob import META_BYTES_MAX, BlobInfo, BlobWriter, ReferencePlace, StoredMeta, Writable
from virtiofsd_nydus.rafs.layout import BlobFeature, ChunkFlag, InfoFlag
from virtiofsd_nydus.rafs.meta import encode_chunk_infos_v2, encode_header, pack_section
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

    def __init__(
        self, out: Writable, index: LayerIndex, *, chunk_size: int, digester: layout.Digester,
        directory: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__(
            out, chunk_size=chunk_size, codec=layout.Codec.GZIP, digester=digester, directory=directory
        )  # fmt: skip
        self._index = index
        self._directory = directory

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
        contexts, count = self._index.encode_contexts()
        windows = self._index.windows
        table = Arena(self._directory, len(infos) + len(contexts) + len(windows))
        table.append(infos)
        table.append(contexts)
        copy_pieces(windows, table.append)
        usize = table.used
        with pack_section(table.view(), self._directory) as packed:
            csize, codec = packed.size, packed.codec
            header = encode_header(
                features, codec, len(self.table), 0, csize, usize,
                (len(infos), len(contexts) + len(windows), count),
            )  # fmt: skip
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

    def finish(self) -> tuple[str, BlobInfo | None]:
        return self._index.layer_id, self._info
