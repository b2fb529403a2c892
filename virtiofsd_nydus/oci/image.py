"""An image by its reference: what is needed to serve it.

resolve_image() finds the manifest, has its signature checked where one is asked for, and brings the bootstrap: of a
Nydus image the one it carries, of a plain OCI image one that is made of its layers (oci/plain.py)."""

import contextlib
import errno
import hashlib
import os
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from virtiofsd_nydus.errors import Cause, Failure
from virtiofsd_nydus.oci.manifest import (
    LAYER_TYPES,
    Descriptor,
    Manifest,
    Platform,
    get_host_platform,
    load_json,
    parse_platform,
)
from virtiofsd_nydus.oci.reference import ARCHIVES, DOCKER, OCI, OCI_ARCHIVE, Reference, parse_reference
from virtiofsd_nydus.oci.store import DEFAULT_ACCESS, Access, ImageStore, VerifiedReader, find_chain, read_document

if TYPE_CHECKING:
    from virtiofsd_nydus.oci.policy import Trust
    from virtiofsd_nydus.oci.shelf import Shelf
    from virtiofsd_nydus.oci.signatures import Signed

# Where a bootstrap layer has it: since v2, and before.
BOOTSTRAP_MEMBERS = ("image/image.boot", "image.boot")
# RAFS allows 2 GiB (docs/rafs-format.md 7.2).
BOOTSTRAP_BYTES_MAX = 2 << 30
COPY_BYTES = 1 << 20


@dataclass(frozen=True)
class ServedImage:
    """name: the reference as a person wrote it. bootstrap: a file that holds it, bootstrap_digest: what its bytes must
    be. blobs: id (hex) to size in bytes of every data blob. manifest_digest: "sha256:...". config: the image's OCI
    configuration (Env, Cmd and so on under "config"). plain: the blobs are OCI layers, not converted. chain: digests of
    the documents that led to the manifest, its own last. signed: the signatures that were asked for and found right.
    read_bytes, requests: of layers, what getting ready took."""

    name: str
    reference: Reference
    bootstrap: Path
    blobs: dict[str, int]
    manifest_digest: str
    config: dict[str, Any]
    backend_type: str
    _backend_settings: dict[str, Any] = field(repr=False)  # may hold a login
    bootstrap_layer_bytes: int = 0  # as it lies in the registry
    bootstrap_digest: str = ""
    bootstrap_layer_digest: str = ""
    plain: bool = False
    chain: tuple[str, ...] = ()
    signed: "tuple[Signed, ...]" = ()
    key: str = ""  # of a plain image on this node's shelf
    manifest: Manifest | None = None
    read_bytes: int = 0
    requests: int = 0

    @property
    def blob_bytes(self) -> int:
        """Bytes of all data blobs: what a full pull would fetch."""
        return sum(self.blobs.values())

    def backend_config(self) -> dict[str, Any]:
        """The backend section of a nydusd configuration: {"type": ..., "config": {...}}; storage.factory takes both.
        It may hold the login in clear."""
        return {"type": self.backend_type, "config": dict(self._backend_settings)}


@dataclass(frozen=True, kw_only=True)
class ResolveOptions:
    """access: to registries. platform: of an index, "OS/ARCHITECTURE", default this host's. work_dir: the cache
    directory, for what a plain image leaves on the node (None: plain images are refused). trust: the signatures that
    are asked for. fill: whether a plain image's first reading fills the cache. say: gets lines for the log."""

    access: Access = DEFAULT_ACCESS
    platform: str = ""
    work_dir: Path | None = None
    trust: "Trust | None" = None
    fill: bool = True
    on_bytes: Callable[[int], None] | None = None
    say: Callable[[str], None] = lambda line: None
    use_index: bool = True  # one that lies beside a plain image, instead of reading its layers


