"""`convert --to oci`: from a Nydus image back to an OCI image.

A blob of RAFS v6 carries the tree of the layer it was made of, whiteouts among it: that becomes the layer again. A
layer that left no blob (it held no file data) and hard links into lower layers are not told there. So what the layers
make is compared with the image's own tree, and where it differs the image becomes one layer, which always is right.
"""

import gzip
import io
import json
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from virtiofsd_nydus.builder.merge import merge_trees
from virtiofsd_nydus.cli.unpack import unpack_image
from virtiofsd_nydus.errors import Cause, Failure
from virtiofsd_nydus.oci.convert import ConvertOptions, Place, publish
from virtiofsd_nydus.oci.image import ResolveOptions, resolve_image
from virtiofsd_nydus.oci.layerbuild import STORED, make_form, read_layer
from virtiofsd_nydus.oci.manifest import (
    ANNOTATION_REF,
    MEDIA_CONFIG,
    MEDIA_LAYER_GZIP,
    MEDIA_MANIFEST,
    Descriptor,
    digest_of,
)
from virtiofsd_nydus.oci.nydus_image import CREATED_BY, describe_file, make_manifest
from virtiofsd_nydus.oci.store import ImageStore, VerifiedReader
from virtiofsd_nydus.rafs.tree import Tree
from virtiofsd_nydus.reader.bootstrap import Bootstrap, Entry
from virtiofsd_nydus.reader.data import Source, directory_source, opened_with_data

MAKER = "virtiofsd-nydus convert --to oci"
COPY_BYTES = 1 << 20


@dataclass(frozen=True)
class _Made:
    """One layer: its file (gzip), and the digest of its tar."""

    path: Path
    diff_id: str


def convert_to_oci(source: Place, target: Place, wanted: ConvertOptions) -> dict[str, Any]:
    """Makes the OCI image and names it by the destination's tag. layers: of the result; one_layer: whether they could
    not be told apart. Raises Failure."""
    with tempfile.TemporaryDirectory(prefix="virtiofsd-nydus-", dir=wanted.work_dir) as name:
        folder = Path(name)
        found = resolve_image(
            source.reference,
            cache_dir=folder / "bootstraps",
            options=ResolveOptions(
                access=getattr(source.store, "access", ResolveOptions().access),
                platform=str(wanted.platform) if wanted.platform is not None else "",
            ),
        )
        assert found.manifest is not None
        place = found.backend_config()
        blobs = found.manifest.blob_layers
        if any(ANNOTATION_REF in blob.annotations for blob in blobs):
            raise Failure(
                f"{source.reference} refers to the layers of the OCI image, which lies beside it: copy that",
                Cause.FORMAT,
            )
        made = _make_layers(source.store, blobs, folder)
        if made is None or not _is_same_tree(made, found.bootstrap):
            with opened_with_data(found.bootstrap, Source(place["type"], place["config"])) as image:
                made = [_write_layer(image, folder / "whole", whole=True)]
            one_layer = True
        else:
            one_layer = False
        layers = []
        for layer in made:
            described = describe_file(layer.path, MEDIA_LAYER_GZIP, {})
            if not target.store.has_blob(described):
                target.store.put_blob(described, layer.path)
            layers.append(described)
        config = _make_config(found.config, [layer.diff_id for layer in made])
        (folder / "config").write_bytes(config)
        described = Descriptor(MEDIA_CONFIG, digest_of(config), len(config))
        if not target.store.has_blob(described):
            target.store.put_blob(described, folder / "config")
        data = make_manifest(described, layers, found.manifest.annotations)
        publish(target, data, MEDIA_MANIFEST, wanted)
    return {
        "source": str(source.reference),
        "target": str(target.reference),
        "manifest_digest": digest_of(data),
        "layers": [layer.digest for layer in layers],
        "diff_ids": [layer.diff_id for layer in made],
        "one_layer": one_layer,
    }


def _make_layers(store: ImageStore, blobs: tuple[Descriptor, ...], folder: Path) -> list[_Made] | None:
    """A layer of each blob; None: a blob carries no tree."""
    made = []
    for number, blob in enumerate(blobs):
        with _fetched(store, blob, folder) as file:
            try:
                with opened_with_data(file, directory_source(folder), blob.hex) as image:
                    made.append(_write_layer(image, folder / f"layer-{number}"))
            except Failure as failure:
                if failure.cause is not Cause.FORMAT:
                    raise
                return None  # RAFS v5, or of another builder: there is no tree in it
    return made


