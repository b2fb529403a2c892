"""How HTTP fails: what may be tried again, and one line with its cause for each exception of the libraries below.

Light: urllib3 is imported when there is an exception of its to describe.
"""

import time

from virtiofsd_nydus.errors import Cause, Failure
from virtiofsd_nydus.net.address import host_of

SPEAKS_HTTPS = "speaks HTTPS, not plain HTTP: use https (scheme, or no --plain-http)"


class RetriableFailure(Failure):
    """A failure that another attempt may mend. after_s: what the server asked for with Retry-After. whole: the server
    fails, not one address of it alone. passed_on: by a peer or proxy, which is well itself. broke: a connection ended
    that may have been stale, so a new one may do at once."""

    def __init__(
        self,
        message: str,
        cause: Cause = Cause.NETWORK,
        after_s: float = 0.0,
        *,
        whole: bool = False,
        broke: bool = False,
        passed_on: bool = False,
    ) -> None:
        super().__init__(message, cause)
        self.after_s, self.whole, self.broke, self.passed_on = after_s, whole, broke, passed_on


class ProxyLimited(RetriableFailure):
    """The proxy itself (not the registry behind it) answered 429."""


class DeadlinePassed(Failure):
    """No time was left to ask: this says nothing about the server."""


def time_left(deadline: float | None, limit_s: float, url: str) -> float:
    """Seconds one wait for url may last: limit_s (0 = no limit) cut to the deadline. Fails when that has passed."""
    if deadline is None:
        return limit_s
    left = deadline - time.monotonic()
    if left <= 0:
        raise DeadlinePassed(f"{host_of(url)}: the deadline passed", Cause.NETWORK)
    return min(limit_s, left) if limit_s else left


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
        return RetriableFailure(f"{host}: the name cannot be resolved: {describe_error(error)}", whole=True)
    if any(isinstance(part, ConnectionRefusedError) for part in chain):
        return RetriableFailure(f"{host}: connection refused: is the server up and the port right?", whole=True)
    if any(isinstance(part, ConnectionResetError | BrokenPipeError) for part in chain):
        return RetriableFailure(f"{host}: the connection was reset", broke=True)
    if any(isinstance(part, exceptions.NewConnectionError) for part in chain):
        return RetriableFailure(f"{host}: no connection: {describe_error(error)}", whole=True)
    if any(isinstance(part, exceptions.ConnectTimeoutError) for part in chain):
        return RetriableFailure(f"{host}: no connection within the time limit", whole=True)
    if any(isinstance(part, TimeoutError | exceptions.TimeoutError) for part in chain):
        return RetriableFailure(f"{host}: no answer within the time limit")
    if any(isinstance(part, exceptions.IncompleteRead | exceptions.ProtocolError) for part in chain):
        return RetriableFailure(f"{host}: the connection broke: {describe_error(error)}", broke=True)
    return RetriableFailure(f"{host}: {describe_error(error)}")
