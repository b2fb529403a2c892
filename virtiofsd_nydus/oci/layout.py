"""An OCI image layout directory (image specification) as source and destination of images."""

import contextlib
import errno
import json
import os
import re
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from virtiofsd_nydus.errors import Cause, Failure
from virtiofsd_nydus.oci.manifest import (
    ANNOTATION_REF_NAME,
    DOCUMENT_BYTES,
    MEDIA_INDEX,
    Descriptor,
    digest_of,
    load_json,
    parse_descriptor,
)
from virtiofsd_nydus.oci.store import OnBytes
from virtiofsd_nydus.storage.localfs import LocalfsBackend

LAYOUT_FILE = "oci-layout"
LAYOUT = {"imageLayoutVersion": "1.0.0"}
# Tags of what lies beside an image: its referrers, its signatures.
BESIDE = re.compile(r"sha256-[0-9a-f]{64}(\.[a-z]+)?")


def choose_image(entries: list[dict[str, Any]], version: str, name: str) -> Descriptor:
    """The manifest of a tag ("": the only image) among the entries of an index.json."""
    tags = [str((entry.get("annotations") or {}).get(ANNOTATION_REF_NAME, "")) for entry in entries]
    if version:
        chosen = [entry for entry, tag in zip(entries, tags, strict=True) if tag == version]
    else:
        images = [entry for entry, tag in zip(entries, tags, strict=True) if not BESIDE.fullmatch(tag)]
        chosen = images if len(images) == 1 else []
    if not chosen:
        have = ", ".join(sorted({tag for tag in tags if tag and not BESIDE.fullmatch(tag)})) or "none"
        raise Failure(
            f"{name}: no image {version!r}; tags there: {have}"
            if version
            else f"{name}: holds {len(entries)} images, say which ({name}:TAG); tags there: {have}",
            Cause.MISSING,
        )
    return parse_descriptor(chosen[-1], name)


def parse_index_file(data: bytes, name: str) -> list[dict[str, Any]]:
    """The entries of an index.json."""
    entries = load_json(data, f"{name}/index.json").get("manifests")
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise Failure(f"{name}: index.json lists no manifests", Cause.FORMAT)
    return entries


class LayoutStore:
    """store.ImageStore of a directory, made when the first blob is put."""

    def __init__(self, directory: Path) -> None:
        self.name = f"oci:{directory}"
        self.directory = directory
        self.blob_dir = directory / "blobs" / "sha256"
        self._backend = LocalfsBackend(str(self.blob_dir))
        self._lock = threading.Lock()

    def close(self) -> None:
        self._backend.close()

    def get_manifest(self, version: str) -> tuple[bytes, str]:
        if version.startswith("sha256:"):
            data = self._read_file(self.blob_dir / version[7:])
            return data, str(load_json(data, self.name).get("mediaType", ""))
        descriptor = choose_image(self._entries(), version, self.name)
        data = self._read_file(self.blob_dir / descriptor.hex)
        if digest_of(data) != descriptor.digest:
            raise Failure(f"{self.name}: manifest {descriptor.digest} is damaged", Cause.DIGEST)
        return data, descriptor.media_type

    def read_blob(self, descriptor: Descriptor) -> Iterator[memoryview]:
        return self._backend.read_range(descriptor.hex, 0, descriptor.size)

    def read_blob_range(self, descriptor: Descriptor, offset: int, length: int) -> Iterator[memoryview]:
        return self._backend.read_range(descriptor.hex, offset, length)

    def get_referrers(self, digest: str) -> bytes | None:
        return None

    def has_blob(self, descriptor: Descriptor) -> bool:
        try:
            return (self.blob_dir / descriptor.hex).stat().st_size == descriptor.size
        except OSError:
            return False

    def put_blob(self, descriptor: Descriptor, file: Path, on_bytes: OnBytes | None = None) -> None:
        with self._new_file(self.blob_dir / descriptor.hex) as temporary:
            # A hard link where the file system allows it: the spool file is not written to any more.
            try:
                temporary.unlink()
                os.link(file, temporary)
            except OSError:
                shutil.copyfile(file, temporary)
            temporary.chmod(0o644)
        if on_bytes is not None:
            on_bytes(descriptor.size)

    def put_manifest(self, data: bytes, media_type: str, tag: str | None) -> bool:
        with self._lock:
            digest = digest_of(data)
            with self._new_file(self.blob_dir / digest[7:]) as temporary:
                temporary.write_bytes(data)
            if tag is None:
                return False
            with self._new_file(self.directory / LAYOUT_FILE) as temporary:
                temporary.write_text(json.dumps(LAYOUT))
            new = Descriptor(media_type, digest, len(data), {ANNOTATION_REF_NAME: tag} if tag else {}).to_json()
            entries = self._entries() if (self.directory / "index.json").exists() else []
            kept = [entry for entry in entries if (entry.get("annotations") or {}).get(ANNOTATION_REF_NAME, "") != tag]
            index = {"schemaVersion": 2, "mediaType": MEDIA_INDEX, "manifests": [*kept, new]}
            with self._new_file(self.directory / "index.json") as temporary:
                temporary.write_text(json.dumps(index, indent=2) + "\n")
        return False

    def _entries(self) -> list[dict[str, Any]]:
        if not (self.directory / LAYOUT_FILE).is_file():
            raise Failure(f"{self.name}: no OCI layout there (no {LAYOUT_FILE} file)", Cause.MISSING)
        return parse_index_file(self._read_file(self.directory / "index.json"), self.name)

    def _read_file(self, path: Path) -> bytes:
        try:
            if path.stat().st_size > DOCUMENT_BYTES:
                raise Failure(f"{path}: too large for a document", Cause.FORMAT)
            return path.read_bytes()
        except FileNotFoundError as error:
            raise Failure(f"{path} is missing: the layout is not complete", Cause.MISSING) from error
        except OSError as error:
            raise Failure(f"cannot read {path}: {error.strerror}", Cause.IO) from error

    @contextlib.contextmanager
    def _new_file(self, path: Path) -> Iterator[Path]:
        """A temporary file that takes path's place when the block ends well: no half written file is ever seen."""
        temporary = path.parent / f".{path.name[:20]}.{os.getpid()}.{threading.get_ident()}.tmp"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.touch()
            yield temporary
            temporary.replace(path)
        except OSError as error:
            raise Failure(
                f"cannot write {path}: {error.strerror}", Cause.SPACE if error.errno == errno.ENOSPC else Cause.IO
            ) from error
        finally:
            temporary.unlink(missing_ok=True)