@contextmanager
def _fetched(store: ImageStore, blob: Descriptor, folder: Path) -> Iterator[Path]:
    path = folder / blob.hex
    reader = VerifiedReader(store.read_blob(blob), blob, f"{store.name}: blob {blob.hex[:12]}")
    with path.open("wb") as out:
        while piece := reader.read(COPY_BYTES):
            out.write(piece)
    try:
        yield path
    finally:
        path.unlink()


class _Hashed(io.RawIOBase):
    def __init__(self, out: Any) -> None:
        self.hash = sha256()
        self._out = out

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.hash.update(data)
        self._out.write(data)
        return len(data)


def _is_implied(image: Bootstrap, entry: Entry) -> bool:
    """Whether a directory looks as one that no entry of the layer described: its path only leads to what is below. An
    entry for it would change the directory of a lower layer."""
    attr = entry.attr
    return (
        attr.mode == stat.S_IFDIR | 0o755
        and not (attr.uid or attr.gid or attr.mtime_s or attr.mtime_nsec)
        and not image.xattrs(attr.ino)
        and bool(image.listdir(attr.ino))
    )


def _write_layer(image: Bootstrap, path: Path, *, whole: bool = False) -> _Made:
    with path.open("wb") as raw, gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0, compresslevel=6) as packed:
        hashed = _Hashed(packed)
        unpack_image(
            image,
            hashed,  # type: ignore[arg-type]  # it writes, no more
            (lambda entry: False) if whole else (lambda entry: _is_implied(image, entry)),
        )
    return _Made(path, f"sha256:{hashed.hash.hexdigest()}")


def _is_same_tree(made: list[_Made], bootstrap: Path) -> bool:
    """Whether the layers, one on the other, make the image's tree."""
    trees = []
    for layer in made:
        with gzip.open(layer.path) as stream:
            read = read_layer(
                stream, kind=STORED, hex_digest="0" * 64, size=0, form=make_form(1 << 20), label="a layer"
            )  # fmt: skip
        trees.append(read.tree)
    ours = _describe_tree(merge_trees(trees, keep=False))
    with Bootstrap(bootstrap) as image:
        return ours == _describe_image(image)


def _describe_tree(tree: Tree) -> dict[bytes, tuple[object, ...]]:
    found: dict[bytes, tuple[object, ...]] = {}
    first: dict[int, bytes] = {}
    for path, node in sorted(tree.list_paths()):
        mode, uid, gid, place, seconds, nanoseconds = tree.attributes(node)
        kind = stat.S_IFMT(mode)
        more: object = None
        if kind == stat.S_IFREG:
            more = tree.size(node)
        elif kind == stat.S_IFLNK:
            more = tree.target(node)
        elif kind in (stat.S_IFCHR, stat.S_IFBLK):
            more = tree.rdev(node)
        same_as = b"" if kind == stat.S_IFDIR else first.setdefault(node, path)
        found[path] = (mode, uid, gid, seconds, nanoseconds, tuple(sorted(tree.xattrs_at(place))), more, same_as)
    return found


def _describe_image(image: Bootstrap) -> dict[bytes, tuple[object, ...]]:
    import os

    found: dict[bytes, tuple[object, ...]] = {}
    first: dict[int, bytes] = {}
    for path, entry in sorted((os.fsencode(entry.path), entry) for entry in image.walk() if entry.path != "/"):
        attr = entry.attr
        kind = stat.S_IFMT(attr.mode)
        more: object = None
        if kind == stat.S_IFREG:
            more = attr.size_bytes
        elif kind == stat.S_IFLNK:
            more = os.fsencode(image.readlink(attr.ino))
        elif kind in (stat.S_IFCHR, stat.S_IFBLK):
            more = attr.rdev
        xattrs = tuple(sorted((os.fsencode(key), value) for key, value in image.xattrs(attr.ino).items()))
        same_as = b"" if kind == stat.S_IFDIR else first.setdefault(attr.ino, path)
        found[path] = (attr.mode, attr.uid, attr.gid, attr.mtime_s, attr.mtime_nsec, xattrs, more, same_as)
    return found


def _make_config(config: dict[str, Any], diff_ids: list[str]) -> bytes:
    """The image's configuration with these layers. The history keeps what made no layer, and what made one where there
    are as many."""
    history = [entry for entry in config.get("history") or [] if isinstance(entry, dict)]
    history = [entry for entry in history if entry.get("created_by") != CREATED_BY]
    if sum(not entry.get("empty_layer") for entry in history) != len(diff_ids):
        history = [{**entry, "empty_layer": True} for entry in history] + [{"created_by": MAKER} for _ in diff_ids]
    new = {**config, "history": history, "rootfs": {"type": "layers", "diff_ids": diff_ids}}
    return json.dumps(new, separators=(",", ":"), ensure_ascii=False).encode()
