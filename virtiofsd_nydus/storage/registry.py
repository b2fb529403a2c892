"""Backend `registry`: blobs of a repository on an OCI registry, by ranges.

Configuration as nydusd-interface.md 4.2 has it. Light: see virtiofsd_nydus.storage.http.
"""

from virtiofsd_nydus.errors import Cause, Failure
from virtiofsd_nydus.oci.session import RegistrySession
from virtiofsd_nydus.storage import http

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from urllib3 import BaseHTTPResponse

    from virtiofsd_nydus.oci.auth import Credentials

# Retries after the first attempt: nydusd's budget (nydusd-interface.md 4.1).
RETRIES = 3
PREFETCH_RETRIES = 1
# What an address that a redirect once named answers when its time is over; the registry then names another.
STALE_STATUSES = (400, 401, 403, 404, 410)


class RegistryBackend:
    """See storage.backend.Backend."""

    kind = "registry"

    def __init__(self, client: http.HttpClient, scheme: str, host: str, repo: str, *,
                 credentials: "Credentials | None" = None, token: str = "", retries: int = RETRIES,
                 plain_fallback: bool = False, blob_url_scheme: str = "", blob_redirected_host: str = "") -> None:
        self._client = client
        self._retries = retries
        self._blob_url_scheme = blob_url_scheme
        self._blob_redirected_host = blob_redirected_host
        self.session = RegistrySession(client, scheme, host, repo, credentials=credentials, token=token,
                                       plain_fallback=plain_fallback, rewrite_redirect=self._rewrite_redirect)
        self._locations: dict[str, str] = {}    # blob id -> where the registry last sent us
        self._sizes: dict[str, int] = {}
        self._buffers: list[bytearray] = []     # list.append and pop are atomic; a reader takes one or makes one

    def set_credentials(self, credentials: "Credentials | None") -> None:
        """Hot reload of the login."""
        self.session.auth.set_credentials(credentials)

    def close(self) -> None:
        self._client.close()

    def blob_size(self, blob_id: str, *, deadline: float | None = None) -> int:
        size = self._sizes.get(blob_id)
        if size is not None:
            return size
        what = name_blob(blob_id)
        retry = self._client.retry(self._retries, deadline)
        while True:
            try:
                response, url = self._request("HEAD", blob_id, what, None, deadline)
                told = response.headers.get("Content-Length", "")
                http.release(response)
                if told.isdecimal():
                    return self._sizes.setdefault(blob_id, int(told))
                raise http.RetriableFailure(f"{http.host_of(url)}: {what}: the answer tells no size")
            except http.RetriableFailure as failure:
                retry.wait(failure)

    def read_range(self, blob_id: str, offset: int, length: int, *, prefetch: bool = False,
                   deadline: float | None = None) -> "Iterator[memoryview]":
        if offset < 0 or length < 0:
            raise ValueError(f"range of {length} bytes at {offset}")
        return self._read_range(blob_id, offset, length, PREFETCH_RETRIES if prefetch else self._retries, deadline)

    def _read_range(self, blob_id: str, offset: int, length: int, retries: int,
                    deadline: float | None) -> "Iterator[memoryview]":
        what = name_blob(blob_id)
        retry = self._client.retry(retries, deadline)
        buffer = self._buffers.pop() if self._buffers else bytearray(http.PIECE_BYTES)
        view = memoryview(buffer)
        end = offset + length
        try:
            while offset < end:
                start = offset
                try:
                    response, url, stop = self._open_range(blob_id, offset, end - offset, what, deadline)
                except http.RetriableFailure as failure:
                    retry.wait(failure)
                    continue
                try:
                    failed: http.RetriableFailure | None = None
                    while offset < stop and failed is None:
                        filled = 0
                        want = min(len(buffer), stop - offset)
                        try:
                            while filled < want:
                                piece = http.read_some(response, url, want - filled, deadline)
                                if not piece:
                                    raise http.RetriableFailure(f"{http.host_of(url)}: {what}: the answer ended "
                                                                f"{stop - offset - filled} bytes early")
                                view[filled:filled + len(piece)] = piece
                                filled += len(piece)
                        except http.RetriableFailure as failure:
                            failed = failure
                        if filled:
                            offset += filled
                            yield view[:filled]
                finally:
                    # After the last byte the connection is back in the pool already; one left half way is closed.
                    if offset < stop:
                        response.close()
                    else:
                        response.release_conn()
                if offset - start >= http.PIECE_BYTES:
                    retry.progress()
                if offset < end:
                    retry.wait(failed or http.RetriableFailure(
                        f"{http.host_of(url)}: {what}: the answer covers {stop - start} bytes, asked for "
                        f"{end - start}"))
        finally:
            view.release()
            self._buffers.append(buffer)

    def _open_range(self, blob_id: str, offset: int, length: int, what: str,
                    deadline: float | None) -> "tuple[BaseHTTPResponse, str, int]":
        """The checked answer to one range request, its address, and the blob offset at which it ends (at most
        offset + length)."""
        headers = {"Range": f"bytes={offset}-{offset + length - 1}"}
        response, url = self._request("GET", blob_id, what, headers, deadline)
        if response.status == 416:
            total = response.headers.get("Content-Range", "").rpartition("/")[2]
            http.release(response)
            raise http.short_blob(url, what, int(total) if total.isdecimal() else -1, offset, length)
        total_bytes = http.check_range(response, url, offset, length, what)
        if total_bytes is not None and self._sizes.setdefault(blob_id, total_bytes) != total_bytes:
            response.close()
            known = self._sizes.pop(blob_id, 0)
            raise http.RetriableFailure(f"{http.host_of(url)}: {what}: had {known} bytes, now has {total_bytes}")
        parsed = http.parse_content_range(response.headers.get("Content-Range", ""))
        return response, url, parsed[1] + 1 if response.status == 206 and parsed else offset + length

    def _request(self, method: str, blob_id: str, what: str, headers: dict[str, str] | None,
                 deadline: float | None) -> "tuple[BaseHTTPResponse, str]":
        """Asks where the last redirect led, else (and when that has gone stale) the registry."""
        location = self._locations.get(blob_id)
        if location is not None:
            try:
                response, url = self.session.request(method, location, what, headers=headers, deadline=deadline,
                                                     pass_statuses=(416, *STALE_STATUSES))
            except Failure:
                self._locations.pop(blob_id, None)
                raise
            if response.status not in STALE_STATUSES:
                return response, url
            http.release(response)
            self._locations.pop(blob_id, None)
        response, url = self.session.request(method, blob_path(blob_id), what, headers=headers, deadline=deadline,
                                             pass_statuses=(416,))
        # A signed address may be good for one method only, so that of a HEAD is not kept.
        if method == "GET" and not self.session.is_own(url):
            self._locations[blob_id] = url
        return response, url

    def _rewrite_redirect(self, url: str) -> str:
        if self._blob_url_scheme:
            url = f"{self._blob_url_scheme}://{url.partition('://')[2]}"
        if self._blob_redirected_host:
            scheme, _, rest = url.partition("://")
            url = f"{scheme}://{self._blob_redirected_host}/{rest.partition('/')[2]}"
        return url


def blob_path(blob_id: str) -> str:
    """Path below /v2/REPO/ of the blob with the bare hex digest blob_id."""
    if len(blob_id) != 64 or not set(blob_id) <= set("0123456789abcdef"):
        raise Failure(f"blob id {blob_id[:80]!r} is no sha256 digest: no registry can hold this blob", Cause.FORMAT)
    return f"blobs/sha256:{blob_id}"


def name_blob(blob_id: str) -> str:
    return f"blob {blob_id[:12]}"
