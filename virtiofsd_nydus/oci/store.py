"""What an image's source and destination have in common, and the stream that vouches for its bytes.

Three of them: oci.registry (docker://), oci.layout (oci:), oci.docker_archive (docker-archive:, source only).
"""

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from virtiofsd_nydus.errors import Cause, Failure
from virtiofsd_nydus.net.documents import parse_json
from virtiofsd_nydus.oci.manifest import (
    DOCUMENT_BYTES,
    INDEX_TYPES,
    Descriptor,
    Manifest,
    Platform,
    choose_entry,
    digest_of,
    parse_index,
    parse_manifest,
)

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

OnBytes = Callable[[int], None]


@dataclass(frozen=True)
class Access:
    """How registries are talked to. plain_http: without TLS (loopback ones are anyway, unless they want it). creds:
    USER:PASSWORD; without them docker's login is looked up. ca_cert_files: PEM files trusted beside the system's.
    hosts_dir: containerd's directory of hosts.toml files. provider_*: the kubelet's credential providers."""

    plain_http: bool = False
    creds: str = field(default="", repr=False)
    ca_cert_files: tuple[str, ...] = ()
    skip_verify: bool = False
    hosts_dir: str = ""
    provider_config: str = ""
    provider_bin_dir: str = ""


DEFAULT_ACCESS = Access()


class ImageStore(Protocol):
    """Where images lie. Methods may be called from several threads; they raise errors.Failure."""

    name: str  # as a person would write it

    def get_manifest(self, version: str) -> tuple[bytes, str]:
        """Document and media type of a tag or digest ("": the only image there is)."""
        ...

    def read_blob(self, descriptor: Descriptor) -> Iterator[memoryview]:
        """The blob's bytes, unverified; a piece is valid until the next is asked for."""
        ...

    def read_blob_range(self, descriptor: Descriptor, offset: int, length: int) -> Iterator[memoryview]:
        """Part of a blob, unverified; as read_blob."""
        ...

    def has_blob(self, descriptor: Descriptor) -> bool: ...

    def put_blob(self, descriptor: Descriptor, file: Path, on_bytes: OnBytes | None = None) -> None:
        """Stores the file, whose digest and size the descriptor tells. Ask has_blob first."""
        ...

    def put_manifest(self, data: bytes, media_type: str, tag: str | None) -> bool:
        """Stores the document, last of all: with it the image becomes visible under the tag ("": a layout's image
        without one). None: under its digest only, for an index that will name it. Whether the store itself lists it
        among the referrers of its subject."""
        ...

    def get_referrers(self, digest: str) -> bytes | None:
        """The index of a manifest's referrers; None: the store keeps none (oci/referrers.py knows the other way)."""
        ...

    def close(self) -> None: ...


class VerifiedReader(io.RawIOBase):
    """A blob as a stream. A reader that comes to the end, or calls finish(), knows that it had the digest and the
    size."""

    def __init__(
        self, pieces: Iterator[memoryview], descriptor: Descriptor, what: str, on_bytes: OnBytes | None = None
    ) -> None:
        self._pieces = pieces
        self._descriptor = descriptor
        self._what = what
        self._on_bytes = on_bytes
        self._hash = sha256()
        self._piece = memoryview(b"")
        self._size = 0
        self._ended = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "WriteableBuffer") -> int:
        out = memoryview(buffer).cast("B")
        if not self._piece and not self._next_piece():
            return 0
        count = min(len(out), len(self._piece))
        out[:count] = self._piece[:count]
        self._piece = self._piece[count:]
        return count

    def finish(self) -> None:
        """Reads what is left (a tar reader stops before its end) and checks."""
        while self._next_piece():
            pass

    def _next_piece(self) -> bool:
        if self._ended:
            return False
        for piece in self._pieces:
            if piece:
                self._hash.update(piece)
                self._size += len(piece)
                if self._size > self._descriptor.size:
                    break
                if self._on_bytes is not None:
                    self._on_bytes(len(piece))
                self._piece = piece
                return True
        self._ended = True
        self._piece = memoryview(b"")
        if self._size != self._descriptor.size or f"sha256:{self._hash.hexdigest()}" != self._descriptor.digest:
            raise Failure(
                f"{self._what}: {self._descriptor.digest} does not have the bytes its digest says: it was "
                "damaged where it is stored or on the way",
                Cause.DIGEST,
            )
        return False


def read_document(store: ImageStore, descriptor: Descriptor, what: str) -> bytes:
    """A small blob (a configuration), whole and verified."""
    if descriptor.size > DOCUMENT_BYTES:
        raise Failure(f"{what}: {descriptor.size} bytes is too large for a document", Cause.FORMAT)
    return VerifiedReader(store.read_blob(descriptor), descriptor, what).readall() or b""


def find_manifest(store: ImageStore, version: str, platform: Platform, *, nydus: bool) -> Manifest:
    """The manifest of a tag or digest; of an index, that of the platform (nydus: see choose_entry)."""
    return find_chain(store, version, platform, nydus=nydus)[1]


def find_chain(store: ImageStore, version: str, platform: Platform, *, nydus: bool) -> tuple[list[str], Manifest]:
    """The same, and the digests of the documents that led to it, the manifest's own last."""
    what = store.name
    chain: list[str] = []
    for _ in range(3):  # an index may name an index, no sane image goes deeper
        data, media_type = store.get_manifest(version)
        digest = digest_of(data)
        chain.append(digest)
        if version.startswith("sha256:") and digest != version:
            raise Failure(f"{what}: the manifest is not the one of {version}: damaged or falsified", Cause.DIGEST)
        value = _peek(data)
        if media_type not in INDEX_TYPES and "manifests" not in value:
            return chain, parse_manifest(data, Descriptor(media_type, digest, len(data)), what)
        version = choose_entry(parse_index(data, what), platform, what, nydus=nydus).descriptor.digest
    raise Failure(f"{what}: indexes within indexes", Cause.FORMAT)


def _peek(data: bytes) -> dict[str, Any]:
    try:
        value = parse_json(data)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
