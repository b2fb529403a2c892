"""Backend `registry`: blobs of a repository on an OCI registry, by ranges, from its mirrors first where it has some.

Configuration as nydusd has it (docs/operations.md), and `mirrors` as nydusd had it once. Light: urllib3 is
imported at the first request.
"""

import time
from dataclasses import KW_ONLY, dataclass, field
from functools import cached_property

from virtiofsd_nydus.errors import Cause, Failure
from virtiofsd_nydus.net.address import parse_address
from virtiofsd_nydus.net.answers import check_status, release
from virtiofsd_nydus.net.client import HttpClient, Request, Through, Trust
from virtiofsd_nydus.net.dragonfly import PIECE_BYTES, REGISTRY_HEADER, PeerCount, make_headers
from virtiofsd_nydus.net.health import Gate
from virtiofsd_nydus.net.login import Login
from virtiofsd_nydus.net.session import Endpoint, RegistrySession
from virtiofsd_nydus.storage.blobs import HttpBackend

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from urllib3 import BaseHTTPResponse

    from virtiofsd_nydus.net.credentials import Credentials
    from virtiofsd_nydus.net.hosts import Host

# What an address that a redirect once named answers when its time is over; the registry then names another.
STALE_STATUSES = (400, 401, 403, 404, 410)
# nydusd's defaults for a mirror.
MIRROR_FAILURES_MAX = 5
MIRROR_CHECK_INTERVAL_S = 5.0
MIRROR_LAST_PAUSE_S = 60.0
# A blob is not asked of a mirror that lacks it, or gave a wrong or broken answer, for so long.
WITHOUT_MISSING_S = 300.0
WITHOUT_BROKEN_S = 30.0


@dataclass(frozen=True, eq=False)
class Mirror:
    """Another registry that may have the same repository; whatever it lacks or fails at is had from the next."""

    scheme: str
    host: str
    _: KW_ONLY
    ping_url: str = ""  # asked before a mirror that failed is trusted again
    headers: "dict[str, str]" = field(default_factory=dict)
    failures_max: int = MIRROR_FAILURES_MAX
    check_interval_s: float = MIRROR_CHECK_INTERVAL_S
    with_login: bool = False  # the registry's own credentials may be sent to it
    prefix: str = "v2"  # of the API's paths
    namespace: str = ""  # the registry that it stands for, told with each request
    trust: "Trust | None" = None  # its own certificates; None: the registry's

    @property
    def query(self) -> str:
        return f"?ns={self.namespace}" if self.namespace else ""

    @cached_property
    def is_peer(self) -> bool:
        """It is Dragonfly's."""
        return any(name.lower() == REGISTRY_HEADER.lower() for name in self.headers)


class Redirects:
    """What nydusd's configuration changes of the addresses that a registry redirects to: their scheme and host. "":
    stays as it is."""

    __slots__ = ("host", "scheme")

    def __init__(self, scheme: str = "", host: str = "") -> None:
        self.scheme, self.host = scheme, host

    def rewrite(self, url: str) -> str:
        found = parse_address(url)
        return f"{self.scheme or found.scheme}://{self.host or found.netloc}{found.target}"


class _Mirrored:
    """A mirror at work."""

    def __init__(self, mirror: Mirror, session: RegistrySession, say: "Callable[[str], None] | None") -> None:
        self.mirror = mirror
        self.session = session
        self.gate = Gate(
            f"mirror {mirror.host}",
            mirror.failures_max,
            mirror.check_interval_s,
            max(MIRROR_LAST_PAUSE_S, mirror.check_interval_s),
            say,
        )
        self.without: dict[str, float] = {}  # blobs it does not have or is bad at, until when
        self.answered: dict[str, str] = {}  # blob id -> address that gave its last answer


