"""Artifacts beside an image: manifests that name it as their subject (distribution specification 1.1, Listing
Referrers).

Indexes, profiles and signatures are kept so: the image itself is never touched. A store that does not list referrers by
itself (a registry without that API, an OCI layout) gets the specification's tag scheme: an index under the tag
sha256-HEX, which is written after the artifact.
"""

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from virtiofsd_nydus.errors import Cause, Failure
from virtiofsd_nydus.oci.manifest import (
    MEDIA_INDEX,
    MEDIA_MANIFEST,
    Descriptor,
    Manifest,
    digest_of,
    load_json,
    parse_descriptor,
    parse_manifest,
)
from virtiofsd_nydus.oci.store import ImageStore, read_document

MEDIA_EMPTY = "application/vnd.oci.empty.v1+json"
EMPTY = b"{}"
# The tag's index is read, changed and written: another writer may have done so between, then it is done again.
TAG_TRIES = 5


@dataclass(frozen=True)
class Referrer:
    """One artifact of a subject. descriptor: of its manifest."""

    descriptor: Descriptor
    artifact_type: str
    annotations: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ArtifactPart:
    """One blob of an artifact: bytes, or a file that holds them."""

    media_type: str
    data: "bytes | Path"
    annotations: dict[str, str] = field(default_factory=dict)

    def describe(self) -> Descriptor:
        from virtiofsd_nydus.oci.nydus_image import describe_file

        if isinstance(self.data, Path):
            return describe_file(self.data, self.media_type, self.annotations)
        return Descriptor(self.media_type, digest_of(self.data), len(self.data), self.annotations)


def referrers_tag(digest: str) -> str:
    """The tag that stands for a subject's referrers: sha256:HEX is sha256-HEX."""
    return digest.replace(":", "-")


def list_referrers(store: ImageStore, digest: str, artifact_type: str = "") -> list[Referrer]:
    """The artifacts of the manifest `digest`, of one type or of all, in the order that the store lists them. None is no
    failure."""
    found = store.get_referrers(digest)
    if found is None:
        found = _read_tag(store, digest)
    return [one for one in parse_referrers(found, store.name) if artifact_type in ("", one.artifact_type)]


def read_artifact(store: ImageStore, referrer: Referrer, subject: str) -> Manifest:
    """An artifact's manifest, checked to be the one that is listed, and to be about the subject."""
    what = f"{store.name}: {referrer.artifact_type or 'artifact'} {referrer.descriptor.digest[7:19]}"
    data, media_type = store.get_manifest(referrer.descriptor.digest)
    if digest_of(data) != referrer.descriptor.digest:
        raise Failure(f"{what}: its manifest is not the one that is listed: damaged or falsified", Cause.DIGEST)
    value = load_json(data, what)
    of = value.get("subject")
    if not isinstance(of, dict) or of.get("digest") != subject:
        raise Failure(f"{what}: it is about another image", Cause.DIGEST)
    return parse_manifest(data, Descriptor(media_type or MEDIA_MANIFEST, referrer.descriptor.digest, len(data)), what)


def read_part(store: ImageStore, descriptor: Descriptor, what: str) -> bytes:
    """A small blob of an artifact, whole and verified."""
    return read_document(store, descriptor, what)


def push_artifact(
    store: ImageStore,
    subject: Descriptor,
    artifact_type: str,
    parts: Sequence[ArtifactPart],
    annotations: dict[str, str] | None = None,
) -> str:
    """Stores an artifact and lists it with its subject; the digest of its manifest. The same artifact makes the same
    manifest. What the store has is not sent again."""
    layers = []
    for part in (ArtifactPart(MEDIA_EMPTY, EMPTY), *parts):
        descriptor = part.describe()
        put_part(store, descriptor, part.data)
        layers.append(descriptor)
    config, layers = layers[0], layers[1:] or layers
    of = Descriptor(subject.media_type or MEDIA_MANIFEST, subject.digest, subject.size)
    value: dict[str, Any] = {
        "schemaVersion": 2,
        "mediaType": MEDIA_MANIFEST,
        "artifactType": artifact_type,
        "config": config.to_json(),
        "layers": [layer.to_json() for layer in layers],
        "subject": of.to_json(),
    }
    if annotations:
        value["annotations"] = dict(sorted(annotations.items()))
    data = json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()
    if not store.put_manifest(data, MEDIA_MANIFEST, None):
        _add_to_tag(store, subject.digest, Descriptor(MEDIA_MANIFEST, digest_of(data), len(data)), value)
    return digest_of(data)


def put_part(store: ImageStore, descriptor: Descriptor, data: "bytes | Path") -> None:
    """Stores a blob that lies in memory or in a file, unless it is there."""
    if store.has_blob(descriptor):
        return
    if isinstance(data, Path):
        store.put_blob(descriptor, data)
        return
    with tempfile.NamedTemporaryFile(prefix="virtiofsd-nydus-") as file:
        file.write(data)
        file.flush()
        store.put_blob(descriptor, Path(file.name))


def parse_referrers(data: bytes, what: str) -> list[Referrer]:
    entries = load_json(data, f"{what}: list of referrers").get("manifests")
    if not isinstance(entries, list):
        raise Failure(f"{what}: the list of referrers has no manifests", Cause.FORMAT)
    found = []
    for entry in entries:
        descriptor = parse_descriptor(entry, what)
        found.append(Referrer(descriptor, str(entry.get("artifactType") or ""), descriptor.annotations))
    return found


def _read_tag(store: ImageStore, digest: str) -> bytes:
    try:
        return store.get_manifest(referrers_tag(digest))[0]
    except Failure as failure:
        if failure.cause is Cause.MISSING:
            return b'{"manifests":[]}'
        raise


def _add_to_tag(store: ImageStore, digest: str, descriptor: Descriptor, manifest: dict[str, Any]) -> None:
    entry = {**descriptor.to_json(), "artifactType": manifest["artifactType"]}
    if "annotations" in manifest:
        entry["annotations"] = manifest["annotations"]
    for _ in range(TAG_TRIES):
        listed = load_json(_read_tag(store, digest), f"{store.name}: list of referrers").get("manifests") or []
        if any(isinstance(one, dict) and one.get("digest") == descriptor.digest for one in listed):
            return
        index = {"schemaVersion": 2, "mediaType": MEDIA_INDEX, "manifests": [*listed, entry]}
        store.put_manifest(json.dumps(index, separators=(",", ":")).encode(), MEDIA_INDEX, referrers_tag(digest))
    listed = load_json(_read_tag(store, digest), store.name).get("manifests") or []
    if not any(isinstance(one, dict) and one.get("digest") == descriptor.digest for one in listed):
        raise Failure(f"{store.name}: others change the list of referrers all the time: try again", Cause.IO)