def open_store(reference: Reference, access: Access = DEFAULT_ACCESS, keep_dir: Path | None = None) -> ImageStore:
    """Opens the store that a reference speaks of. keep_dir: where an archive that has to be decoded stays (default: it
    goes with the store)."""
    if reference.transport == DOCKER:
        from virtiofsd_nydus.oci.registry import RegistryStore

        return RegistryStore.open(reference, access)
    if reference.transport == OCI:
        from virtiofsd_nydus.oci.layout import LayoutStore

        return LayoutStore(reference.path)
    from virtiofsd_nydus.oci.docker_archive import DockerArchiveStore, OciArchiveStore

    return (OciArchiveStore if reference.transport == OCI_ARCHIVE else DockerArchiveStore)(reference.path, keep_dir)


def resolve_image(
    reference: str | Reference,
    *,
    cache_dir: Path,
    access: Access = DEFAULT_ACCESS,
    platform: str = "",
    options: ResolveOptions | None = None,
) -> ServedImage:
    """Finds an image and puts its bootstrap on this node (one that is there already is used, once verified).

    cache_dir: for bootstraps of Nydus images. Raises Failure: AUTH where a signature is asked for and lacks, FORMAT for
    what is no image, else as the stores do."""
    if isinstance(reference, str):
        reference = parse_reference(reference)
    options = options or ResolveOptions(access=access, platform=platform)
    wanted = parse_platform(options.platform) if options.platform else get_host_platform()
    work_dir = options.work_dir
    inner = open_store(reference, options.access, work_dir / "archives" if work_dir is not None else None)
    store = inner
    if work_dir is not None:
        from virtiofsd_nydus.oci.nodestore import NodeStore

        store = NodeStore(inner, work_dir / "documents", options.say)
    try:
        chain, manifest = find_chain(store, reference.version, wanted, nydus=True)
        signed: list[Signed] = []
        if options.trust is not None:
            from virtiofsd_nydus.oci.policy import require_trust

            signed = require_trust(options.trust, store, chain, str(reference))
        config = load_json(read_document(store, manifest.config, f"{reference}: configuration"), str(reference))
        found = _Found(reference, manifest, config, tuple(chain), tuple(signed))
        layer = manifest.bootstrap_layer
        if layer is not None and reference.transport not in ARCHIVES:
            bootstrap, digest = fetch_bootstrap(store, layer, cache_dir)
            kind, settings = _describe_backend(inner)
            blobs = {one.hex: one.size for one in manifest.blob_layers}
            return found.serve(
                bootstrap,
                digest,
                blobs,
                kind,
                settings,
                bootstrap_layer_bytes=layer.size,
                bootstrap_layer_digest=layer.digest,
            )
        if work_dir is None:
            raise _not_nydus(reference)
        try:
            return _resolve_plain(store, inner, found, options)
        except _NydusBeside as beside:
            layer = beside.layer
        bootstrap, digest = fetch_bootstrap(store, layer, cache_dir)
        kind, settings = _describe_backend(inner)
        return found.serve(
            bootstrap,
            digest,
            {one.hex: one.size for one in manifest.layers},
            kind,
            settings,
            bootstrap_layer_bytes=layer.size,
            bootstrap_layer_digest=layer.digest,
        )
    finally:
        store.close()


@dataclass(frozen=True)
class _Found:
    """What the documents of an image say."""

    reference: Reference
    manifest: Manifest
    config: dict[str, Any]
    chain: tuple[str, ...]
    signed: "tuple[Signed, ...]"

    def serve(
        self, bootstrap: Path, digest: str, blobs: dict[str, int], kind: str, settings: dict[str, Any], **more: Any
    ) -> ServedImage:
        return ServedImage(
            str(self.reference),
            self.reference,
            bootstrap,
            blobs,
            self.manifest.descriptor.digest,
            self.config,
            kind,
            settings,
            bootstrap_digest=digest,
            chain=self.chain,
            signed=self.signed,
            manifest=self.manifest,
            **more,
        )


