"""Which images may be used: those that a key signed, those of a repository that asks for no key, none.

The file is containers-policy.json(5)'s: "default", and "transports" with scopes HOST[/NAME[:TAG]] and *.HOST. Of its
kinds of requirement these are known: insecureAcceptAnything, reject, sigstoreSigned (keyPath, keyPaths, keyData,
keyDatas). All requirements of a scope have to be met. A kind that is not known refuses.
"""

import binascii
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from virtiofsd_nydus.errors import Cause, Failure, UsageFailure
from virtiofsd_nydus.net.documents import parse_json
from virtiofsd_nydus.oci.reference import DOCKER, Reference
from virtiofsd_nydus.oci.signatures import Key, Signed, find_signature, load_key, make_key
from virtiofsd_nydus.oci.store import ImageStore

POLICY_BYTES_MAX = 4 << 20


@dataclass(frozen=True)
class Requirement:
    """keys: one of them must have signed. None: nothing is asked for. refusal: why no image will do. repository: what
    the signer must have called the image, "": anything."""

    keys: tuple[Key, ...] | None = None
    refusal: str = ""
    repository: str = ""


@dataclass(frozen=True)
class Trust:
    """What is asked of an image before it is used. requirements: all of them."""

    requirements: tuple[Requirement, ...] = ()
    named_by: str = ""  # what asks: an option, or a policy file and the scope in it
    keys: tuple[Key, ...] = field(default=())

    @property
    def asks_for_a_key(self) -> bool:
        return any(one.keys is not None or one.refusal for one in self.requirements)


def choose_trust(reference: Reference, verify_keys: Sequence[Path] = (), policy: Path | None = None) -> Trust:
    """What --verify-key and --policy ask of this image. Both may be given: then both have to be met."""
    requirements: list[Requirement] = []
    named: list[str] = []
    if verify_keys:
        requirements.append(Requirement(tuple(load_key(path) for path in verify_keys)))
        named.append("--verify-key")
    if policy is not None:
        scope, found = read_policy(policy, reference)
        requirements += found
        named.append(f"{policy}, {scope}")
    return Trust(tuple(requirements), " and ".join(named))


def require_trust(trust: Trust, store: ImageStore, digests: Sequence[str], what: str) -> list[Signed]:
    """The signatures that the requirements are met by. Raises Failure (AUTH: unsigned or not by the key)."""
    found = []
    for one in trust.requirements:
        if one.refusal:
            raise Failure(f"{what}: {one.refusal} ({trust.named_by})", Cause.AUTH)
        if one.keys is None:
            continue
        signed, why = find_signature(store, digests, one.keys)
        if signed is None:
            raise Failure(f"{what}: signature: {why}; a signature is asked for by {trust.named_by}", Cause.AUTH)
        if one.repository and signed.reference.partition("@")[0] != one.repository:
            raise Failure(
                f"{what}: signature: it was made for {signed.reference[:200]!r}, not for {one.repository} "
                f"({trust.named_by})",
                Cause.AUTH,
            )
        found.append(signed)
    return found


def read_policy(path: Path, reference: Reference) -> tuple[str, list[Requirement]]:
    """The scope of a policy file that an image falls under, and what it asks for. Raises UsageFailure."""
    try:
        with path.open("rb") as file:
            document = parse_json(file.read(POLICY_BYTES_MAX))
    except OSError as error:
        raise UsageFailure(f"cannot read the policy {path}: {error.strerror}") from None
    except ValueError:
        document = None
    if not isinstance(document, dict) or not isinstance(document.get("default"), list):
        raise UsageFailure(f"policy {path}: a JSON object with a list `default` is wanted (containers-policy.json(5))")
    transports = document.get("transports")
    scopes = transports.get(reference.transport) if isinstance(transports, dict) else None
    for scope in list_scopes(reference):
        if isinstance(scopes, dict) and scope in scopes:
            return f"scope {scope!r}", _parse(path, scope, scopes[scope], reference)
    return "default", _parse(path, "default", document["default"], reference)


def list_scopes(reference: Reference) -> list[str]:
    """The scopes that an image falls under, the narrowest first."""
    if reference.transport != DOCKER:
        place = str(reference.path.absolute())
        parents = [str(one) for one in reference.path.absolute().parents]
        return [*([f"{place}:{reference.tag}"] if reference.tag else []), place, *parents, ""]
    name = f"{reference.host}/{reference.repo}"
    scopes = [f"{name}@{reference.digest}" if reference.digest else f"{name}:{reference.tag}", name]
    while "/" in name:
        name = name.rpartition("/")[0]
        scopes.append(name)
    host = reference.host.partition(":")[0]
    while "." in host:
        host = host.partition(".")[2]
        scopes.append(f"*.{host}")
    return [*scopes, ""]


def _parse(path: Path, scope: str, listed: Any, reference: Reference) -> list[Requirement]:
    if not isinstance(listed, list) or not listed:
        raise UsageFailure(f"policy {path}, {scope!r}: a list of requirements is wanted, and not an empty one")
    return [_parse_one(path, scope, one, reference) for one in listed]


def _parse_one(path: Path, scope: str, value: Any, reference: Reference) -> Requirement:
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "insecureAcceptAnything":
        return Requirement()
    if kind == "reject":
        return Requirement(refusal="the policy refuses this image")
    if kind != "sigstoreSigned":
        return Requirement(refusal=f"the policy asks for {str(kind)[:40]!r}, which is not known here")
    where = f"policy {path}, {scope!r}"
    keys: list[Key] = []
    for name in ("keyPath", "keyPaths"):
        given = value.get(name)
        for file in given if isinstance(given, list) else [given] if given else []:
            keys.append(load_key(path.parent / str(file)))
    for name in ("keyData", "keyDatas"):
        given = value.get(name)
        for text in given if isinstance(given, list) else [given] if given else []:
            try:
                keys.append(make_key(f"{where}, {name}", binascii.a2b_base64(str(text), strict_mode=True)))
            except ValueError:
                raise UsageFailure(f"{where}: {name} is not base64") from None
    if not keys:
        raise UsageFailure(f"{where}: sigstoreSigned needs keyPath or keyData; keyless signatures are not known here")
    return Requirement(tuple(keys), repository=_parse_identity(where, value.get("signedIdentity"), reference))


def _parse_identity(where: str, value: Any, reference: Reference) -> str:
    if value is None:
        return ""
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "matchRepository" and reference.transport == DOCKER:
        return f"{reference.host}/{reference.repo}"
    if kind == "exactRepository" and isinstance(value.get("dockerRepository"), str):
        return str(value["dockerRepository"])
    raise UsageFailure(f"{where}: signedIdentity {str(kind)[:40]!r} is not known: matchRepository, exactRepository are")
