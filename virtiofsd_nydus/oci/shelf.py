"""What is known of layers on this node, kept by their digests: tree, chunk table and how to read each chunk again.

A layer that images share is indexed once. Files of the cache directory's `layers`, all written whole:

    KEY.json           an image: the digests of the two files below that are named by it, and what else it needs
    SIZE/              of layers that are cut in chunks of this size
      HEX.layer        header (one line of JSON), the tree's and the table's records (zstd), SHA-256 of all before it
      HEX.blob.meta    gzip layers: the engine's table of contexts, found beside the bootstrap
      HEX.frames       layers with a table of contents: where each piece is (zstd of JSON)
      KEY.boot         the image's bootstrap
      KEY.layers       how the layers' chunks are had (oci/layers.py)

A file that is damaged is found by its own digest, and the layer is read again.
"""

import contextlib
import fcntl
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from virtiofsd_nydus.errors import Cause, Failure
from virtiofsd_nydus.net.documents import parse_json
from virtiofsd_nydus.rafs import layout
from virtiofsd_nydus.rafs.blob import BlobInfo
from virtiofsd_nydus.rafs.chunktable import ChunkTable
from virtiofsd_nydus.rafs.tree import Tree

VERSION = 1
DIGEST_BYTES = 32
# Fields of a BlobInfo that a header holds as they are.
NUMBERS = ("features", "compressed_size", "uncompressed_size", "ci_csize", "ci_usize", "ci_offset", "meta_size")


@dataclass
class KnownLayer:
    """One layer. kind: of oci/layers.py. info: None where it has no file data. frames: of kind TABLE, where each chunk
    is."""

    digest: str
    size: int
    diff_id: str
    kind: str
    chunk_size: int
    tree: Tree
    table: ChunkTable
    info: BlobInfo | None
    frames: list[tuple[int, ...]] = field(default_factory=list)
    frame_digests: list[str] = field(default_factory=list)


class Shelf:
    """The directory. Safe for several processes: files are replaced whole, and who makes a layer's holds its lock."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def path(self, name: str) -> Path:
        return self.directory / name

    @contextmanager
    def locked(self, name: str) -> Iterator[None]:
        """One process at a time makes what has this name; others wait, and find it."""
        self.directory.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.directory / f".{name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)

    def write(self, name: str, parts: list[bytes]) -> None:
        handle, temporary = tempfile.mkstemp(dir=self.directory, prefix=".new-")
        try:
            with os.fdopen(handle, "wb") as file:
                for part in parts:
                    file.write(part)
                os.fchmod(file.fileno(), 0o444)
            os.replace(temporary, self.directory / name)  # noqa: PTH105
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)  # noqa: PTH108
            raise

    # ---- layers

    def save(self, layer: KnownLayer) -> None:
        """Keeps a layer. Raises OSError."""
        import zstandard

        parts = [*layer.tree.dump(), *layer.table.dump()]
        header: dict[str, Any] = {
            "version": VERSION,
            "digest": layer.digest,
            "size": layer.size,
            "diff_id": layer.diff_id,
            "kind": layer.kind,
            "chunk_size": layer.chunk_size,
            "lower_links": layer.tree.lower_links,
            "parts": [len(part) for part in parts],
            "blob": None if layer.info is None else describe_info(layer.info),
            "frames": len(layer.frames),
        }
        frames = json.dumps([layer.frames, layer.frame_digests]).encode() if layer.frames else b""
        packed = zstandard.ZstdCompressor(level=1).compress(b"".join([*parts, frames]))
        data = json.dumps(header).encode() + b"\n" + packed
        self.write(f"{layer.digest[7:]}.layer", [data, sha256(data).digest()])

    def load(self, digest: str, directory: str | None = None) -> KnownLayer | None:
        """What is known of a layer; None where nothing is, or what is there is damaged. directory: of tables that are
        too large for memory."""
        import zstandard

        path = self.path(f"{digest[7:]}.layer")
        try:
            data = path.read_bytes()
        except OSError:
            return None
        body, told = data[:-DIGEST_BYTES], data[-DIGEST_BYTES:]
        if sha256(body).digest() != told:
            return None
        line, _, packed = body.partition(b"\n")
        try:
            header = parse_json(line)
            if header["version"] != VERSION or header["digest"] != digest:
                return None
            view = memoryview(zstandard.ZstdDecompressor().decompress(packed))
            parts, at = [], 0
            for size in header["parts"]:
                parts.append(view[at : at + size])
                at += size
            table = ChunkTable.restore(parts[Tree.DUMPED :], directory)
            tree = Tree.restore(parts[: Tree.DUMPED], header["lower_links"], table, directory)
            frames, digests = parse_json(bytes(view[at:])) if header["frames"] else ([], [])
            info = None if header["blob"] is None else restore_info(header["blob"], table)
        except (ValueError, KeyError, TypeError, IndexError, zstandard.ZstdError) as error:
            raise Failure(f"{path}: cannot be read: {error}", Cause.FORMAT) from error
        return KnownLayer(
            digest,
            header["size"],
            header["diff_id"],
            header["kind"],
            header["chunk_size"],
            tree,
            table,
            info,
            [tuple(one) for one in frames],
            digests,
        )


def describe_info(info: BlobInfo) -> dict[str, Any]:
    return {
        "id": info.blob_id,
        "codec": int(info.codec),
        "chunk_size": info.chunk_size,
        "ci_codec": int(info.ci_codec),
        "meta_digest": info.meta_digest.hex(),
        **{name: getattr(info, name) for name in NUMBERS},
    }


def restore_info(value: dict[str, Any], table: ChunkTable) -> BlobInfo:
    return BlobInfo(
        blob_id=value["id"],
        table=table,
        codec=layout.Codec(value["codec"]),
        digester=layout.Digester.SHA256,
        chunk_size=value["chunk_size"],
        ci_codec=layout.Codec(value["ci_codec"]),
        meta_digest=bytes.fromhex(value["meta_digest"]),
        **{name: value[name] for name in NUMBERS},
    )
