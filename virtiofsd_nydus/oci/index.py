"""What a node learned of a plain image, as an artifact beside the image, so that other nodes need not read the layers.

The artifact has one layer, a tar with the image's bootstrap, the gzip layers' tables of contexts, the places of frames,
and how each layer is read. Its bootstrap vouches for every byte that is served. So it must come from who is believed:
where a key is asked for, by the same key; of an image that is named by a digest and no key, it is not used at all; of a
tag without a key, the registry's word is what there is anyway. A Nydus image that was put beside the OCI image as its
referrer (a zran reference) is used under the same rule.
"""

import gzip
import io
import json
import re
import tarfile
from hashlib import sha256
from typing import Any

from virtiofsd_nydus.errors import Cause, Failure
from virtiofsd_nydus.net.documents import parse_json
from virtiofsd_nydus.oci.manifest import MEDIA_LAYER_GZIP, NYDUS_ARTIFACT_TYPE, Descriptor, Manifest
from virtiofsd_nydus.oci.policy import Trust
from virtiofsd_nydus.oci.referrers import ArtifactPart, Referrer, list_referrers, push_artifact, read_artifact
from virtiofsd_nydus.oci.shelf import Shelf
from virtiofsd_nydus.oci.signatures import find_signature
from virtiofsd_nydus.oci.store import ImageStore, VerifiedReader

INDEX_TYPE = "application/vnd.virtiofsd-nydus.index.v1"
BOOTSTRAP, LAYERS = "image/image.boot", "image/layers.json"
BESIDE = re.compile(r"image/([0-9a-f]{64}\.(?:blob\.meta|frames))")
CHUNKS = "dev.virtiofsd-nydus.chunk-size"
MEMBER_BYTES_MAX = 1 << 30
READ_MAX = 20  # referrers that are looked into
LAYER_KEYS = {"kind", "size", "at", "chunk_size", "virtual", "frames"}


def push_index(store: ImageStore, manifest: Manifest, shelf: Shelf, key: str) -> Descriptor:
    """Puts what the shelf's KEY says of an image beside it; the artifact's descriptor. Raises Failure."""
    record = parse_json(shelf.path(f"{key}.json").read_bytes())
    folder = shelf.path(f"{int(record['chunk_size']) >> 10}k")
    out = io.BytesIO()
    with (
        gzip.GzipFile(filename="", mode="wb", fileobj=out, mtime=0, compresslevel=6) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.USTAR_FORMAT) as archive,
    ):
        names = {BOOTSTRAP: f"{key}.boot", LAYERS: f"{key}.layers"}
        names.update({f"image/{name}": str(name) for name in sorted(record["files"])})
        for name, file in names.items():
            data = (folder / file).read_bytes()
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(data), 0o444
            archive.addfile(member, io.BytesIO(data))
    part = ArtifactPart(MEDIA_LAYER_GZIP, out.getvalue(), {CHUNKS: str(record["chunk_size"])})
    digest = push_artifact(store, manifest.descriptor, INDEX_TYPE, [part])
    data, media_type = store.get_manifest(digest)
    return Descriptor(media_type, digest, len(data))


def find_indexes(
    store: ImageStore, manifest: Manifest, trust: Trust | None, *, pinned: bool
) -> "tuple[list[tuple[Referrer, Manifest]], str]":
    """The indexes of an image that may be used, best first, and why others may not. pinned: it was named by a
    digest."""
    found: list[tuple[Referrer, Manifest]] = []
    why = ""
    subject = manifest.descriptor.digest
    listed = list_referrers(store, subject)
    wanted = [one for one in listed if one.artifact_type == INDEX_TYPE]
    wanted += [one for one in listed if one.artifact_type in (NYDUS_ARTIFACT_TYPE, "")]
    for referrer in wanted[:READ_MAX]:
        try:
            described = read_artifact(store, referrer, subject)
        except Failure as failure:
            if failure.cause not in (Cause.DIGEST, Cause.FORMAT, Cause.MISSING):
                raise
            why = why or f"index {referrer.descriptor.digest[7:19]}: {failure}"
            continue
        if referrer.artifact_type != INDEX_TYPE and described.bootstrap_layer is None:
            continue
        refusal = _refuse(store, referrer, trust, pinned)
        if refusal:
            why = why or f"index {referrer.descriptor.digest[7:19]} is not used: {refusal}"
        else:
            found.append((referrer, described))
    return found, why


