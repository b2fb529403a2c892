"""A store with the documents it gave before kept on this node, so that an image that is here needs no network.

What a digest names never changes: it is kept under its digest and checked each time it is read. What a tag names is
asked for each time; only when the registry cannot be reached does the last answer hold."""

import os
import tempfile
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path

from virtiofsd_nydus.errors import Cause, Failure
from virtiofsd_nydus.oci.manifest import DOCUMENT_BYTES, Descriptor, digest_of, load_json
from virtiofsd_nydus.oci.store import ImageStore, OnBytes

# The registry is away, or what is between us is: no answer of its own.
AWAY = (Cause.NETWORK, Cause.DEADLINE)


def type_of(data: bytes) -> str:
    """The media type that a manifest tells of itself."""
    try:
        return str(load_json(data, "manifest").get("mediaType") or "")
    except Failure:
        return ""


class NodeStore:
    """store.ImageStore over another one. directory: made when something is kept. say: gets a line when a tag's last
    answer is used."""

    def __init__(self, store: ImageStore, directory: Path, say: Callable[[str], None] = lambda line: None) -> None:
        self.name = store.name
        self.store = store
        self._directory = directory
        self._say = say

    def close(self) -> None:
        self.store.close()

    def get_manifest(self, version: str) -> tuple[bytes, str]:
        if version.startswith("sha256:"):
            kept = self._read(version[7:])
            if kept is not None:
                return kept, type_of(kept)
            data, media_type = self.store.get_manifest(version)
            if digest_of(data) == version:
                self._keep(version[7:], data)
            return data, media_type
        note = f"tag-{sha256(f'{self.name} {version}'.encode()).hexdigest()}"
        try:
            data, media_type = self.store.get_manifest(version)
        except Failure as failure:
            named = self._read_note(note) if failure.cause in AWAY else ""
            kept = self._read(named[7:]) if named else None
            if kept is None:
                raise
            self._say(f"{self.name}: what the tag named last is taken ({named[:19]}): {failure}")
            return kept, type_of(kept)
        self._keep(digest_of(data)[7:], data)
        self._keep(note, digest_of(data).encode())
        return data, media_type

    def get_referrers(self, digest: str) -> bytes | None:
        note = f"referrers-{digest[7:]}"
        try:
            found = self.store.get_referrers(digest)
        except Failure as failure:
            path = self._directory / note
            if failure.cause not in AWAY or not path.exists():
                raise
            return path.read_bytes()[:DOCUMENT_BYTES]
        if found is not None:
            self._keep(note, found)
        return found

    def read_blob(self, descriptor: Descriptor) -> Iterator[memoryview]:
        """Small blobs (configurations, signed documents) are kept; layers are not."""
        if descriptor.size > DOCUMENT_BYTES:
            yield from self.store.read_blob(descriptor)
            return
        data = self._read(descriptor.hex)
        if data is None:
            data = b"".join(bytes(piece) for piece in self.store.read_blob(descriptor))
            if digest_of(data) == descriptor.digest:
                self._keep(descriptor.hex, data)
        yield memoryview(data)

    def read_blob_range(self, descriptor: Descriptor, offset: int, length: int) -> Iterator[memoryview]:
        return self.store.read_blob_range(descriptor, offset, length)

    def has_blob(self, descriptor: Descriptor) -> bool:
        return self.store.has_blob(descriptor)

    def put_blob(self, descriptor: Descriptor, file: Path, on_bytes: OnBytes | None = None) -> None:
        self.store.put_blob(descriptor, file, on_bytes)

    def put_manifest(self, data: bytes, media_type: str, tag: str | None) -> bool:
        return self.store.put_manifest(data, media_type, tag)

    def _read(self, name: str) -> bytes | None:
        """What is kept under a digest; one that is damaged counts as missing, and is asked for anew."""
        try:
            data = (self._directory / name).read_bytes()
        except OSError:
            return None
        return data if sha256(data).hexdigest() == name else None

    def _read_note(self, name: str) -> str:
        try:
            return (self._directory / name).read_text()[:71]
        except OSError:
            return ""

    def _keep(self, name: str, data: bytes) -> None:
        """Writes a file whole. A directory that cannot be written costs the next start a request, and nothing else."""
        path = self._directory / name
        try:
            if path.exists() and path.stat().st_size == len(data) and path.read_bytes() == data:
                return
            self._directory.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=self._directory, prefix=".new-")
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(data)
                os.replace(temporary, path)  # noqa: PTH105
            except BaseException:
                os.unlink(temporary)  # noqa: PTH108
                raise
        except OSError:
            pass
