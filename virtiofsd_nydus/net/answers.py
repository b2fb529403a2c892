"""Answers to HTTP requests: their status, their range and their body, checked before a byte is used.

Light: urllib3 is imported where its exceptions are caught.
"""

import time

from virtiofsd_nydus.errors import Cause, Failure
from virtiofsd_nydus.net.address import host_of, parse_address, path_of
from virtiofsd_nydus.net.deadline import wait_until
from virtiofsd_nydus.net.documents import parse_json, parse_size
from virtiofsd_nydus.net.dragonfly import is_backends
from virtiofsd_nydus.net.failures import SPEAKS_HTTPS, RetriableFailure, classify_error

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from urllib3 import BaseHTTPResponse

# One read hands over this much: small enough that decoding starts early, large enough that calls do not count.
PIECE_BYTES = 256 << 10
# An error body is read for its first words only.
ERROR_BODY_BYTES = 4096
# So long the words of an error, or the rest of an answer that is not wanted, are waited for.
DRAIN_LIMIT_S = 1.0
RETRY_AFTER_MAX_S = 30.0
REDIRECTS_MAX = 5
REDIRECT_STATUSES = frozenset((301, 302, 303, 307, 308))
# What servers answer to a HEAD that they do not know.
HEAD_REFUSED = (400, 405, 501)
RETRY_STATUSES = frozenset((408, 425, 429))  # and all from 500 on
# How servers written in Go and nginx answer plain HTTP on a TLS port.
PLAIN_TO_TLS_WORDS = ("HTTP request to an HTTPS server", "plain HTTP request was sent to HTTPS")


def release(response: "BaseHTTPResponse") -> None:
    """Gives the connection back when little of the body is left, else closes it."""
    import urllib3

    try:
        left = response.length_remaining  # 0 for HEAD, whatever Content-Length says
        if left is not None and left <= ERROR_BODY_BYTES:
            wait_until(time.monotonic() + DRAIN_LIMIT_S)
            response.drain_conn()
            response.release_conn()
            return
    except (urllib3.exceptions.HTTPError, OSError):
        pass
    response.close()


def decode_body(data: bytes, encoding: str, url: str, limit_bytes: int) -> bytes:
    """What a body of Content-Encoding `encoding` stands for. Raises Failure (FORMAT)."""
    import zlib

    if encoding not in ("gzip", "x-gzip", "deflate"):
        raise Failure(f"{host_of(url)}: the answer to {path_of(url)} is encoded as {encoding[:40]!r}", Cause.FORMAT)
    inflater = zlib.decompressobj(15 if encoding == "deflate" else 31)
    try:
        out = inflater.decompress(data, limit_bytes + 1)
    except zlib.error:
        raise RetriableFailure(f"{host_of(url)}: the answer to {path_of(url)} does not decode") from None
    if len(out) > limit_bytes or not inflater.eof:
        raise Failure(
            f"{host_of(url)}: the answer to {path_of(url)} is larger than {limit_bytes} bytes, or cut", Cause.FORMAT
        )
    return out


def read_some(response: "BaseHTTPResponse", url: str, size_bytes: int, deadline: float | None = None) -> bytes:
    """What one wait on the socket brings, at most size_bytes; b"" at the end. The wait ends at the deadline: a
    server that sends a byte now and then cannot stretch it."""
    import http.client

    import urllib3

    try:
        if deadline is not None and deadline <= time.monotonic():
            raise RetriableFailure(f"{host_of(url)}: the deadline passed while the answer was arriving")
        wait_until(deadline)
        return response.read1(size_bytes)
    except (urllib3.exceptions.HTTPError, http.client.HTTPException, OSError, ValueError) as error:
        response.close()
        raise classify_error(error, url) from error
    except Failure:
        response.close()
        raise


def read_body(response: "BaseHTTPResponse", url: str, limit_bytes: int, deadline: float | None = None) -> bytes:
    """Reads the whole body, decoded where the server encoded it unasked. It must not pass limit_bytes."""
    data = read_stored(response, url, limit_bytes, deadline)
    return data if is_plain(response) else decode_body(data, encoding_of(response), url, limit_bytes)


def encoding_of(response: "BaseHTTPResponse") -> str:
    return response.headers.get("Content-Encoding", "").strip().lower()


