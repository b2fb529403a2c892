"""What is read out of an address: the host for a message, the origin that a login belongs to. Light."""


def host_of(url: str) -> str:
    """host[:port] of a URL, for messages (a URL may carry a signature, so it is never shown whole)."""
    return url.partition("://")[2].partition("/")[0].partition("?")[0].rpartition("@")[2] or url[:40]


def path_of(url: str) -> str:
    return "/" + url.partition("://")[2].partition("/")[2].partition("?")[0]


def origin_of(url: str) -> str:
    """scheme://host:port, lower case, port always there: equal for two URLs that credentials may be shared by."""
    scheme = url.partition("://")[0].lower()
    host = host_of(url).lower()
    if host.rpartition(":")[2].isdecimal() and not host.endswith("]"):
        return f"{scheme}://{host}"
    return f"{scheme}://{host}:{443 if scheme == 'https' else 80}"
