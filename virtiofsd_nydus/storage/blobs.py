"""What all HTTP backends share: a range is read in pieces from checked answers, taken up again where it broke off, and
counted. Nothing here waits before another attempt: storage/pump.py and read_patiently() do, each in its own way.

Light: urllib3 is imported at the first request.
"""

import time

from virtiofsd_nydus.errors import Cause, Failure
from virtiofsd_nydus.net.address import host_of
from virtiofsd_nydus.net.answers import PIECE_BYTES, check_range, parse_content_range, read_some, release, short_blob
from virtiofsd_nydus.net.client import HttpClient, Retry, Through
from virtiofsd_nydus.net.documents import parse_size
from virtiofsd_nydus.net.failures import ProxyLimited, RetriableFailure
from virtiofsd_nydus.storage.backoff import Backoff
from virtiofsd_nydus.storage.meter import BackendMeter

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from urllib3 import BaseHTTPResponse

    from virtiofsd_nydus.net.client import Proxy

# Attempts of one read that go another way at once: on a mirror, to the registry where a redirect led to nothing.
ELSEWHERE_MAX = 3
# An answer that brings less than this in a read timeout is given up: a byte now and then is no progress.
PROGRESS_BYTES = 4096
# So much in one piece is handed on as it came; less is gathered first, lest calls count.
WHOLE_PIECE_BYTES = 32 << 10


