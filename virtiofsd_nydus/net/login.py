"""Logging in to a registry: anonymous, basic and bearer tokens, for the OCI client and the storage backend alike.

The bearer flow is the one of the distribution specification (401 with WWW-Authenticate, then a token from `realm`):
with credentials POST (OAuth2) first and GET where the server does not take it, without credentials GET. Tokens are
kept per scope until shortly before they expire; of several threads that meet a 401 one fetches, the others use what
it got.
Light: the daemon reads configurations before it answers RUNNING.
"""

import re
import threading
import time

from virtiofsd_nydus.errors import Cause, Failure
from virtiofsd_nydus.net.address import host_of
from virtiofsd_nydus.net.answers import check_status, read_body, release
from virtiofsd_nydus.net.client import HttpClient, Request
from virtiofsd_nydus.net.credentials import Credentials
from virtiofsd_nydus.net.failures import DeadlinePassed, RetriableFailure

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager
    from typing import Any

CLIENT_ID = "virtiofsd-nydus"
# The specification: a token without expires_in lives 60 s at least; nydusd assumes 600.
TOKEN_TTL_S = 60
# A token is fetched anew this long before its end, or a tenth of its life when that is shorter.
TOKEN_MARGIN_S = 20
TOKEN_ANSWER_BYTES = 1 << 20
# While there is traffic a token is renewed aside, this long or half its life before its margin, so that no read waits.
RENEW_AHEAD_S = 30
# After so long without a request the renewing rests (an image whose bytes are all here needs no login); the next
# request wakes it.
IDLE_S = 300.0
# Waits after renewals that failed: doubled from the first to the last.
RENEW_PAUSE_FIRST_S = 5.0
RENEW_PAUSE_LAST_S = 600.0
# A refused login is not tried again for so long: every cold read would, and accounts get locked by that.
REFUSED_FOR_S = 10.0
# One step of WWW-Authenticate (RFC 9110 11.6.1): a scheme before its parameters, a parameter, or a scheme alone.
CHALLENGE = re.compile(
    r"""([A-Za-z][\w-]*)\s+(?=[\w-]+\s*=)"""
    r"""|([A-Za-z][\w-]*)\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^\s,"]+))"""
    r"""|([A-Za-z][\w-]*)(?=\s*(?:,|$))"""
)


def parse_challenges(text: str) -> list[tuple[str, dict[str, str]]]:
    """WWW-Authenticate to [(scheme in lower case, parameters)], in its order."""
    out: list[tuple[str, dict[str, str]]] = []
    for match in CHALLENGE.finditer(text):
        scheme, key, quoted, plain, bare = match.groups()
        if scheme or bare:
            out.append(((scheme or bare).lower(), {}))
        elif key and out:
            value = plain if quoted is None else re.sub(r"\\(.)", r"\1", quoted)
            out[-1][1][key.lower()] = value
    return out


def pull_scope(repo: str) -> str:
    return f"repository:{repo}:pull"


def push_scope(repo: str) -> str:
    return f"repository:{repo}:pull,push"


class Login:
    """What a registry is logged in to with. credentials: those that were given. token: a bearer token that another
    program got (nydusd's registry_token), used until it is refused. find: asked at each login where no credentials were
    given, for those may be short-lived."""

    __slots__ = ("credentials", "find", "token")

    def __init__(
        self,
        credentials: Credentials | None = None,
        token: str = "",
        find: "Callable[[], Credentials | None] | None" = None,
    ) -> None:
        self.credentials = credentials
        self.token = token
        self.find = find if credentials is None else None


