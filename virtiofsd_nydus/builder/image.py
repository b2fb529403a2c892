"""From sources to a Nydus image: build_layer makes one blob of one layer, merge_layers one bootstrap of all of them."""

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Literal

from virtiofsd_nydus.builder.chunker import Chunker
from virtiofsd_nydus.builder.decoding import Hash, Readable
from virtiofsd_nydus.builder.dictionary import ChunkDictionary
from virtiofsd_nydus.builder.merge import ChunkChoice, list_lower_links, merge_trees
from virtiofsd_nydus.builder.options import BuildOptions
from virtiofsd_nydus.errors import Cause, Failure
from virtiofsd_nydus.rafs.blob import BlobInfo, BlobWriter, PlainBlobWriter, Writable
from virtiofsd_nydus.rafs.blob_reference import ReferenceBlobWriter
from virtiofsd_nydus.rafs.blob_v6 import InlinedBlobWriter
from virtiofsd_nydus.rafs.bootstrap import BootstrapStats, BootstrapWriter
from virtiofsd_nydus.rafs.spill import Arena, copy_pieces
from virtiofsd_nydus.rafs.tree import Tree

if TYPE_CHECKING:
    from virtiofsd_nydus.builder.source_dir import DirectorySource
    from virtiofsd_nydus.builder.source_tar import TarSource
    from virtiofsd_nydus.builder.zran import ZranIndex

__all__ = ["BuildOptions", "Layer", "LayerSource", "MergedImage", "build_layer", "merge_layers"]


@dataclass(slots=True)
class LayerStats:
    """Counts of one layer: what was read and what was written."""

    names: int = 0
    files: int = 0
    file_bytes: int = 0
    chunks: int = 0
    deduplicated_bytes: int = 0  # of chunks the layer or the dictionary already had
    dictionary_bytes: int = 0  # of them, those the dictionary had
    unique_bytes: int = 0  # of the layer's own chunks, not compressed
    stored_bytes: int = 0  # what they take in the blob
    dropped_xattrs: int = 0  # that RAFS cannot hold
    bootstrap_bytes: int = 0  # of the layer's own bootstrap, not compressed


@dataclass(slots=True)
class Layer:
    """One layer's blob, written, and its tree, which merge_layers needs. blob_info is None when the layer holds no file
    data: there is a blob all the same, which no merged bootstrap names."""

    tree: Tree
    blob_id: str  # sha256 of the blob, hex
    blob_size: int
    blob_info: BlobInfo | None
    stats: LayerStats
    label: str = ""  # names it in errors
    diff_id: str = ""  # "sha256:..." of the decoded tar, where the options ask for it


@dataclass(slots=True)
class MergedImage:
    """The bootstrap of a whole image."""

    arena: Arena
    tree: Tree
    blobs: list[BlobInfo]  # of the blob table, in its order
    stats: BootstrapStats
    unused_blob_ids: list[str] = field(default_factory=list)  # of layers no file of the result is in

    @property
    def bootstrap(self) -> memoryview:
        """The bootstrap's bytes. They may be large and not in memory: take them in pieces (spill.copy_pieces)."""
        return self.arena.view()


class _CountedSource:
    """Tells how far reading has come, in bytes of the source as it is (compressed when it is)."""

    def __init__(self, source: Readable, on_progress: Callable[[int], None]) -> None:
        self._source = source
        self._on_progress = on_progress

    def read(self, size: int, /) -> bytes:
        data = self._source.read(size)
        self._on_progress(len(data))
        return data


@dataclass(frozen=True, slots=True)
class LayerSource:
    """What a layer is made of. kind "dir": data is a path. kind "tar": a path or anything with read(); gzip, zstd and
    plain are told apart; it is read to its end. on_progress gets numbers of bytes just read (tar: of the source as it
    is; dir: of files). label names the source in errors."""

    data: Readable | Path | str
    kind: Literal["dir", "tar"]
    label: str = ""
    on_progress: Callable[[int], None] | None = None


