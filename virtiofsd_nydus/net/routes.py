"""The proxies that the environment names: HTTP_PROXY, HTTPS_PROXY and NO_PROXY, read as Go's programs read them.

Light.
"""

import os

from virtiofsd_nydus.errors import Cause, Failure
from virtiofsd_nydus.net.address import Address, parse_address, show_address

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping


class Routes:
    """By which proxy a server is reached. Immutable."""

    def __init__(self, http: str = "", https: str = "", no_proxy: str = "") -> None:
        """http, https: proxies for addresses of that scheme, [http://][USER:PASSWORD@]HOST:PORT, "": none. no_proxy:
        servers that are asked directly, as in NO_PROXY: names with all below them, .name for those below alone,
        addresses, networks, * for all, each with :PORT if only that one is meant. This machine is always among them."""
        self._by_scheme = {"http": http, "https": https}
        self._direct = [entry.strip().lower() for entry in no_proxy.split(",") if entry.strip()]

    @classmethod
    def read_environment(cls, environment: "Mapping[str, str] | None" = None) -> "Routes":
        found = os.environ if environment is None else environment

        def get(name: str) -> str:
            return found.get(name) or found.get(name.lower()) or ""

        return cls(get("HTTP_PROXY"), get("HTTPS_PROXY"), get("NO_PROXY"))

    def choose(self, address: Address) -> str:
        """The proxy's address, http(s)://[USER:PASSWORD@]HOST:PORT; "": the server is asked directly. Raises Failure
        for a proxy that cannot be."""
        proxy = self._by_scheme[address.scheme]
        if not proxy or self._is_direct(address.host.strip("[]"), address.port):
            return ""
        if "://" not in proxy:
            proxy = f"http://{proxy}"
        if not proxy.startswith(("http://", "https://")):
            raise Failure(
                f"{address.scheme.upper()}_PROXY names {show_address(proxy)}: a proxy's address begins with http:// or "
                "https://",
                Cause.NETWORK,
            )
        parse_address(proxy)
        return proxy.rstrip("/")

    def _is_direct(self, host: str, port: int) -> bool:
        import ipaddress

        try:
            ip: ipaddress.IPv4Address | ipaddress.IPv6Address | None = ipaddress.ip_address(host)
        except ValueError:
            ip = None
        if host == "localhost" or (ip is not None and ip.is_loopback):
            return True
        return any(_matches(entry, host, port, ip) for entry in self._direct)


def _matches(entry: str, host: str, port: int, ip: object) -> bool:
    """Whether one entry of NO_PROXY means the server."""
    import ipaddress

    if entry == "*":
        return True
    if ip is not None and "/" in entry:
        try:
            return ip in ipaddress.ip_network(entry, strict=False)
        except ValueError:
            return False
    name, colon, wanted_port = entry.rpartition(":")
    if colon and wanted_port.isdecimal() and (name.count(":") == 0 or name.endswith("]")):
        if wanted_port != str(port):
            return False
    else:
        name = entry
    name = name.strip("[]")
    if name.startswith("*."):
        name = name[1:]
    if name.startswith("."):
        return host.endswith(name)
    return host == name or (ip is None and host.endswith("." + name))
