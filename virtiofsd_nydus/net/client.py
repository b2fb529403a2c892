"""The one way to do HTTP: pooled connections, limits in time, attempts that are counted.

Nothing retries behind the caller's back: send() is one request on the wire, Retry says whether and when another.
Light: urllib3 (and the ssl it brings) is imported at the first request.
"""

import threading
import time

from virtiofsd_nydus.errors import Cause, Failure
from virtiofsd_nydus.net.address import host_of, origin_of
from virtiofsd_nydus.net.answers import REDIRECT_STATUSES, REDIRECTS_MAX, check_status, redirect_target, release
from virtiofsd_nydus.net.failures import RetriableFailure, classify_error, describe_error, time_left

TYPE_CHECKING = False
if TYPE_CHECKING:
    import ssl
    from collections.abc import Iterable, Mapping
    from typing import IO, Protocol

    from urllib3 import BaseHTTPResponse, PoolManager, Timeout

    from virtiofsd_nydus.net.connect import Resolver

    class Proxy(Protocol):
        """A server that requests go through. net.proxy has the one there is."""

        url: str

        def send(
            self,
            client: "HttpClient",
            method: str,
            url: str,
            headers: Mapping[str, str],
            body: bytes | IO[bytes] | None,
            timeout: Timeout,
            prefetch: bool,
        ) -> BaseHTTPResponse | None:
            """The answer by way of the proxy; None: the request is to go directly."""
            ...

        def pass_by(self) -> float:
            """Counts a request that goes round it; seconds that this one has to wait first."""
            ...

        def status(self) -> dict[str, object]:
            """Health and counts, for the API: no secrets."""
            ...

        def with_url(self, url: str) -> "Proxy":
            """Another one at url with the same settings."""
            ...

        def close(self) -> None: ...


# As many connections to a host as there are fetch slots (storage/pump.py); more are closed after one use.
POOL_SIZE = 8
CONNECT_TIMEOUT_S = 5.0
READ_TIMEOUT_S = 5.0
# Back-off: doubled from the first to the last value, each spread by up to half of itself.
BACKOFF_FIRST_S = 0.1
BACKOFF_LAST_S = 3.0
# Headers that carry a secret of the one who configured them: for the backend's own server, not for the address that it
# redirects to.
SECRET_HEADERS = frozenset(("authorization", "proxy-authorization", "cookie"))


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


