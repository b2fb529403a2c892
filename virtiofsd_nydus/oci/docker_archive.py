"""Archives as sources: `docker save`'s, in which manifest.json names a configuration and layer tars, and OCI layouts in
a tar (`oci-archive:`).

Members are read where they lie in the tar. Docker's are presented as an OCI manifest, so that the rest need not
know."""

import errno
import json
import os
import shutil
import sys
import tarfile
import tempfile
import threading
import zlib
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO

from virtiofsd_nydus.builder.decoding import is_zstd
from virtiofsd_nydus.errors import Cause, Failure
from virtiofsd_nydus.net.documents import parse_json
from virtiofsd_nydus.oci.layout import choose_image, parse_index_file
from virtiofsd_nydus.oci.manifest import (
    DOCUMENT_BYTES,
    MEDIA_CONFIG,
    MEDIA_LAYER,
    MEDIA_MANIFEST,
    Descriptor,
    digest_of,
    load_json,
)
from virtiofsd_nydus.oci.reference import DOCKER_ARCHIVE, OCI_ARCHIVE, STDIN
from virtiofsd_nydus.oci.store import OnBytes
from virtiofsd_nydus.storage.localfs import LocalfsBackend

PIECE_BYTES = 1 << 20


class DockerArchiveStore:
    """store.ImageStore, for reading only. A compressed archive, and standard input, is decoded into a file first: of
    TMPDIR and gone with the store, or of keep_dir, where it stays under its digest for a mount that needs it later."""

    kind = DOCKER_ARCHIVE
    wanted = "a docker archive (a tar with manifest.json)"

    def __init__(self, file: Path, keep_dir: Path | None = None) -> None:
        self.name = f"{self.kind}:{file}"
        self._file = file
        self._keep_dir = keep_dir
        self._kept: Path | None = None
        self._decoded: Any = None  # a temporary file, gone with close()
        self._backend: LocalfsBackend | None = None
        self._lock = threading.Lock()
        self._manifests: dict[str, bytes] = {}  # by what was asked for
        self._places: dict[str, tuple[int, int]] = {}  # digest -> offset and size in the archive

    def close(self) -> None:
        if self._backend is not None:
            self._backend.close()
        if self._decoded is not None:
            self._decoded.close()

    def get_manifest(self, version: str) -> tuple[bytes, str]:
        """version: NAME[:TAG] of an image of the archive, "": the only one; or the digest of one that was made here."""
        with self._lock:
            made = next((data for data in self._manifests.values() if digest_of(data) == version), None)
            if made is not None:
                return made, self._type_of(made)
            if self.kind == OCI_ARCHIVE and version.startswith("sha256:"):
                data = self._read_document(version)
                return data, self._type_of(data)
            if version not in self._manifests:
                self._manifests[version] = self._scan(version)
            return self._manifests[version], self._type_of(self._manifests[version])

    def _type_of(self, data: bytes) -> str:
        return str(load_json(data, self.name).get("mediaType") or "")

    def read_blob(self, descriptor: Descriptor) -> Iterator[memoryview]:
        if descriptor.digest not in self._places:
            raise Failure(f"{self.name}: no blob {descriptor.digest}", Cause.MISSING)
        offset, size = self._places[descriptor.digest]
        return self._opened().read_range("", offset, size)

    def read_blob_range(self, descriptor: Descriptor, offset: int, length: int) -> Iterator[memoryview]:
        at, _ = self._places[descriptor.digest]
        return self._opened().read_range("", at + offset, length)

    def get_referrers(self, digest: str) -> bytes | None:
        return None

    def has_blob(self, descriptor: Descriptor) -> bool:
        return descriptor.digest in self._places

    def put_blob(self, descriptor: Descriptor, file: Path, on_bytes: OnBytes | None = None) -> None:
        raise Failure(f"{self.name}: an archive can be a source only", Cause.IO)

    def put_manifest(self, data: bytes, media_type: str, tag: str | None) -> bool:
        raise Failure(f"{self.name}: an archive can be a source only", Cause.IO)

    def _opened(self) -> LocalfsBackend:
        """Reads the archive as a plain tar. Raises OSError, ValueError for one that does not decode."""
        if self._backend is None:
            if self._file == STDIN:
                self._decode_stdin()
            else:
                with self._file.open("rb") as raw:
                    self._decode(open_decoded(raw))
            self._backend = LocalfsBackend(blob_file=str(self.tar_path))
        return self._backend

    def _decode_stdin(self) -> None:
        """Standard input can be read once only: as it is into a file, then as any."""
        with tempfile.TemporaryFile(prefix="virtiofsd-nydus-", dir=self._keep_dir) as raw:
            shutil.copyfileobj(sys.stdin.buffer, raw, PIECE_BYTES)
            raw.seek(0)
            self._decode(open_decoded(raw) or raw)

    def _decode(self, reader: "BinaryIO | None") -> None:
        if reader is None:
            return
        if self._keep_dir is not None:
            self._keep_dir.mkdir(parents=True, exist_ok=True)
        self._decoded = tempfile.NamedTemporaryFile(prefix="virtiofsd-nydus-", dir=self._keep_dir)  # noqa: SIM115
        hashed = sha256()
        while piece := reader.read(PIECE_BYTES):
            hashed.update(piece)
            self._decoded.write(piece)
        self._decoded.flush()
        if self._keep_dir is not None:
            kept = self._keep_dir / f"{hashed.hexdigest()}.tar"
            if not kept.exists():
                os.link(self._decoded.name, kept)
            self._kept = kept

    @property
    def tar_path(self) -> Path:
        """The tar that members are read of; known once a manifest was asked for."""
        if self._kept is not None:
            return self._kept
        return self._file if self._decoded is None else Path(self._decoded.name)

    def place_of(self, descriptor: Descriptor) -> int:
        """Where a blob begins in the tar."""
        return self._places[descriptor.digest][0]

    def _choose(self, listed: Any, version: str) -> Any:
        """The entry of manifest.json for NAME[:TAG]."""
        if not isinstance(listed, list) or not listed:
            raise Failure(f"{self.name}: holds no images", Cause.FORMAT)
        names = [[str(name) for name in entry.get("RepoTags") or []] for entry in listed]
        if not version and len(listed) == 1:
            return listed[0]
        found = [
            entry
            for entry, of_entry in zip(listed, names, strict=True)
            if normalize_name(version) in [normalize_name(name) for name in of_entry]
        ]
        if version and found:
            return found[0]
        have = ", ".join(name for of_entry in names for name in of_entry) or "none with a name"
        raise Failure(
            f"{self.name}: no image {version!r}; there are: {have}"
            if version
            else f"{self.name}: holds {len(listed)} images, say which ({self.name}:NAME:TAG); there are: {have}",
            Cause.MISSING if version else Cause.FORMAT,
        )

    def _scan(self, version: str) -> bytes:
        """Finds the members and makes the manifest."""
        try:
            self._opened()
            with tarfile.open(self.tar_path, "r:") as archive:
                members = {_tidy(member.name): member for member in archive}
                if self.kind == OCI_ARCHIVE:
                    return self._scan_layout(members, version)
                chosen = self._choose(parse_json(self._read_member(members, "manifest.json")), version)
                config = self._read_member(members, str(chosen["Config"]))
                layers = [self._add(self._resolve(members, str(name)), MEDIA_LAYER) for name in chosen["Layers"]]
                config_member = self._resolve(members, str(chosen["Config"]))
                self._places[digest_of(config)] = config_member.offset_data, config_member.size
        except FileNotFoundError as error:
            raise Failure(f"{self._file}: no such file", Cause.MISSING) from error
        except (tarfile.TarError, ValueError, KeyError, TypeError, AttributeError, EOFError, zlib.error) as error:
            raise Failure(
                f"{self.name}: not {self.wanted}, plain or compressed: {error}",
                Cause.FORMAT,
            ) from error
        except OSError as error:
            if error.errno is None:  # of gzip and bz2: what they read is damaged
                raise Failure(f"{self.name}: does not decode: {error}", Cause.FORMAT) from error
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            raise Failure(
                f"cannot decode {self._file} in {tempfile.gettempdir()}: {error.strerror} (TMPDIR)"
                if full
                else f"cannot read {self._file}: {error.strerror}",
                Cause.SPACE if full else Cause.IO,
            ) from error
        value: dict[str, Any] = {
            "schemaVersion": 2,
            "mediaType": MEDIA_MANIFEST,
            "config": Descriptor(MEDIA_CONFIG, digest_of(config), len(config)).to_json(),
            "layers": [layer.to_json() for layer in layers],
        }
        return json.dumps(value).encode()

    def _scan_layout(self, members: dict[str, tarfile.TarInfo], version: str) -> bytes:
        """The manifest of an image of an OCI layout. Its blobs, manifests among them, are known by their names: who
        reads them compares digests."""
        for name, member in members.items():
            if name.startswith("blobs/sha256/") and member.isreg():
                self._places[f"sha256:{name[13:]}"] = member.offset_data, member.size
        entries = parse_index_file(self._read_member(members, "index.json"), self.name)
        descriptor = choose_image(entries, version, self.name)
        data = self._read_document(descriptor.digest)
        if digest_of(data) != descriptor.digest:
            raise Failure(f"{self.name}: manifest {descriptor.digest} is damaged", Cause.DIGEST)
        return data

    def _read_document(self, digest: str) -> bytes:
        if digest not in self._places:
            raise Failure(f"{self.name}: no blob {digest}", Cause.MISSING)
        offset, size = self._places[digest]
        if size > DOCUMENT_BYTES:
            raise Failure(f"{self.name}: {digest} is too large for a document", Cause.FORMAT)
        return b"".join(bytes(piece) for piece in self._opened().read_range("", offset, size))

    def _add(self, member: tarfile.TarInfo, media_type: str) -> Descriptor:
        """The archive does not tell its layers' digests reliably (old ones name them by ids): they are computed."""
        hashed = sha256()
        for piece in self._opened().read_range("", member.offset_data, member.size):
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
        return b"".join(bytes(piece) for piece in self._opened().read_range("", member.offset_data, member.size))