def is_plain(response: "BaseHTTPResponse") -> bool:
    """Whether the body's bytes are those of the thing itself."""
    return encoding_of(response) in ("", "identity")


def read_stored(response: "BaseHTTPResponse", url: str, limit_bytes: int, deadline: float | None) -> bytes:
    """Reads the whole body as it came."""
    out = bytearray()
    while piece := read_some(response, url, min(PIECE_BYTES, limit_bytes + 1 - len(out)), deadline):
        out += piece
        if len(out) > limit_bytes:
            response.close()
            raise Failure(
                f"{host_of(url)}: the answer to {path_of(url)} is larger than {limit_bytes} bytes", Cause.FORMAT
            )
    return bytes(out)


def error_text(response: "BaseHTTPResponse", url: str) -> str:
    """The first words of an error answer, on one line. Ends the response."""
    import urllib3

    wait_until(time.monotonic() + DRAIN_LIMIT_S)
    try:
        data = response.read1(ERROR_BODY_BYTES) or b""
    except (urllib3.exceptions.HTTPError, OSError):
        data = b""
    response.close()
    text = data.decode("utf-8", "replace")
    try:
        errors = parse_json(text)["errors"]
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
    if status in RETRY_STATUSES or (status >= 500 and status not in HEAD_REFUSED):
        after_s = parse_size(response.headers.get("Retry-After", "")) or 0
        raise RetriableFailure(
            f"{where}: status {status}{said}",
            after_s=min(after_s, RETRY_AFTER_MAX_S),
            whole=status in (429, 503),
            passed_on=is_backends(response.headers),
        )
    raise Failure(f"{where}: unexpected status {status}{said}", Cause.IO)


def redirect_target(response: "BaseHTTPResponse", url: str, what: str, join: "Callable[[str, str], str]") -> str:
    """Where a redirect from url leads. Ends the response."""
    location = response.headers.get("Location", "")
    release(response)
    if not location:
        raise RetriableFailure(f"{host_of(url)}: {what}: a redirect without an address")
    try:
        return parse_address(join(url, location)).url
    except (Failure, ValueError):
        where = ascii(location.partition("?")[0][:60])
        raise Failure(
            f"{host_of(url)}: {what}: redirected to {where}, which is no http address", Cause.NETWORK
        ) from None


def check_range(response: "BaseHTTPResponse", url: str, offset: int, length: int, what: str) -> int | None:
    """Checks the answer to `Range: bytes=offset-(offset+length-1)` before a byte of it is used.

    Returns the total size where told. An answer that is shorter than asked is taken (the rest is asked for anew);
    one that is longer, elsewhere or without a range raises."""
    headers = response.headers
    told = headers.get("Content-Length", "")
    told_bytes = parse_size(told)
    if not is_plain(response):
        response.close()
        raise RetriableFailure(
            f"{host_of(url)}: {what}: the answer is encoded ({encoding_of(response)[:40]!r}), though none was asked for"
        )
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
    if wrong:
        response.close()
        raise RetriableFailure(
            f"{host_of(url)}: {what}: asked for {length} bytes at {offset}, the answer is "
            f"labelled {content_range[:60]!r}, length {told[:20]!r}"
        )
    if total is not None and total < offset + length:
        response.close()
        raise short_blob(url, what, total, offset, length)
    return total


def parse_content_range(text: str) -> tuple[int, int, int | None] | None:
    """(first, last, total or None) of `bytes 0-9/100`; None for anything else."""
    unit, _, rest = text.strip().partition(" ")
    span, slash, total = rest.strip().partition("/")
    first, dash, last = span.partition("-")
    begin, end, size = parse_size(first), parse_size(last), parse_size(total)
    if unit.lower() != "bytes" or not slash or not dash or begin is None or end is None or end < begin:
        return None
    if total == "*":
        return begin, end, None
    return (begin, end, size) if size is not None and end < size else None


def short_blob(url: str, what: str, size: int, offset: int, length: int) -> Failure:
    return Failure(
        f"{host_of(url)}: {what} has {size} bytes, the image wants {length} at {offset}: "
        "the blob is not the one the image was made with",
        Cause.FORMAT,
    )
