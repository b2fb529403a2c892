"""A `docker save` archive as source: manifest.json names a configuration and layer tars within one tar.

Presented as an OCI manifest over the archive's members, so that the rest need not know."""

import json
import tarfile
import threading
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

from virtiofsd_nydus.errors import Cause, Failure
from virtiofsd_nydus.net.documents import parse_json
from virtiofsd_nydus.oci.manifest import (
    DOCUMENT_BYTES,
    MEDIA_CONFIG,
    MEDIA_LAYER,
    MEDIA_MANIFEST,
    Descriptor,
    digest_of,
)
from virtiofsd_nydus.oci.store import OnBytes
from virtiofsd_nydus.storage.localfs import LocalfsBackend

PIECE_BYTES = 1 << 20


class DockerArchiveStore:
    """store.ImageStore, for reading only. The archive must be a plain tar: members are read where they lie."""

    def __init__(self, file: Path) -> None:
        self.name = f"docker-archive:{file}"
        self._file = file
        self._backend = LocalfsBackend(blob_file=str(file))
        self._lock = threading.Lock()
        self._manifest: bytes | None = None
        self._places: dict[str, tuple[int, int]] = {}  # digest -> offset and size in the archive

    def close(self) -> None:
        self._backend.close()

    def get_manifest(self, version: str) -> tuple[bytes, str]:
        with self._lock:
            if self._manifest is None:
                self._manifest = self._scan()
            return self._manifest, MEDIA_MANIFEST

    def read_blob(self, descriptor: Descriptor) -> Iterator[memoryview]:
        if descriptor.digest not in self._places:
            raise Failure(f"{self.name}: no blob {descriptor.digest}", Cause.MISSING)
        offset, size = self._places[descriptor.digest]
        return self._backend.read_range("", offset, size)

    def has_blob(self, descriptor: Descriptor) -> bool:
        return descriptor.digest in self._places

    def put_blob(self, descriptor: Descriptor, file: Path, on_bytes: OnBytes | None = None) -> None:
        raise Failure(f"{self.name}: a docker archive can be a source only", Cause.IO)

    def put_manifest(self, data: bytes, media_type: str, tag: str | None) -> None:
        raise Failure(f"{self.name}: a docker archive can be a source only", Cause.IO)

    def _scan(self) -> bytes:
        """Finds the members and makes the manifest."""
        try:
            with tarfile.open(self._file, "r:") as archive:
                members = {_tidy(member.name): member for member in archive}
                listed = parse_json(self._read_member(members, "manifest.json"))
                if not isinstance(listed, list) or len(listed) != 1:
                    count = len(listed) if isinstance(listed, list) else 0
                    raise Failure(
                        f"{self.name}: holds {count} images, one is expected: save them one by one", Cause.FORMAT
                    )
                config = self._read_member(members, str(listed[0]["Config"]))
                layers = [self._add(self._resolve(members, str(name)), MEDIA_LAYER) for name in listed[0]["Layers"]]
                config_member = self._resolve(members, str(listed[0]["Config"]))
                self._places[digest_of(config)] = config_member.offset_data, config_member.size
        except FileNotFoundError as error:
            raise Failure(f"{self._file}: no such file", Cause.MISSING) from error
        except (tarfile.TarError, ValueError, KeyError, TypeError, IndexError) as error:
            raise Failure(
                f"{self.name}: not a docker archive (a plain tar with manifest.json; unpack a .gz first): {error}",
                Cause.FORMAT,
            ) from error
        except OSError as error:
            raise Failure(f"cannot read {self._file}: {error.strerror}", Cause.IO) from error
        value: dict[str, Any] = {
            "schemaVersion": 2,
            "mediaType": MEDIA_MANIFEST,
            "config": Descriptor(MEDIA_CONFIG, digest_of(config), len(config)).to_json(),
            "layers": [layer.to_json() for layer in layers],
        }
        return json.dumps(value).encode()

    def _add(self, member: tarfile.TarInfo, media_type: str) -> Descriptor:
        """The archive does not tell its layers' digests reliably (old ones name them by ids): they are computed."""
        hashed = sha256()
        for piece in self._backend.read_range("", member.offset_data, member.size):
            hashed.update(piece)
        digest = f"sha256:{hashed.hexdigest()}"
        self._places[digest] = member.offset_data, member.size
        return Descriptor(media_type, digest, member.size)

    def _resolve(self, members: dict[str, tarfile.TarInfo], name: str) -> tarfile.TarInfo:
        """The file of a name. Docker links layers that occur twice."""
        for _ in range(8):
            member = members.get(_tidy(name))
            if member is None:
                raise Failure(f"{self.name}: member {name!r} is missing", Cause.FORMAT)
            if member.isreg():
                return member
            if member.issym():
                name = _tidy(str(Path(member.name).parent / member.linkname))
            elif member.islnk():
                name = member.linkname
            else:
                break
        raise Failure(f"{self.name}: member {name!r} is no file", Cause.FORMAT)

    def _read_member(self, members: dict[str, tarfile.TarInfo], name: str) -> bytes:
        member = self._resolve(members, name)
        if member.size > DOCUMENT_BYTES:
            raise Failure(f"{self.name}: member {name!r} is too large for a document", Cause.FORMAT)
        return b"".join(bytes(piece) for piece in self._backend.read_range("", member.offset_data, member.size))


def _tidy(name: str) -> str:
    """A member's name without ./ and inner .. parts."""
    parts: list[str] = []
    for part in name.split("/"):
        if part == "..":
            if parts:
                parts.pop()
        elif part not in ("", "."):
            parts.append(part)
    return "/".join(parts)
