"""A registry in memory with the habits of others: what docker-registry does not do (the referrers API), and what real
registries are known for (their logins, redirects, refusals). Habits are set one by one, or by a registry's name
(HABITS).

Plain HTTP on loopback. Every request is recorded.
"""

import base64
import contextlib
import http.server
import json
import re
import socket
import threading
import urllib.parse
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple, Self

STORAGE = "/storage/"
MEDIA_INDEX = "application/vnd.oci.image.index.v1+json"


class Seen(NamedTuple):
    method: str
    path: str
    headers: dict[str, str]
    status: int


@dataclass(frozen=True)
class Habits:
    """referrers: the API of the distribution specification. redirect: blobs are had from a storage server, whose signed
    addresses are good for so many requests (0: for ever), then answer with expired_status. storage_refuses_login: it
    answers 400 to a request that brings an Authorization header. basic: USER:PASSWORD, each time. token: of
    USER:PASSWORD ("" for anyone) by a token server; token_key: the name of the token in its answer; token_get: POST is
    not known. token_uses: requests it is good for. challenges: what 401 asks for beside Bearer. head: whether HEAD of
    blobs is served. range_status: what a range gets instead of 206. limited: so many requests are answered 429 with
    Retry-After retry_after. encode: manifests come with this Content-Encoding. chunked: bodies have no length. http10:
    answers are HTTP/1.0."""

    referrers: bool = True
    redirect: int | None = None
    expired_status: int = 403
    storage_refuses_login: bool = False
    basic: str = ""
    token: str | None = None
    token_key: str = "token"
    token_get: bool = False
    token_uses: int = 1 << 30
    expired_login_status: int = 401
    challenges: str = ""
    head: bool = True
    range_status: int = 206
    limited: int = 0
    retry_after: str = "0"
    encode: str = ""
    chunked: bool = False
    http10: bool = False
    extra: dict[str, str] = field(default_factory=dict)


# What each is known for, as its documentation and its users tell.
HABITS = {
    "Docker Hub": Habits(referrers=False, token="", token_get=True, redirect=2, limited=1),
    "Harbor": Habits(token="user:word", challenges='Basic realm="harbor"', expired_login_status=401),
    "ECR": Habits(basic="AWS:token", redirect=2, expired_login_status=403),
    "GCR": Habits(referrers=False, token="oauth2accesstoken:word", redirect=0, head=False),
    "ACR": Habits(token="user:word", token_key="access_token", redirect=3, storage_refuses_login=True),
    "Quay": Habits(token="user+robot:word", redirect=1, token_uses=3),
    "Nexus": Habits(referrers=False, basic="user:word", chunked=True, challenges='Basic realm="Sonatype Nexus"'),
    "Artifactory": Habits(basic="user:word", http10=True, encode="gzip"),
}


