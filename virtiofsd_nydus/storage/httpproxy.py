"""Backend `http-proxy`: any HTTP server, or a program behind a unix socket, that answers ranges of blobs.

Configuration as nydusd has it (docs/operations.md). Light: urllib3 is imported at the first request.
"""

from virtiofsd_nydus.errors import Cause, Failure
from virtiofsd_nydus.net.address import host_of
from virtiofsd_nydus.net.client import HttpClient, Request, Through, request_following
from virtiofsd_nydus.storage.blobs import HttpBackend
from virtiofsd_nydus.storage.localfs import BLOB_ID_CHARACTERS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from urllib3 import BaseHTTPResponse


# The address of what is behind a unix socket: HTTP needs a host.
UNIX_BASE = "http://localhost"


class HttpProxyBackend(HttpBackend):
    """See storage.backend.Backend. Address of a blob: ADDR PATH /ID; on a unix socket without a path just /, as nydusd
    asks there: such a socket serves one blob."""

    kind = "http-proxy"

    def __init__(
        self,
        client: HttpClient,
        address: str,
        path: str = "",
        *,
        unix: bool = False,
        say: "Callable[[str], None] | None" = None,
    ) -> None:
        """address: http(s)://HOST[:PORT]; for a unix socket (which client is bound to) its path, for messages."""
        super().__init__(client, address if unix else host_of(address), say)
        path = "/" + path.strip("/") if path.strip("/") else ""
        self._base = (UNIX_BASE if unix else address.rstrip("/")) + path
        self._whole = unix and not path

    def _request(
        self,
        method: str,
        blob_id: str,
        what: str,
        headers: dict[str, str],
        through: Through,
        deadline: float | None,
    ) -> "tuple[BaseHTTPResponse, str]":
        url = self._base + "/" if self._whole else f"{self._base}/{check_blob_id(blob_id)}"
        return request_following(self._client, Request(method, url, headers), what, through, deadline)


def check_blob_id(blob_id: str) -> str:
    """The id comes from an image: it must not lead out of its place."""
    if not 1 <= len(blob_id) <= 64 or not BLOB_ID_CHARACTERS.issuperset(blob_id):
        raise Failure(f"blob id {blob_id[:80]!r} is not one: letters, digits, - and _ only", Cause.FORMAT)
    return blob_id