class HttpBackend:
    """See storage.backend.Backend. A subclass says by _request() how a blob is asked for."""

    kind = ""

    def __init__(self, client: HttpClient, where: str, say: "Callable[[str], None] | None" = None) -> None:
        """where: names the server in messages. say: gets lines about servers that come and go."""
        self._client = client
        self._retries = client.limits.retries
        self.say = say
        self.meter = BackendMeter(self.kind)
        self.source = f"{self.kind} {where}"
        self.backoff = Backoff(self.source, say)
        self._sizes: dict[str, int] = {}
        self._distrusted: set[str] = set()
        self._buffers: list[bytearray] = []  # list.append and pop are atomic; a reader takes one or makes one

    # ---- for subclasses

    def _request(
        self,
        method: str,
        blob_id: str,
        what: str,
        headers: dict[str, str],
        through: Through,
        deadline: float | None,
    ) -> "tuple[BaseHTTPResponse, str]":
        """One answer (status 2xx or 416, unread) for the blob and the address that gave it. Raises Failure, and
        RetriableFailure where another attempt may help."""
        raise NotImplementedError

    def _broke(self, blob_id: str, url: str, failure: Failure) -> bool:
        """An answer from url was wrong or broke off half way. True: the next attempt goes elsewhere."""
        return False

    def distrust(self, blob_id: str) -> None:
        """Bytes of the blob were not the image's: proxies and mirrors are left out for it from now on."""
        self._distrusted.add(blob_id)

    def status(self) -> "dict[str, object]":
        """Health, for the API: no secrets."""
        found: dict[str, object] = {"breaker": self.backoff.state}
        proxy = self._client.proxy
        if proxy is not None:
            found["proxy"] = proxy.status()
        return found

    def set_proxy(self, proxy: "Proxy | None") -> None:
        """Hot change: what follows goes by proxy; the settings of the former one but its address hold on."""
        self._client.set_proxy(proxy)

    # ---- storage.backend.Backend

    def prepare(self) -> None:
        self._client.prepare()

    def close(self) -> None:
        self._client.close()

    def blob_size(self, blob_id: str, *, deadline: float | None = None) -> int:
        size = self._sizes.get(blob_id)
        if size is not None:
            return size
        what = name_blob(blob_id)
        retry = self.retry(deadline)
        through = self._start(blob_id, False)
        while True:
            try:
                size = self._ask_size(blob_id, what, through, deadline)
                self.backoff.succeeded(blob_id)
                return self._sizes.setdefault(blob_id, size)
            except RetriableFailure as failure:
                self.backoff.failed(blob_id, failure)
                if not self._goes_round(blob_id, failure, through):
                    retry.wait(failure)

    def retry(self, deadline: float | None) -> Retry:
        """Attempts for a caller who waits between them; retry_limit bounds them."""
        return self._client.retry(self._retries, deadline)

    def _ask_size(self, blob_id: str, what: str, through: Through, deadline: float | None) -> int:
        """The size that a HEAD tells or, of a server that serves none, the answer to a range."""
        try:
            response, url = self._request("HEAD", blob_id, what, {}, through, deadline)
        except Failure as failure:
            if failure.cause is not Cause.IO:
                raise
            answer = self._open_range(blob_id, 0, 1, what, through, deadline)
            answer.end()
            size = self._sizes.get(blob_id)
            if size is None:
                raise RetriableFailure(f"{host_of(answer.url)}: {what}: no answer tells its size") from failure
            return size
        told_bytes = parse_size(response.headers.get("Content-Length", ""))
        release(response)
        if told_bytes is None:
            raise RetriableFailure(f"{host_of(url)}: {what}: the answer tells no size")
        return told_bytes

    def read_range(
        self, blob_id: str, offset: int, length: int, *, prefetch: bool = False, deadline: float | None = None
    ) -> "Iterator[memoryview]":
        if offset < 0 or length < 0:
            raise ValueError(f"range of {length} bytes at {offset}")
        return self._read_range(blob_id, offset, length, prefetch, deadline)

    def _read_range(
        self, blob_id: str, offset: int, length: int, prefetch: bool, deadline: float | None
    ) -> "Iterator[memoryview]":
        what = name_blob(blob_id)
        through = self._start(blob_id, prefetch)
        buffer = self._buffers.pop() if self._buffers else bytearray(PIECE_BYTES)
        view = memoryview(buffer)
        end = offset + length
        hurried = 0  # attempts made at once though hardly any bytes had come
        try:
            while offset < end:
                start, began_s = offset, time.monotonic()
                try:
                    answer = self._open_range(blob_id, offset, end - offset, what, through, deadline)
                except Failure as failure:
                    self.meter.record(began_s, end - offset, failure.cause.name.lower())
                    if not isinstance(failure, RetriableFailure):
                        raise
                    if not self._goes_round(blob_id, failure, through):
                        if hurried or not failure.broke:
                            raise
                        hurried += 1
                    continue
                failed: RetriableFailure | None = None
                try:
                    for piece in answer.read(view, self._client.limits.read_timeout_s, deadline):
                        offset += len(piece)
                        self.meter.receive(len(piece))
                        yield piece
                except RetriableFailure as failure:
                    failed = failure
                finally:
                    answer.end()
                    self.meter.record(began_s, end - start, "network" if failed else "")
                if offset < end:
                    failed = failed or RetriableFailure(
                        f"{host_of(answer.url)}: {what}: the answer covers {answer.stop - start} bytes, asked for "
                        f"{end - start}",
                        broke=True,
                    )
                    elsewhere = self._broke(blob_id, answer.url, failed) or self._goes_round(blob_id, failed, through)
                    if offset - start < PIECE_BYTES:
                        if hurried >= (ELSEWHERE_MAX if elsewhere else failed.broke):
                            raise failed
                        hurried += 1
        finally:
            view.release()
            self._buffers.append(buffer)

    def _start(self, blob_id: str, prefetch: bool) -> Through:
        through = Through(prefetch)
        through.bypass = blob_id in self._distrusted
        return through

    def _goes_round(self, blob_id: str, failure: RetriableFailure, through: Through) -> bool:
        """Whether the next attempt goes round the proxy, at once: when the proxy has no room for it, or when so many
        attempts in a row failed by it. Raises when too many requests have gone round it: one may after a while."""
        proxy = self._client.proxy
        if proxy is None or through.prefetch or through.bypass:
            return False
        if not isinstance(failure, ProxyLimited) and self.backoff.failures(blob_id) + 1 < self._retries:
            return False
        pause_s = proxy.pass_by()
        if pause_s:
            raise RetriableFailure(str(failure), failure.cause, max(pause_s, failure.after_s)) from failure
        through.bypass = True
        return True

    def _open_range(
        self, blob_id: str, offset: int, length: int, what: str, through: Through, deadline: float | None
    ) -> "_RangeAnswer":
        """The checked answer to one range request; it may be shorter than length."""
        headers = {"Range": f"bytes={offset}-{offset + length - 1}"}
        response, url = self._request("GET", blob_id, what, headers, through, deadline)
        try:
            if response.status == 416:
                total = parse_size(response.headers.get("Content-Range", "").rpartition("/")[2])
                release(response)
                raise short_blob(url, what, -1 if total is None else total, offset, length)
            total_bytes = check_range(response, url, offset, length, what)
        except Failure as failure:
            elsewhere = self._broke(blob_id, url, failure)
            if isinstance(failure, RetriableFailure):
                raise
            if not elsewhere and (self._client.proxy is None or through.bypass):
                raise
            through.bypass = through.bypass or not elsewhere  # what stands between may be at fault
            raise RetriableFailure(str(failure), failure.cause, broke=True) from failure
        if total_bytes is not None and self._sizes.setdefault(blob_id, total_bytes) != total_bytes:
            response.close()
            known = self._sizes.pop(blob_id, 0)
            raise RetriableFailure(f"{host_of(url)}: {what}: had {known} bytes, now has {total_bytes}")
        parsed = parse_content_range(response.headers.get("Content-Range", ""))
        stop = parsed[1] + 1 if response.status == 206 and parsed else offset + length
        return _RangeAnswer(response, url, what, offset, stop)


