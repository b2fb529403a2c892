"""The data blob of a RAFS v6 layer: chunk data, blob.meta, chunk digests, the layer's own bootstrap, and the table of
contents that finds them from the blob's end.

Each section is followed (not preceded) by a tar header, because its size is known only then.
"""

import hashlib

from virtiofsd_nydus.rafs import layout
from virtiofsd_nydus.rafs.blob import BlobInfo, BlobWriter, Form, StoredMeta, Writable
from virtiofsd_nydus.rafs.cipher import Cipher
from virtiofsd_nydus.rafs.layout import BlobFeature, ChunkFlag, InfoFlag
from virtiofsd_nydus.rafs.meta import (
    MetaHeader,
    compress_section,
    digest_section,
    encode_batch_context,
    encode_chunk_infos_v1,
    encode_chunk_infos_v2,
    encode_header,
    encode_tar_header,
    encode_toc_entry,
    pack_section,
    require_table_size,
)
from virtiofsd_nydus.rafs.spill import copy_pieces

DIGESTS_AT_A_TIME = 1 << 14


class InlinedBlobWriter(BlobWriter):
    """A blob with all its sections. batch_size: small chunks are compressed together, up to this many bytes."""

    def __init__(
        self, out: Writable, form: Form, *, batch_size: int = 0, level: int = 3, cipher: Cipher | None = None
    ) -> None:
        super().__init__(out, form, cipher=cipher)
        self.batch_size = batch_size
        self._directory = form.directory
        self._level = level
        self._toc = bytearray()
        self._batch = bytearray()
        self._batched: list[int] = []  # chunks in the batch being collected
        self._contexts = bytearray()
        self._context_count = 0
        self._meta: StoredMeta | None = None

    @property
    def holds_bootstrap(self) -> bool:
        return True

    # ---- chunk data
    def write_chunk(self, digest: bytes, crc: int, payload: bytes | memoryview, usize: int, flags: int) -> int:
        self._flush_batch()
        return super().write_chunk(digest, crc, payload, usize, flags)

    def write_batched(self, digest: bytes, crc: int, data: bytes) -> int:
        if len(self._batch) + len(data) >= self.batch_size:
            self._flush_batch()
        flags = ChunkFlag.ENCRYPTED if self.cipher else 0
        index = self._add_entry(digest, crc, len(data), 0, 0, flags)
        self.table.set_context(index, self._context_count, len(self._batch))
        self._batch += data
        self._batched.append(index)
        return index

    def _flush_batch(self) -> None:
        if not self._batched:
            return
        usize = len(self._batch)
        packed, _ = compress_section(self._batch, self.codec, self._level)
        if self.cipher is not None:
            packed = self.cipher.encrypt(packed)
        for index in self._batched:
            self.table.set_coff(index, self.size)
        self._contexts += encode_batch_context(len(packed), usize)
        self._context_count += 1
        self._write(packed)
        self._batch = bytearray()
        self._batched = []

    # ---- sections
    def _add_toc(self, name: str, codec: layout.Codec, digest: bytes, coff: int, csize: int, usize: int) -> None:
        self._toc += encode_toc_entry(name, codec, digest, coff, csize, usize)

    def finish_data(self) -> BlobInfo | None:
        """Ends the chunk data and writes blob.meta and blob.digest. Returns what the layer's own bootstrap says of its
        blob (a placeholder for an id, sizes so far); None when there are no chunks and so nothing to say."""
        self._flush_batch()
        self.data_size = self.size
        if not len(self.table):
            return None
        features = (
            BlobFeature.ALIGNED | BlobFeature.INLINED_FS_META | BlobFeature.INLINED_CHUNK_DIGEST
            | BlobFeature.HAS_TAR_HEADER | BlobFeature.HAS_TOC | BlobFeature.CAP_TAR_TOC
        )  # fmt: skip
        if self.batch_size:
            features |= BlobFeature.CHUNK_INFO_V2 | BlobFeature.BATCH
        if self.cipher is not None:
            features |= BlobFeature.CHUNK_INFO_V2 | BlobFeature.ENCRYPTED
        data_bytes = self.size
        self._write(encode_tar_header("image.blob", data_bytes))
        self._flush()
        # the one digest of the table of contents that covers a tar header too
        self._add_toc("image.blob", layout.Codec.NONE, self._hash.digest(), 0, data_bytes, self.uncompressed_size)
        ci_codec, offset, csize, usize = self._write_meta(features)
        self._write_digests()
        self._info = BlobInfo(
            blob_id=layout.PLACEHOLDER_ID, table=self.table, codec=self.codec, digester=self.digester,
            chunk_size=self.chunk_size, features=features, compressed_size=self.size,
            uncompressed_size=self.uncompressed_size, ci_codec=ci_codec, ci_offset=offset, ci_csize=csize,
            ci_usize=usize, cipher=self.cipher, meta=self._meta,
        )  # fmt: skip
        return self._info

    def _write_digests(self) -> None:
        offset, count = self.size, len(self.table)
        hashed = hashlib.sha256()
        for start in range(0, count, DIGESTS_AT_A_TIME):
            digests = self.table.digests(start, min(start + DIGESTS_AT_A_TIME, count))
            hashed.update(digests)
            self._write(digests)
        self._write(encode_tar_header("blob.digest", 32 * count))
        self._add_toc("blob.digest", layout.Codec.NONE, hashed.digest(), offset, 32 * count, 32 * count)

    def _write_meta(self, features: int) -> tuple[layout.Codec, int, int, int]:
        """Codec, offset, stored and plain size of what stands before the header. Both are encrypted where the chunks
        are, each on its own; the table of contents tells the digests of the plain ones."""
        if features & BlobFeature.CHUNK_INFO_V2:
            infos = encode_chunk_infos_v2(self.table, InfoFlag.BATCH)
        else:
            infos = encode_chunk_infos_v1(self.table)
        contexts = len(infos), len(self._contexts), self._context_count
        infos += self._contexts
        require_table_size(len(infos), "use a larger chunk size")
        packed, codec = compress_section(infos, self.codec)
        plain = packed
        if self.cipher is not None:
            packed = self.cipher.encrypt(packed)
        offset = self.size
        header = encode_header(
            MetaHeader(
                features,
                codec,
                len(self.table),
                offset,
                len(packed),
                len(infos),
                contexts if features & BlobFeature.BATCH else (0, 0, 0),
            )
        )
        self._meta = StoredMeta(plain, codec, len(infos), header)
        self._add_toc("blob.meta", codec, digest_section(infos), offset, len(packed), len(infos))
        self._add_toc(
            "blob.meta.header", layout.Codec.NONE, digest_section(header), offset + len(packed), len(header),
            len(header),
        )  # fmt: skip
        self._write(packed)
        self._write(self.cipher.encrypt(header) if self.cipher is not None else header)
        self._write(encode_tar_header("blob.meta", len(packed) + len(header)))
        return codec, offset, len(packed), len(infos)

    def write_bootstrap(self, bootstrap: memoryview) -> None:
        """The bootstrap is compressed with zstd where that helps, whatever the data's codec is: readers know no other
        codec here."""
        offset = self.size
        with pack_section(bootstrap, self._directory) as packed:
            size, codec = packed.size, packed.codec
            packed.copy(self._write)
        self._write(encode_tar_header("image.boot", size))
        digest = hashlib.sha256()
        copy_pieces(bootstrap, digest.update)
        self._add_toc("image.boot", codec, digest.digest(), offset, size, len(bootstrap))

    def finish(self) -> tuple[str, BlobInfo | None]:
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
            info.features &= ~BlobFeature.INLINED_FS_META
            info.compressed_size = self.size
            info.toc_size = len(toc) + len(header)
            info.toc_digest = digest_section(toc + header)
        return blob_id, info
