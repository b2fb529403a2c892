"""The one way to do HTTP: pooled connections, limits in time, attempts that are counted.

Nothing retries behind the caller's back: send() is one request on the wire, Retry says whether and when another.
Light: urllib3 (and the ssl it brings) is imported at the first request.
"""

import threading
import time

from virtiofsd_nydus.errors import Cause, Failure
from virtiofsd_nydus.net.address import Address, host_of, origin_of, parse_address
from virtiofsd_nydus.net.answers import REDIRECT_STATUSES, REDIRECTS_MAX, check_status, redirect_target, release
from virtiofsd_nydus.net.deadline import wait_until
from virtiofsd_nydus.net.failures import RetriableFailure, classify_error, describe_error, time_left
from virtiofsd_nydus.net.routes import Routes

TYPE_CHECKING = False
if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable, Iterable, Mapping
    from typing import IO, Any, Protocol

    from urllib3 import BaseHTTPResponse, PoolManager, ProxyManager, Timeout

    from virtiofsd_nydus.net.connect import Resolver

    Body = bytes | Callable[[], IO[bytes]]

    class Proxy(Protocol):
        """A server that requests go through. net.proxy has the one there is."""

        url: str

        def send(
            self, client: "HttpClient", request: "Request", timeout: Timeout, prefetch: bool
        ) -> BaseHTTPResponse | None:
            """The answer to a request with all its headers, by way of the proxy; None: it is to go directly."""
            ...

        def pass_by(self) -> float:
            """0: a request may go round it, and is counted; else seconds until one may."""
            ...

        def status(self) -> dict[str, object]:
            """Health and counts, for the API: no secrets."""
            ...

        def with_url(self, url: str) -> "Proxy":
            """Another one at url with the same settings."""
            ...

        def close(self) -> None: ...


# As many connections to a host as a source has fetch slots (storage/pump.py); more are closed after one use.
POOL_SIZE = 9
RETRIES = 3  # nydusd's budget
USER_AGENT = "virtiofsd-nydus"
CONNECT_TIMEOUT_S = 5.0
READ_TIMEOUT_S = 5.0
# Back-off: doubled from the first to the last value, each spread by up to half of itself.
BACKOFF_FIRST_S = 0.1
BACKOFF_LAST_S = 3.0
# A header whose name has one of these words in it carries a secret: for the server that it was configured for, not for
# the address that it redirects to.
SECRET_WORDS = ("auth", "cookie", "token", "secret", "password", "key", "credential")


class Limits:
    """How long and how often a client tries. Timeouts of one wait in seconds, 0: none. retries: attempts after the
    first one. pool_size: connections to a host that are kept."""

    __slots__ = ("connect_timeout_s", "pool_size", "read_timeout_s", "retries")

    def __init__(
        self,
        *,
        read_timeout_s: float = READ_TIMEOUT_S,
        connect_timeout_s: float = CONNECT_TIMEOUT_S,
        retries: int = RETRIES,
        pool_size: int = POOL_SIZE,
    ) -> None:
        self.read_timeout_s = read_timeout_s
        self.connect_timeout_s = connect_timeout_s
        self.retries = retries
        self.pool_size = pool_size


class Trust:
    """Which servers are believed to be who they say. ca_cert_files: PEM files trusted beside the system's."""

    __slots__ = ("ca_cert_files", "skip_verify")

    def __init__(self, ca_cert_files: "Iterable[str]" = (), *, skip_verify: bool = False) -> None:
        self.ca_cert_files = tuple(ca_cert_files)
        self.skip_verify = skip_verify


class Request:
    """What is sent where. body: a function gives it anew for each attempt. home: the origin that the secrets among the
    headers are for; sent to another one they are left out. read_timeout_s: instead of the client's, for this
    request."""

    __slots__ = ("body", "headers", "home", "method", "read_timeout_s", "url")

    def __init__(
        self,
        method: str,
        url: str,
        headers: "Mapping[str, str] | None" = None,
        body: "Body | None" = None,
        *,
        home: str = "",
        read_timeout_s: float | None = None,
    ) -> None:
        self.method = method
        self.url = url
        self.headers = headers or {}
        self.body = body
        self.home = home
        self.read_timeout_s = read_timeout_s

    def at(self, url: str, home: str, headers: "Mapping[str, str] | None" = None) -> "Request":
        """The same request to another address, with further headers."""
        return Request(
            self.method,
            url,
            {**self.headers, **(headers or {})},
            self.body,
            home=home,
            read_timeout_s=self.read_timeout_s,
        )

    def make_body(self) -> "bytes | IO[bytes] | None":
        return self.body() if callable(self.body) else self.body


class Through:
    """How the requests of one operation go: by the backend's proxy, if it has one, or round it."""

    __slots__ = ("bypass", "prefetch")

    def __init__(self, prefetch: bool = False) -> None:
        self.prefetch = prefetch
        self.bypass = False


