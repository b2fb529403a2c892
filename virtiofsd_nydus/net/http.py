"""The one way to do HTTP: pooled connections, limits in time, checked ranges, and one line for whatever went wrong.

Nothing retries behind the caller's back: send() is one request on the wire, Retry says whether and when another.
Light: urllib3 (and the ssl it brings) is imported at the first request.
"""

import threading
import time

from virtiofsd_nydus.errors import Cause, Failure

TYPE_CHECKING = False
if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable, Iterable, Mapping
    from typing import IO

    from urllib3 import BaseHTTPResponse, PoolManager

    from virtiofsd_nydus.net.connect import Resolver
    from virtiofsd_nydus.net.proxy import ForwardProxy

# As many connections to a host as there are fetch slots (docs/architecture.md); more are closed after one use.
POOL_SIZE = 8
CONNECT_TIMEOUT_S = 5.0
READ_TIMEOUT_S = 5.0
# One read hands over this much: small enough that decoding starts early, large enough that calls do not count.
PIECE_BYTES = 256 << 10
# Back-off: doubled from the first to the last value, each spread by up to half of itself.
BACKOFF_FIRST_S = 0.1
BACKOFF_LAST_S = 3.0
# An error body is read for its first words only.
ERROR_BODY_BYTES = 4096
REDIRECTS_MAX = 5
REDIRECT_STATUSES = frozenset((301, 302, 303, 307, 308))
RETRY_STATUSES = frozenset((408, 425, 429))  # and all from 500 on
# How servers written in Go and nginx answer plain HTTP on a TLS port.
PLAIN_TO_TLS_WORDS = ("HTTP request to an HTTPS server", "plain HTTP request was sent to HTTPS")
# Headers that carry a secret of whoever configured them: for the backend's own server, not for where it redirects to.
SECRET_HEADERS = frozenset(("authorization", "proxy-authorization", "cookie"))
SPEAKS_HTTPS = "speaks HTTPS, not plain HTTP: use https (scheme, or no --plain-http)"


class RetriableFailure(Failure):
    """A failure that another attempt may mend. after_s: what the server asked for with Retry-After."""

    def __init__(self, message: str, cause: Cause = Cause.NETWORK, after_s: float = 0.0) -> None:
        super().__init__(message, cause)
        self.after_s = after_s


class DeadlinePassed(Failure):
    """There was no time left to ask: it says nothing about the server."""


def time_left(deadline: float | None, limit_s: float, url: str) -> float:
    """Seconds one wait for url may last: limit_s (0 = no limit) cut to the deadline. Fails when that has passed."""
    if deadline is None:
        return limit_s
    left = deadline - time.monotonic()
    if left <= 0:
        raise DeadlinePassed(f"{host_of(url)}: the deadline passed", Cause.NETWORK)
    return min(limit_s, left) if limit_s else left


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
        proxy: "ForwardProxy | None" = None,
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

    def set_proxy(self, proxy: "ForwardProxy | None") -> None:
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


def redirect_target(response: "BaseHTTPResponse", url: str, what: str, join: "Callable[[str, str], str]") -> str:
    """Where a redirect from url leads. Ends the response."""
    location = response.headers.get("Location", "")
    release(response)
    if not location:
        raise RetriableFailure(f"{host_of(url)}: {what}: a redirect without an address")
    target = join(url, location)
    if not target.startswith(("http://", "https://")):
        raise Failure(f"{host_of(url)}: {what}: redirected to {target[:60]!r}, which is no http address", Cause.NETWORK)
    return target


def release(response: "BaseHTTPResponse") -> None:
    """Gives the connection back when little of the body is left, else closes it."""
    import urllib3

    try:
        left = response.length_remaining  # 0 for HEAD, whatever Content-Length says
        if left is not None and left <= ERROR_BODY_BYTES:
            response.drain_conn()
            response.release_conn()
            return
    except (urllib3.exceptions.HTTPError, OSError):
        pass
    response.close()


def read_body(response: "BaseHTTPResponse", url: str, limit_bytes: int, deadline: float | None = None) -> bytes:
    """The whole body, which must not pass limit_bytes."""
    out = bytearray()
    while piece := read_some(response, url, min(PIECE_BYTES, limit_bytes + 1 - len(out)), deadline):
        out += piece
        if len(out) > limit_bytes:
            response.close()
            raise Failure(
                f"{host_of(url)}: the answer to {path_of(url)} is larger than {limit_bytes} bytes", Cause.FORMAT
            )
    return bytes(out)


