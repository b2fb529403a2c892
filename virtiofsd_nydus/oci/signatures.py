"""Signatures of images by a key, as cosign makes them: a small document that names the manifest's digest, and its
signature beside it, under the tag sha256-HEX.sig or as a referrer of the manifest.

The keys' work is done by `cryptography`, which is loaded when it is needed and asked for where it is missing
(`pip install virtiofsd-nydus[trust]`).
"""

import binascii
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from virtiofsd_nydus.errors import Cause, Failure, UsageFailure
from virtiofsd_nydus.net.documents import parse_json
from virtiofsd_nydus.oci.manifest import (
    MEDIA_CONFIG,
    MEDIA_MANIFEST,
    Descriptor,
    Manifest,
    digest_of,
    parse_manifest,
)
from virtiofsd_nydus.oci.referrers import (
    ArtifactPart,
    list_referrers,
    push_artifact,
    put_part,
    read_artifact,
    read_part,
)
from virtiofsd_nydus.oci.store import ImageStore

# cosign's names
MEDIA_PAYLOAD = "application/vnd.dev.cosign.simplesigning.v1+json"
SIGNATURE_TYPE = "application/vnd.dev.cosign.artifact.sig.v1+json"
ANNOTATION_SIGNATURE = "dev.cosignproject.cosign/signature"
PAYLOAD_KIND = "cosign container image signature"
KEY_BYTES_MAX = 64 << 10
# Signatures of one image that are looked at: a repository that is open to all could hold any number.
SIGNATURES_MAX = 100


@dataclass(frozen=True)
class Key:
    """A public key, ready to verify. name: the file that holds it."""

    name: str
    key: Any

    def verify(self, signature: bytes, data: bytes) -> bool:
        """Whether this key made the signature. ECDSA with SHA-256, Ed25519, or RSA (PKCS #1 v1.5, SHA-256), as cosign
        has them."""
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives import hashes
        from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding

        try:
            if isinstance(self.key, ec.EllipticCurvePublicKey):
                self.key.verify(signature, data, ec.ECDSA(hashes.SHA256()))
            elif isinstance(self.key, ed25519.Ed25519PublicKey):
                self.key.verify(signature, data)
            else:
                self.key.verify(signature, data, padding.PKCS1v15(), hashes.SHA256())
        except InvalidSignature:
            return False
        return True


@dataclass(frozen=True)
class Signed:
    """A signature that was found right: of which digest, by which key, and where it lay."""

    digest: str
    key: str
    place: str
    reference: str  # what the signer called the image


def load_key(path: Path) -> Key:
    """A public key in PEM. Raises UsageFailure."""
    return make_key(str(path), _read_key(path))


def make_key(name: str, pem: bytes) -> Key:
    serialization = _load_library().serialization
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

    try:
        key = serialization.load_pem_public_key(pem)
    except (ValueError, TypeError) as error:
        raise UsageFailure(f"{name}: not a public key in PEM: {_first_words(error)}") from None
    if not isinstance(key, ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey | rsa.RSAPublicKey):
        raise UsageFailure(f"{name}: keys of this kind are not used: ECDSA, Ed25519 and RSA are")
    return Key(name, key)


def sign(key_file: Path, data: bytes) -> bytes:
    """The signature of data by a private key in PEM (PKCS #8, without a password). Raises UsageFailure."""
    serialization = _load_library().serialization
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa

    pem = _read_key(key_file)
    if b"COSIGN PRIVATE KEY" in pem or b"SIGSTORE PRIVATE KEY" in pem:
        raise UsageFailure(
            f"{key_file}: encrypted in cosign's own way: give a PEM key without a password (openssl genpkey)"
        )
    try:
        key = serialization.load_pem_private_key(pem, None)
    except (ValueError, TypeError) as error:
        raise UsageFailure(f"{key_file}: not a private key in PEM without a password: {_first_words(error)}") from None
    if isinstance(key, ec.EllipticCurvePrivateKey):
        return bytes(key.sign(data, ec.ECDSA(hashes.SHA256())))
    if isinstance(key, ed25519.Ed25519PrivateKey):
        return bytes(key.sign(data))
    if isinstance(key, rsa.RSAPrivateKey):
        return bytes(key.sign(data, padding.PKCS1v15(), hashes.SHA256()))
    raise UsageFailure(f"{key_file}: keys of this kind are not used: ECDSA, Ed25519 and RSA are")


def _load_library() -> Any:
    try:
        from cryptography.hazmat import primitives
        from cryptography.hazmat.primitives import serialization

        assert serialization
    except ImportError:
        raise UsageFailure(
            "signatures need the Python package `cryptography`: pip install 'virtiofsd-nydus[trust]'"
        ) from None
    return primitives


