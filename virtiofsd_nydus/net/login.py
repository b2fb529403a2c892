"""Logging in to a registry: anonymous, basic and bearer tokens, for the OCI client and the storage backend alike.

The bearer flow is the one of the distribution specification (401 with WWW-Authenticate, then a token from `realm`):
with credentials POST (OAuth2) first and GET where the server does not take it, without credentials GET. Tokens are
kept per scope until shortly before they expire; of several threads that meet a 401 one fetches, the others use what
it got.
Light: the daemon reads configurations before it answers RUNNING.
"""

import threading
import time

from virtiofsd_nydus.errors import Cause, Failure
from virtiofsd_nydus.net.address import host_of, origin_of
from virtiofsd_nydus.net.answers import (
    REDIRECT_STATUSES,
    REDIRECTS_MAX,
    check_status,
    read_body,
    redirect_target,
    release,
)
from virtiofsd_nydus.net.client import HttpClient, Request
from virtiofsd_nydus.net.credentials import Credentials
from virtiofsd_nydus.net.documents import parse_json
from virtiofsd_nydus.net.failures import DeadlinePassed, RetriableFailure, time_left

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager
    from typing import Any

    from urllib3 import BaseHTTPResponse

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
# Of looking credentials up, by a program perhaps
FIND_LIMIT_S = 30.0
# The characters of schemes and parameter names in WWW-Authenticate (RFC 9110 5.6.2).
TOKEN_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789!#$%&'*+-.^_`|~")
BLANKS = frozenset(" \t")
# A token's life is believed up to this; a server that says more is asked anew after a day.
TOKEN_LIFE_MAX_S = 86400.0


def parse_challenges(text: str) -> list[tuple[str, dict[str, str]]]:
    """WWW-Authenticate to [(scheme in lower case, parameters)], in its order. What is neither is passed over. One pass:
    a server may send 64 KiB of anything."""
    out: list[tuple[str, dict[str, str]]] = []
    at = 0
    while at < len(text):
        begin, at = at, _skip(text, at, TOKEN_CHARACTERS)
        if at == begin:  # a comma, a blank, or nothing that belongs here
            at += 1
            continue
        word = text[begin:at].lower()
        at = _skip(text, at, BLANKS)
        if text[at : at + 1] != "=":
            out.append((word, {}))
            continue
        value, at = _read_value(text, _skip(text, at + 1, BLANKS))
        if out and value is not None:
            out[-1][1][word] = value
    return out


def _skip(text: str, at: int, characters: frozenset[str]) -> int:
    """Where the run of characters that begins at `at` ends."""
    while at < len(text) and text[at] in characters:
        at += 1
    return at


def _read_value(text: str, at: int) -> tuple[str | None, int]:
    """A parameter's value, quoted or not, and where it ends; None: its quotes are not closed."""
    if text[at : at + 1] != '"':
        end = at
        while end < len(text) and text[end] not in ' \t,"':
            end += 1
        return text[at:end], end
    out = []
    at += 1
    while at < len(text) and text[at] != '"':
        at += text[at] == "\\"
        out.append(text[at : at + 1])
        at += 1
    return ("".join(out) if at < len(text) else None), at + 1


def pull_scope(repo: str) -> str:
    return f"repository:{repo}:pull"


def push_scope(repo: str) -> str:
    return f"repository:{repo}:pull,push"


