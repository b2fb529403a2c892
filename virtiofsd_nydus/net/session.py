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
from virtiofsd_nydus.net.client import HttpClient, Through
from virtiofsd_nydus.net.credentials import Credentials
from virtiofsd_nydus.net.login import Authenticator, pull_scope, push_scope

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import IO

    from urllib3 import BaseHTTPResponse

    Body = bytes | Callable[[], IO[bytes]]


class RegistrySession:
    """One repository. Thread-safe."""

    def __init__(
        self,
        client: HttpClient,
        scheme: str,
        host: str,
        repo: str,
        *,
        credentials: Credentials | None = None,
        token: str = "",
        plain_fallback: bool = False,
        rewrite_redirect: "Callable[[str], str] | None" = None,
        find_credentials: "Callable[[], Credentials | None] | None" = None,
        say: "Callable[[str], None] | None" = None,
    ) -> None:
        """plain_fallback: go on in plain HTTP when the host turns out not to speak TLS (nydusd does so with
        skip_verify). rewrite_redirect: changes the address a redirect names. find_credentials: asked at each login when
        credentials are not given. say: gets a line when the login stops or begins to work."""
        self.client = client
        self.host = host
        self.repo = repo
        self.auth = Authenticator(
            client, host, credentials, token, secure=scheme == "https", find_credentials=find_credentials, say=say
        )
        self._scheme = scheme
        self._plain_fallback = plain_fallback and scheme == "https"
        self._rewrite_redirect = rewrite_redirect

    def url(self, path: str) -> str:
        """Address of /v2/REPO/path."""
        return f"{self._scheme}://{self.host}/v2/{self.repo}/{path}"

    def is_own(self, url: str) -> bool:
        """Whether credentials for this registry may go to url."""
        return origin_of(url) == origin_of(self.url(""))

    def request(
        self,
        method: str,
        target: str,
        what: str,
        *,
        push: bool = False,
        headers: "Mapping[str, str] | None" = None,
        body: "Body | None" = None,
        deadline: float | None = None,
        read_timeout_s: float | None = None,
        through: Through | None = None,
        pass_statuses: tuple[int, ...] = (),
    ) -> "tuple[BaseHTTPResponse, str]":
        """One exchange. target: path below /v2/REPO/, or a whole URL. what: names the thing in messages.
        through: by the client's proxy as it says.

        Returns the answer (status below 300, or one of pass_statuses) unread, and the address that gave it. Raises
        Failure: AUTH, MISSING, SCHEME, NETWORK (RetriableFailure where another try may help), IO."""
        from urllib.parse import urljoin

        url = target if "://" in target else self.url(target)
        for _ in range(REDIRECTS_MAX + 1):
            try:
                response = self._send(method, url, push, headers, body, deadline, read_timeout_s, through)
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
        self,
        method: str,
        url: str,
        push: bool,
        headers: "Mapping[str, str] | None",
        body: "Body | None",
        deadline: float | None,
        read_timeout_s: float | None,
        through: Through | None,
    ) -> "BaseHTTPResponse":
        own = self.is_own(url)

        def send(authorization: str) -> "BaseHTTPResponse":
            sent = dict(headers or {})
            if authorization:
                sent["Authorization"] = authorization
            return self.client.send(
                method,
                url,
                headers=sent,
                deadline=deadline,
                read_timeout_s=read_timeout_s,
                through=through,
                own=own,
                body=body() if callable(body) else body,
            )

        if not own:
            return send("")
        if not self.auth.settled:
            with self.auth.first_request(deadline):
                if not self.auth.settled:
                    try:
                        return self._send_logged_in(send, push, deadline)
                    finally:
                        # Whatever came of it: when the registry is down, those who wait must not go one by one.
                        self.auth.settled = True
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
        if response.status in (401, 403):
            self.auth.note_refusal(response.status)
            raise self.auth.refused(scope, response.status, error_text(response, ""))
        return response