class HttpClient:
    """One pool manager and its limits. Thread-safe."""

    def __init__(
        self,
        *,
        skip_verify: bool = False,
        ca_cert_files: "Iterable[str]" = (),
        read_timeout_s: float = READ_TIMEOUT_S,
        connect_timeout_s: float = CONNECT_TIMEOUT_S,
        pool_size: int = POOL_SIZE,
        user_agent: str = "virtiofsd-nydus",
        headers: "Mapping[str, str] | None" = None,
        proxy: "Proxy | None" = None,
        unix_socket: str = "",
    ) -> None:
        """Timeouts in seconds, 0 = none. ca_cert_files: PEM files trusted beside the system's. headers: sent with every
        request of the backend (SECRET_HEADERS only where send() is told that the server is its own). unix_socket: where
        all plain-HTTP requests go."""
        self._skip_verify = skip_verify
        self._ca_cert_files = tuple(ca_cert_files)
        self.read_timeout_s = read_timeout_s
        self._connect_timeout_s = connect_timeout_s
        self.pool_size = pool_size
        self._user_agent = user_agent
        self._headers = dict(headers or {})
        self._public_headers = {k: v for k, v in self._headers.items() if k.lower() not in SECRET_HEADERS}
        self.proxy = proxy
        self._unix_socket = unix_socket
        self._resolver: Resolver | None = None
        self._pool: PoolManager | None = None
        self._lock = threading.Lock()
        self.closing = threading.Event()

    def close(self) -> None:
        """Ends waits between attempts and drops idle connections; requests on the wire run to their time limit."""
        self.closing.set()
        with self._lock:
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.clear()
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
        self._manager()

    def retry(self, retries: int, deadline: float | None) -> Retry:
        return Retry(retries, deadline, self.closing)

    def send(
        self,
        method: str,
        url: str,
        *,
        headers: "Mapping[str, str] | None" = None,
        body: "bytes | IO[bytes] | None" = None,
        deadline: float | None = None,
        read_timeout_s: float | None = None,
        through: Through | None = None,
        own: bool = False,
    ) -> "BaseHTTPResponse":
        """One request, no redirect followed, body of the answer unread: read it to its end or release(response).

        read_timeout_s: for this request instead of the client's. through: by the proxy as it says; None: directly. own:
        url is the server that the configuration names. Raises Failure: SCHEME for TLS that does not come
        about, NETWORK (RetriableFailure) for whatever else keeps an answer from arriving."""
        import http.client

        import urllib3

        read_s = self.read_timeout_s if read_timeout_s is None else read_timeout_s
        timeout = urllib3.Timeout(
            connect=time_left(deadline, self._connect_timeout_s, url) or None,
            read=time_left(deadline, read_s, url) or None,
        )
        sent = {
            "User-Agent": self._user_agent,
            "Accept-Encoding": "identity",
            **(self._headers if own else self._public_headers),
            **(headers or {}),
        }
        proxy = self.proxy
        if proxy is not None and through is not None and not through.bypass:
            response = proxy.send(self, method, url, sent, body, timeout, through.prefetch)
            if response is not None:
                return response
            time_left(deadline, 0, url)
        try:
            return self._manager().request(
                method,
                url,
                headers=sent,
                body=body,
                timeout=timeout,
                redirect=False,
                retries=False,
                preload_content=False,
                decode_content=False,
            )
        except (urllib3.exceptions.HTTPError, http.client.HTTPException, OSError, ValueError) as error:
            raise classify_error(error, url) from error

    def _manager(self) -> "PoolManager":
        with self._lock:
            if self.closing.is_set():
                raise Failure("the HTTP client is closed", Cause.NETWORK)
            if self._pool is None:
                self._pool = self._make_manager()
            return self._pool

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
            return connect.make_unix_manager(self._unix_socket, self.pool_size)
        manager = urllib3.PoolManager(
            num_pools=16, maxsize=self.pool_size, block=False, ssl_context=self.make_ssl_context()
        )
        return connect.install(manager, self.resolver())

    def make_ssl_context(self) -> "ssl.SSLContext":
        import ssl

        import urllib3

        context = ssl.create_default_context()
        for file in self._ca_cert_files:
            try:
                context.load_verify_locations(cafile=file)
            except (OSError, ssl.SSLError) as error:
                raise Failure(
                    f"cannot load the CA certificate file {file}: {describe_error(error)}", Cause.SCHEME
                ) from error
        if self._skip_verify:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
            urllib3.disable_warnings(urllib3.exceptions.InsecureRequestWarning)
        return context


def request_following(
    client: HttpClient,
    method: str,
    url: str,
    what: str,
    headers: "Mapping[str, str]",
    through: Through,
    deadline: float | None,
) -> "tuple[BaseHTTPResponse, str]":
    """One exchange with a server that knows no login, redirects followed: the answer (2xx or 416, unread) and the
    address that gave it."""
    from urllib.parse import urljoin

    first = origin_of(url)
    for _ in range(REDIRECTS_MAX + 1):
        response = client.send(
            method, url, headers=headers, deadline=deadline, through=through, own=origin_of(url) == first
        )
        if response.status < 300 or response.status == 416:
            return response, url
        if response.status not in REDIRECT_STATUSES:
            check_status(response, url, what)
            release(response)
            raise Failure(f"{host_of(url)}: {what}: unexpected status {response.status}", Cause.IO)
        url = redirect_target(response, url, what, urljoin)
    raise Failure(f"{host_of(url)}: {what}: more than {REDIRECTS_MAX} redirects", Cause.NETWORK)