class Login:
    """What a registry is logged in to with. credentials: those that were given. token: a bearer token that another
    program got (nydusd's registry_token), used until it is refused. find: asked at each login where no credentials were
    given, for those may be short-lived; gets the seconds that it may take."""

    __slots__ = ("credentials", "find", "token")

    def __init__(
        self,
        credentials: Credentials | None = None,
        token: str = "",
        find: "Callable[[float], Credentials | None] | None" = None,
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
        self._denied_until: dict[str, float] = {}  # scope -> until when a 403 is not taken for an expired login
        self._wants_basic = False
        self._get_only = False
        self.secure = secure
        self._find_credentials = login.find
        self._not_found = ""  # why find_credentials failed
        self._say = say
        self._renewer: threading.Thread | None = None
        self._last_used = 0.0
        self.first_is_over = False  # of the requests: see first_request
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
            self._denied_until.clear()
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

    def renew_expired(self, scope: str, sent: str, deadline: float | None = None) -> str | None:
        """What to send instead of `sent` after a 403, by which some registries say that a login has expired: another
        header, "" for none (the registry is to say what it wants). None: there is nothing new, the 403 stands."""
        with _held(self._lock, deadline, self._host):
            known, now = self._headers.get(scope), time.monotonic()
            if known and known[0] != sent and known[1] > now:
                return known[0]
            if self._denied_until.get(scope, 0.0) > now:
                return None
            # A right that is lacking is answered the same way: it must not cost a login for each read.
            self._denied_until[scope] = now + REFUSED_FOR_S
            if sent == self._preset:
                self._preset = ""
                return ""
            try:
                header, life_s = self._renew(scope, sent, None, deadline)
            except Failure as failure:
                if failure.cause is Cause.AUTH:
                    return None
                raise
            self._headers[scope] = header, time.monotonic() + life_s
            self._lives_s[scope] = life_s
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
                limit_s = time_left(deadline, FIND_LIMIT_S, f"https://{self._host}")
                self._credentials, self._not_found = self._find_credentials(limit_s), ""
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
        if challenges:
            self._wants_basic = any(name == "basic" for name, _ in challenges)
        if self._credentials is not None and self._wants_basic:
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
                    answer = self._token_call(
                        Request("POST", realm, kind, urlencode(form).encode(), home=origin_of(realm)), deadline
                    )
                    if answer is not None:
                        return answer
                query = urlencode([*fields, ("client_id", CLIENT_ID), *(("scope", one) for one in scopes)])
                headers = {"Authorization": who.basic_header()} if who is not None and who.username else {}
                url = f"{realm}{'&' if '?' in realm else '?'}{query}"
                answer = self._token_call(Request("GET", url, headers, home=origin_of(realm)), deadline)
                if answer is None:
                    raise self.refused(scope, 401)
                self._get_only = True
                return answer
            except RetriableFailure as failure:
                retry.wait(failure)

    def _token_call(self, request: Request, deadline: float | None) -> tuple[str, float] | None:
        """One call of the token server, redirects followed; None when it refuses. To a POST many servers answer
        whatever they like (their login page, a redirect to it): all that is no token means that they do not know it."""
        is_post = request.method == "POST"
        response, url = self._send_token_request(request, deadline)
        status = response.status
        if status in (400, 401, 403) or (is_post and (status in REDIRECT_STATUSES or status in (404, 405, 501))):
            release(response)
            return None
        if status != 200:
            check_status(response, url, "the token server")
            release(response)
            raise Failure(f"{host_of(url)}: the token server answered with status {status}", Cause.AUTH)
        try:
            found: Any = parse_json(read_body(response, url, TOKEN_ANSWER_BYTES, deadline))
            token = found.get("token") or found.get("access_token")
            life_s = float(found.get("expires_in") or TOKEN_TTL_S)
        except (ValueError, AttributeError, TypeError, OverflowError) as error:
            if is_post:
                return None
            raise Failure(f"{host_of(url)}: the token server's answer is not a token", Cause.AUTH) from error
        if not isinstance(token, str) or not token or not token.isascii() or not token.isprintable():
            if is_post:
                return None
            raise Failure(f"{host_of(url)}: the token server's answer has no token", Cause.AUTH)
        return f"Bearer {token}", min(max(life_s, 1.0), TOKEN_LIFE_MAX_S)

    def _send_token_request(self, request: Request, deadline: float | None) -> "tuple[BaseHTTPResponse, str]":
        """The answer and its address. A GET follows redirects; its login goes to the realm's own origin alone."""
        from urllib.parse import urljoin

        url = request.url
        for _ in range(REDIRECTS_MAX + 1):
            response = self._client.send(request.at(url, request.home), deadline=deadline)
            if response.status not in REDIRECT_STATUSES or request.method == "POST":
                return response, url
            url = redirect_target(response, url, "the token server", urljoin)
        raise Failure(f"{host_of(request.url)}: the token server redirects without end", Cause.NETWORK)


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
