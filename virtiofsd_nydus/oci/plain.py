"""A plain OCI image made ready to be served as it is: nothing is converted and nothing is pushed.

The first start on a node reads each layer once, front to end: on the way the tree and the chunk table are built, and
the cache is filled. Layers that tell their contents (oci/toc.py) are not even read. What is learned is kept by the
layers' digests (oci/shelf.py), so that the next start of this image, or of another one with the same layers, fetches
only what is read, and what is in the cache needs no network."""

import errno
import io
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from virtiofsd_nydus.builder.decoding import InPlaceFailure
from virtiofsd_nydus.builder.image import Layer, LayerStats, merge_layers
from virtiofsd_nydus.builder.options import BuildOptions
from virtiofsd_nydus.errors import Cause, Failure
from virtiofsd_nydus.net.documents import parse_json
from virtiofsd_nydus.oci import layers as layer_backend
from virtiofsd_nydus.oci.cachefill import CacheFill
from virtiofsd_nydus.oci.convert import run_at_a_time
from virtiofsd_nydus.oci.layerbuild import (
    STORED,
    TABLE,
    ZRAN,
    ReadLayer,
    choose_kind,
    describe_virtual,
    make_form,
    read_layer,
)
from virtiofsd_nydus.oci.manifest import Descriptor, Manifest
from virtiofsd_nydus.oci.shelf import KnownLayer, Shelf
from virtiofsd_nydus.oci.store import ImageStore, VerifiedReader
from virtiofsd_nydus.oci.toc import TocFile, TocSource, choose_chunk_size, has_table, read_table
from virtiofsd_nydus.rafs import layout
from virtiofsd_nydus.rafs.blob import StoredMeta
from virtiofsd_nydus.rafs.meta import decode_cache_file

LAYERS_AT_A_TIME = 2
CHUNK_BYTES = 1 << 20
# Of images with layers that have tables: most files are one chunk then, whose digest is the file's.
CHUNK_BYTES_MAX = layout.CHUNK_BYTES_MAX
KEY_BYTES = 32
SHELF_DIR = "layers"


@dataclass(frozen=True)
class PlainImage:
    """bootstrap: its file. layers: the file for a backend's key `layers`. blobs: layer (hex) to its bytes in the
    registry. read_bytes: of layers, fetched now to get ready."""

    bootstrap: Path
    bootstrap_digest: str
    layers: Path
    blobs: dict[str, int]
    key: str = ""
    read_bytes: int = 0
    requests: int = 0


@dataclass
class PlainOptions:
    """work_dir: the cache directory. place_of: where a layer's bytes begin in what the backend reads (archives), 0
    elsewhere. fill: whether the cache is filled on the way. on_bytes: gets what has been read of layers."""

    work_dir: Path
    place_of: Callable[[Descriptor], int] = lambda layer: 0
    fill: bool = True
    on_bytes: Callable[[int], None] | None = None
    say: Callable[[str], None] = lambda line: None
    spill_dir: str | None = None
    find_index: "Callable[[Shelf, str], int] | None" = None  # puts an index that others made there; bytes fetched
    read_bytes: int = 0
    requests: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, size: int, requests: int = 0) -> None:
        with self.lock:
            self.read_bytes += size
            self.requests += requests
        if self.on_bytes is not None:
            self.on_bytes(size)


def prepare_plain(store: ImageStore, manifest: Manifest, diff_ids: Sequence[str], options: PlainOptions) -> PlainImage:
    """The bootstrap of an OCI image, made if it is not on this node. Raises Failure."""
    run = _Run(store, manifest, diff_ids, options)
    try:
        return run.prepare()
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise Failure(
            f"cannot work in {options.work_dir / SHELF_DIR}: {error.strerror or error} (--cache-dir)",
            Cause.SPACE if full else Cause.IO,
        ) from error