def read_some(response: "BaseHTTPResponse", url: str, size_bytes: int, deadline: float | None = None) -> bytes:
    """What one wait on the socket brings, at most size_bytes; b"" at the end. The wait ends at the deadline: a
    server that sends a byte now and then cannot stretch it."""
    import http.client

    import urllib3

    try:
        if deadline is not None:
            left = deadline - time.monotonic()
            if left <= 0:
                raise RetriableFailure(f"{host_of(url)}: the deadline passed while the answer was arriving")
            connection = response.connection
            sock = getattr(connection, "sock", None)
            if sock is not None and (sock.gettimeout() is None or sock.gettimeout() > left):
                sock.settimeout(left)
        return response.read1(size_bytes)
    except (urllib3.exceptions.HTTPError, http.client.HTTPException, OSError, ValueError) as error:
        response.close()
        raise classify_error(error, url) from error
    except Failure:
        response.close()
        raise


def error_text(response: "BaseHTTPResponse", url: str) -> str:
    """The first words of an error answer, on one line. Ends the response."""
    import urllib3

    try:
        data = response.read1(ERROR_BODY_BYTES) or b""
    except (urllib3.exceptions.HTTPError, OSError):
        data = b""
    response.close()
    text = data.decode("utf-8", "replace")
    try:
        import json

        errors = json.loads(text)["errors"]
        text = "; ".join(str(error.get("message") or error.get("code")) for error in errors)
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:200]


def check_status(response: "BaseHTTPResponse", url: str, what: str) -> None:
    """Raises for an answer that is neither success nor redirect. what: names the thing asked for in the message.
    401 and 403 are the caller's where it can log in; here they are AUTH."""
    status = response.status
    if status < 400:
        return
    text = error_text(response, url)
    said = f": {text}" if text else ""
    where = f"{host_of(url)}: {what}"
    if status == 400 and any(words in text for words in PLAIN_TO_TLS_WORDS):
        raise Failure(f"{host_of(url)} {SPEAKS_HTTPS}", Cause.SCHEME)
    if status in (401, 403):
        raise Failure(f"{where}: refused with status {status}{said}", Cause.AUTH)
    if status in (404, 410):
        raise Failure(f"{where}: not there (status {status}){said}", Cause.MISSING)
    if status in RETRY_STATUSES or status >= 500:
        after = response.headers.get("Retry-After", "")
        raise RetriableFailure(
            f"{where}: status {status}{said}", after_s=min(float(after), 30.0) if after.isdecimal() else 0.0
        )
    raise Failure(f"{where}: unexpected status {status}{said}", Cause.IO)


def check_range(response: "BaseHTTPResponse", url: str, offset: int, length: int, what: str) -> int | None:
    """Checks the answer to `Range: bytes=offset-(offset+length-1)` before a byte of it is used.

    Returns the total size where told. An answer that is shorter than asked is taken (the rest is asked for anew);
    one that is longer, elsewhere or without a range raises."""
    headers = response.headers
    told = headers.get("Content-Length", "")
    told_bytes = int(told) if told.isdecimal() else None
    if response.status == 200:
        # Range is optional for servers; the whole thing from its start is as good when that is what is wanted.
        if offset == 0 and told_bytes == length:
            return length
        response.close()
        raise Failure(
            f"{host_of(url)}: {what}: the server does not serve byte ranges (status 200 to a range of "
            f"{length} bytes at {offset}); it or the proxy before it must support them",
            Cause.NETWORK,
        )
    content_range = headers.get("Content-Range", "")
    parsed = parse_content_range(content_range)
    if response.status != 206 or parsed is None:
        response.close()
        raise RetriableFailure(
            f"{host_of(url)}: {what}: status {response.status} with Content-Range "
            f"{content_range[:60]!r} to a range request"
        )
    first, last, total = parsed
    wrong = first != offset or last >= offset + length or told_bytes not in (None, last - first + 1)
    if wrong or headers.get("Content-Encoding", "identity") != "identity":
        response.close()
        raise RetriableFailure(
            f"{host_of(url)}: {what}: asked for {length} bytes at {offset}, the answer is "
            f"labelled {content_range[:60]!r}, length {told[:20]!r}"
        )
    if total is not None and total < offset + length:
        response.close()
        raise short_blob(url, what, total, offset, length)
    return total