def build_layer(
    source: LayerSource,
    *,
    options: BuildOptions,
    out_blob: Writable | Path | str,
    dictionary: ChunkDictionary | None = None,
) -> Layer:
    """Reads a source once, front to end, and writes the layer's blob; its bytes depend on source and options alone.

    out_blob: a path, or anything with write(), which gets memoryviews valid during the call. Raises Failure: FORMAT for
    a source that makes no layer, IO for one that cannot be read."""
    if isinstance(out_blob, (str, Path)):
        try:
            with open(out_blob, "wb", buffering=0) as out:
                return build_layer(source, options=options, out_blob=out, dictionary=dictionary)
        except BaseException:
            Path(out_blob).unlink(missing_ok=True)
            raise
    path = source.data
    if source.kind == "tar" and isinstance(path, (str, Path)):
        try:
            with open(path, "rb", buffering=0) as stream:
                opened = replace(source, data=stream, label=source.label or str(path))
                return build_layer(opened, options=options, out_blob=out_blob, dictionary=dictionary)
        except OSError as error:
            raise Failure(f"{error.filename or path}: {error.strerror}", Cause.IO) from error

    try:
        return _build(_Run(source, options), out_blob, dictionary)
    except Failure as failure:
        if source.label and source.label not in str(failure):
            raise Failure(f"{source.label}: {failure}", failure.cause) from failure
        raise


@dataclass(frozen=True, slots=True)
class _Run:
    """What build_layer was asked for."""

    source: LayerSource
    options: BuildOptions


def _build(run: _Run, out_blob: Writable, dictionary: ChunkDictionary | None) -> Layer:
    options = run.options
    index = _make_index(run) if options.oci_ref else None
    writer = _make_writer(out_blob, options, index)
    chunker = Chunker(
        writer,
        level=options.compression_level,
        threads=options.threads,
        batch_size=options.batch_size,
        dictionary=dictionary.index if dictionary is not None else None,
    )
    stats = LayerStats()
    hashed = hashlib.sha256() if options.diff_id and run.source.kind == "tar" else None
    try:
        reader = _make_reader(run, chunker, index, hashed)
        tree = reader.read()
        chunker.close()
    except BaseException:
        chunker.cancel()
        raise
    stats.files, stats.file_bytes = reader.files, reader.file_bytes
    stats.dropped_xattrs, stats.deduplicated_bytes = reader.dropped_xattrs, chunker.deduplicated_bytes
    stats.dictionary_bytes = chunker.dictionary_bytes
    prefetch_chunks = getattr(reader, "prefetch_chunks", 0)
    del reader, chunker  # their indexes go before the bootstrap, as large again, comes
    info = writer.finish_data()
    stats.stored_bytes = writer.data_size
    stats.unique_bytes = writer.chunk_bytes
    if writer.holds_bootstrap:
        links = list_lower_links(tree)
        for directory, name, _ in links:  # what they share is not known here
            tree.unlink(directory, name)
        bootstrap = _write_bootstrap(tree, [info] if info else [], options, dictionary)[0]
        writer.write_bootstrap(bootstrap.data.view())
        stats.bootstrap_bytes = bootstrap.stats.bootstrap_bytes
        del bootstrap
        for directory, name, link in links:
            tree.link(directory, name, link)
    blob_id, info = writer.finish()
    if info is not None and options.prefetch_policy == "blob" and prefetch_chunks:
        info.prefetch_size = writer.table.coff(prefetch_chunks - 1) + writer.table.csize(prefetch_chunks - 1)
    stats.names = 1 + sum(tree.child_count(directory) for directory in tree.walk_directories())
    stats.chunks = len(writer.table)
    diff_id = f"sha256:{hashed.hexdigest()}" if hashed is not None else ""
    return Layer(tree, blob_id, writer.size, info, stats, run.source.label, diff_id)


def _make_index(run: _Run) -> "ZranIndex":
    from virtiofsd_nydus.builder.zran import ZranIndex

    if isinstance(run.source.data, (str, Path)):
        raise Failure("only a layer can be referred to, a directory has none", Cause.FORMAT)
    return ZranIndex(_count(run.source.data, run.source.on_progress), run.options.chunk_size, run.options.spill_dir)


def _count(source: Readable, on_progress: Callable[[int], None] | None) -> Readable:
    return _CountedSource(source, on_progress) if on_progress is not None else source


def _make_writer(out_blob: Writable, options: BuildOptions, index: "ZranIndex | None") -> BlobWriter:
    from virtiofsd_nydus.rafs.cipher import Cipher

    if index is not None:
        return ReferenceBlobWriter(out_blob, index, options.form)
    if options.fs_version == 5:
        return PlainBlobWriter(out_blob, options.form, aligned=options.aligned_chunk)
    return InlinedBlobWriter(
        out_blob,
        options.form,
        batch_size=options.batch_size,
        level=options.compression_level,
        cipher=Cipher.make() if options.encrypt else None,
    )


