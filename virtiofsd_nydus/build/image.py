"""From sources to a Nydus image: build_layer makes one blob of one layer, merge_layers one bootstrap of all of them."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Literal

from virtiofsd_nydus.build.chunker import Chunker
from virtiofsd_nydus.build.merge import ChunkChoice, merge_trees
from virtiofsd_nydus.build.options import BuildOptions
from virtiofsd_nydus.build.tar_stream import Readable
from virtiofsd_nydus.errors import Cause, Failure, UsageFailure
from virtiofsd_nydus.rafs.blob import BlobWriter, Writable
from virtiofsd_nydus.rafs.bootstrap import BlobInfo, BootstrapStats, BootstrapWriter
from virtiofsd_nydus.rafs.tree import Directory

if TYPE_CHECKING:
    from virtiofsd_nydus.build.source_dir import DirectorySource
    from virtiofsd_nydus.build.source_tar import TarSource

__all__ = ["BuildOptions", "Layer", "MergedImage", "build_layer", "merge_layers"]


@dataclass(slots=True)
class LayerStats:
    """What went into a layer and came out."""

    names: int = 0
    files: int = 0
    file_bytes: int = 0
    chunks: int = 0
    deduplicated_bytes: int = 0  # of chunks the layer already had
    dropped_xattrs: int = 0  # that RAFS cannot hold
    bootstrap_bytes: int = 0  # of the layer's own bootstrap, not compressed


@dataclass(slots=True)
class Layer:
    """One layer's blob, written, and its tree, which merge_layers needs. blob_info is None when the layer holds no file
    data: there is a blob all the same, which no merged bootstrap names."""

    tree: Directory
    blob_id: str  # sha256 of the blob, hex
    blob_size: int
    blob_info: BlobInfo | None
    stats: LayerStats


@dataclass(slots=True)
class MergedImage:
    """The bootstrap of a whole image."""

    bootstrap: bytearray
    root: Directory
    blobs: list[BlobInfo]  # of the blob table, in its order
    stats: BootstrapStats
    unused_blob_ids: list[str] = field(default_factory=list)  # of layers no file of the result is in


class _CountedSource:
    """Tells how far reading has come, in bytes of the source as it is (compressed when it is)."""

    def __init__(self, source: Readable, on_progress: Callable[[int], None]) -> None:
        self._source = source
        self._on_progress = on_progress

    def read(self, size: int, /) -> bytes:
        data = self._source.read(size)
        self._on_progress(len(data))
        return data


def build_layer(
    source: Readable | Path | str, *, options: BuildOptions, out_blob: Writable | Path | str,
    kind: Literal["dir", "tar"], on_progress: Callable[[int], None] | None = None, label: str = "",
) -> Layer:  # fmt: skip
    """Reads a source once, front to end, and writes the layer's blob; its bytes depend on source and options alone.

    kind "dir": source is a path. kind "tar": a path or anything with read(); gzip, zstd and plain are told apart; it is
    read to its end. out_blob: a path, or anything with write(), which gets memoryviews valid during the call.
    on_progress gets numbers of bytes just read (tar: of the source as it is; dir: of files). label names the source in
    errors. Raises Failure: FORMAT for a source that makes no layer, IO for one that cannot be read."""
    if isinstance(out_blob, (str, Path)):
        try:
            with open(out_blob, "wb", buffering=0) as out:
                return build_layer(
                    source, options=options, out_blob=out, kind=kind, on_progress=on_progress, label=label
                )
        except BaseException:
            Path(out_blob).unlink(missing_ok=True)
            raise
    if kind == "tar" and isinstance(source, (str, Path)):
        try:
            with open(source, "rb", buffering=0) as stream:
                return build_layer(
                    stream, options=options, out_blob=out_blob, kind=kind, on_progress=on_progress,
                    label=label or str(source),
                )  # fmt: skip
        except OSError as error:
            raise Failure(f"{error.filename or source}: {error.strerror}", Cause.IO) from error

    writer = BlobWriter(
        out_blob, chunk_size=options.chunk_size, codec=options.codec, digester=options.digest_kind
    )
    chunker = Chunker(writer, level=options.compression_level, threads=options.threads)
    stats = LayerStats()
    try:
        reader = _make_reader(source, chunker, writer, options, kind, on_progress, label)
        tree = reader.read()
        chunker.close()
    except BaseException:
        chunker.cancel()
        raise
    stats.files, stats.file_bytes = reader.files, reader.file_bytes
    stats.dropped_xattrs, stats.deduplicated_bytes = reader.dropped_xattrs, chunker.deduplicated_bytes
    del reader, chunker  # their indexes go before the bootstrap, as large again, comes
    info = writer.finish_data()
    bootstrap = BootstrapWriter(
        tree, [info] if info else [], chunk_size=options.chunk_size, codec=options.codec,
        digester=options.digest_kind, prefetch=_prefetch_paths(options),
    )  # fmt: skip
    writer.write_bootstrap(bootstrap.write())
    blob_id, info = writer.finish()
    stats.names, stats.chunks = bootstrap.stats.names, len(writer.table)
    stats.bootstrap_bytes = bootstrap.stats.bootstrap_bytes
    return Layer(tree, blob_id, writer.size, info, stats)


def _make_reader(
    source: Readable | Path | str, chunker: Chunker, writer: BlobWriter, options: BuildOptions, kind: str,
    on_progress: Callable[[int], None] | None, label: str,
) -> "TarSource | DirectorySource":  # fmt: skip
    if kind == "tar":
        from virtiofsd_nydus.build.source_tar import TarSource

        if isinstance(source, (str, Path)):
            raise TypeError("a path is opened by build_layer")
        counted = _CountedSource(source, on_progress) if on_progress is not None else source
        return TarSource(counted, chunker, writer.table, chunk_size=options.chunk_size, label=label or "tar")
    from virtiofsd_nydus.build.source_dir import DirectorySource

    if not isinstance(source, (str, Path)):
        raise TypeError("a directory is given by its path")
    prefetch = options.prefetch_patterns if options.prefetch_policy != "none" else ()
    return DirectorySource(
        Path(source), chunker, writer.table, chunk_size=options.chunk_size, prefetch=prefetch, on_progress=on_progress
    )


def _prefetch_paths(options: BuildOptions) -> list[bytes]:
    """What goes into the prefetch table: only the policy "fs" has one in RAFS v6."""
    return [os.fsencode(path) for path in options.prefetch_patterns] if options.prefetch_policy == "fs" else []


def merge_layers(
    layers: Sequence[Layer], *, options: BuildOptions, out_bootstrap: Path | str | BinaryIO | None = None,
    chunk_dict: Path | None = None,
) -> MergedImage:  # fmt: skip
    """One bootstrap of all layers, lowest first; written to out_bootstrap too when given. All layers must have been
    built with these options. Blobs that no file refers to are not in it."""
    if chunk_dict is not None:
        raise UsageFailure("--chunk-dict is not supported yet")
    made = (options.chunk_size, options.codec, options.digest_kind)
    for layer in layers:
        info = layer.blob_info
        if info is not None and (info.chunk_size, info.codec, info.digester) != made:
            raise Failure(f"layer {layer.blob_id[:12]} was built with other options than this image", Cause.FORMAT)
    root = merge_trees([layer.tree for layer in layers])
    # Of two equal layers the upper replaces every file of the lower, so no blob comes into the table twice.
    present = [layer.blob_info for layer in layers if layer.blob_info is not None]
    choice = ChunkChoice(root, [info.table for info in present])
    kept = [index for index, used in enumerate(choice.used) if used]
    position = {layer: index for index, layer in enumerate(kept)}
    moved = {
        table: {chunk: (position[layer], index) for chunk, (layer, index) in places.items()}
        for table, places in choice.moved.items()
    }
    writer = BootstrapWriter(
        root, [present[index] for index in kept], chunk_size=options.chunk_size, codec=options.codec,
        digester=options.digest_kind, moved=moved, prefetch=_prefetch_paths(options),
    )  # fmt: skip
    bootstrap = writer.write()
    if isinstance(out_bootstrap, (str, Path)):
        Path(out_bootstrap).write_bytes(bootstrap)
    elif out_bootstrap is not None:
        out_bootstrap.write(bootstrap)
    used_ids = {present[index].blob_id for index in kept}
    unused = [layer.blob_id for layer in layers if layer.blob_id not in used_ids]
    return MergedImage(bootstrap, root, [present[index] for index in kept], writer.stats, unused)
