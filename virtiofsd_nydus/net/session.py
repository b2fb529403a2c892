"""Requests to one repository of one registry: logged in, redirects followed, refusals told apart.

The OCI client and the storage backend both speak through it. Light: urllib3 is imported at the first request.
"""

from virtiofsd_nydus.errors import Cause, Failure
from virtiofsd_nydus.net.address import host_of, origin_of
from virtiofsd_nydus.net.answers import (
    REDIRECT_STATUSES,
    REDIRECTS_MAX,
    check_status,
    error_text,
    redirect_target,
    release,
)
from virtiofsd_nydus.net.client import HttpClient, Request, Through
from virtiofsd_nydus.net.login import Authenticator, Login, pull_scope, push_scope

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from urllib3 import BaseHTTPResponse


class Endpoint:
    """One repository of one registry. prefix: of the API's paths. plain_fallback: go on in plain HTTP when the host
    turns out not to speak TLS (nydusd does so with skip_verify)."""

    __slots__ = ("host", "plain_fallback", "prefix", "repo", "scheme")

    def __init__(self, scheme: str, host: str, repo: str, *, plain_fallback: bool = False, prefix: str = "v2") -> None:
        self.scheme = scheme
        self.host = host
        self.repo = repo
        self.prefix = prefix
        self.plain_fallback = plain_fallback and scheme == "https"


class RegistrySession:
    """Requests to one endpoint. Thread-safe."""

    def __init__(
        self,
        client: HttpClient,
        endpoint: Endpoint,
        login: Login | None = None,
        *,
        rewrite_redirect: "Callable[[str], str] | None" = None,
        say: "Callable[[str], None] | None" = None,
    ) -> None:
        """rewrite_redirect: changes the address a redirect names. say: gets a line when the login stops or begins to
        work."""
        self.client = client
        self.host = endpoint.host
        self.repo = endpoint.repo
        self.auth = Authenticator(client, endpoint.host, login, secure=endpoint.scheme == "https", say=say)
        self._scheme = endpoint.scheme
        self._prefix = f"{endpoint.prefix}/" if endpoint.prefix else ""
        self._plain_fallback = endpoint.plain_fallback
        self._rewrite_redirect = rewrite_redirect

    def url(self, path: str) -> str:
        """Address of /v2/REPO/path."""
        return f"{self._scheme}://{self.host}/{self._prefix}{self.repo}/{path}"

    def is_own(self, url: str) -> bool:
        """Whether credentials for this registry may go to url."""
        return origin_of(url) == origin_of(self.url(""))

    def request(
        self,
        request: Request,
        what: str,
        *,
        push: bool = False,
        deadline: float | None = None,
        through: Through | None = None,
        pass_statuses: tuple[int, ...] = (),
    ) -> "tuple[BaseHTTPResponse, str]":
        """One exchange. The request's url: a path below /v2/REPO/, or a whole one. what: names the thing in messages.
        push: the login must allow to write. through: by the client's proxy as it says.

        Returns the answer (status below 300, or one of pass_statuses) unread, and the address that gave it. Raises
        Failure: AUTH, MISSING, SCHEME, NETWORK (RetriableFailure where another try may help), IO."""
        from urllib.parse import urljoin

        url = request.url if "://" in request.url else self.url(request.url)
        for _ in range(REDIRECTS_MAX + 1):
            try:
                response = self._send(request, url, push, deadline, through)
            except Failure as failure:
                if failure.cause is Cause.SCHEME and self._plain_fallback and self.is_own(url):
                    self._scheme, self._plain_fallback = "http", False
                    self.auth.secure = False
                    url = url.replace("https://", "http://", 1)
                    continue
                raise
            if response.status in pass_statuses:
                return response, url
            if response.status not in REDIRECT_STATUSES:
                if response.status < 300:
                    return response, url
                check_status(response, url, what)
                release(response)
                raise Failure(f"{host_of(url)}: {what}: unexpected status {response.status}", Cause.IO)
            url = redirect_target(response, url, what, urljoin)
            if self._rewrite_redirect is not None and not self.is_own(url):
                url = self._rewrite_redirect(url)
        raise Failure(
            f"{self.host}: {what}: more than {REDIRECTS_MAX} redirects, the last to {host_of(url)}",
            Cause.NETWORK,
        )

    def _send(
        self, request: Request, url: str, push: bool, deadline: float | None, through: Through | None
    ) -> "BaseHTTPResponse":
        home = origin_of(self.url(""))

        def send(authorization: str) -> "BaseHTTPResponse":
            added = {"Authorization": authorization} if authorization else {}
            return self.client.send(request.at(url, home, added), deadline=deadline, through=through)

        if origin_of(url) != home:
            return send("")
        if not self.auth.first_is_over:
            with self.auth.first_request(deadline):
                if not self.auth.first_is_over:
                    try:
                        return self._send_logged_in(send, push, deadline)
                    finally:
                        # However it ended: when the registry is down, the threads that wait must not go one by one.
                        self.auth.first_is_over = True
        return self._send_logged_in(send, push, deadline)

    def _send_logged_in(
        self, send: "Callable[[str], BaseHTTPResponse]", push: bool, deadline: float | None
    ) -> "BaseHTTPResponse":
        scope = push_scope(self.repo) if push else pull_scope(self.repo)
        header = self.auth.header(scope, deadline)
        response = send(header)
        if response.status == 401:
            challenge = response.headers.get("WWW-Authenticate", "")
            release(response)
            if header and not challenge:
                # Harbor answers a stale header without saying what it wants; without a header it does.
                response = send("")
                if response.status != 401:
                    return response
                challenge = response.headers.get("WWW-Authenticate", "")
                release(response)
            response = send(self.auth.refresh(scope, header, challenge, deadline))
        elif response.status == 403 and header:
            renewed = self.auth.renew_expired(scope, header, deadline)
            if renewed is not None:
                release(response)
                response = send(renewed)
            if renewed == "" and response.status == 401:
                challenge = response.headers.get("WWW-Authenticate", "")
                release(response)
                response = send(self.auth.refresh(scope, header, challenge, deadline))
        if response.status in (401, 403):
            self.auth.note_refusal(response.status)
            raise self.auth.refused(scope, response.status, error_text(response, ""))
        return response
