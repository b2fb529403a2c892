"""Manifests, indexes and configurations: media types, checked parsing, and the Nydus annotations.

Media types and annotations of Nydus images are those that nydus-snapshotter and nydusify go by.
"""

import platform as host_platform
import re
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

from virtiofsd_nydus.errors import Cause, Failure, UsageFailure
from virtiofsd_nydus.net.documents import parse_json

MEDIA_INDEX = "application/vnd.oci.image.index.v1+json"
MEDIA_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
MEDIA_CONFIG = "application/vnd.oci.image.config.v1+json"
MEDIA_LAYER = "application/vnd.oci.image.layer.v1.tar"
MEDIA_LAYER_GZIP = "application/vnd.oci.image.layer.v1.tar+gzip"
MEDIA_LAYER_ZSTD = "application/vnd.oci.image.layer.v1.tar+zstd"
MEDIA_DOCKER_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
MEDIA_DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
MEDIA_DOCKER_LAYER = "application/vnd.docker.image.rootfs.diff.tar.gzip"
MEDIA_DOCKER_LAYER_PLAIN = "application/vnd.docker.image.rootfs.diff.tar"
MEDIA_DOCKER_LAYER_ZSTD = "application/vnd.docker.image.rootfs.diff.tar.zstd"
# Layers that a registry may leave to other servers. Where their bytes are at hand they are layers as any.
MEDIA_DOCKER_FOREIGN = "application/vnd.docker.image.rootfs.foreign.diff.tar"
MEDIA_NONDISTRIBUTABLE = "application/vnd.oci.image.layer.nondistributable.v1.tar"
MEDIA_NYDUS_BLOB = "application/vnd.oci.image.layer.nydus.blob.v1"

INDEX_TYPES = (MEDIA_INDEX, MEDIA_DOCKER_LIST)
MANIFEST_TYPES = (MEDIA_MANIFEST, MEDIA_DOCKER_MANIFEST)
LAYER_TYPES = (
    MEDIA_LAYER,
    MEDIA_LAYER_GZIP,
    MEDIA_LAYER_ZSTD,
    MEDIA_DOCKER_LAYER,
    MEDIA_DOCKER_LAYER_PLAIN,
    MEDIA_DOCKER_LAYER_ZSTD,
    MEDIA_DOCKER_FOREIGN,
    f"{MEDIA_DOCKER_FOREIGN}.gzip",
    f"{MEDIA_DOCKER_FOREIGN}.zstd",
    MEDIA_NONDISTRIBUTABLE,
    f"{MEDIA_NONDISTRIBUTABLE}+gzip",
    f"{MEDIA_NONDISTRIBUTABLE}+zstd",
)
ACCEPT = ", ".join((*MANIFEST_TYPES, *INDEX_TYPES))

ANNOTATION_BLOB = "containerd.io/snapshot/nydus-blob"
ANNOTATION_ENCRYPTED = "containerd.io/snapshot/nydus-encrypted-blob"
ANNOTATION_REF = "containerd.io/snapshot/nydus-ref"
ANNOTATION_BOOTSTRAP = "containerd.io/snapshot/nydus-bootstrap"
ANNOTATION_FS_VERSION = "containerd.io/snapshot/nydus-fs-version"
ANNOTATION_REF_NAME = "org.opencontainers.image.ref.name"
# How a Nydus manifest is marked in an index beside its OCI twin.
NYDUS_ARTIFACT_TYPE = "application/vnd.nydus.image.manifest.v1+json"
NYDUS_OS_FEATURE = "nydus.remoteimage.v1"

# Largest document taken: registries refuse larger ones.
DOCUMENT_BYTES = 4 << 20
DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


def digest_of(data: bytes) -> str:
    return f"sha256:{sha256(data).hexdigest()}"