def short_blob(url: str, what: str, size: int, offset: int, length: int) -> Failure:
    return Failure(
        f"{host_of(url)}: {what} has {size} bytes, the image wants {length} at {offset}: "
        "the blob is not the one the image was made with",
        Cause.FORMAT,
    )


def parse_content_range(text: str) -> tuple[int, int, int | None] | None:
    """(first, last, total or None) of `bytes 0-9/100`; None for anything else."""
    unit, _, rest = text.strip().partition(" ")
    span, slash, total = rest.strip().partition("/")
    first, dash, last = span.partition("-")
    if unit.lower() != "bytes" or not slash or not dash or not (first.isdecimal() and last.isdecimal()):
        return None
    if total != "*" and not total.isdecimal():
        return None
    if int(last) < int(first) or (total != "*" and int(last) >= int(total)):
        return None
    return int(first), int(last), None if total == "*" else int(total)


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


def describe_error(error: BaseException) -> str:
    """The innermost reason of an exception, on one line."""
    import urllib3

    seen: BaseException = error
    while True:
        inner = getattr(seen, "reason", None) or seen.__cause__ or seen.__context__
        if not isinstance(inner, BaseException) or inner is seen:
            break
        seen = inner
    if isinstance(seen, OSError) and seen.strerror:
        return seen.strerror
    text = str(seen) if not isinstance(seen, urllib3.exceptions.HTTPError) else seen.args[-1] if seen.args else ""
    return " ".join(f"{text or type(seen).__name__}".split())[:200]


def classify_error(error: BaseException, url: str) -> Failure:
    """What an exception of urllib3, http.client, ssl or the socket means, as one line with its cause."""
    import ssl

    from urllib3 import exceptions

    if isinstance(error, Failure):
        return error
    host = host_of(url)
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        inner = getattr(link, "reason", None)
        link = inner if isinstance(inner, BaseException) else link.__cause__ or link.__context__
    words = " ".join(str(part) for part in chain)
    if any(isinstance(part, ssl.SSLCertVerificationError) for part in chain):
        why = next(part for part in chain if isinstance(part, ssl.SSLCertVerificationError)).verify_message
        return Failure(
            f"{host}: the server's certificate is not trusted ({why}): add its CA (ca_cert_files, "
            "--ca-cert) or the name it was made for",
            Cause.SCHEME,
        )
    if "WRONG_VERSION_NUMBER" in words or "RECORD_LAYER_FAILURE" in words or "HTTP_REQUEST" in words:
        return Failure(f"{host} does not speak TLS (plain HTTP?): use scheme http or --plain-http", Cause.SCHEME)
    if any(
        isinstance(part, ssl.SSLError)
        and not isinstance(part, ssl.SSLEOFError | ssl.SSLZeroReturnError)
        and "timed out" not in str(part)
        for part in chain
    ):
        return Failure(f"{host}: TLS failed: {describe_error(error)}", Cause.SCHEME)
    # A TLS alert where a status line should be: plain HTTP was sent to a TLS port.
    if "\x15\x03" in words or "\\x15\\x03" in words:
        return Failure(f"{host} {SPEAKS_HTTPS}", Cause.SCHEME)
    if any(isinstance(part, exceptions.LocationParseError) for part in chain):
        return Failure(f"not a URL: {host}", Cause.FORMAT)
    if any(isinstance(part, exceptions.NameResolutionError) for part in chain):
        return RetriableFailure(f"{host}: the name cannot be resolved: {describe_error(error)}")
    if any(isinstance(part, ConnectionRefusedError) for part in chain):
        return RetriableFailure(f"{host}: connection refused: is the server up and the port right?")
    if any(isinstance(part, ConnectionResetError | BrokenPipeError) for part in chain):
        return RetriableFailure(f"{host}: the connection was reset")
    if any(isinstance(part, exceptions.NewConnectionError) for part in chain):
        return RetriableFailure(f"{host}: no connection: {describe_error(error)}")
    if any(isinstance(part, exceptions.ConnectTimeoutError) for part in chain):
        return RetriableFailure(f"{host}: no connection within the time limit")
    if any(isinstance(part, TimeoutError | exceptions.TimeoutError) for part in chain):
        return RetriableFailure(f"{host}: no answer within the time limit")
    if any(isinstance(part, exceptions.IncompleteRead | exceptions.ProtocolError) for part in chain):
        return RetriableFailure(f"{host}: the connection broke: {describe_error(error)}")
    return RetriableFailure(f"{host}: {describe_error(error)}")