class Retry:
    """Attempts of one operation. `retries` more tries after the first, none that would start after the deadline.

    closing: an event that ends waiting at once (the owner is shutting down)."""

    __slots__ = ("_backoff_s", "_closing", "_deadline", "_left", "_retries")

    def __init__(self, retries: int, deadline: float | None, closing: threading.Event) -> None:
        self._retries = self._left = retries
        self._deadline = deadline
        self._closing = closing
        self._backoff_s = BACKOFF_FIRST_S

    @property
    def last(self) -> bool:
        """Whether the attempt under way is the last."""
        return self._left <= 0

    def progress(self) -> None:
        """Bytes have arrived: the count starts anew, so that a long transfer may survive many cuts."""
        self._left = self._retries
        self._backoff_s = BACKOFF_FIRST_S

    def wait(self, failure: Failure) -> None:
        """Waits before the next attempt, or raises what the last one failed with."""
        if not isinstance(failure, RetriableFailure):
            raise failure
        if self._left <= 0:
            raise Failure(f"{failure} (gave up after {self._retries + 1} attempts)", failure.cause) from failure
        import random

        pause_s = max(failure.after_s, self._backoff_s * random.uniform(0.5, 1.0))
        if self._deadline is not None and time.monotonic() + pause_s >= self._deadline:
            raise Failure(f"{failure} (no time left for another attempt)", failure.cause) from failure
        self._left -= 1
        self._backoff_s = min(self._backoff_s * 2, BACKOFF_LAST_S)
        if self._closing.wait(pause_s):
            raise Failure(f"{failure} (shutting down)", failure.cause) from failure


def is_secret(name: str) -> bool:
    """Whether a header of this name carries a secret."""
    name = name.lower()
    return any(word in name for word in SECRET_WORDS)


def drop_secrets(headers: "Mapping[str, str]") -> dict[str, str]:
    return {name: value for name, value in headers.items() if not is_secret(name)}


class CommonHeaders:
    """Headers that go with every request, the secrets among them to some origins alone."""

    __slots__ = ("_all", "_origins", "_public")

    def __init__(self, headers: "Mapping[str, str]", secret_origins: "Iterable[str]" = ()) -> None:
        self._all = dict(headers)
        self._public = drop_secrets(self._all)
        self._origins = frozenset(secret_origins)

    def for_origin(self, origin: str) -> dict[str, str]:
        return self._all if origin in self._origins else self._public


