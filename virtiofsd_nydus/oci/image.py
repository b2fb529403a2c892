"""A Nydus image by its reference: what is needed to serve it.

resolve_image() finds the manifest and brings the bootstrap, the only part of an image that is ever fetched whole."""

import contextlib
import os
import tarfile
import tempfile
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO

from virtiofsd_nydus.errors import Cause, Failure
from virtiofsd_nydus.oci.manifest import (
    Descriptor,
    Manifest,
    Platform,
    get_host_platform,
    load_json,
    parse_platform,
)
from virtiofsd_nydus.oci.reference import DOCKER, DOCKER_ARCHIVE, OCI, Reference, parse_reference
from virtiofsd_nydus.oci.store import DEFAULT_ACCESS, Access, ImageStore, VerifiedReader, find_manifest, read_document

# Where a bootstrap layer has it: since v2, and before.
BOOTSTRAP_MEMBERS = ("image/image.boot", "image.boot")
# RAFS allows 2 GiB (docs/rafs-format.md 7.2).
BOOTSTRAP_BYTES_MAX = 2 << 30
COPY_BYTES = 1 << 20


@dataclass(frozen=True)
class NydusImage:
    """name: the reference as a person wrote it. bootstrap: a file that holds it, named by the bootstrap layer's digest.
    blobs: id (hex) to size in bytes of every data blob. manifest_digest: "sha256:...". config: the image's OCI
    configuration (Env, Cmd and so on under "config")."""

    name: str
    reference: Reference
    bootstrap: Path
    blobs: dict[str, int]
    manifest_digest: str
    config: dict[str, Any]
    backend_type: str
    _backend_settings: dict[str, Any] = field(repr=False)  # may hold a login
    bootstrap_layer_bytes: int = 0  # as it lies in the registry

    @property
    def blob_bytes(self) -> int:
        """Bytes of all data blobs: what a full pull would fetch."""
        return sum(self.blobs.values())

    def backend_config(self) -> dict[str, Any]:
        """The backend section of a nydusd configuration: {"type": ..., "config": {...}}; storage.factory takes both.
        It may hold the login in clear."""
        return {"type": self.backend_type, "config": dict(self._backend_settings)}


def open_store(reference: Reference, access: Access = DEFAULT_ACCESS) -> ImageStore:
    """Opens the store that a reference speaks of."""
    if reference.transport == DOCKER:
        from virtiofsd_nydus.oci.registry import RegistryStore

        return RegistryStore.open(reference, access)
    if reference.transport == OCI:
        from virtiofsd_nydus.oci.layout import LayoutStore

        return LayoutStore(reference.path)
    from virtiofsd_nydus.oci.docker_archive import DockerArchiveStore

    return DockerArchiveStore(reference.path)


def resolve_image(
    reference: str | Reference, *, cache_dir: Path, access: Access = DEFAULT_ACCESS, platform: str = ""
) -> NydusImage:
    """Finds a Nydus image and puts its bootstrap into cache_dir (one that is there already is used, once verified).

    platform: of an index, "OS/ARCHITECTURE", default this host's. Raises Failure: FORMAT for an image that is none of
    Nydus, else as the stores do."""
    if isinstance(reference, str):
        reference = parse_reference(reference)
    wanted = parse_platform(platform) if platform else get_host_platform()
    store = open_store(reference, access)
    try:
        manifest = find_nydus_manifest(store, reference, wanted)
        layer = manifest.bootstrap_layer
        assert layer is not None
        bootstrap = fetch_bootstrap(store, layer, cache_dir)
        config = load_json(read_document(store, manifest.config, f"{reference}: configuration"), str(reference))
        kind, settings = _describe_backend(store)
        return NydusImage(
            str(reference),
            reference,
            bootstrap,
            {one.hex: one.size for one in manifest.blob_layers},
            manifest.descriptor.digest,
            config,
            kind,
            settings,
            layer.size,
        )
    finally:
        store.close()


def find_nydus_manifest(store: ImageStore, reference: Reference, platform: Platform) -> Manifest:
    if reference.transport == DOCKER_ARCHIVE:
        raise _not_nydus(reference)
    manifest = find_manifest(store, reference.version, platform, nydus=True)
    if manifest.bootstrap_layer is None:
        raise _not_nydus(reference)
    return manifest