class _NydusBeside(Exception):
    """A Nydus image lies beside the OCI image and may be used instead."""

    def __init__(self, layer: Descriptor) -> None:
        super().__init__()
        self.layer = layer


class _IndexFinder:
    """Looks for what others know of a plain image before its layers are read."""

    def __init__(self, store: ImageStore, found: _Found, options: ResolveOptions) -> None:
        self._store, self._found, self._options = store, found, options

    def __call__(self, shelf: "Shelf", key: str) -> int:
        """Puts an index's files on the shelf; the bytes fetched, 0: there is none that may be used."""
        from virtiofsd_nydus.oci.index import INDEX_TYPE, find_indexes, pull_index

        manifest, say = self._found.manifest, self._options.say
        pinned = bool(self._found.reference.digest)
        indexes, why = find_indexes(self._store, manifest, self._options.trust, pinned=pinned)
        if why:
            say(f"{self._found.reference}: {why}")
        for referrer, artifact in indexes:
            layer = artifact.bootstrap_layer
            if referrer.artifact_type != INDEX_TYPE and layer is not None:
                raise _NydusBeside(layer)
            try:
                return pull_index(self._store, artifact, shelf, key, {one.hex: one.size for one in manifest.layers})
            except Failure as failure:
                if failure.cause not in (Cause.DIGEST, Cause.FORMAT, Cause.MISSING):
                    raise
                say(f"{failure}; the layers are read")
        return 0


def _resolve_plain(store: ImageStore, inner: ImageStore, found: _Found, options: ResolveOptions) -> ServedImage:
    from virtiofsd_nydus.oci.convert import list_diff_ids
    from virtiofsd_nydus.oci.docker_archive import DockerArchiveStore
    from virtiofsd_nydus.oci.plain import PlainOptions, prepare_plain

    assert options.work_dir is not None
    manifest, name = found.manifest, str(found.reference)
    for layer in manifest.layers:
        if layer.media_type not in LAYER_TYPES:
            raise Failure(
                f"{name}: layer {layer.digest} is of type {layer.media_type!r}, which cannot be read", Cause.FORMAT
            )
    options.work_dir.mkdir(parents=True, exist_ok=True)
    wanted = PlainOptions(options.work_dir, fill=options.fill, on_bytes=options.on_bytes, say=options.say)
    if isinstance(inner, DockerArchiveStore):
        wanted.place_of = inner.place_of
    elif options.use_index:
        wanted.find_index = _IndexFinder(store, found, options)
    image = prepare_plain(store, manifest, list_diff_ids(found.config, manifest, name), wanted)
    kind, settings = _describe_backend(inner)
    settings["layers"] = str(image.layers.absolute())
    return found.serve(
        image.bootstrap,
        image.bootstrap_digest,
        image.blobs,
        kind,
        settings,
        plain=True,
        key=image.key,
        read_bytes=image.read_bytes,
        requests=image.requests,
    )


def find_nydus_manifest(store: ImageStore, reference: Reference, platform: Platform) -> Manifest:
    if reference.transport in ARCHIVES:
        raise _not_nydus(reference)
    manifest = find_chain(store, reference.version, platform, nydus=True)[1]
    if manifest.bootstrap_layer is None:
        raise _not_nydus(reference)
    return manifest


