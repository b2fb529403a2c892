"""containerd's hosts.toml: where a registry's images are had, in which order, and whom to believe there.

DIR/HOST/hosts.toml, with HOST as HOST_PORT_ or HOST:PORT, else DIR/_default/hosts.toml (containerd's config_path).
Keys: `server`, and of each host `capabilities`, `ca`, `skip_verify`, `header`, `override_path`. `client` (certificates
of the client) and `dial_timeout` are named in a warning. Light: tomllib is loaded when there is a file."""

import os

from virtiofsd_nydus.errors import UsageFailure
from virtiofsd_nydus.net.address import parse_address

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

FILE_BYTES_MAX = 1 << 20
KNOWN = frozenset(("capabilities", "ca", "skip_verify", "header", "override_path"))


class Host:
    """One server of a registry's images. prefix: the path that stands for /v2. pull, resolve: whether blobs, and what
    tags name, may be asked of it. own: it is the registry itself (`server`)."""

    __slots__ = ("ca_cert_files", "headers", "host", "own", "prefix", "pull", "resolve", "scheme", "skip_verify")

    def __init__(self, url: str, where: str, *, own: bool = False) -> None:
        text = url if "://" in url else f"https://{url}"
        try:
            address = parse_address(text)
        except Exception:
            raise UsageFailure(f"{where}: {url[:80]!r} is no address of a server") from None
        self.scheme, self.host = address.scheme, address.netloc
        self.prefix = address.target.partition("?")[0].strip("/")
        self.headers: dict[str, str] = {}
        self.ca_cert_files: tuple[str, ...] = ()
        self.skip_verify = False
        self.pull = self.resolve = True
        self.own = own


def find_hosts(directory: str, host: str, say: "Callable[[str], None] | None" = None) -> list[Host]:
    """The servers of a registry, in the order they are asked; the registry itself last. Empty: no file speaks of it.
    say: gets a line that names what has no effect. Raises UsageFailure for a file that cannot be."""
    name, _, port = host.rpartition(":")
    names = [host, *([f"{name}_{port}_"] if name and port.isdigit() else []), "_default"]
    for one in names:
        path = os.path.join(directory, one, "hosts.toml")  # noqa: PTH118
        try:
            with open(path, "rb") as file:
                return _parse(file.read(FILE_BYTES_MAX), path, host, say)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise UsageFailure(f"cannot read {path}: {error.strerror}") from None
    return []


def _parse(data: bytes, path: str, host: str, say: "Callable[[str], None] | None") -> list[Host]:
    import tomllib

    try:
        document = tomllib.loads(data.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UsageFailure(f"{path}: not TOML: {str(error)[:80]}") from None
    found = []
    unknown: set[str] = set()
    hosts = document.get("host") or {}
    if not isinstance(hosts, dict):
        raise UsageFailure(f"{path}: host must be tables")
    for url, table in hosts.items():
        if not isinstance(table, dict):
            raise UsageFailure(f"{path}: host {url[:80]!r} must be a table")
        unknown |= set(table) - KNOWN
        found.append(_read_host(url, table, path))
    server = document.get("server")
    if server is not None and not isinstance(server, str):
        raise UsageFailure(f"{path}: server must be a string")
    own = Host(server or f"https://{host}", path, own=True)
    own.prefix = own.prefix or "v2"
    for key in ("ca", "skip_verify", "header"):
        if key in document:
            _set(own, key, document[key], path)
    unknown |= set(document) - {"host", "server", *KNOWN}
    if unknown and say is not None:
        say(f"{path}: keys without effect: {', '.join(sorted(unknown))}")
    return [*found, own]


def _read_host(url: str, table: "dict[str, Any]", path: str) -> Host:
    host = Host(url, path)
    for key, value in table.items():
        if key in KNOWN:
            _set(host, key, value, path)
    # Without override_path the API is below /v2 of what is named.
    if table.get("override_path") is not True and host.prefix.rpartition("/")[2] != "v2":
        host.prefix = f"{host.prefix}/v2" if host.prefix else "v2"
    return host


def _set(host: Host, key: str, value: "Any", path: str) -> None:
    where = f"{path}: {key} of {host.host}"
    if key == "capabilities":
        if not isinstance(value, list):
            raise UsageFailure(f"{where} must be a list")
        host.pull, host.resolve = "pull" in value, "resolve" in value
    elif key == "ca":
        files = value if isinstance(value, list) else [value]
        if not all(isinstance(file, str) for file in files):
            raise UsageFailure(f"{where} must be names of files")
        folder = os.path.dirname(path)  # noqa: PTH120
        host.ca_cert_files = tuple(os.path.join(folder, file) for file in files)  # noqa: PTH118
    elif key == "skip_verify":
        host.skip_verify = value is True
    elif key == "header":
        if not isinstance(value, dict):
            raise UsageFailure(f"{where} must be a table")
        for name, text in value.items():
            parts = text if isinstance(text, list) else [text]
            if not all(isinstance(part, str) for part in parts):
                raise UsageFailure(f"{where}: {name} must be strings")
            host.headers[str(name)] = ", ".join(parts)