class Authenticator:
    """Authorization headers for one registry. Thread-safe.

    header() before a request, refresh() after a 401, refused() for the message when that did not help."""

    def __init__(
        self,
        client: HttpClient,
        host: str,
        login: Login | None = None,
        *,
        secure: bool = False,
        say: "Callable[[str], None] | None" = None,
    ) -> None:
        """secure: the registry is spoken to over TLS, so the token server must be too. say: gets one line when the
        login stops or begins to work."""
        login = login or Login()
        self._client = client
        self._host = host
        self._credentials = login.credentials
        self._lock = threading.Lock()
        self._first = threading.Lock()
        self._preset = f"Bearer {login.token}" if login.token else ""
        self._headers: dict[str, tuple[str, float]] = {}  # scope -> header, monotonic time of its end
        self._lives_s: dict[str, float] = {}
        self._challenge: dict[str, str] | None = None
        self._refused: dict[str, tuple[Failure, float]] = {}  # scope -> refusal, monotonic time of its end
        self._get_only = False
        self.secure = secure
        self._find_credentials = login.find
        self._not_found = ""  # why find_credentials failed
        self._say = say
        self._renewer: threading.Thread | None = None
        self._last_used = 0.0
        self.settled = False
        self.state = "unknown"  # ok, refused: what came of the last login

    @property
    def user(self) -> str:
        return self._credentials.username if self._credentials else ""

    def set_credentials(self, credentials: Credentials | None) -> None:
        """New credentials for what follows (hot reload); tokens got with the old ones are dropped."""
        with self._lock:
            self._credentials, self._find_credentials = credentials, None
            self._headers.clear()
            self._refused.clear()
            self._preset = ""
            self.state = "unknown"

    def first_request(self, deadline: float | None) -> "AbstractContextManager[None]":
        """Held by the first exchange, so that a burst of readers makes one 401 and one token, not one each."""
        return _held(self._first, deadline, self._host)

    def header(self, scope: str, deadline: float | None = None) -> str:
        """The header to send for scope, "" for none known. Renews a token that is about to end."""
        known = self._headers.get(scope)
        self._last_used = time.monotonic()
        if known and known[1] > self._last_used:
            if known[1] != float("inf") and self._renewer is None:
                self._start_renewing()
            return known[0]
        if known is None or self._challenge is None:
            return self._preset
        return self.refresh(scope, known[0], None, deadline)

    def refresh(self, scope: str, sent: str, answer: str | None, deadline: float | None = None) -> str:
        """A header other than `sent`, which was refused with WWW-Authenticate `answer` (None: it is only old).

        Raises Failure AUTH when there is none to be had."""
        with _held(self._lock, deadline, self._host):
            known = self._headers.get(scope)
            if known and known[0] != sent and known[1] > time.monotonic():
                return known[0]
            refused = self._refused.get(scope)
            if refused and refused[1] > time.monotonic():
                raise Failure(str(refused[0]), refused[0].cause)
            try:
                header, life_s = self._renew(scope, sent, answer, deadline)
            except Failure as failure:
                if failure.cause is Cause.AUTH:
                    self._refused[scope] = failure, time.monotonic() + REFUSED_FOR_S
                    self._change_state("refused", str(failure))
                raise
            self._headers[scope] = header, time.monotonic() + life_s
            self._lives_s[scope] = life_s
            self._change_state("ok", f"{self._host}: the login works again")
            return header

    def note_refusal(self, status: int) -> None:
        """A header that was just got was refused."""
        self._change_state("refused", f"{self._host}: the login is refused with status {status}")

    def _change_state(self, state: str, line: str) -> None:
        before, self.state = self.state, state
        if before != state and (before, state) != ("unknown", "ok") and self._say is not None:
            self._say(line)

    # ---- renewing ahead of time

    def _start_renewing(self) -> None:
        with self._lock:
            if self._renewer is None:
                self._renewer = threading.Thread(target=self._renew_ahead, name="token", daemon=True)
                self._renewer.start()

    def _renew_ahead(self) -> None:
        """Renews each token before its end while there is traffic. Never raises: a read that needs a token that could
        not be had tells why."""
        pause_s = RENEW_PAUSE_FIRST_S
        while time.monotonic() - self._last_used < IDLE_S:
            now = time.monotonic()
            due = [
                (end - self._ahead(scope), scope, header)
                for scope, (header, end) in list(self._headers.items())
                if end != float("inf")
            ]
            if not due:
                break
            at, scope, header = min(due)
            if at > now:
                if self._client.closing.wait(min(at - now, 5.0)):
                    break
                continue
            try:
                self.refresh(scope, header, None, now + 30)
                pause_s = RENEW_PAUSE_FIRST_S
            except Failure:
                if self._client.closing.wait(pause_s):
                    break
                pause_s = min(pause_s * 2, RENEW_PAUSE_LAST_S)
        self._renewer = None

    def _ahead(self, scope: str) -> float:
        return min(RENEW_AHEAD_S, self._lives_s.get(scope, 0.0) / 2)

    def _renew(self, scope: str, sent: str, answer: str | None, deadline: float | None) -> tuple[str, float]:
        """A new header and for how many seconds to use it. The lock is held."""
        if sent and sent == self._preset:
            self._preset = ""
        if self._find_credentials is not None:
            try:
                self._credentials, self._not_found = self._find_credentials(), ""
            except Failure as failure:
                self._credentials, self._not_found = None, str(failure)
        challenges = parse_challenges(answer or "")
        bearer = next((fields for name, fields in challenges if name == "bearer" and fields.get("realm")), None)
        if not challenges:
            bearer = self._challenge  # a stale token need not be told what is wanted
        if bearer is not None:
            self._challenge = bearer
            header, life_s = self._fetch_token(bearer, scope, deadline)
            return header, life_s - min(TOKEN_MARGIN_S, life_s / 10)
        if self._credentials is not None and any(name == "basic" for name, _ in challenges):
            header = self._credentials.basic_header()
            if header != sent:
                return header, float("inf")
        raise self.refused(scope, 401)

    def refused(self, scope: str, status: int, said: str = "") -> Failure:
        """The line for a login that did not work."""
        what = scope.partition(":")[2] or "the registry"
        name, _, actions = what.rpartition(":")
        doing = f"{'push' if 'push' in actions else 'pull'} {name}" if name else what
        said = f" ({self._credentials.hide_in(said) if self._credentials else said})" if said else ""
        if self._not_found:
            said += f" ({self._not_found})"
        if self._credentials is None:
            return Failure(
                f"{self._host}: refused to {doing} without a login{said}: give --creds USER:PASSWORD, "
                f"or log in with `docker login {self._host}`",
                Cause.AUTH,
            )
        if status == 403:
            return Failure(
                f"{self._host}: user {self.user!r} may not {doing}{said}: ask for the right, or give another user",
                Cause.AUTH,
            )
        return Failure(
            f"{self._host}: login of user {self.user!r} refused to {doing}{said}: check the password "
            "(--creds, docker's config.json, or auth in the configuration)",
            Cause.AUTH,
        )

    def _fetch_token(self, challenge: dict[str, str], scope: str, deadline: float | None) -> tuple[str, float]:
        """Authorization header and its life in seconds. The lock is held."""
        from urllib.parse import urlencode

        realm = challenge["realm"]
        if realm.partition("://")[0] not in ("http", "https"):
            raise Failure(f"{self._host}: asks for a token from {realm[:80]!r}, which is no http address", Cause.AUTH)
        if self._credentials is not None and self.secure and not realm.startswith("https://"):
            raise Failure(
                f"{self._host}: names a token server without TLS ({host_of(realm)}): the password is "
                "not sent there in clear; the registry's configuration must name an https realm",
                Cause.AUTH,
            )
        scopes = [scope]
        wanted = challenge.get("scope", "")
        if wanted and not _covers(scope, wanted):
            scopes += wanted.split()
        fields = [("service", challenge["service"])] if challenge.get("service") else []
        who = self._credentials
        retry = self._client.retry(2, deadline)
        while True:
            try:
                if who is not None and (who.identity_token or not self._get_only):
                    form = [*fields, ("client_id", CLIENT_ID), ("scope", " ".join(scopes)), *_grant(who)]
                    kind = {"Content-Type": "application/x-www-form-urlencoded"}
                    answer = self._token_call(Request("POST", realm, kind, urlencode(form).encode()), deadline)
                    if answer is not None:
                        return answer
                query = urlencode([*fields, ("client_id", CLIENT_ID), *(("scope", one) for one in scopes)])
                headers = {"Authorization": who.basic_header()} if who is not None and who.username else {}
                url = f"{realm}{'&' if '?' in realm else '?'}{query}"
                answer = self._token_call(Request("GET", url, headers), deadline)
                if answer is None:
                    raise self.refused(scope, 401)
                self._get_only = True
                return answer
            except RetriableFailure as failure:
                retry.wait(failure)

    def _token_call(self, request: Request, deadline: float | None) -> tuple[str, float] | None:
        """One call of the token server; None when it refuses (or, for POST, does not know it)."""
        import json

        url = request.url
        response = self._client.send(request, deadline=deadline)
        status = response.status
        if status in (400, 401, 403) or (request.method == "POST" and status in (404, 405, 501)):
            release(response)
            return None
        if status != 200:
            check_status(response, url, "the token server")
            release(response)
            raise Failure(f"{host_of(url)}: the token server answered with status {status}", Cause.AUTH)
        try:
            found: Any = json.loads(read_body(response, url, TOKEN_ANSWER_BYTES, deadline))
            token = found.get("token") or found.get("access_token")
            life_s = float(found.get("expires_in") or TOKEN_TTL_S)
        except (ValueError, AttributeError, TypeError) as error:
            raise Failure(f"{host_of(url)}: the token server's answer is not a token", Cause.AUTH) from error
        if not isinstance(token, str) or not token or not token.isascii() or not token.isprintable():
            raise Failure(f"{host_of(url)}: the token server's answer has no token", Cause.AUTH)
        return f"Bearer {token}", max(life_s, 1.0)


def _grant(who: Credentials) -> list[tuple[str, str]]:
    if who.identity_token:
        return [("grant_type", "refresh_token"), ("refresh_token", who.identity_token)]
    return [("grant_type", "password"), ("username", who.username), ("password", who.password)]


def _covers(scope: str, wanted: str) -> bool:
    """Whether every action of `wanted` (one or more scopes) is among those of scope."""
    name, _, actions = scope.rpartition(":")
    have = set(actions.split(","))
    for one in wanted.split():
        other, _, other_actions = one.rpartition(":")
        if other != name or not set(other_actions.split(",")) <= have:
            return False
    return True


class _held:
    """A lock taken until the deadline at the latest."""

    __slots__ = ("_deadline", "_host", "_lock")

    def __init__(self, lock: threading.Lock, deadline: float | None, host: str) -> None:
        self._lock = lock
        self._host = host
        self._deadline = deadline

    def __enter__(self) -> None:
        left = -1.0 if self._deadline is None else max(0.0, self._deadline - time.monotonic())
        if not self._lock.acquire(timeout=left):
            raise DeadlinePassed(f"{self._host}: the deadline passed while waiting for a login", Cause.NETWORK)

    def __exit__(self, *exc: object) -> None:
        self._lock.release()