def _read_key(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(KEY_BYTES_MAX)
    except OSError as error:
        raise UsageFailure(f"cannot read the key {path}: {error.strerror}") from None


def _first_words(error: Exception) -> str:
    return str(error).partition("\n")[0][:100]


# ---- what is signed


def make_payload(digest: str, reference: str) -> bytes:
    """The document that is signed. reference: what the image is called, without tag or digest."""
    value = {
        "critical": {
            "identity": {"docker-reference": reference},
            "image": {"docker-manifest-digest": digest},
            "type": PAYLOAD_KIND,
        },
        "optional": None,
    }
    return json.dumps(value, separators=(",", ":")).encode()


def parse_payload(data: bytes) -> tuple[str, str]:
    """Digest and reference that a signed document names; ("", "") where it is none."""
    try:
        critical = parse_json(data)["critical"]
        if critical["type"] != PAYLOAD_KIND:
            return "", ""
        return str(critical["image"]["docker-manifest-digest"]), str(critical["identity"]["docker-reference"])
    except (ValueError, KeyError, TypeError):
        return "", ""


# ---- where signatures lie


def signature_tag(digest: str) -> str:
    return digest.replace(":", "-") + ".sig"


def sign_manifest(store: ImageStore, subject: Descriptor, reference: str, key_file: Path) -> None:
    """Signs a manifest that the store has: the signature goes under its tag, beside those that are there, and is a
    referrer of the manifest too."""
    payload = make_payload(subject.digest, reference)
    signature = binascii.b2a_base64(sign(key_file, payload), newline=False).decode()
    part = ArtifactPart(MEDIA_PAYLOAD, payload, {ANNOTATION_SIGNATURE: signature})
    put_part(store, part.describe(), payload)
    tagged = _read_tag(store, subject.digest)
    layers = [*(tagged.layers if tagged is not None else ()), part.describe()]
    config = json.dumps(
        {
            "architecture": "",
            "created": "0001-01-01T00:00:00Z",
            "os": "",
            "rootfs": {"type": "layers", "diff_ids": [layer.digest for layer in layers]},
            "config": {},
        },
        separators=(",", ":"),
    ).encode()
    described = Descriptor(MEDIA_CONFIG, digest_of(config), len(config))
    put_part(store, described, config)
    value = {
        "schemaVersion": 2,
        "mediaType": MEDIA_MANIFEST,
        "config": described.to_json(),
        "layers": [layer.to_json() for layer in layers],
    }
    store.put_manifest(json.dumps(value, separators=(",", ":")).encode(), MEDIA_MANIFEST, signature_tag(subject.digest))
    push_artifact(store, subject, SIGNATURE_TYPE, [part])


def find_signature(store: ImageStore, digests: Sequence[str], keys: Sequence[Key]) -> tuple[Signed | None, str]:
    """The first signature by one of the keys of one of the digests, and, where there is none, what was found instead.
    digests: of the manifests that lead to the image; a signature of any of them vouches for it."""
    looked, wrong = 0, ""
    for digest in digests:
        for descriptor, place in _list_signatures(store, digest):
            looked += 1
            if looked > SIGNATURES_MAX:
                return None, f"none of the first {SIGNATURES_MAX} signatures is right"
            found, why = _check(store, descriptor, place, digest, keys)
            if found is not None:
                return found, ""
            wrong = wrong or why
    return None, wrong or "it has no signature"


def _check(
    store: ImageStore, descriptor: Descriptor, place: str, digest: str, keys: Sequence[Key]
) -> tuple[Signed | None, str]:
    what = f"{store.name}: signature in {place}"
    try:
        payload = read_part(store, descriptor, what)
        signature = binascii.a2b_base64(descriptor.annotations.get(ANNOTATION_SIGNATURE, ""), strict_mode=True)
    except (ValueError, Failure) as error:
        if isinstance(error, Failure) and error.cause not in (Cause.DIGEST, Cause.FORMAT, Cause.MISSING):
            raise
        return None, f"the signature in {place} cannot be read: {error}"
    key = next((one for one in keys if one.verify(signature, payload)), None)
    if key is None:
        return None, f"the signature in {place} is not by {' or '.join(one.name for one in keys)}"
    named, reference = parse_payload(payload)
    if named != digest:
        return None, f"the signature in {place} is of another image ({named[:19] or 'none'})"
    return Signed(digest, key.name, place, reference), ""


def _list_signatures(store: ImageStore, digest: str) -> Iterator[tuple[Descriptor, str]]:
    """The signed documents of a manifest: by the tag, then by referrers."""
    tagged = _read_tag(store, digest)
    for layer in tagged.layers if tagged is not None else ():
        if layer.media_type == MEDIA_PAYLOAD:
            yield layer, f"tag {signature_tag(digest)[:19]}...sig"
    for referrer in list_referrers(store, digest, SIGNATURE_TYPE):
        try:
            layers = read_artifact(store, referrer, digest).layers
        except Failure as failure:
            if failure.cause not in (Cause.DIGEST, Cause.FORMAT, Cause.MISSING):
                raise
            continue  # who may push to the repository could list it
        for layer in layers:
            if layer.media_type == MEDIA_PAYLOAD:
                yield layer, f"referrer {referrer.descriptor.digest[7:19]}"


def _read_tag(store: ImageStore, digest: str) -> Manifest | None:
    try:
        data, media_type = store.get_manifest(signature_tag(digest))
    except Failure as failure:
        if failure.cause is Cause.MISSING:
            return None
        raise
    return parse_manifest(data, Descriptor(media_type, digest_of(data), len(data)), f"{store.name}: signatures")