class MemoryRegistry:
    """A context manager. host: HOST:PORT; storage: the server that redirects lead to, of another origin."""

    def __init__(self, habits: Habits | None = None, *, family: int = socket.AF_INET) -> None:
        self.habits = habits or Habits()
        self.blobs: dict[str, bytes] = {}
        self.manifests: dict[str, tuple[str, bytes]] = {}  # digest -> media type, bytes
        self.tags: dict[str, str] = {}
        self.uploads: dict[str, bytes] = {}
        self.seen: list[Seen] = []
        self.down = False  # connections are closed without an answer
        self._signed: dict[str, int] = {}
        self._tokens: dict[str, int] = {}
        self._lock = threading.Lock()
        self._servers = [_Server(self, family), _Server(self, family)]
        self.host, self.storage = (one.host for one in self._servers)

    def __enter__(self) -> Self:
        for server in self._servers:
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def change(self, **habits: Any) -> None:
        self.habits = replace(self.habits, **habits)

    def load(self, layout: Path, tag: str) -> None:
        """Takes an image of an OCI layout in, past all habits."""
        for path in (layout / "blobs/sha256").iterdir():
            self.blobs[f"sha256:{path.name}"] = path.read_bytes()
        for entry in json.loads((layout / "index.json").read_text())["manifests"]:
            if entry["annotations"]["org.opencontainers.image.ref.name"] == tag:
                self.tags[tag] = entry["digest"]
                self.manifests[entry["digest"]] = entry["mediaType"], self.blobs[entry["digest"]]

    def gets(self, part: str) -> int:
        """GETs that were answered with bytes, of paths that have this part."""
        return sum(1 for one in self.seen if one.method == "GET" and part in one.path and one.status in (200, 206))

    # ---- answers (called by the handlers)

    def take_token(self, value: str) -> bool:
        with self._lock:
            left = self._tokens.get(value, 0)
            self._tokens[value] = left - 1
            return left > 0

    def make_token(self) -> str:
        with self._lock:
            token = f"token-{len(self._tokens)}"
            self._tokens[token] = self.habits.token_uses
            return token

    def sign(self) -> str:
        with self._lock:
            name = str(len(self._signed))
            self._signed[name] = self.habits.redirect or 1 << 30
            return name

    def take_signature(self, name: str) -> bool:
        with self._lock:
            left = self._signed.get(name, 0)
            self._signed[name] = left - 1
            return left > 0

    def take_limit(self) -> bool:
        with self._lock:
            if self.habits.limited <= 0:
                return False
            self.habits = replace(self.habits, limited=self.habits.limited - 1)
            return True

    def referrers_of(self, digest: str, kind: str) -> bytes:
        entries = []
        for name, (media_type, data) in self.manifests.items():
            value = json.loads(data)
            if (value.get("subject") or {}).get("digest") != digest:
                continue
            entry = {"mediaType": media_type, "digest": name, "size": len(data)}
            entry["artifactType"] = value.get("artifactType") or value["config"]["mediaType"]
            if "annotations" in value:
                entry["annotations"] = value["annotations"]
            if kind in ("", entry["artifactType"]):
                entries.append(entry)
        return json.dumps({"schemaVersion": 2, "mediaType": MEDIA_INDEX, "manifests": entries}).encode()


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, registry: MemoryRegistry, family: int) -> None:
        self.registry = registry
        self.address_family = family
        address = "127.0.0.1" if family == socket.AF_INET else "::1"
        super().__init__((address, 0), _Handler)
        shown = address if family == socket.AF_INET else f"[{address}]"
        self.host = f"{shown}:{self.server_address[1]}"

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # clients that go away


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_POST = do_PUT = do_PATCH = do_GET

    def _serve(self) -> None:
        registry = self.server.registry
        self.habits = registry.habits
        if registry.down:
            self.close_connection = True
            return
        if self.habits.http10:
            self.protocol_version = "HTTP/1.0"
        self.body = self._read_body()
        url = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(url.query))
        if url.path == "/token":
            self._token()
        elif url.path.startswith(STORAGE):
            self._storage(url.path.removeprefix(STORAGE), query)
        elif self.command in ("GET", "HEAD") and registry.take_limit():
            self._send(429, b"", {"Retry-After": self.habits.retry_after})
        elif not self._logged_in():
            self._challenge()
        else:
            self._route(url.path, query)

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _send(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        with contextlib.suppress(ValueError):
            self.server.registry.seen.append(Seen(self.command, self.path, dict(self.headers), status))
        self.send_response(status)
        chunked = self.habits.chunked and body and not self.habits.http10
        for name, value in {**(headers or {}), **self.habits.extra}.items():
            self.send_header(name, value)
        if chunked:
            self.send_header("Transfer-Encoding", "chunked")
        elif "Content-Length" not in (headers or {}):
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if chunked:
            for start in range(0, len(body), 1000):
                piece = body[start : start + 1000]
                self.wfile.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
            self.wfile.write(b"0\r\n\r\n")
        else:
            self.wfile.write(body)

    # ---- login

    def _logged_in(self) -> bool:
        habits, given = self.habits, self.headers.get("Authorization", "")
        if habits.basic:
            return given == "Basic " + base64.b64encode(habits.basic.encode()).decode()
        if habits.token is not None:
            return given.startswith("Bearer ") and self.server.registry.take_token(given[7:])
        return True

    def _challenge(self) -> None:
        habits = self.habits
        told = [habits.challenges] if habits.challenges else []
        if habits.token is not None:
            host = self.server.host
            told.append(f'Bearer realm="http://{host}/token",service="here",scope="repository:x:pull"')
        elif not told:
            told = ['Basic realm="here"']
        status = habits.expired_login_status if self.headers.get("Authorization") else 401
        code = "DENIED" if status == 403 else "UNAUTHORIZED"
        text = "Your authorization token has expired. Reauthenticate and try again." if status == 403 else "no"
        body = json.dumps({"errors": [{"code": code, "message": text}]}).encode()
        self._send(status, body, {"WWW-Authenticate": ", ".join(told)} if status == 401 else {})

    def _token(self) -> None:
        habits = self.habits
        if self.command == "POST" and habits.token_get:
            self._send(405)
            return
        given = self.headers.get("Authorization", "")
        wanted = "Basic " + base64.b64encode((habits.token or "").encode()).decode()
        form = dict(urllib.parse.parse_qsl(self.body.decode()))
        by_form = f"{form.get('username')}:{form.get('password')}" == habits.token
        if habits.token and given != wanted and not by_form:
            self._send(401, b'{"errors":[{"code":"UNAUTHORIZED"}]}')
            return
        token = self.server.registry.make_token()
        self._send(200, json.dumps({habits.token_key: token, "expires_in": 300}).encode())

    # ---- the API

    def _route(self, path: str, query: dict[str, str]) -> None:
        if path == "/v2/":
            self._send(200, b"{}")
            return
        found = re.fullmatch(r"/v2/(.+)/(manifests|blobs|referrers)/(.+|)", path)
        if found is None:
            self._send(404)
            return
        name, kind, rest = found.groups()
        if kind == "manifests":
            self._manifest(rest)
        elif kind == "referrers":
            if not self.habits.referrers:
                self._send(404, b"404 page not found\n", {"Content-Type": "text/plain"})
                return
            data = self.server.registry.referrers_of(rest, query.get("artifactType", ""))
            self._send(200, data, {"Content-Type": MEDIA_INDEX})
        elif rest.startswith("uploads/"):
            self._upload(name, rest, query)
        else:
            self._blob(rest)

    def _manifest(self, version: str) -> None:
        registry = self.server.registry
        if self.command == "PUT":
            digest = f"sha256:{sha256(self.body).hexdigest()}"
            registry.manifests[digest] = self.headers["Content-Type"], self.body
            if not version.startswith("sha256:"):
                registry.tags[version] = digest
            subject = (json.loads(self.body).get("subject") or {}).get("digest", "")
            listed = {"OCI-Subject": subject} if subject and self.habits.referrers else {}
            self._send(201, b"", {"Docker-Content-Digest": digest, **listed})
            return
        digest = registry.tags.get(version, version)
        if digest not in registry.manifests:
            self._send(404, b'{"errors":[{"code":"MANIFEST_UNKNOWN"}]}')
            return
        media_type, data = registry.manifests[digest]
        headers = {"Content-Type": media_type, "Docker-Content-Digest": digest}
        if self.habits.encode == "gzip":
            import gzip

            data, headers["Content-Encoding"] = gzip.compress(data), "gzip"
        self._send(200, data, headers)

    def _upload(self, name: str, rest: str, query: dict[str, str]) -> None:
        uploads = self.server.registry.uploads
        if self.command == "POST":
            rest = f"uploads/{len(uploads)}"
            uploads[rest] = b""
        else:
            uploads[rest] += self.body
        if self.command == "PUT":
            self.server.registry.blobs[query["digest"]] = uploads[rest]
            self._send(201)
            return
        told = {"Range": f"0-{max(0, len(uploads[rest]) - 1)}"} if self.command == "PATCH" else {}
        self._send(202, b"", {"Location": f"/v2/{name}/blobs/{rest}?state=1", **told})

    def _blob(self, digest: str) -> None:
        registry, habits = self.server.registry, self.habits
        data = registry.blobs.get(digest)
        if data is None:
            self._send(404, b'{"errors":[{"code":"BLOB_UNKNOWN"}]}')
        elif self.command == "HEAD" and not habits.head:
            self._send(405)
        elif habits.redirect is not None and self.command == "GET":
            target = f"http://{registry.storage}{STORAGE}{digest}?sig={registry.sign()}"
            self._send(307, b"", {"Location": target})
        else:
            self._range(data)

    def _storage(self, digest: str, query: dict[str, str]) -> None:
        registry, habits = self.server.registry, self.habits
        if habits.storage_refuses_login and self.headers.get("Authorization"):
            self._send(400, b"InvalidAuthenticationInfo")
        elif not registry.take_signature(query.get("sig", "")):
            self._send(habits.expired_status, b"<Error><Code>ExpiredToken</Code></Error>")
        else:
            self._range(registry.blobs[digest])

    def _range(self, data: bytes) -> None:
        if self.command == "HEAD":
            self._send(200, b"", {"Content-Length": str(len(data))})
            return
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if found is None or self.habits.range_status == 200:
            self._send(200, data)
            return
        first, last = int(found[1]), min(int(found[2] or len(data)), len(data) - 1)
        if first >= len(data):
            self._send(416, b"<html>no</html>", {"Content-Range": f"bytes */{len(data)}"})
            return
        self._send(206, data[first : last + 1], {"Content-Range": f"bytes {first}-{last}/{len(data)}"})
