"""Image references: `docker://HOST[:PORT]/NAME[:TAG|@DIGEST]`, `oci:DIR[:TAG]`, `docker-archive:FILE[:NAME[:TAG]]`,
`oci-archive:FILE[:TAG]`. FILE may be `-`, standard input."""

import ipaddress
import re
from dataclasses import dataclass, field
from pathlib import Path

from virtiofsd_nydus.errors import UsageFailure

DOCKER = "docker"
OCI = "oci"
DOCKER_ARCHIVE = "docker-archive"
OCI_ARCHIVE = "oci-archive"
ARCHIVES = (DOCKER_ARCHIVE, OCI_ARCHIVE)
STDIN = Path("-")

GRAMMAR = (
    "docker://HOST[:PORT]/NAME[:TAG|@DIGEST], oci:DIR[:TAG], docker-archive:FILE[:NAME[:TAG]] or oci-archive:FILE[:TAG]"
)

# The distribution specification's names; at most 255 bytes with the host.
COMPONENT = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
NAME = re.compile(rf"{COMPONENT}(?:/{COMPONENT})*")
TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
HOST = re.compile(r"(?:[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?")


@dataclass(frozen=True)
class Reference:
    """transport: DOCKER (host, repo, tag or digest), OCI and OCI_ARCHIVE (path, tag), DOCKER_ARCHIVE (path, tag:
    NAME[:TAG] of one of its images)."""

    transport: str
    host: str = ""
    repo: str = ""
    path: Path = field(default_factory=Path)
    tag: str = ""
    digest: str = ""

    def __str__(self) -> str:
        if self.transport == DOCKER:
            return f"docker://{self.host}/{self.repo}" + (f"@{self.digest}" if self.digest else f":{self.tag}")
        return f"{self.transport}:{self.path}" + (f":{self.tag}" if self.tag else "")

    @property
    def name(self) -> str:
        """The image without tag and digest, as signers call it."""
        return f"{self.host}/{self.repo}" if self.transport == DOCKER else str(self.path)

    @property
    def version(self) -> str:
        """Tag or digest, whichever the reference has ("" for a layout's only image)."""
        return self.digest or self.tag

    @property
    def api_host(self) -> str:
        """Where the registry's API is (Docker Hub's is not at its name)."""
        return "registry-1.docker.io" if self.host in ("docker.io", "index.docker.io") else self.host


def parse_reference(text: str) -> Reference:
    """Raises UsageFailure with the grammar for what is none."""
    if text.startswith("docker://"):
        return _parse_docker(text)
    transport, colon, rest = text.partition(":")
    if colon and rest and transport in ARCHIVES:
        # A file may have colons in its name: the longest part that is there is the file.
        ends = [at for at in range(len(rest), 0, -1) if rest[at : at + 1] in ("", ":")]
        end = next((at for at in ends if Path(rest[:at]).exists() or rest[:at] == str(STDIN)), len(rest))
        return Reference(transport, path=Path(rest[:end]), tag=rest[end + 1 :])
    if colon and rest and transport == OCI:
        folder, last_colon, tag = rest.rpartition(":")
        # A directory may have a colon in its name; one that is there wins.
        if last_colon and folder and TAG.fullmatch(tag) and not Path(rest).is_dir():
            return Reference(OCI, path=Path(folder), tag=tag)
        return Reference(OCI, path=Path(rest))
    raise UsageFailure(f"{text!r} is no image reference: expected {GRAMMAR}")


def is_loopback(host: str) -> bool:
    """Whether host[:port] is this machine by its name: such registries speak plain HTTP by default."""
    name = host.rpartition(":")[0] if re.search(r":[0-9]+$", host) and not host.endswith("]") else host
    if name.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(name.strip("[]")).is_loopback
    except ValueError:
        return False


def default_scheme(host: str, plain_http: bool = False) -> str:
    return "http" if plain_http or is_loopback(host) else "https"


def _parse_docker(text: str) -> Reference:
    rest = text.removeprefix("docker://")
    rest, at, digest = rest.partition("@")
    host, slash, name = rest.partition("/")
    name, colon, tag = name.partition(":")
    if at and not DIGEST.fullmatch(digest):
        raise UsageFailure(f"{text!r}: {digest[:80]!r} is no digest: expected sha256: and 64 hexadecimal digits")
    if colon and not TAG.fullmatch(tag):
        raise UsageFailure(f"{text!r}: {tag[:80]!r} is no tag")
    if not slash or not HOST.fullmatch(host):
        raise UsageFailure(f"{text!r}: a registry's host and a name are needed: docker://HOST[:PORT]/NAME[:TAG]")
    if not NAME.fullmatch(name) or len(host) + len(name) > 255:
        raise UsageFailure(f"{text!r}: {name[:80]!r} is no image name (lower case, parts between /)")
    return Reference(DOCKER, host=host, repo=name, tag="" if digest else tag or "latest", digest=digest)