class OciArchiveStore(DockerArchiveStore):
    """The same of an OCI layout in a tar."""

    kind = OCI_ARCHIVE
    wanted = "an OCI layout in a tar (with index.json)"


def open_decoded(raw: BinaryIO) -> "BinaryIO | None":
    """What decodes a compressed file from its start; None: it is not compressed in a way that is known."""
    head = raw.read(6)
    raw.seek(0)
    if head[:2] == b"\x1f\x8b":
        import gzip

        return gzip.GzipFile(fileobj=raw)  # type: ignore[return-value]
    if is_zstd(head):
        import zstandard

        return _ZstdReader(zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True))  # type: ignore[return-value]
    if head[:3] == b"BZh":
        import bz2

        return bz2.BZ2File(raw)  # type: ignore[return-value]
    if head == b"\xfd7zXZ\0":
        import lzma

        return _XzReader(lzma.LZMAFile(raw))  # type: ignore[return-value]
    return None


class _ZstdReader:
    """Tells damage as the others do."""

    def __init__(self, reader: Any) -> None:
        self._reader = reader

    def read(self, size: int) -> bytes:
        import zstandard

        try:
            return bytes(self._reader.read(size))
        except zstandard.ZstdError as error:
            raise ValueError(str(error)) from None


class _XzReader:
    """Tells damage as the others do."""

    def __init__(self, reader: Any) -> None:
        self._reader = reader

    def read(self, size: int) -> bytes:
        import lzma

        try:
            return bytes(self._reader.read(size))
        except lzma.LZMAError as error:
            raise ValueError(str(error)) from None


def normalize_name(name: str) -> str:
    """NAME:TAG with what docker leaves out: the tag `latest`, and not its own registry's name."""
    name = name.removeprefix("docker.io/").removeprefix("library/")
    return name if ":" in name.rpartition("/")[2] else f"{name}:latest"


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