def fetch_bootstrap(store: ImageStore, layer: Descriptor, cache_dir: Path) -> Path:
    """The bootstrap in the layer as cache_dir/<hex of the layer>.boot.

    A second file beside it holds the bootstrap's own digest: one that does not fit (a torn or damaged file) is fetched
    anew."""
    path = cache_dir / f"{layer.hex}.boot"
    check = cache_dir / f"{layer.hex}.boot.sha256"
    try:
        if check.read_text() == _digest_file(path):
            return path
    except FileNotFoundError:
        pass
    except OSError as error:
        raise Failure(f"cannot read {path}: {error.strerror}", Cause.IO) from error
    what = f"{store.name}: bootstrap layer"
    reader = VerifiedReader(store.read_blob(layer), layer, what)
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=cache_dir, prefix=f".{layer.hex[:12]}.", delete=False) as out:
            temporary = Path(out.name)
            try:
                _extract_bootstrap(reader, out.file, what)
                out.flush()
                # Only now is it known that these are the layer's bytes.
                reader.finish()
                os.fchmod(out.fileno(), 0o444)
                digest = _digest_file(temporary)
                check.unlink(missing_ok=True)
                temporary.replace(path)
                _write_whole(check, digest)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
    except OSError as error:
        import errno

        raise Failure(
            f"cannot write the bootstrap into {cache_dir}: {error.strerror or error}",
            Cause.SPACE if error.errno == errno.ENOSPC else Cause.IO,
        ) from error
    return path


def _extract_bootstrap(reader: VerifiedReader, out: Any, what: str) -> None:
    import lzma
    import zlib

    try:
        with tarfile.open(fileobj=reader, mode="r|*", bufsize=64 << 10) as archive:
            for member in archive:
                if member.name.removeprefix("./") in BOOTSTRAP_MEMBERS and member.isreg():
                    if member.size > BOOTSTRAP_BYTES_MAX:
                        raise Failure(f"{what}: a bootstrap of {member.size} bytes is refused", Cause.FORMAT)
                    source = archive.extractfile(member)
                    assert source is not None
                    _copy(source, out, member.size, what)
                    return
    except (tarfile.TarError, EOFError, ValueError, OverflowError, zlib.error, lzma.LZMAError) as error:
        # Damage on the way shows here first; finish() tells it from a layer that was made wrong.
        reader.finish()
        raise Failure(f"{what}: not a tar with a bootstrap: {error}", Cause.FORMAT) from error
    raise Failure(f"{what}: no {BOOTSTRAP_MEMBERS[0]} in it", Cause.FORMAT)


def _copy(source: "BinaryIO | Any", out: Any, size: int, what: str) -> None:
    while size > 0:
        piece = source.read(min(size, COPY_BYTES))
        if not piece:
            raise Failure(f"{what}: the bootstrap in it is cut short", Cause.FORMAT)
        out.write(piece)
        size -= len(piece)


def _digest_file(path: Path) -> str:
    hashed = sha256()
    with path.open("rb") as file:
        while piece := file.read(COPY_BYTES):
            hashed.update(piece)
    return f"sha256:{hashed.hexdigest()}"


def _write_whole(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with contextlib.suppress(FileNotFoundError):
        temporary.unlink()
    temporary.write_text(text)
    temporary.replace(path)


def _describe_backend(store: ImageStore) -> tuple[str, dict[str, Any]]:
    from virtiofsd_nydus.oci.layout import LayoutStore
    from virtiofsd_nydus.oci.registry import RegistryStore

    if isinstance(store, LayoutStore):
        return "localfs", {"dir": str(store.blob_dir.absolute())}
    assert isinstance(store, RegistryStore)
    settings: dict[str, Any] = {"scheme": store.scheme, "host": store.host, "repo": store.repo}
    # Docker's login is not among them: it may be short-lived, so the backend looks it up itself when it logs in.
    if store.credentials is not None:
        settings["auth"] = store.credentials.basic_header().partition(" ")[2]
    if store.access.ca_cert_files:
        settings["ca_cert_files"] = list(store.access.ca_cert_files)
    if store.access.skip_verify:
        settings["skip_verify"] = True
    return "registry", settings


def _not_nydus(reference: Reference) -> Failure:
    return Failure(
        f"{reference} is not a Nydus image: make one of it with "
        f"`virtiofsd-nydus convert {reference} docker://HOST/NAME:TAG`",
        Cause.FORMAT,
    )