class _Run:
    """One image being made ready."""

    def __init__(self, store: ImageStore, manifest: Manifest, diff_ids: Sequence[str], options: PlainOptions) -> None:
        self._store, self._manifest, self._options = store, manifest, options
        self._diff_ids = {layer.digest: one for layer, one in zip(manifest.layers, diff_ids, strict=False)}
        self._top = Shelf(options.work_dir / SHELF_DIR)
        self._stop = threading.Event()
        self._tables: dict[str, list[TocFile]] = {}
        self._chunk_size = CHUNK_BYTES

    def prepare(self) -> PlainImage:
        options = self._options
        key = self._find_key()
        found = self._find_image(key)
        if found is None:
            with self._top.locked(key):
                found = self._find_image(key) or self._take_index(key) or self._make_image(key)
        return replace(found, key=key, read_bytes=options.read_bytes, requests=options.requests)

    def _take_index(self, key: str) -> PlainImage | None:
        """The image by an index that lies beside it."""
        if self._options.find_index is None:
            return None
        fetched = self._options.find_index(self._top, key)
        if not fetched:
            return None
        self._options.count(fetched, 1)
        return self._find_image(key)

    @property
    def _shelf(self) -> Shelf:
        """What is known of layers that are cut in chunks of this size."""
        return Shelf(self._top.path(f"{self._chunk_size >> 10}k"))

    def _find_key(self) -> str:
        """Names the image's bootstrap: by its layers, how they are read, and where archives have them."""
        parts = [f"{one.digest} {sorted(one.annotations.items())}" for one in self._manifest.layers]
        places = [str(self._options.place_of(one)) for one in self._manifest.layers]
        return sha256("\n".join(["plain 1", *parts, *places]).encode()).hexdigest()[:KEY_BYTES]

    def _find_image(self, key: str) -> PlainImage | None:
        """The image as it is on this node; None where something of it is missing or damaged."""
        try:
            record = parse_json(self._top.path(f"{key}.json").read_bytes())
            told, names = str(record["bootstrap"]), record["files"]
            self._chunk_size = int(record["chunk_size"])
            shelf = self._shelf
            bootstrap, layers = shelf.path(f"{key}.boot"), shelf.path(f"{key}.layers")
            if digest_file(bootstrap) != told or not all(shelf.path(str(name)).exists() for name in names):
                return None
            if digest_file(layers) != record["layers"]:
                return None
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return PlainImage(bootstrap, told, layers, self._sizes())

    def _sizes(self) -> dict[str, int]:
        return {layer.hex: layer.size for layer in self._manifest.layers}

    def _make_image(self, key: str) -> PlainImage:
        unique = list({layer.digest: layer for layer in self._manifest.layers}.values())
        self._read_tables(unique)
        order = sorted(unique, key=lambda layer: -layer.size)
        known = run_at_a_time(self._find_layer, order, LAYERS_AT_A_TIME, self._stop)
        by_digest = {layer.digest: one for layer, one in zip(order, known, strict=True)}
        built = [_as_layer(by_digest[layer.digest], layer) for layer in self._manifest.layers]
        build = BuildOptions(
            compressor="none", digester="sha256", chunk_size=self._chunk_size, spill_dir=self._options.spill_dir
        )
        merged = merge_layers(built, options=build, keep_trees=False, mixed_codecs=True)
        bootstrap = bytes(merged.bootstrap)
        described = {one.digest[7:]: self._describe(one, layer) for layer, one in zip(order, known, strict=True)}
        layers = json.dumps({"version": 1, "layers": described}).encode()
        files = [f"{one.digest[7:]}.blob.meta" for one in known if one.kind == ZRAN and one.info is not None]
        files += [str(one["frames"]) for one in described.values() if "frames" in one]
        digest = f"sha256:{sha256(bootstrap).hexdigest()}"
        record = {
            "image": self._store.name,
            "manifest": self._manifest.descriptor.digest,
            "layers": f"sha256:{sha256(layers).hexdigest()}",
            "bootstrap": digest,
            "chunk_size": self._chunk_size,
            "files": files,
        }
        self._shelf.write(f"{key}.layers", [layers])
        self._shelf.write(f"{key}.boot", [bootstrap])
        self._top.write(f"{key}.json", [json.dumps(record).encode()])
        return PlainImage(self._shelf.path(f"{key}.boot"), digest, self._shelf.path(f"{key}.layers"), self._sizes())

    def _describe(self, known: KnownLayer, layer: Descriptor) -> dict[str, Any]:
        out = {
            "kind": known.kind,
            "size": layer.size,
            "at": self._options.place_of(layer),
            "chunk_size": known.chunk_size,
            "virtual": known.info.compressed_size if known.info is not None else 0,
        }
        if known.frames:
            out["frames"] = f"{layer.hex}.frames"
        return out

    # ---- layers

    def _read_tables(self, layers: Sequence[Descriptor]) -> None:
        """The tables of contents, and with them the chunk size that all layers share."""
        wanted = []
        for layer in layers:
            if not has_table(layer):
                continue
            try:
                files, fetched = read_table(self._store, layer)
            except Failure as failure:
                if failure.cause is not Cause.FORMAT:
                    raise
                self._options.say(f"{failure}: the layer is read whole")
                continue
            self._options.count(fetched, 2)
            self._tables[layer.digest] = files
            wanted.append(choose_chunk_size(files, CHUNK_BYTES_MAX))
        self._chunk_size = max([CHUNK_BYTES, *wanted])

    def _find_layer(self, layer: Descriptor) -> KnownLayer:
        """What is known of a layer, from this node or by reading it; one process at a time reads it."""
        found = self._load(layer)
        if found is not None:
            return found
        with self._shelf.locked(layer.hex):
            return self._load(layer) or self._read(layer)

    def _load(self, layer: Descriptor) -> KnownLayer | None:
        found = self._shelf.load(layer.digest, self._options.spill_dir)
        if found is None or (found.kind == TABLE) != (layer.digest in self._tables):
            return None
        needs = f"{layer.hex}.blob.meta" if found.kind == ZRAN and found.info is not None else ""
        if needs and not self._shelf.path(needs).exists():
            return None
        self._check_diff_id(layer, found.diff_id)
        return found

    def _check_diff_id(self, layer: Descriptor, found: str) -> None:
        """found: "" for a layer that was not read whole."""
        told = self._diff_ids.get(layer.digest, "")
        if found and told.startswith("sha256:") and found != told:
            raise Failure(
                f"{self._store.name}: layer {layer.digest[7:19]} does not have the content that the image's "
                f"configuration says (diff_id {told[:19]}): the image was put together wrong",
                Cause.DIGEST,
            )

    def _read(self, layer: Descriptor) -> KnownLayer:
        if layer.digest in self._tables:
            return self._read_by_table(layer)
        pieces = self._store.read_blob(layer)
        first = next(pieces, memoryview(b""))
        head = bytes(first[:512])
        kind = choose_kind(head)
        try:
            return self._read_as(layer, kind, _rejoin(first, pieces))
        except InPlaceFailure as failure:
            self._options.say(f"{failure}; what is lost of the layer is had by reading it again")
            return self._read_as(layer, STORED, self._store.read_blob(layer))

    def _read_as(self, layer: Descriptor, kind: str, pieces: Iterator[memoryview]) -> KnownLayer:
        options = self._options
        what = f"{self._store.name}: layer {layer.digest[7:19]}"
        reader = VerifiedReader(pieces, layer, what, self._count)
        fill = CacheFill(options.work_dir, layer.hex, options.say) if options.fill else None
        meta_out = io.BytesIO()
        options.count(0, 1)
        try:
            try:
                made = read_layer(
                    reader,
                    kind=kind,
                    hex_digest=layer.hex,
                    size=layer.size,
                    form=make_form(self._chunk_size, options.spill_dir),
                    label=what,
                    meta_out=meta_out,
                    on_chunk=fill.add if fill is not None else None,
                )
            except Failure as failure:
                if (
                    failure.cause is Cause.FORMAT
                    and not isinstance(failure, InPlaceFailure)
                    and not self._stop.is_set()
                ):
                    reader.finish()  # a layer that arrived damaged: then that is what to say
                raise
            reader.finish()
            self._check_diff_id(layer, made.diff_id)
            known = self._keep(layer, made, meta_out.getbuffer())
            if fill is not None and made.info is not None:
                fill.publish(len(made.table), made.info.uncompressed_size)
            return known
        finally:
            if fill is not None:
                fill.close()

    def _count(self, size: int) -> None:
        if self._stop.is_set():
            raise Failure("another layer failed", Cause.IO)
        self._options.count(size)

    def _keep(self, layer: Descriptor, made: ReadLayer, meta: memoryview) -> KnownLayer:
        info = made.info
        if made.kind == ZRAN and info is not None:
            end = len(meta) - layout.META_HEADER_BYTES
            stored = StoredMeta(bytes(meta[:end]), info.ci_codec, info.ci_usize, bytes(meta[end:]))
            self._shelf.write(f"{layer.hex}.blob.meta", [decode_cache_file(stored)])
        known = KnownLayer(
            layer.digest, layer.size, made.diff_id, made.kind, self._chunk_size, made.tree, made.table, info
        )
        self._shelf.save(known)
        return known

    def _read_by_table(self, layer: Descriptor) -> KnownLayer:
        """Without the layer's data, but for the files whose chunks the table has no digests of."""
        what = f"{self._store.name}: layer {layer.digest[7:19]}"
        form = make_form(self._chunk_size, self._options.spill_dir)
        source = TocSource(
            self._tables[layer.digest], form, what, lambda file, step: self._read_file(layer, file, step)
        )
        tree = source.read()
        info = describe_virtual(source.writer, layer.hex, source.writer.size)
        known = KnownLayer(layer.digest, layer.size, "", TABLE, self._chunk_size, tree, source.writer.table, info)
        known.frames, known.frame_digests = source.frames, source.frame_digests
        import zstandard

        frames = zstandard.ZstdCompressor(level=3).compress(json.dumps([source.frames, source.frame_digests]).encode())
        self._shelf.write(f"{layer.hex}.frames", [frames])
        self._shelf.save(known)
        return known

    def _read_file(self, layer: Descriptor, file: TocFile, step: int) -> Iterator[bytes]:
        """A file's chunks, out of its frames, each of which is compared with the table."""
        what = f"{self._store.name}: layer {layer.digest[7:19]}"
        held = bytearray()
        for frame in file.frames:
            stored = b""
            if frame.csize:
                stored = b"".join(bytes(piece) for piece in self._store.read_blob_range(layer, frame.coff, frame.csize))
                self._options.count(len(stored), 1)
            record = (0, frame.usize, frame.coff, frame.csize, frame.inner, frame.codec)
            held += layer_backend.decode_frame(record, stored, frame.coff, frame.digest[7:], what)
            while len(held) >= step:
                yield bytes(held[:step])
                del held[:step]
        if held:
            yield bytes(held)


def _as_layer(known: KnownLayer, layer: Descriptor) -> Layer:
    label = f"layer {layer.digest[7:19]}"
    return Layer(known.tree, layer.hex, layer.size, known.info, LayerStats(), label, known.diff_id)


def _rejoin(first: memoryview, rest: Iterator[memoryview]) -> Iterator[memoryview]:
    yield first
    yield from rest


def digest_file(path: Path) -> str:
    hashed = sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            hashed.update(piece)
    return f"sha256:{hashed.hexdigest()}"