def fetch_bootstrap(store: ImageStore, layer: Descriptor, cache_dir: Path) -> tuple[Path, str]:
    """The bootstrap in the layer as cache_dir/HEX.boot (HEX: of the layer), and the digest of its bytes.

    The layer itself stays beside it (HEX.tar.gz): each time it is compared with the manifest, and the bootstrap with
    what is in it, so that a file that was changed on this node is found, and made or had anew."""
    what = f"{store.name}: bootstrap layer"
    path, kept = cache_dir / f"{layer.hex}.boot", cache_dir / f"{layer.hex}.tar.gz"
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(Failure, OSError):
            digest = _digest_bootstrap(kept, layer, what)
            if not path.exists() or digest != _digest_file(path):
                _digest_bootstrap(kept, layer, what, path)
            return path, digest
        with _new_file(cache_dir, layer.hex, kept) as out:
            reader = VerifiedReader(store.read_blob(layer), layer, what)
            while piece := reader.read(COPY_BYTES):
                out.write(piece)
        digest = _digest_bootstrap(kept, layer, what, path)
    except OSError as error:
        raise Failure(
            f"cannot write the bootstrap into {cache_dir}: {error.strerror or error}",
            Cause.SPACE if error.errno == errno.ENOSPC else Cause.IO,
        ) from error
    return path, digest


def _digest_bootstrap(kept: Path, layer: Descriptor, what: str, target: Path | None = None) -> str:
    """The digest of the bootstrap in a layer's file, whose bytes are compared with the manifest. target: the bootstrap
    is written there, too."""
    hashed = _Hashed()
    with kept.open("rb") as file, contextlib.ExitStack() as stack:
        if target is not None:
            hashed.out = stack.enter_context(_new_file(target.parent, layer.hex, target))
        reader = VerifiedReader(_pieces_of(file), layer, what)
        _extract_bootstrap(reader, hashed, what)
        # Only now is it known that these are the layer's bytes.
        reader.finish()
    return f"sha256:{hashed.hash.hexdigest()}"


def _pieces_of(file: BinaryIO) -> Iterator[memoryview]:
    while piece := file.read(COPY_BYTES):
        yield memoryview(piece)


class _Hashed:
    """Digests what is written, and passes it on."""

    def __init__(self) -> None:
        self.hash = hashlib.sha256()
        self.out: Any = None

    def write(self, data: bytes) -> None:
        self.hash.update(data)
        if self.out is not None:
            self.out.write(data)


@contextlib.contextmanager
def _new_file(directory: Path, prefix: str, target: Path) -> Iterator[Any]:
    """A file that takes target's place when the block ends well."""
    with tempfile.NamedTemporaryFile(dir=directory, prefix=f".{prefix[:12]}.", delete=False) as out:
        temporary = Path(out.name)
        try:
            yield out.file
            out.flush()
            os.fchmod(out.fileno(), 0o444)
            temporary.replace(target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


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


def _describe_backend(store: ImageStore) -> tuple[str, dict[str, Any]]:
    from virtiofsd_nydus.oci.docker_archive import DockerArchiveStore
    from virtiofsd_nydus.oci.layout import LayoutStore
    from virtiofsd_nydus.oci.registry import RegistryStore

    if isinstance(store, LayoutStore):
        return "localfs", {"dir": str(store.blob_dir.absolute())}
    if isinstance(store, DockerArchiveStore):
        return "localfs", {"blob_file": str(store.tar_path.absolute())}
    assert isinstance(store, RegistryStore)
    settings: dict[str, Any] = {"scheme": store.scheme, "host": store.host, "repo": store.repo}
    # Docker's login is not among them: it may be short-lived, so the backend looks it up itself when it logs in.
    if store.credentials is not None:
        settings["auth"] = store.credentials.basic_header().partition(" ")[2]
    if store.access.ca_cert_files:
        settings["ca_cert_files"] = list(store.access.ca_cert_files)
    if store.access.skip_verify:
        settings["skip_verify"] = True
    for key, value in (
        ("hosts_dir", store.access.hosts_dir),
        ("credential_provider_config", store.access.provider_config),
        ("credential_provider_bin_dir", store.access.provider_bin_dir),
    ):
        if value:
            settings[key] = str(Path(value).absolute())
    return "registry", settings


def _not_nydus(reference: Reference) -> Failure:
    return Failure(
        f"{reference} is not a Nydus image: make one of it with "
        f"`virtiofsd-nydus convert {reference} docker://HOST/NAME:TAG`",
        Cause.FORMAT,
    )
