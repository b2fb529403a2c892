"""A repository of an OCI registry as source and destination of images (distribution specification 1.1).

Reading blobs is the storage backend's work, so that pulls have its checks, retries and resuming too."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Self
from urllib.parse import urljoin

from virtiofsd_nydus.errors import Cause, Failure
from virtiofsd_nydus.net.answers import HEAD_REFUSED, check_status, read_body, release
from virtiofsd_nydus.net.client import HttpClient, Limits, Request, Trust
from virtiofsd_nydus.net.credentials import find_docker_credentials, parse_creds
from virtiofsd_nydus.net.failures import RetriableFailure
from virtiofsd_nydus.net.hosts import find_hosts
from virtiofsd_nydus.net.login import Login
from virtiofsd_nydus.net.session import Endpoint, RegistrySession
from virtiofsd_nydus.oci.manifest import ACCEPT, DOCUMENT_BYTES, MEDIA_INDEX, Descriptor, digest_of
from virtiofsd_nydus.oci.reference import Reference, default_scheme
from virtiofsd_nydus.oci.store import Access, OnBytes
from virtiofsd_nydus.storage.blobs import read_patiently
from virtiofsd_nydus.storage.factory import make_providers
from virtiofsd_nydus.storage.registry import RegistryBackend, make_mirrors

# No guest waits for a conversion, so its limits are those of a slow registry. A PUT is answered after the registry
# has hashed and stored the whole blob.
LIMITS = Limits(read_timeout_s=30.0, connect_timeout_s=10.0)
PUT_TIMEOUT_S = 300.0
# By any of these registries say that an upload is opened or done.
UPLOAD_STATUSES = (200, 201, 202, 204)


class RegistryStore:
    """store.ImageStore of one repository. Thread-safe."""

    def __init__(self, reference: Reference, access: Access, scheme: str = "https") -> None:
        self.name = str(reference)
        self.host = reference.api_host
        self.repo = reference.repo
        self.scheme = scheme
        self.access = access
        self.credentials = parse_creds(access.creds) if access.creds else None
        hosts = find_hosts(access.hosts_dir, reference.host) if access.hosts_dir else []
        own = hosts[-1] if hosts else None
        cas = (*access.ca_cert_files, *(own.ca_cert_files if own is not None else ()))
        skip_verify = access.skip_verify or (own is not None and own.skip_verify)
        self._client = HttpClient(LIMITS, Trust(cas, skip_verify=skip_verify))
        providers = make_providers(access.provider_config, access.provider_bin_dir)
        login = Login(
            self.credentials,
            find=lambda limit_s: (
                (providers.find(reference.host, self.repo, limit_s) if providers is not None else None)
                or find_docker_credentials(reference.host, limit_s)
            ),
        )
        self._backend = RegistryBackend(
            self._client,
            Endpoint(scheme, self.host, self.repo),
            login,
            mirrors=make_mirrors(hosts, reference.host),
        )
        self._session = self._backend.session
        # Servers of hosts.toml that may tell what a tag names
        self._resolvers = [
            (
                RegistrySession(
                    HttpClient(LIMITS, Trust(one.ca_cert_files, skip_verify=one.skip_verify)),
                    Endpoint(one.scheme, one.host, self.repo, prefix=one.prefix),
                ),
                one.headers,
            )
            for one in hosts
            if one.resolve and not one.own
        ]
        self._namespace = f"?ns={reference.host}"
        self._known: set[str] = set()  # digests this repository has
        self._lock = threading.Lock()

    @classmethod
    def open(cls, reference: Reference, access: Access) -> Self:
        """Opens a repository with the login that was given, else docker's, looked up at each login. A loopback registry
        is spoken to in plain HTTP unless it turns out to want TLS."""
        scheme = default_scheme(reference.api_host, access.plain_http)
        if scheme == "http" and not access.plain_http and _wants_tls(reference.api_host):
            scheme = "https"
        return cls(reference, access, scheme)

    def close(self) -> None:
        self._backend.close()
        for session, _ in self._resolvers:
            session.client.close()

    def get_manifest(self, version: str) -> tuple[bytes, str]:
        for session, headers in self._resolvers:
            try:
                path = f"manifests/{version}{self._namespace}"
                response, url = session.request(
                    Request("GET", path, {**headers, "Accept": ACCEPT}), f"manifest of {self.name}"
                )
                media_type = response.headers.get("Content-Type", "").partition(";")[0].strip()
                data = read_body(response, url, DOCUMENT_BYTES)
            except Failure:
                continue  # the next server, and the registry itself at last, may have it
            if not version.startswith("sha256:") or digest_of(data) == version:
                return data, media_type
        retry = self._client.retry(LIMITS.retries, None)
        while True:
            try:
                request = Request("GET", f"manifests/{version}", {"Accept": ACCEPT})
                response, url = self._session.request(request, f"manifest of {self.name}")
                media_type = response.headers.get("Content-Type", "").partition(";")[0].strip()
                told = response.headers.get("Docker-Content-Digest", "")
                data = read_body(response, url, DOCUMENT_BYTES)
                break
            except RetriableFailure as failure:
                retry.wait(failure)
        if told.startswith("sha256:") and told != digest_of(data):
            raise Failure(
                f"{self.name}: the manifest does not have the digest the registry tells: damaged on the way",
                Cause.DIGEST,
            )
        return data, media_type

    def read_blob(self, descriptor: Descriptor) -> Iterator[memoryview]:
        return read_patiently(self._backend, descriptor.hex, 0, descriptor.size)

    def read_blob_range(self, descriptor: Descriptor, offset: int, length: int) -> Iterator[memoryview]:
        return read_patiently(self._backend, descriptor.hex, offset, length)

    def get_referrers(self, digest: str) -> bytes | None:
        """None where the registry has no referrers API: it answers 404 then, and some 405 or a page."""
        retry = self._client.retry(LIMITS.retries, None)
        while True:
            try:
                request = Request("GET", f"referrers/{digest}", {"Accept": MEDIA_INDEX})
                response, url = self._session.request(
                    request, f"referrers of {self.name}", pass_statuses=(400, 404, 405, 501)
                )
                media_type = response.headers.get("Content-Type", "").partition(";")[0].strip()
                if response.status >= 400 or media_type != MEDIA_INDEX:
                    release(response)
                    return None
                return read_body(response, url, DOCUMENT_BYTES)
            except RetriableFailure as failure:
                retry.wait(failure)

    def has_blob(self, descriptor: Descriptor) -> bool:
        with self._lock:
            if descriptor.digest in self._known:
                return True
        retry = self._client.retry(LIMITS.retries, None)
        while True:
            try:
                request = Request("HEAD", f"blobs/{descriptor.digest}")
                response, _ = self._session.request(
                    request, f"blob {descriptor.digest}", push=True, pass_statuses=(404, *HEAD_REFUSED)
                )
                release(response)
                if response.status in HEAD_REFUSED:
                    request = Request("GET", f"blobs/{descriptor.digest}", {"Range": "bytes=0-0"})
                    response, _ = self._session.request(
                        request, f"blob {descriptor.digest}", push=True, pass_statuses=(404, 416)
                    )
                    response.close()
                there = response.status != 404
                break
            except RetriableFailure as failure:
                retry.wait(failure)
        if there:
            self._remember(descriptor)
        return there

    def put_blob(self, descriptor: Descriptor, file: Path, on_bytes: OnBytes | None = None) -> None:
        """Monolithic upload (POST, then PUT of the whole). A broken upload starts anew."""
        what = f"upload of blob {descriptor.digest[7:19]} to {self.name}"
        retry = self._client.retry(LIMITS.retries, None)
        sent = 0

        def count(size: int) -> None:
            nonlocal sent
            sent += size
            if on_bytes is not None:
                on_bytes(size)

        while True:
            try:
                self._upload(descriptor, file, what, count)
                break
            except RetriableFailure as failure:
                if on_bytes is not None:
                    on_bytes(-sent)
                sent = 0
                retry.wait(failure)
        self._remember(descriptor)

    def put_manifest(self, data: bytes, media_type: str, tag: str | None) -> bool:
        version = digest_of(data) if tag is None else tag
        retry = self._client.retry(LIMITS.retries, None)
        while True:
            try:
                kind = {"Content-Type": media_type}
                request = Request("PUT", f"manifests/{version}", kind, data, read_timeout_s=PUT_TIMEOUT_S)
                response, _ = self._session.request(request, f"manifest of {self.name}", push=True)
                told = response.headers.get("Docker-Content-Digest", "")
                listed = bool(response.headers.get("OCI-Subject", ""))
                release(response)
                break
            except RetriableFailure as failure:
                retry.wait(failure)
        if told.startswith("sha256:") and told != digest_of(data):
            raise Failure(f"{self.name}: the registry stored another manifest than was sent ({told})", Cause.DIGEST)
        return listed

    def _upload(self, descriptor: Descriptor, file: Path, what: str, on_bytes: OnBytes) -> None:
        request = Request("POST", "blobs/uploads/", {"Content-Length": "0"})
        response, url = self._session.request(request, what, push=True)
        location = response.headers.get("Location", "")
        release(response)
        if response.status not in UPLOAD_STATUSES or not location:
            raise Failure(f"{self.host}: {what}: the registry opened no upload (status {response.status})", Cause.IO)
        location = urljoin(url, location)
        location += ("&" if "?" in location else "?") + f"digest={descriptor.digest}"
        opened: list[_CountedFile] = []

        def body() -> IO[bytes]:
            opened.append(_CountedFile(file, on_bytes))
            return opened[-1]  # type: ignore[return-value]  # has all that is used of it: read()

        try:
            kind = {"Content-Type": "application/octet-stream", "Content-Length": str(descriptor.size)}
            request = Request("PUT", location, kind, body, read_timeout_s=PUT_TIMEOUT_S)
            response, _ = self._session.request(request, what, push=True)
        finally:
            for one in opened:
                one.close()
        release(response)
        if response.status not in UPLOAD_STATUSES:
            raise Failure(f"{self.host}: {what}: unexpected status {response.status}", Cause.IO)

    def _remember(self, descriptor: Descriptor) -> None:
        with self._lock:
            self._known.add(descriptor.digest)


def _wants_tls(host: str) -> bool:
    """Whether a plain request is answered by the complaint that it is not TLS. (A HEAD would not tell.)"""
    client = HttpClient(LIMITS)
    url = f"http://{host}/v2/"
    try:
        check_status(client.send(Request("GET", url)), url, "the registry")
    except Failure as failure:
        return failure.cause is Cause.SCHEME  # whatever else is wrong the first real request will tell
    finally:
        client.close()
    return False


class _CountedFile:
    """A file that tells how much of it was read."""

    # http.client reads 16 KiB at a time by itself; larger pieces cost a third of the calls' time.
    PIECE_BYTES = 256 << 10

    def __init__(self, path: Path, on_bytes: OnBytes) -> None:
        self._file = path.open("rb", buffering=self.PIECE_BYTES)
        self._on_bytes = on_bytes

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(max(size, self.PIECE_BYTES) if size >= 0 else -1)
        self._on_bytes(len(data))
        return data

    def close(self) -> None:
        self._file.close()
