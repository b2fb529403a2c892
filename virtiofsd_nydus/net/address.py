"""Addresses: the one place that says which server an http(s) address means.

An address that a server sent (a redirect, a token server) decides to which host a login goes. Two parsers may read one
crafted text as two hosts, so there is one: net.client connects to the host and port that parse_address() found, and
secrets go by the origin of the same Address. What is not plainly an address is refused. Light.
"""

from virtiofsd_nydus.errors import Cause, Failure

PORTS = {"http": 80, "https": 443}
HOST_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyz0123456789.-_")
IPV6_CHARACTERS = frozenset("0123456789abcdef:.%")
USER_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-._~%!$&'()*+,;=:")
# Kept as they are in path and query; all else is percent-encoded.
TARGET_SAFE = "%/?:@!$&'()*+,;=~-._"
ADDRESS_BYTES_MAX = 16 << 10


class Address:
    """scheme: http or https. host: in lower case, IPv6 in brackets. port: always there. target: path and query as they
    are sent. A login in the address is left out, as is a fragment."""

    __slots__ = ("host", "port", "scheme", "shown_port", "target")

    def __init__(self, scheme: str, host: str, port: int, target: str, shown_port: bool = False) -> None:
        self.scheme, self.host, self.port, self.target = scheme, host, port, target
        self.shown_port = shown_port  # the port stood in the address

    @property
    def netloc(self) -> str:
        """host, with :port where the address had one."""
        return f"{self.host}:{self.port}" if self.shown_port else self.host

    @property
    def origin(self) -> str:
        """scheme://host:port: equal for two addresses that a login may be shared by."""
        return f"{self.scheme}://{self.host}:{self.port}"

    @property
    def url(self) -> str:
        """The address anew, out of its parts."""
        return f"{self.scheme}://{self.netloc}{self.target}"


def parse_address(url: str) -> Address:
    """The parts of an absolute http(s) address. Raises Failure (FORMAT) for a text that is none."""
    scheme, separator, rest = url.partition("://")
    scheme = scheme.lower()
    if scheme not in PORTS or not separator or len(url) > ADDRESS_BYTES_MAX:
        raise Failure(f"not an http address: {show_address(url)}", Cause.FORMAT)
    end = min((at for at in (rest.find("/"), rest.find("?"), rest.find("#")) if at >= 0), default=len(rest))
    authority, target = rest[:end], rest[end:].partition("#")[0]
    user, at, place = authority.rpartition("@")
    host, port_text, right = _split_port(place.lower())
    if not right or (at and not USER_CHARACTERS.issuperset(user)) or any(c < " " or c == "\x7f" for c in target):
        raise Failure(f"not an http address: {show_address(url)}", Cause.FORMAT)
    port = int(port_text) if port_text else PORTS[scheme]
    if not target.startswith("/"):
        target = "/" + target
    if not target.isascii() or not set(target) <= SAFE_CHARACTERS:
        from urllib.parse import quote

        target = quote(target, safe=TARGET_SAFE)
    return Address(scheme, host, port, target, bool(port_text))


SAFE_CHARACTERS = USER_CHARACTERS | frozenset(TARGET_SAFE)


def _split_port(place: str) -> tuple[str, str, bool]:
    """host, port ("": none), and whether both are what they should be."""
    if place.startswith("["):
        host, bracket, rest = place[1:].partition("]")
        right = bool(bracket) and ":" in host and IPV6_CHARACTERS.issuperset(host.partition("%")[0])
        right = right and HOST_CHARACTERS.issuperset(host.partition("%")[2].replace("%", "", 1))
        host = f"[{host}]"
        colon, port = rest[:1], rest[1:]
        right = right and colon in ("", ":")
    else:
        host, colon, port = place.partition(":")
        right = bool(host) and HOST_CHARACTERS.issuperset(host)
    if colon and port:
        right = right and len(port) <= 5 and port.isascii() and port.isdecimal() and 0 < int(port) < 1 << 16
    return host, port, right


def host_of(url: str) -> str:
    """host[:port] of an address, for messages (it may carry a signature, so it is never shown whole)."""
    try:
        return parse_address(url).netloc
    except Failure:
        return show_address(url)


def show_address(url: str) -> str:
    """What may be shown of a text that should be an address: its first part, without a login, on one line."""
    text = url.partition("://")[2] or url
    return ascii(text.partition("/")[0].partition("?")[0].rpartition("@")[2][:60])


def path_of(url: str) -> str:
    """The path of an address, without its query."""
    return parse_address(url).target.partition("?")[0]


def origin_of(url: str) -> str:
    """scheme://host:port of an address."""
    return parse_address(url).origin