class RegistryBackend(HttpBackend):
    """See storage.backend.Backend."""

    kind = "registry"

    def __init__(
        self,
        client: HttpClient,
        endpoint: Endpoint,
        login: Login | None = None,
        *,
        redirects: Redirects | None = None,
        mirrors: "Sequence[Mirror]" = (),
        say: "Callable[[str], None] | None" = None,
    ) -> None:
        super().__init__(client, endpoint.host, say)
        login = login or Login()
        rewrite = redirects.rewrite if redirects is not None else None
        self.session = RegistrySession(client, endpoint, login, rewrite_redirect=rewrite, say=say)
        self._own_clients = {
            id(mirror): HttpClient(client.limits, mirror.trust) for mirror in mirrors if mirror.trust is not None
        }
        self._mirrors = [
            _Mirrored(
                mirror,
                RegistrySession(
                    self._own_clients.get(id(mirror), client),
                    Endpoint(mirror.scheme, mirror.host, endpoint.repo, prefix=mirror.prefix),
                    Login(login.credentials, find=login.find) if mirror.with_login else None,
                ),
                say,
            )
            for mirror in mirrors
        ]
        self.peer = PeerCount()  # of mirrors
        self._locations: dict[str, str] = {}  # blob id -> where the registry last sent us

    def close(self) -> None:
        super().close()
        for client in self._own_clients.values():
            client.close()

    @property
    def piece_bytes(self) -> int:
        """What a request costs its server at least; 0: no more than was asked for."""
        return PIECE_BYTES if any(one.mirror.is_peer for one in self._mirrors) else 0

    def set_credentials(self, credentials: "Credentials | None") -> None:
        """Hot reload of the login."""
        self.session.auth.set_credentials(credentials)
        for one in self._mirrors:
            if one.mirror.with_login:
                one.session.auth.set_credentials(credentials)
        self._locations.clear()

    def status(self) -> "dict[str, object]":
        found = super().status()
        found["login"] = self.session.auth.state
        if self._mirrors:
            if self.peer.answers:
                found["p2p"] = self.peer.status()
            found["mirrors"] = {one.mirror.host: one.gate.state for one in self._mirrors}
        return found

    def distrust(self, blob_id: str) -> None:
        super().distrust(blob_id)
        self._locations.pop(blob_id, None)

    def _broke(self, blob_id: str, url: str, failure: Failure) -> bool:
        answered = next((one for one in self._mirrors if one.answered.get(blob_id) == url), None)
        if answered is not None:
            answered.gate.failed(str(failure))
            answered.without[blob_id] = time.monotonic() + WITHOUT_BROKEN_S
            return True
        return self._locations.pop(blob_id, None) == url

    def _request(
        self,
        method: str,
        blob_id: str,
        what: str,
        headers: dict[str, str],
        through: Through,
        deadline: float | None,
    ) -> "tuple[BaseHTTPResponse, str]":
        """Asks mirrors, then where the last redirect led, else (and when that has gone stale) the registry."""
        if self._mirrors and blob_id not in self._distrusted:
            answer = self._ask_mirrors(method, blob_id, what, headers, through, deadline)
            if answer is not None:
                return answer
        location = self._locations.get(blob_id)
        if location is not None:
            try:
                response, url = self.session.request(
                    Request(method, location, headers),
                    what,
                    deadline=deadline,
                    through=through,
                    pass_statuses=(416, *STALE_STATUSES),
                )
            except Failure:
                self._locations.pop(blob_id, None)
                raise
            if response.status not in STALE_STATUSES:
                return response, url
            release(response)
            self._locations.pop(blob_id, None)
        request = Request(method, blob_path(blob_id), headers)
        response, url = self.session.request(request, what, deadline=deadline, through=through, pass_statuses=(416,))
        # A signed address may be good for one method only, so that of a HEAD is not kept.
        if method == "GET" and not self.session.is_own(url):
            self._locations[blob_id] = url
        return response, url

    def _ask_mirrors(
        self,
        method: str,
        blob_id: str,
        what: str,
        headers: dict[str, str],
        through: Through,
        deadline: float | None,
    ) -> "tuple[BaseHTTPResponse, str] | None":
        """The first mirror's answer that is one; None when there is none to be had."""
        for one in self._mirrors:
            if one.without.get(blob_id, 0.0) > time.monotonic() or not one.gate.enter():
                continue
            try:
                if one.gate.state != "open" and one.mirror.ping_url:
                    self._ping(one, deadline)
                path = blob_path(blob_id) + one.mirror.query
                told = make_headers(through.prefetch) if one.mirror.is_peer else {}
                request = Request(method, path, {**told, **one.mirror.headers, **headers})
                response, url = one.session.request(request, what, deadline=deadline, through=through)
            except Failure as failure:
                if getattr(failure, "passed_on", False):
                    one.gate.succeeded()  # the registry behind it fails
                elif failure.cause is Cause.NETWORK or failure.cause is Cause.SCHEME:
                    one.gate.failed(str(failure))
                else:
                    one.gate.succeeded()
                    if failure.cause is Cause.MISSING:
                        one.without[blob_id] = time.monotonic() + WITHOUT_MISSING_S
                continue
            one.gate.succeeded()
            self.peer.note(response.headers)
            one.answered[blob_id] = url
            return response, url
        return None

    def _ping(self, one: _Mirrored, deadline: float | None) -> None:
        response = self._client.send(Request("GET", one.mirror.ping_url), deadline=deadline)
        check_status(response, one.mirror.ping_url, "health check")
        release(response)


def make_mirrors(hosts: "Sequence[Host]", registry_host: str) -> list[Mirror]:
    """The servers of hosts.toml that blobs may be had of before the registry itself."""
    return [
        Mirror(
            one.scheme,
            one.host,
            headers=one.headers,
            prefix=one.prefix,
            namespace=registry_host,
            trust=Trust(one.ca_cert_files, skip_verify=one.skip_verify),
        )
        for one in hosts
        if one.pull and not one.own
    ]


def blob_path(blob_id: str) -> str:
    """Path below /v2/REPO/ of the blob with the bare hex digest blob_id."""
    if len(blob_id) != 64 or not set(blob_id) <= set("0123456789abcdef"):
        raise Failure(f"blob id {blob_id[:80]!r} is no sha256 digest: no registry can hold this blob", Cause.FORMAT)
    return f"blobs/sha256:{blob_id}"
