"""Connections that keep to their time limit from the first step on: names are looked up aside, within it, and kept.

urllib3 resolves by a blocking getaddrinfo that no timeout reaches. Heavy: imports urllib3; net.client loads it late.
"""

import socket
import ssl
import sys
import threading
import time
from typing import Any

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.exceptions import ConnectTimeoutError, NameResolutionError, NewConnectionError

from virtiofsd_nydus.net.deadline import cut_wait

# Registries move rarely; a short memory keeps a cold start from asking for the same name hundreds of times.
FOUND_FOR_S = 60.0
UNFOUND_FOR_S = 2.0
# A lookup without any time limit of its own
LOOKUP_LIMIT_S = 30.0

Address = tuple[int, int, int, str, Any]


class TimedSocket(socket.socket):
    """A socket whose waits for bytes end at the thread's deadline (net.deadline)."""

    def recv_into(self, buffer: Any, nbytes: int = 0, flags: int = 0) -> int:
        cut_wait(self)
        return super().recv_into(buffer, nbytes, flags)


class TimedTlsSocket(ssl.SSLSocket):
    """The same over TLS. (A handshake is one call, whose timeout is for all of it.)"""

    def recv_into(self, buffer: Any, nbytes: int | None = None, flags: int = 0) -> int:
        cut_wait(self)
        return super().recv_into(buffer, nbytes, flags)


class _Lookup:
    __slots__ = ("addresses", "done", "error", "good_until")

    def __init__(self) -> None:
        self.done = threading.Event()
        self.addresses: list[Address] = []
        self.error: OSError | None = None
        self.good_until = 0.0


class Resolver:
    """Names to addresses: one lookup a name at a time, in a thread that callers leave when their time is over."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lookups: dict[tuple[str, int], _Lookup] = {}

    def resolve(self, host: str, port: int, limit_s: float | None) -> list[Address]:
        """Raises gaierror for a name that is not there, TimeoutError when limit_s pass."""
        with self._lock:
            lookup = self._lookups.get((host, port))
            if lookup is None or (lookup.done.is_set() and lookup.good_until < time.monotonic()):
                lookup = self._lookups[host, port] = _Lookup()
                threading.Thread(target=self._look_up, args=(host, port, lookup), name="resolve", daemon=True).start()
        if not lookup.done.wait(LOOKUP_LIMIT_S if limit_s is None else limit_s):
            raise TimeoutError(f"the name {host} was not resolved in time")
        if lookup.error is not None:
            raise lookup.error
        return lookup.addresses

    def prefer(self, host: str, port: int, address: Address) -> None:
        """This address answered: it is tried first from now on."""
        with self._lock:
            lookup = self._lookups.get((host, port))
            if lookup is not None and address in lookup.addresses:
                lookup.addresses = [address, *(one for one in lookup.addresses if one != address)]

    def forget(self, host: str, port: int) -> None:
        """Forgets the name's addresses: none answered, the server may have moved."""
        with self._lock:
            lookup = self._lookups.get((host, port))
            if lookup is not None and lookup.done.is_set():
                del self._lookups[host, port]

    @staticmethod
    def _look_up(host: str, port: int, lookup: _Lookup) -> None:
        try:
            lookup.addresses = list(socket.getaddrinfo(host, port, 0, socket.SOCK_STREAM))
            lookup.good_until = time.monotonic() + FOUND_FOR_S
        except OSError as error:
            lookup.error = error
            lookup.good_until = time.monotonic() + UNFOUND_FOR_S
        except UnicodeError:  # a label that IDNA cannot have
            lookup.error = socket.gaierror(socket.EAI_NONAME, "no such name")
            lookup.good_until = time.monotonic() + UNFOUND_FOR_S
        lookup.done.set()


def _open(connection: Any, resolver: Resolver) -> socket.socket:
    """A connected socket within connection.timeout, all addresses together, or one of urllib3's exceptions."""
    limit_s = connection.timeout if isinstance(connection.timeout, int | float) else None
    until = None if limit_s is None else time.monotonic() + limit_s
    host = connection._dns_host.strip("[]")
    too_late = ConnectTimeoutError(connection, f"Connection to {connection.host} timed out.")
    try:
        addresses = resolver.resolve(host, connection.port, limit_s)
    except TimeoutError as error:
        raise too_late from error
    except OSError as error:
        reason = error if isinstance(error, socket.gaierror) else socket.gaierror(*error.args)
        raise NameResolutionError(connection.host, connection, reason) from error
    last: OSError | None = None
    for position, (family, kind, protocol, name, address) in enumerate(addresses):
        left = None if until is None else until - time.monotonic()
        if left is not None and left <= 0:
            resolver.forget(host, connection.port)
            raise too_late from last
        # An address that does not answer must leave time for the others.
        share = left if left is None or position == len(addresses) - 1 else left / 2
        sock = TimedSocket(family, kind, protocol)
        try:
            for option in connection.socket_options or ():
                sock.setsockopt(*option)
            sock.settimeout(share)
            sock.connect(address)
        except OSError as error:
            sock.close()
            last = error
            continue
        if position:
            resolver.prefer(host, connection.port, (family, kind, protocol, name, address))
        sys.audit("http.client.connect", connection, connection.host, connection.port)
        # What is left is for the TLS handshake.
        sock.settimeout(None if until is None else max(until - time.monotonic(), 0.001))
        return sock
    resolver.forget(host, connection.port)
    if isinstance(last, TimeoutError):
        raise too_late from last
    raise NewConnectionError(connection, f"Failed to establish a new connection: {last}") from last


def _begin_sending(connection: Any) -> None:
    """What the connection left of its time was the handshake's; each wait to send has all of it again."""
    if connection.sock is not None:
        connection.sock.settimeout(connection.timeout if isinstance(connection.timeout, int | float) else None)


def install(manager: urllib3.PoolManager, resolver: Resolver) -> urllib3.PoolManager:
    """Makes the manager's connections look names up in resolver."""

    class Connection(HTTPConnection):
        def _new_conn(self) -> socket.socket:
            return _open(self, resolver)

        def connect(self) -> None:
            super().connect()
            _begin_sending(self)

    class SecureConnection(HTTPSConnection):
        def _new_conn(self) -> socket.socket:
            return _open(self, resolver)

        def connect(self) -> None:
            super().connect()
            _begin_sending(self)

    class Pool(HTTPConnectionPool):
        ConnectionCls = Connection

    class SecurePool(HTTPSConnectionPool):
        ConnectionCls = SecureConnection

    manager.pool_classes_by_scheme = {"http": Pool, "https": SecurePool}
    return manager


def make_unix_manager(path: str, pool_size: int) -> urllib3.PoolManager:
    """A manager whose plain-HTTP connections all go to the unix socket."""

    class Connection(HTTPConnection):
        def _new_conn(self) -> socket.socket:
            sock = TimedSocket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                sock.settimeout(self.timeout if isinstance(self.timeout, int | float) else None)
                sock.connect(path)
            except TimeoutError as error:
                sock.close()
                raise ConnectTimeoutError(self, f"Connection to {path} timed out.") from error
            except OSError as error:
                sock.close()
                raise NewConnectionError(self, f"Failed to establish a new connection: {error}") from error
            return sock

    class Pool(HTTPConnectionPool):
        ConnectionCls = Connection

    manager = urllib3.PoolManager(num_pools=4, maxsize=pool_size, block=False)
    manager.pool_classes_by_scheme = {"http": Pool, "https": Pool}
    return manager