class _RangeAnswer:
    """A checked answer that is being read: bytes [at, stop) of the blob are to come."""

    __slots__ = ("_at", "_response", "_what", "stop", "url")

    def __init__(self, response: "BaseHTTPResponse", url: str, what: str, start: int, stop: int) -> None:
        self._response = response
        self._what = what
        self._at = start
        self.url = url
        self.stop = stop

    def read(self, view: memoryview, limit_s: float, deadline: float | None) -> "Iterator[memoryview]":
        """Yields the bytes in order; a piece is valid until the next is asked for. view: memory to gather small pieces
        in. Raises RetriableFailure once all that came before it is handed over."""
        pace = _Pace(limit_s)
        while self._at < self.stop:
            piece, failure = self._gather(view, pace, deadline)
            self._at += len(piece)
            if piece:
                yield piece
            if failure is not None:
                raise failure

    def _gather(
        self, view: memoryview, pace: "_Pace", deadline: float | None
    ) -> "tuple[memoryview, RetriableFailure | None]":
        """The next bytes, as many as view holds or as came in one large piece, and what kept more from coming."""
        filled, want = 0, min(len(view), self.stop - self._at)
        try:
            while filled < want:
                piece = read_some(self._response, self.url, want - filled, deadline)
                if not piece:
                    raise RetriableFailure(
                        f"{host_of(self.url)}: {self._what}: the answer ended {self.stop - self._at - filled} bytes "
                        "early",
                        broke=True,
                    )
                pace.check(len(piece), self.url, self._what)
                if not filled and len(piece) >= WHOLE_PIECE_BYTES:
                    return memoryview(piece), None
                view[filled : filled + len(piece)] = piece
                filled += len(piece)
        except RetriableFailure as failure:
            return view[:filled], failure
        return view[:filled], None

    def end(self) -> None:
        """After the last byte the connection is in the pool again; one that was left half way is closed."""
        if self._at < self.stop:
            self._response.close()
        else:
            self._response.release_conn()


class _Pace:
    """Whether an answer keeps coming."""

    __slots__ = ("_bytes", "_limit_s", "_since_s")

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s  # 0: no limit
        self._since_s = time.monotonic()
        self._bytes = 0

    def check(self, more_bytes: int, url: str, what: str) -> None:
        self._bytes += more_bytes
        if not self._limit_s or time.monotonic() - self._since_s < self._limit_s:
            return
        if self._bytes < PROGRESS_BYTES:
            raise RetriableFailure(
                f"{host_of(url)}: {what}: the answer trickles: {self._bytes} bytes in "
                f"{time.monotonic() - self._since_s:.1f} s"
            )
        self._since_s, self._bytes = time.monotonic(), 0


def read_patiently(
    backend: HttpBackend,
    blob_id: str,
    offset: int,
    length: int,
    *,
    prefetch: bool = False,
    deadline: float | None = None,
) -> "Iterator[memoryview]":
    """The range, for a caller who may wait between attempts; retry_limit of them fail before it does."""
    retry = backend.retry(deadline)
    end = offset + length
    while offset < end:
        start = offset
        try:
            for piece in backend.read_range(blob_id, offset, end - offset, prefetch=prefetch, deadline=deadline):
                offset += len(piece)
                if offset - start >= PIECE_BYTES:
                    backend.backoff.succeeded(blob_id)
                yield piece
            backend.backoff.succeeded(blob_id)
        except RetriableFailure as failure:
            failure.after_s = max(failure.after_s, backend.backoff.failed(blob_id, failure) - time.monotonic())
            if offset - start >= PIECE_BYTES:
                retry.progress()
            retry.wait(failure)


def name_blob(blob_id: str) -> str:
    return f"blob {blob_id[:12]}"