class HttpClient:
    """One pool manager and its limits. Thread-safe."""

    def __init__(
        self,
        limits: Limits | None = None,
        trust: Trust | None = None,
        *,
        headers: "CommonHeaders | None" = None,
        proxy: "Proxy | None" = None,
        routes: Routes | None = None,
        unix_socket: str = "",
    ) -> None:
        """proxy: the backend's own, for requests that say so. routes: proxies for all others (default: the
        environment's). unix_socket: where all plain-HTTP requests go."""
        self.limits = limits or Limits()
        self._trust = trust or Trust()
        self._headers = headers or CommonHeaders({})
        self.proxy = proxy
        self._routes = routes if routes is not None else Routes.read_environment()
        self._unix_socket = unix_socket
        self._resolver: Resolver | None = None
        self._managers: dict[str, PoolManager] = {}  # by the proxy's address, "": directly
        self._lock = threading.Lock()
        self.closing = threading.Event()

    def close(self) -> None:
        """Ends waits between attempts and drops idle connections; requests on the wire run to their time limit."""
        self.closing.set()
        with self._lock:
            managers, self._managers = self._managers, {}
        for manager in managers.values():
            manager.clear()
        if self.proxy is not None:
            self.proxy.close()

    def set_proxy(self, proxy: "Proxy | None") -> None:
        """Hot change, for requests that begin from now on. Settings of the former proxy but its address hold on."""
        former = self.proxy
        if former is not None and proxy is not None:
            proxy = former.with_url(proxy.url)
        self.proxy = proxy
        if former is not None:
            former.close()

    def prepare(self) -> None:
        """Imports what requests need and reads the certificates."""
        self._manager("")

    def retry(self, retries: int, deadline: float | None) -> Retry:
        return Retry(retries, deadline, self.closing)

    def send(
        self,
        request: Request,
        *,
        deadline: float | None = None,
        through: Through | None = None,
    ) -> "BaseHTTPResponse":
        """Sends one request. No redirect is followed; the answer's body is unread: read it to its end or
        release(response). through: by the proxy as it says; None: directly. Raises Failure: SCHEME for TLS that does
        not come about, NETWORK (RetriableFailure) for all else that keeps an answer from arriving."""
        address = parse_address(request.url)
        whole = Request(request.method, address.url, self._choose_headers(request, address), request.body)
        read_s = self.limits.read_timeout_s if request.read_timeout_s is None else request.read_timeout_s
        proxy = self.proxy
        if proxy is not None and through is not None and not through.bypass:
            response = proxy.send(self, whole, self._begin_wait(whole, read_s, deadline), through.prefetch)
            if response is not None:
                return response
        return self._send_directly(whole, address, self._begin_wait(whole, read_s, deadline))

    def _choose_headers(self, request: Request, address: Address) -> dict[str, str]:
        """All headers of a request. Here alone is decided which secrets go to the address."""
        configured = self._headers.for_origin(address.origin)
        own = request.headers if address.origin == request.home else drop_secrets(request.headers)
        return {"User-Agent": USER_AGENT, "Accept-Encoding": "identity", **configured, **own}

    def _begin_wait(self, request: Request, read_s: float, deadline: float | None) -> "Timeout":
        """The limits of one exchange. Its headers have to come within those of one connection and one read together,
        however slowly they trickle (an upload takes its own time)."""
        import urllib3

        connect_s = self.limits.connect_timeout_s
        timeout = urllib3.Timeout(
            connect=time_left(deadline, connect_s, request.url) or None,
            read=time_left(deadline, read_s, request.url) or None,
        )
        until = deadline
        if request.body is None and connect_s and read_s:
            ends = time.monotonic() + connect_s + read_s
            until = ends if deadline is None else min(ends, deadline)
        wait_until(until)
        return timeout

    def _send_directly(self, request: Request, address: Address, timeout: "Timeout") -> "BaseHTTPResponse":
        import http.client

        import urllib3

        options: dict[str, Any] = {
            "headers": request.headers,
            "body": request.make_body(),
            "timeout": timeout,
            "redirect": False,
            "retries": False,
            "preload_content": False,
            "decode_content": False,
        }
        try:
            route = "" if self._unix_socket else self._routes.choose(address)
            manager = self._manager(route)
            if route:
                return manager.urlopen(request.method, address.url, **options)
            pool = manager.connection_from_host(address.host, address.port, address.scheme)
            return pool.urlopen(request.method, address.target, assert_same_host=False, **options)
        except (urllib3.exceptions.HTTPError, http.client.HTTPException, OSError, ValueError) as error:
            raise classify_error(error, request.url) from error

    def _manager(self, route: str) -> "PoolManager":
        with self._lock:
            if self.closing.is_set():
                raise Failure("the HTTP client is closed", Cause.NETWORK)
            manager = self._managers.get(route)
            if manager is None:
                manager = self.make_proxy_manager(route) if route else self._make_manager()
                self._managers[route] = manager
            return manager

    def resolver(self) -> "Resolver":
        """The one memory of names for direct and proxied connections."""
        from virtiofsd_nydus.net.connect import Resolver

        if self._resolver is None:
            self._resolver = Resolver()
        return self._resolver

    def _make_manager(self) -> "PoolManager":
        import urllib3

        from virtiofsd_nydus.net import connect

        if self._unix_socket:
            return connect.make_unix_manager(self._unix_socket, self.limits.pool_size)
        manager = urllib3.PoolManager(
            num_pools=16, maxsize=self.limits.pool_size, block=False, ssl_context=self.make_ssl_context()
        )
        return connect.install(manager, self.resolver())

    def make_proxy_manager(self, url: str) -> "ProxyManager":
        """A manager whose connections go by the proxy at url, http(s)://[USER:PASSWORD@]HOST:PORT."""
        import urllib3

        from virtiofsd_nydus.net import connect

        login, at, _ = url.partition("://")[2].rpartition("@")
        manager = urllib3.ProxyManager(
            parse_address(url).url,
            proxy_headers=urllib3.make_headers(proxy_basic_auth=login) if at else None,
            num_pools=16,
            maxsize=self.limits.pool_size,
            block=False,
            ssl_context=self.make_ssl_context(),
        )
        connect.install(manager, self.resolver())
        return manager

    def make_ssl_context(self) -> "ssl.SSLContext":
        import ssl

        import urllib3

        from virtiofsd_nydus.net.connect import TimedTlsSocket

        context = ssl.create_default_context()
        context.sslsocket_class = TimedTlsSocket
        for file in self._trust.ca_cert_files:
            try:
                context.load_verify_locations(cafile=file)
            except (OSError, ssl.SSLError) as error:
                raise Failure(
                    f"cannot load the CA certificate file {file}: {describe_error(error)}", Cause.SCHEME
                ) from error
        if self._trust.skip_verify:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
            urllib3.disable_warnings(urllib3.exceptions.InsecureRequestWarning)
        return context


def request_following(
    client: HttpClient, request: Request, what: str, through: Through, deadline: float | None
) -> "tuple[BaseHTTPResponse, str]":
    """One exchange with a server that knows no login, redirects followed: the answer (2xx or 416, unread) and the
    address that gave it."""
    from urllib.parse import urljoin

    url, first = request.url, origin_of(request.url)
    for _ in range(REDIRECTS_MAX + 1):
        response = client.send(request.at(url, first), deadline=deadline, through=through)
        if response.status < 300 or response.status == 416:
            return response, url
        if response.status not in REDIRECT_STATUSES:
            check_status(response, url, what)
            release(response)
            raise Failure(f"{host_of(url)}: {what}: unexpected status {response.status}", Cause.IO)
        url = redirect_target(response, url, what, urljoin)
    raise Failure(f"{host_of(url)}: {what}: more than {REDIRECTS_MAX} redirects", Cause.NETWORK)
