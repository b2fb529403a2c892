"""A forward proxy between a backend and its server, such as the peer daemon of Dragonfly: used while it is well, left
aside while it is not, and trusted again after a probe. Configuration: nydusd's section `proxy` (docs/operations.md).

Light: urllib3 is imported with the first request.
"""

import threading
import time
from dataclasses import KW_ONLY, dataclass, replace

from virtiofsd_nydus.errors import Cause, Failure
from virtiofsd_nydus.net.address import host_of
from virtiofsd_nydus.net.answers import error_text, release
from virtiofsd_nydus.net.client import HttpClient, Request
from virtiofsd_nydus.net.dragonfly import PeerCount, is_peers_own, make_headers
from virtiofsd_nydus.net.failures import ProxyLimited, RetriableFailure, classify_error
from virtiofsd_nydus.net.health import Gate, RateLimit

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from urllib3 import BaseHTTPResponse, ProxyManager, Timeout

# Failures in a row after which the proxy is left aside, and for how long (without a ping address).
FAILURES_MAX = 3
LAST_PAUSE_S = 60.0
# Retries that go round a proxy that is not to be fallen back from: nydusd's budget of one a second, but a cold start
# may have all its fetch slots at once.
BYPASSES_PER_S = 1.0
BYPASS_BURST = 8.0


@dataclass(frozen=True, repr=False)
class ProxySettings:
    """A forward proxy, as the configuration has it. Not shown: its address may hold a password."""

    url: str  # http://[USER:PASSWORD@]HOST:PORT
    _: KW_ONLY
    ping_url: str = ""  # asked every check_interval_s while there is traffic; "": never
    fallback: bool = True  # what the proxy fails at goes directly
    check_interval_s: float = 5.0
    use_http: bool = False  # https requests are sent to it as http, for it to fetch
    check_pause_s: float = 300.0  # checks rest after so long without a request
    connect_timeout_s: float = 5.0