@dataclass(frozen=True)
class Descriptor:
    """A blob or manifest by its digest. size in bytes."""

    media_type: str
    digest: str
    size: int
    annotations: dict[str, str] = field(default_factory=dict)

    @property
    def hex(self) -> str:
        return self.digest.partition(":")[2]

    def to_json(self) -> dict[str, Any]:
        out: dict[str, Any] = {"mediaType": self.media_type, "digest": self.digest, "size": self.size}
        if self.annotations:
            out["annotations"] = dict(sorted(self.annotations.items()))
        return out


@dataclass(frozen=True)
class Platform:
    """os/architecture[/variant]."""

    os: str
    architecture: str
    variant: str = ""

    def to_json(self) -> dict[str, str]:
        out = {"architecture": self.architecture, "os": self.os}
        return {**out, "variant": self.variant} if self.variant else out

    def __str__(self) -> str:
        return "/".join(part for part in (self.os, self.architecture, self.variant) if part)


@dataclass(frozen=True)
class IndexEntry:
    descriptor: Descriptor
    platform: Platform | None
    is_nydus: bool


@dataclass(frozen=True)
class Manifest:
    """One image: layers lowest first."""

    descriptor: Descriptor
    config: Descriptor
    layers: tuple[Descriptor, ...]
    annotations: dict[str, str] = field(default_factory=dict)

    @property
    def bootstrap_layer(self) -> Descriptor | None:
        """The layer with the bootstrap: what makes it a Nydus image."""
        return next((one for one in reversed(self.layers) if one.annotations.get(ANNOTATION_BOOTSTRAP) == "true"), None)

    @property
    def blob_layers(self) -> tuple[Descriptor, ...]:
        return tuple(
            one
            for one in self.layers
            if one.media_type == MEDIA_NYDUS_BLOB or one.annotations.get(ANNOTATION_BLOB) == "true"
        )


def parse_platform(text: str) -> Platform:
    """The --platform option."""
    parts = text.split("/")
    if not 2 <= len(parts) <= 3 or not all(parts):
        raise UsageFailure(f"--platform {text!r}: expected OS/ARCHITECTURE[/VARIANT], like linux/amd64")
    return Platform(*parts)


def get_host_platform() -> Platform:
    """The platform of this machine, in Go's names as OCI has them."""
    machine = host_platform.machine().lower()
    variant = {"armv6l": "v6", "armv5tel": "v5"}.get(machine, "")
    return normalize_platform(Platform("linux", "arm" if machine.startswith("armv") else machine, variant))


ARCHITECTURES = {
    "x86_64": ("amd64", ""),
    "x86-64": ("amd64", ""),
    "aarch64": ("arm64", ""),
    "armhf": ("arm", "v7"),
    "armel": ("arm", "v6"),
    "i686": ("386", ""),
    "i386": ("386", ""),
}
# What an architecture without a variant means
IMPLIED_VARIANTS = {"amd64": "v1", "arm64": "v8", "arm": "v7"}


def normalize_platform(platform: Platform) -> Platform:
    """Other names of an architecture replaced; a variant that the architecture means anyway is left out."""
    architecture, variant = platform.architecture.lower(), platform.variant.lower()
    if architecture in ARCHITECTURES:
        architecture, implied = ARCHITECTURES[architecture]
        variant = variant or implied
    if variant.isascii() and variant.isdecimal():
        variant = f"v{variant}"
    if variant == IMPLIED_VARIANTS.get(architecture):
        variant = ""
    return Platform(platform.os.lower(), architecture, variant)


def rank_platform(found: Platform, wanted: Platform) -> int | None:
    """How well an image of one platform runs on another: 0 best. None: it does not. As containerd has it: a processor
    runs images of its own variant and of lower ones, the highest of them best."""
    found, wanted = normalize_platform(found), normalize_platform(wanted)
    if (found.os, found.architecture) != (wanted.os, wanted.architecture):
        return None
    if found.variant == wanted.variant:
        return 0
    have, want = variant_level(found), variant_level(wanted)
    return want - have if have is not None and want is not None and have < want else None