@dataclass(slots=True)
class _Written:
    data: Arena
    stats: BootstrapStats


def _write_bootstrap(
    tree: Tree, blobs: Sequence[BlobInfo], options: BuildOptions, dictionary: ChunkDictionary | None
) -> tuple[_Written, list[BlobInfo]]:
    """The bootstrap of a tree, and the blobs it names: those of the layers that it needs, then the dictionary's."""
    from virtiofsd_nydus.rafs.bootstrap_v5 import BootstrapWriterV5

    known = dictionary.blobs if dictionary is not None else []
    choice = ChunkChoice(tree, [info.table for info in blobs], [info.table for info in known])
    every = [*blobs, *known]
    kept = [number for number, used in enumerate(choice.used) if used]
    position = {number: index for index, number in enumerate(kept)}
    moved = {
        table: {chunk: (position[number], index) for chunk, (number, index) in places.items()}
        for table, places in choice.moved.items()
    }
    named = [every[number] for number in kept]
    kind = BootstrapWriterV5 if options.fs_version == 5 else BootstrapWriter
    writer = kind(tree, named, options.form, moved=moved, prefetch=_prefetch_paths(options))
    return _Written(writer.write(), writer.stats), named


def _make_reader(
    run: _Run, chunker: Chunker, index: "ZranIndex | None", hashed: Hash | None
) -> "TarSource | DirectorySource":
    source, options = run.source.data, run.options
    if run.source.kind == "tar":
        from virtiofsd_nydus.builder.source_tar import TarSource

        if isinstance(source, (str, Path)):
            raise TypeError("a path is opened by build_layer")
        counted = _count(source, run.source.on_progress)
        return TarSource(counted, chunker, options.form, label=run.source.label or "tar", index=index, hashed=hashed)
    from virtiofsd_nydus.builder.source_dir import DirectorySource

    if not isinstance(source, (str, Path)):
        raise TypeError("a directory is given by its path")
    prefetch = options.prefetch_patterns if options.prefetch_policy != "none" else ()
    return DirectorySource(Path(source), chunker, options.form, prefetch=prefetch, on_progress=run.source.on_progress)


def _prefetch_paths(options: BuildOptions) -> list[bytes]:
    """Paths for the prefetch table; only the policy "fs" writes one."""
    return [os.fsencode(path) for path in options.prefetch_patterns] if options.prefetch_policy == "fs" else []


def merge_layers(
    layers: Sequence[Layer],
    *,
    options: BuildOptions,
    out_bootstrap: Path | str | BinaryIO | None = None,
    dictionary: ChunkDictionary | None = None,
    keep_trees: bool = True,
    mixed_codecs: bool = False,
) -> MergedImage:
    """One bootstrap of all layers, lowest first; written to out_bootstrap too when given. All layers must have been
    built with these options. Blobs that no file refers to are not in it. keep_trees: False may make the lowest layer's
    tree the image's, which takes less space. mixed_codecs: each layer's blob may have its own, as layers of plain
    images have."""
    made = (options.chunk_size, options.codec, options.digest_kind)
    for layer in layers:
        info = layer.blob_info
        if info is None:
            continue
        codec = options.codec if mixed_codecs else info.codec
        if (info.chunk_size, codec, info.digester) != made:
            raise Failure(f"layer {layer.blob_id[:12]} was built with other options than this image", Cause.FORMAT)
    tree = merge_trees(
        [layer.tree for layer in layers],
        [layer.label for layer in layers],
        keep=keep_trees,
        directory=options.spill_dir,
    )
    # Of two equal layers the upper replaces every file of the lower, so no blob comes into the table twice.
    present = [layer.blob_info for layer in layers if layer.blob_info is not None]
    written, named = _write_bootstrap(tree, present, options, dictionary)
    bootstrap = written.data.view()
    if isinstance(out_bootstrap, (str, Path)):
        with Path(out_bootstrap).open("wb") as out:
            copy_pieces(bootstrap, out.write)
    elif out_bootstrap is not None:
        copy_pieces(bootstrap, out_bootstrap.write)
    used_ids = {info.blob_id for info in named}
    unused = [layer.blob_id for layer in layers if layer.blob_id not in used_ids]
    return MergedImage(written.data, tree, named, written.stats, unused)
