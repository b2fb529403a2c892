"""Backends `s3` and `oss`: blobs as objects of a bucket, each request signed.

s3 is signed by botocore (AWS's own signer, Signature Version 4; imported with the first request), oss by the HMAC that
the service documents (header `Authorization: OSS id:signature`; the tests hold it against the vendor's library).
Configuration as nydusd has it (docs/operations.md). Light: urllib3 is imported at the first
request.
"""

import threading
import time

from virtiofsd_nydus.errors import Cause, Failure
from virtiofsd_nydus.net.address import host_of, origin_of
from virtiofsd_nydus.net.answers import REDIRECT_STATUSES, check_status, error_text, release
from virtiofsd_nydus.net.client import HttpClient, Request, Through
from virtiofsd_nydus.storage.blobs import HttpBackend
from virtiofsd_nydus.storage.httpproxy import check_blob_id

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from urllib3 import BaseHTTPResponse

S3_ENDPOINT = "s3.amazonaws.com"
# Clock differences beyond this are refused by S3 (15 minutes); the answer tells the server's time.
SKEW_WORDS = ("RequestTimeTooSkewed",)


class Bucket:
    """Where objects are. endpoint: a host. path_style: the bucket's name stands in the path, not in the host. region:
    s3's."""

    __slots__ = ("base", "name", "prefix", "region")

    def __init__(
        self, scheme: str, endpoint: str, name: str, prefix: str = "", *, path_style: bool = False, region: str = ""
    ) -> None:
        self.base = f"{scheme}://{endpoint}/{name}" if path_style else f"{scheme}://{name}.{endpoint}"
        self.name = name
        self.prefix = prefix
        self.region = region


class Keys:
    """What requests are signed with. Never shows its secrets."""

    __slots__ = ("id", "secret", "session_token")

    def __init__(self, id: str = "", secret: str = "", session_token: str = "") -> None:
        self.id, self.secret, self.session_token = id, secret, session_token

    def __repr__(self) -> str:
        return f"Keys({self.id!r}, ...)"

    def hide_in(self, text: str) -> str:
        """text without these secrets, should a server have sent them back."""
        for secret in (self.secret, self.session_token):
            if len(secret) >= 4:
                text = text.replace(secret, "***")
        return text


class ObjectBackend(HttpBackend):
    """One bucket. See storage.backend.Backend."""

    def __init__(
        self, client: HttpClient, bucket: Bucket, keys: Keys, say: "Callable[[str], None] | None" = None
    ) -> None:
        super().__init__(client, f"bucket {bucket.name} at {host_of(bucket.base)}", say)
        self._bucket = bucket
        self._keys = keys

    def _sign(self, method: str, url: str, key: str, headers: dict[str, str]) -> dict[str, str]:
        """The headers with the signature's."""
        raise NotImplementedError

    def _request(
        self,
        method: str,
        blob_id: str,
        what: str,
        headers: dict[str, str],
        through: Through,
        deadline: float | None,
    ) -> "tuple[BaseHTTPResponse, str]":
        from urllib.parse import quote

        key = self._bucket.prefix + check_blob_id(blob_id)
        url = f"{self._bucket.base}/{quote(key, safe='/~')}"
        request = Request(method, url, self._sign(method, url, key, headers), home=origin_of(self._bucket.base))
        response = self._client.send(request, deadline=deadline, through=through)
        if response.status < 300 or response.status == 416:
            return response, url
        if response.status in REDIRECT_STATUSES:
            # A signature holds for one host, so a redirect is a wrong region or endpoint, not a way to go.
            region = response.headers.get("x-amz-bucket-region", "")
            release(response)
            raise Failure(
                f"{host_of(url)}: bucket {self._bucket.name} is elsewhere"
                f"{f' (region {region})' if region else ''}: set endpoint and region to its own",
                Cause.NETWORK,
            )
        if response.status in (400, 403):
            raise self._refused(response, url, what)
        check_status(response, url, what)
        release(response)
        raise Failure(f"{host_of(url)}: {what}: unexpected status {response.status}", Cause.IO)

    def _refused(self, response: "BaseHTTPResponse", url: str, what: str) -> Failure:
        status = response.status
        text = self._keys.hide_in(error_text(response, url))
        code = find_code(text)
        said = f" ({code or text[:80]})" if text else ""
        who = f"key {self._keys.id!r}" if self._keys.id else "nobody (no key is configured)"
        if code in SKEW_WORDS:
            return Failure(f"{host_of(url)}: the clock of this machine is wrong{said}", Cause.AUTH)
        if status == 400 and "Token" not in code and "Auth" not in code:
            return Failure(f"{host_of(url)}: {what}: unexpected status 400{said}", Cause.IO)
        return Failure(
            f"{host_of(url)}: {what}: refused to {who}{said}: check access_key_id and "
            f"access_key_secret, and what they may read of bucket {self._bucket.name}",
            Cause.AUTH,
        )


def find_code(text: str) -> str:
    """The code of an error as S3 and OSS answer it in XML; "": none."""
    code = text.partition("<Code>")[2].partition("</Code>")[0].strip()
    return code if len(code) <= 64 and code.isascii() and code.replace(".", "").isalpha() else ""


class S3Backend(ObjectBackend):
    """Any S3-compatible service."""

    kind = "s3"

    def __init__(
        self, client: HttpClient, bucket: Bucket, keys: Keys, say: "Callable[[str], None] | None" = None
    ) -> None:
        super().__init__(client, bucket, keys, say)
        self._import_lock = threading.Lock()

    def _sign(self, method: str, url: str, key: str, headers: dict[str, str]) -> dict[str, str]:
        keys = self._keys
        if not keys.id:
            return headers
        with self._import_lock:  # one thread pays for the import, not eight at once
            from botocore.auth import S3SigV4Auth
            from botocore.awsrequest import AWSRequest
            from botocore.credentials import Credentials

        request = AWSRequest(method=method, url=url, headers=dict(headers))
        who = Credentials(keys.id, keys.secret, keys.session_token or None)
        S3SigV4Auth(who, "s3", self._bucket.region).add_auth(request)
        return dict(request.headers.items())


class OssBackend(ObjectBackend):
    """Alibaba Cloud's Object Storage Service."""

    kind = "oss"

    def _sign(self, method: str, url: str, key: str, headers: dict[str, str]) -> dict[str, str]:
        import binascii
        import hmac
        from email.utils import formatdate

        signed = {**headers, "Date": formatdate(time.time(), usegmt=True)}
        extra, keys = "", self._keys
        if keys.session_token:
            signed["x-oss-security-token"] = keys.session_token
            extra = f"x-oss-security-token:{keys.session_token}\n"
        # Always signed, even with empty keys, as nydusd does.
        text = f"{method}\n\n\n{signed['Date']}\n{extra}/{self._bucket.name}/{key}"
        mac = hmac.new(keys.secret.encode(), text.encode(), "sha1").digest()
        signed["Authorization"] = f"OSS {keys.id}:{binascii.b2a_base64(mac, newline=False).decode()}"
        return signed
