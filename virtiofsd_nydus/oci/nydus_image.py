"""What a Nydus image is made of at its destination: the bootstrap's layer, configuration, manifest and index."""

import gzip
import io
import json
import tarfile
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from virtiofsd_nydus.oci.manifest import (
    ANNOTATION_BLOB,
    ANNOTATION_ENCRYPTED,
    ANNOTATION_REF,
    MEDIA_INDEX,
    MEDIA_MANIFEST,
    MEDIA_NYDUS_BLOB,
    NYDUS_ARTIFACT_TYPE,
    Descriptor,
    Manifest,
    Platform,
    digest_of,
)
from virtiofsd_nydus.rafs.blob import BlobInfo, StoredMeta
from virtiofsd_nydus.rafs.layout import BlobFeature
from virtiofsd_nydus.rafs.meta import decode_cache_file
from virtiofsd_nydus.rafs.spill import relieve

# Half of a large bootstrap is digests: more effort finds nothing in them.
BOOTSTRAP_LEVEL = 6
# Of a bootstrap, which may lie in a file (rafs/spill.py); tarfile reads 16 KiB at a time.
READS_TO_RELIEVE = 512
# The maker in the image's history, in the words of Nydus's own converter, which tools look for.
CREATED_BY = "Nydus Converter"
BOOTSTRAP_COMMENT = "Nydus Bootstrap Layer"


def write_bootstrap_layer(
    path: Path, bootstrap: "bytes | memoryview", metas: "Sequence[tuple[str, StoredMeta]]" = ()
) -> str:
    """Writes the tar+gzip with image/image.boot (Nydus's bootstrap layer) and beside it blob.meta of the blobs (by id),
    so that a mount need not ask for those; the same bytes for the same image. Returns the digest of the tar."""
    hashed = _HashedWriter()
    with (
        path.open("wb") as raw,
        gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0, compresslevel=BOOTSTRAP_LEVEL) as compressed,
    ):
        hashed.out = compressed
        with tarfile.open(fileobj=hashed, mode="w|", format=tarfile.USTAR_FORMAT) as archive:
            folder = tarfile.TarInfo("image")
            folder.type, folder.mode = tarfile.DIRTYPE, 0o755
            archive.addfile(folder)
            member = tarfile.TarInfo("image/image.boot")
            member.size, member.mode = len(bootstrap), 0o444
            archive.addfile(member, _ViewReader(bootstrap))
            for blob_id, meta in metas:
                data = decode_cache_file(meta)
                member = tarfile.TarInfo(f"image/{blob_id}.blob.meta")
                member.size, member.mode = len(data), 0o444
                archive.addfile(member, _ViewReader(data))
    return f"sha256:{hashed.hash.hexdigest()}"


class _ViewReader(io.RawIOBase):
    """Reads what is in memory without copying all of it."""

    def __init__(self, data: "bytes | memoryview") -> None:
        self._view = memoryview(data)
        self._reads = 0

    def read(self, size: int = -1) -> bytes:
        self._reads += 1
        if not self._reads % READS_TO_RELIEVE:
            relieve()
        end = size if size >= 0 else len(self._view)
        piece, self._view = bytes(self._view[:end]), self._view[end:]
        return piece


class _HashedWriter(io.RawIOBase):
    """Passes bytes on and hashes them."""

    def __init__(self) -> None:
        self.hash = sha256()
        self.out: Any = None

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.hash.update(data)
        self.out.write(data)
        return len(data)


def make_config(
    config: dict[str, Any],
    layer_blob_ids: list[str],
    blobs: list[Descriptor],
    bootstrap_diff_id: str,
) -> bytes:
    """The image configuration with the new layers: diff ids are the blobs' digests (they are not compressed again) and
    the bootstrap tar's; the history keeps one entry that is not empty for each of them."""
    remaining = [blob.hex for blob in blobs]
    history: list[dict[str, Any]] = []
    ids = iter(layer_blob_ids)
    for entry in config.get("history") or []:
        if not isinstance(entry, dict):
            continue
        entry = dict(entry)
        if not entry.get("empty_layer"):
            blob_id = next(ids, "")
            if blob_id in remaining:
                remaining.remove(blob_id)
            else:
                entry["empty_layer"] = True  # its layer has become no blob of its own
        history.append(entry)
    history += [{"created_by": CREATED_BY} for _ in remaining]
    history.append({"created_by": CREATED_BY, "comment": BOOTSTRAP_COMMENT})
    new = {
        **config,
        "history": history,
        "rootfs": {"type": "layers", "diff_ids": [*(blob.digest for blob in blobs), bootstrap_diff_id]},
    }
    return json.dumps(new, separators=(",", ":"), ensure_ascii=False).encode()


def make_manifest(config: Descriptor, layers: list[Descriptor], annotations: dict[str, str]) -> bytes:
    value: dict[str, Any] = {
        "schemaVersion": 2,
        "mediaType": MEDIA_MANIFEST,
        "config": config.to_json(),
        "layers": [layer.to_json() for layer in layers],
    }
    if annotations:
        value["annotations"] = dict(sorted(annotations.items()))
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


def make_index(oci: Manifest, nydus: bytes, platform: Platform) -> bytes:
    """An index of both images. The OCI one comes first: clients that know nothing of Nydus take the first that fits."""
    media_type = oci.descriptor.media_type or MEDIA_MANIFEST
    entries = [
        {
            **Descriptor(media_type, oci.descriptor.digest, oci.descriptor.size).to_json(),
            "platform": platform.to_json(),
        },
        {
            **Descriptor(MEDIA_MANIFEST, digest_of(nydus), len(nydus)).to_json(),
            "artifactType": NYDUS_ARTIFACT_TYPE,
            "platform": platform.to_json(),
        },
    ]
    return json.dumps(
        {"schemaVersion": 2, "mediaType": MEDIA_INDEX, "manifests": entries}, separators=(",", ":")
    ).encode()


def describe_file(path: Path, media_type: str, annotations: dict[str, str]) -> Descriptor:
    hashed = sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            hashed.update(piece)
    return Descriptor(media_type, f"sha256:{hashed.hexdigest()}", path.stat().st_size, annotations)


def describe_blob(info: BlobInfo) -> Descriptor:
    """The blob as a layer of the manifest; of a layer that is referred to, the blob of its blob.meta."""
    annotations = {ANNOTATION_BLOB: "true"}
    if info.cipher is not None:
        annotations[ANNOTATION_ENCRYPTED] = "true"
    if info.features & BlobFeature.SEPARATE:
        annotations[ANNOTATION_REF] = f"sha256:{info.blob_id}"
        return Descriptor(MEDIA_NYDUS_BLOB, f"sha256:{info.meta_digest.hex()}", info.meta_size, annotations)
    return Descriptor(MEDIA_NYDUS_BLOB, f"sha256:{info.blob_id}", info.compressed_size, annotations)