class ForwardProxy:
    """One proxy of one backend. Thread-safe. The checks run only while there is traffic."""

    def __init__(self, settings: ProxySettings, say: "Callable[[str], None] | None" = None) -> None:
        """say: gets one line when the proxy is left aside or used again."""
        self.url = settings.url
        self.settings = settings
        self._say = say
        self._closed = False
        pause_s = settings.check_interval_s
        self.gate = Gate(f"proxy {host_of(self.url)}", FAILURES_MAX, pause_s, max(LAST_PAUSE_S, pause_s), say)
        self._bypasses = RateLimit(BYPASSES_PER_S, BYPASS_BURST)
        self._lock = threading.Lock()
        self._manager: ProxyManager | None = None
        self._checker: threading.Thread | None = None
        self._last_used = 0.0
        self.peer = PeerCount()
        self.used = self.passed_by = 0  # requests it answered, requests that went round it

    def send(
        self,
        client: HttpClient,
        request: Request,
        timeout: "Timeout",
        prefetch: bool,
    ) -> "BaseHTTPResponse | None":
        """The answer by way of the proxy; None: send it directly (the proxy is unwell and fallback is on)."""
        import http.client as http_client

        import urllib3

        self._note_traffic(client)
        if not self.gate.enter():
            self._leave_aside(RetriableFailure(self.gate.refusal()))
            return None
        url = request.url
        if self.settings.use_http and url.startswith("https://"):
            url = "http://" + url.removeprefix("https://")
        sent = {**request.headers, **make_headers(prefetch)}
        try:
            response = self._get_manager(client).request(
                request.method,
                url,
                headers=sent,
                body=request.make_body(),
                timeout=timeout,
                redirect=False,
                retries=False,
                preload_content=False,
                decode_content=False,
            )
        except (urllib3.exceptions.HTTPError, http_client.HTTPException, OSError, ValueError) as error:
            failure = classify_error(error, self.url)
            told = f"by way of the proxy {failure}"
            self.gate.failed(str(failure))
            self._leave_aside(
                RetriableFailure(told) if failure.cause is Cause.NETWORK else Failure(told, failure.cause)
            )
            return None
        own = (
            (response.status >= 400 and is_peers_own(response.headers))
            or response.status == 407
            or (response.status == 403 and "X-Squid-Error" in response.headers)
        )
        if own:
            self._handle_own_error(response, prefetch)
            return None
        self.gate.succeeded()
        self.peer.note(response.headers)
        if response.status >= 500 and self.settings.fallback:
            release(response)  # the proxy may be at fault or the origin: the origin is asked
            self._leave_aside(None)
            return None
        self.used += 1
        return response

    def with_url(self, url: str) -> "ForwardProxy":
        """A proxy with the same settings at another address, without the health check, which was of this one."""
        former = self.settings
        settings = replace(former, url=url, ping_url="")
        return ForwardProxy(settings, self._say)

    def pass_by(self) -> float:
        """0: a request may go round it, and is counted; else seconds until one may."""
        pause_s = self._bypasses.debt_s()
        if not pause_s:
            self._bypasses.take(1)
            self.passed_by += 1
        return pause_s

    def status(self) -> dict[str, object]:
        """Health and counts, for the API: no secrets."""
        found: dict[str, object] = {"state": self.gate.state, "used": self.used, "passed_by": self.passed_by}
        if self.peer.answers:
            found["p2p"] = self.peer.status()
        return found

    def close(self) -> None:
        with self._lock:
            self._closed = True
            manager, self._manager = self._manager, None
        if manager is not None:
            manager.clear()

    def _handle_own_error(self, response: "BaseHTTPResponse", prefetch: bool) -> None:
        """An error that the proxy itself made: returns where the request is to go directly."""
        status = response.status
        said = error_text(response, self.url)
        line = f"proxy {host_of(self.url)}: status {status}{': ' + said if said else ''}"
        if status == 429:
            self.gate.succeeded()
            # Prefetch gives way; a reader goes round the proxy.
            raise Failure(line, Cause.NETWORK) if prefetch else ProxyLimited(line)
        if status in (403, 407):
            self.gate.succeeded()
            raise Failure(f"{line}: the proxy, not the registry, refuses this request", Cause.AUTH)
        self.gate.failed(line)
        self._leave_aside(RetriableFailure(line))

    def _leave_aside(self, failure: Failure | None) -> None:
        if self.settings.fallback or failure is None:
            self.passed_by += 1
            return
        raise failure

    def _get_manager(self, client: HttpClient) -> "ProxyManager":
        with self._lock:
            if self._manager is None:
                self._manager = client.make_proxy_manager(self.url)
            return self._manager

    # ---- health

    def _note_traffic(self, client: HttpClient) -> None:
        self._last_used = time.monotonic()
        if not self.settings.ping_url or self._checker is not None:
            return
        with self._lock:
            if self._checker is None:
                self._checker = threading.Thread(target=self._check, args=(client,), name="proxy-check", daemon=True)
                self._checker.start()

    def _check(self, client: HttpClient) -> None:
        """Pings until there has been no traffic for a while; the next request starts it anew."""
        while time.monotonic() - self._last_used < self.settings.check_pause_s and not self._closed:
            self._ping(client)
            if client.closing.wait(self.settings.check_interval_s):
                break
        self._checker = None

    def _ping(self, client: HttpClient) -> None:
        try:
            response = client.send(
                Request("GET", self.settings.ping_url, read_timeout_s=self.settings.connect_timeout_s or 5.0)
            )
            status = response.status
            release(response)
        except Failure as failure:
            if not client.closing.is_set():
                self.gate.trip(f"its health check fails: {failure}")
            return
        if 200 <= status < 400:
            self.gate.reprieve()
        else:
            self.gate.trip(f"its health check answers with status {status}")