def _refuse(store: ImageStore, referrer: Referrer, trust: Trust | None, pinned: bool) -> str:
    if trust is not None and trust.asks_for_a_key:
        for one in trust.requirements:
            if one.keys is not None:
                signed, why = find_signature(store, [referrer.descriptor.digest], one.keys)
                if signed is None:
                    return f"signature: {why}"
        return ""
    if pinned:
        return "the image is named by its digest, and nothing binds the index to it: give --verify-key for both"
    return ""


def pull_index(store: ImageStore, artifact: Manifest, shelf: Shelf, key: str, layers: dict[str, int]) -> int:
    """Puts the files of an artifact where a start looks for them; the bytes that were fetched. layers: hex and size of
    the image's. Raises Failure: DIGEST for one that is not what its manifest says, FORMAT for one that cannot be
    used."""
    what = f"{store.name}: index"
    if len(artifact.layers) != 1:
        raise Failure(f"{what}: it has {len(artifact.layers)} parts, one is wanted", Cause.FORMAT)
    layer = artifact.layers[0]
    members = _read_members(VerifiedReader(store.read_blob(layer), layer, what), what)
    try:
        chunk_size = int(layer.annotations[CHUNKS])
        described = parse_json(members[LAYERS])["layers"]
        checked = {name: _check_layer(name, value, layers, members) for name, value in described.items()}
        bootstrap = members[BOOTSTRAP]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Failure(f"{what}: it is malformed: {str(error)[:100]}", Cause.FORMAT) from error
    folder = Shelf(shelf.path(f"{chunk_size >> 10}k"))
    folder.directory.mkdir(parents=True, exist_ok=True)
    files = []
    for name, data in members.items():
        beside = BESIDE.fullmatch(name)
        if beside is not None:
            files.append(beside[1])
            folder.write(beside[1], [data])
    text = json.dumps({"version": 1, "layers": checked}).encode()
    record = {
        "image": store.name,
        "layers": f"sha256:{sha256(text).hexdigest()}",
        "bootstrap": f"sha256:{sha256(bootstrap).hexdigest()}",
        "chunk_size": chunk_size,
        "files": files,
    }
    folder.write(f"{key}.layers", [text])
    folder.write(f"{key}.boot", [bootstrap])
    shelf.write(f"{key}.json", [json.dumps(record).encode()])
    return layer.size


def _read_members(reader: VerifiedReader, what: str) -> dict[str, bytes]:
    import zlib

    members: dict[str, bytes] = {}
    try:
        with tarfile.open(fileobj=reader, mode="r|gz") as archive:
            for member in archive:
                name = member.name
                if not member.isreg() or not (name in (BOOTSTRAP, LAYERS) or BESIDE.fullmatch(name)):
                    continue
                if member.size > MEMBER_BYTES_MAX:
                    raise Failure(f"{what}: {name} of {member.size} bytes is refused", Cause.FORMAT)
                source = archive.extractfile(member)
                assert source is not None
                members[name] = source.read()
    except (tarfile.TarError, EOFError, OSError, ValueError, zlib.error) as error:
        reader.finish()  # damage on the way shows here first
        raise Failure(f"{what}: not a tar: {error}", Cause.FORMAT) from error
    reader.finish()
    return members


def _check_layer(name: str, value: dict[str, Any], layers: dict[str, int], members: dict[str, bytes]) -> dict[str, Any]:
    """One layer as an index tells it: of this image, with numbers that can be."""
    frames = value.get("frames", "")
    numbers = [value["size"], value["chunk_size"], value["virtual"]]
    ok = (
        layers.get(name) == value["size"]
        and set(value) <= LAYER_KEYS
        and value["kind"] in ("zran", "placed", "stored", "table")
        and value["at"] == 0
        and all(isinstance(one, int) and not isinstance(one, bool) and 0 <= one < 1 << 44 for one in numbers)
        and (not frames or f"image/{frames}" in members)
        and (value["kind"] != "table" or bool(frames) or not value["virtual"])
    )
    if not ok:
        raise ValueError(f"what it says of layer {name[:12]} cannot be")
    return value