def variant_level(platform: Platform) -> int | None:
    """The number of a normalized platform's variant; None: variants of this architecture have no order."""
    implied = IMPLIED_VARIANTS.get(platform.architecture)
    variant = platform.variant or implied or ""
    number = variant.removeprefix("v")
    if implied is None or not variant.startswith("v") or not number.isascii() or not number.isdecimal():
        return None
    return int(number[:4])


def parse_descriptor(value: Any, what: str) -> Descriptor:
    try:
        media_type, digest, size = value["mediaType"], value["digest"], value["size"]
        annotations = value.get("annotations") or {}
        ok = (
            isinstance(media_type, str)
            and isinstance(digest, str)
            and isinstance(size, int)
            and not isinstance(size, bool)
            and 0 <= size < 1 << 62
            and isinstance(annotations, dict)
            and all(isinstance(one, str) for pair in annotations.items() for one in pair)
        )
    except (KeyError, TypeError, AttributeError):
        ok = False
    if not ok:
        raise Failure(f"{what}: a descriptor lacks mediaType, digest or size", Cause.FORMAT)
    if not DIGEST.fullmatch(digest):
        raise Failure(f"{what}: digest {digest[:80]!r} is not supported: sha256 is", Cause.FORMAT)
    return Descriptor(media_type, digest, size, annotations)


def load_json(data: bytes, what: str) -> dict[str, Any]:
    """A JSON object of at most DOCUMENT_BYTES."""
    try:
        value = parse_json(data) if len(data) <= DOCUMENT_BYTES else None
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise Failure(f"{what}: not a JSON document of an image", Cause.FORMAT)
    return value


def parse_manifest(data: bytes, descriptor: Descriptor, what: str) -> Manifest:
    value = load_json(data, what)
    layers = value.get("layers")
    if value.get("schemaVersion") != 2 or not isinstance(layers, list) or "config" not in value:
        raise Failure(f"{what}: not an image manifest (schema 2 with config and layers)", Cause.FORMAT)
    annotations = value.get("annotations")
    return Manifest(
        descriptor,
        parse_descriptor(value["config"], what),
        tuple(parse_descriptor(layer, what) for layer in layers),
        {str(key): str(one) for key, one in annotations.items()} if isinstance(annotations, dict) else {},
    )


def parse_index(data: bytes, what: str) -> list[IndexEntry]:
    entries = load_json(data, what).get("manifests")
    if not isinstance(entries, list):
        raise Failure(f"{what}: not an image index (no manifests)", Cause.FORMAT)
    out = []
    for entry in entries:
        descriptor = parse_descriptor(entry, what)
        found = entry.get("platform")
        platform: Platform | None = None
        features: list[Any] = []
        if isinstance(found, dict):
            platform = Platform(
                str(found.get("os", "")), str(found.get("architecture", "")), str(found.get("variant") or "")
            )
            features = found.get("os.features") or []
        is_nydus = entry.get("artifactType") == NYDUS_ARTIFACT_TYPE or NYDUS_OS_FEATURE in features
        out.append(IndexEntry(descriptor, platform, is_nydus))
    return out


def choose_entry(entries: list[IndexEntry], wanted: Platform, what: str, *, nydus: bool) -> IndexEntry:
    """The index's entry for a platform, the one that runs best there. nydus: prefer a Nydus manifest (else: never take
    one)."""

    def rank(entry: IndexEntry) -> int | None:
        if entry.platform is None:
            return 0 if len(entries) == 1 else None
        return rank_platform(entry.platform, wanted)

    ranked = [(rank(entry), entry) for entry in entries if nydus or not entry.is_nydus]
    fitting = [(nydus and not entry.is_nydus, found, entry) for found, entry in ranked if found is not None]
    if not fitting:
        # Attestations have the platform unknown/unknown; no person wants to choose them.
        have = sorted({str(entry.platform) for entry in entries if entry.platform and entry.platform.os != "unknown"})
        raise Failure(
            f"{what}: no image for {wanted}; there are: {', '.join(have) or 'none'} (--platform)", Cause.MISSING
        )
    return min(fitting, key=lambda one: one[:2])[2]  # of equal ones the first
