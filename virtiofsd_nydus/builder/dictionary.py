"""A chunk dictionary: an image whose chunks others refer to instead of storing them again."""

import os
import stat
from dataclasses import dataclass
from pathlib import Path

from virtiofsd_nydus.builder.options import BuildOptions
from virtiofsd_nydus.errors import Cause, Failure
from virtiofsd_nydus.rafs import layout
from virtiofsd_nydus.rafs.blob import BlobInfo
from virtiofsd_nydus.rafs.chunktable import ChunkRecord, ChunkTable
from virtiofsd_nydus.rafs.layout import BlobFeature

# Features of blobs that another image's blob table cannot describe.
REFUSED = {
    BlobFeature.ENCRYPTED: "encrypted", BlobFeature.ZRAN: "of a zran image",
    BlobFeature.SEPARATE: "without its blob.meta",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class ChunkDictionary:
    """blobs: in the order of the dictionary's blob table. index: digest -> a chunk of one of their tables, which know
    the chunks that files use and no others."""

    blobs: list[BlobInfo]
    index: dict[bytes, tuple[ChunkTable, int]]


def load_dictionary(path: Path, options: BuildOptions) -> ChunkDictionary:
    """Reads a bootstrap, ours or any RAFS image's, through the engine. It must be of the same version, chunk size and
    digester as what is built. Raises Failure (FORMAT, IO)."""
    from virtiofsd_nydus.reader.bootstrap import Bootstrap

    with Bootstrap(path) as image:
        info = image.info
        for blob in image.blobs:
            if blob.chunk_count and not blob.compressed_size_bytes:
                raise Failure(
                    f"chunk dictionary {path}: blob {blob.id[:12]} has {blob.chunk_count} chunks in 0 stored "
                    "bytes, as nydus-image's generated dictionaries say; nothing that uses them can be read: "
                    "take an image's bootstrap",
                    Cause.FORMAT,
                )
        for name, theirs, ours in (
            ("RAFS version", info.fs_version, options.fs_version),
            ("chunk size", info.chunk_size_bytes, options.chunk_size),
        ):
            if theirs != ours:
                raise Failure(f"chunk dictionary {path}: its {name} is {theirs}, the image's {ours}", Cause.FORMAT)
        blobs = []
        for blob in image.blobs:
            for feature, word in REFUSED.items():
                if blob.features & feature:
                    raise Failure(f"chunk dictionary {path}: blob {blob.id[:12]} is {word}", Cause.FORMAT)
            if blob.digester != options.digest_kind:
                raise Failure(
                    f"chunk dictionary {path}: blob {blob.id[:12]} has other digests than {options.digester}",
                    Cause.FORMAT,
                )
            table = ChunkTable()
            table.resize(blob.chunk_count)
            blobs.append(
                BlobInfo(
                    blob_id=blob.id,
                    table=table,
                    codec=layout.Codec(blob.compressor),
                    digester=options.digest_kind,
                    chunk_size=blob.chunk_size_bytes,
                    features=blob.features,
                    compressed_size=blob.compressed_size_bytes,
                    uncompressed_size=blob.uncompressed_size_bytes,
                    ci_codec=layout.Codec(blob.ci_compressor),
                    ci_offset=blob.ci_offset,
                    ci_csize=blob.ci_csize_bytes,
                    ci_usize=blob.ci_usize_bytes,
                )
            )
        index: dict[bytes, tuple[ChunkTable, int]] = {}
        seen: set[int] = set()
        try:
            for entry in image.walk():
                if not stat.S_ISREG(entry.attr.mode) or entry.attr.ino in seen:
                    continue
                seen.add(entry.attr.ino)
                for chunk in image.chunks(entry.attr.ino):
                    table = blobs[chunk.blob_index].table
                    at = chunk.chunk_index
                    if chunk.digest is None:
                        raise Failure(f"chunk dictionary {os.fspath(path)}: it holds no chunk digests", Cause.FORMAT)
                    if at >= len(table) or table.usize(at) or chunk.digest in index:
                        continue
                    flags = chunk.flags & layout.ChunkFlag.COMPRESSED
                    table.set(
                        at,
                        ChunkRecord(
                            chunk.digest, chunk.uoff, chunk.coff, chunk.csize_bytes, chunk.usize_bytes, 0, flags
                        ),
                    )
                    index[chunk.digest] = table, at
        except OSError as error:
            raise Failure(
                f"chunk dictionary {path}: its files cannot be read: {error.strerror} (`check` says why)", Cause.FORMAT
            ) from error
        return ChunkDictionary(blobs, index)
