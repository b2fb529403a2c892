"""An HTTP server that goes wrong on request: a registry's blobs served from a directory (or from a registry behind it),
with a fault injected into the answers a test chooses.

Answers every path that ends in a blob's HEX digest (GET with ranges, HEAD): /v2/NAME/blobs/sha256:HEX, a bucket's
/BUCKET/HEX, and the whole address that a forward proxy is asked for; /store/HEX?sig=N is where redirects lead. On a
unix socket / is its one blob. Every request is recorded, with its range. In front of a registry it passes everything
on, so that the fault is all that differs.
"""

import contextlib
import http.client
import json
import re
import socket
import ssl
import struct
import threading
from dataclasses import dataclass, field
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple, Self

BLOB = re.compile(r"[/:]([0-9a-f]{64})$")
TOKEN_PATH = "/token"


class Recorded(NamedTuple):
    """One request. first and last: the byte range asked for (-1: none). status: 0 when the connection was cut."""

    method: str
    path: str
    first: int
    last: int
    authorization: str
    status: int
    headers: dict[str, str]


@dataclass
class Fault:
    """What goes wrong, with which requests, how often.

    kind: one of FAULTS. match: part of "METHOD path". times: how many requests it hits (-1: all). The numbers mean what
    the kind's line in FAULTS says."""

    kind: str
    at_bytes: int = 0
    seconds: float = 0.0
    status: int = 0
    text: str = ""
    charset: str = "utf-8"  # of text
    match: str = "GET "
    times: int = 1
    headers: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert self.kind in FAULTS, self.kind


FAULTS = {
    "delay": "answers after `seconds` (at once when the server stops)",
    "stall": "stops sending after at_bytes of the body, for `seconds`, then goes on",
    "trickle": "sends the body in pieces of at_bytes, `seconds` apart",
    "truncate": "closes after at_bytes of a body that was announced whole",
    "reset": "resets the connection after at_bytes of the body (0: before any answer)",
    "corrupt": "flips the byte at at_bytes of the body",
    "status": "answers with `status`, `headers` and `text`",
    "ignore_range": "sends the whole blob with 200",
    "shift_range": "sends the bytes at_bytes further on, and says so in Content-Range",
    "mislabel_range": "sends the right bytes under a Content-Range at_bytes off",
    "no_content_range": "206 without Content-Range",
    "short_range": "sends only at_bytes of the range, rightly labelled",
    "long_body": "sends at_bytes more than the range, Content-Length says so too",
    "wrong_total": "says the blob is at_bytes larger than it is",
    "multipart": "206 multipart/byteranges around the right bytes",
    "chunked": "sends the right bytes without Content-Length (no fault, but rare)",
    "close": "Connection: close after a right answer (no fault, but rare)",
    "redirect": "redirects to /store, at `text` (http://host:port) when given, else relative; the address is good for "
    "at_bytes requests (0: for ever)",
    "redirect_loop": "redirects to itself",
    "redirect_bad": "redirects to `text`",
    "restatus": "answers as it would, but with `status` and, in addition, `headers`",
    "encode": "sends the right bytes and says that they are encoded as `text`",
    "slow_headers": "begins its answer and sends a byte of a header each `seconds`, without end",
    "garbage": "sends `text` instead of HTTP",
}


class FaultyServer:
    """blobs: hex digest to bytes. upstream: host:port of a plain-HTTP registry to pass on what is not in blobs.

    token_user: ask for a bearer token (GET or POST /token of this same server), for USER:PASSWORD or "" for anyone;
    a token is good for token_uses requests. basic_user: ask for USER:PASSWORD in each request. expired_status: what a
    request with a login that is not good (any more) is answered with; one without a login gets 401."""

    def __init__(
        self,
        blobs: dict[str, bytes] | None = None,
        *,
        upstream: str = "",
        token_user: str | None = None,
        token_uses: int = 1 << 30,
        tls: tuple[Path, Path] | None = None,
        unix: Path | None = None,
    ) -> None:
        self.blobs = dict(blobs or {})
        self.upstream = upstream
        self.token_user = token_user
        self.token_uses = token_uses
        self.token_life_s = 300
        self.basic_user = ""
        self.expired_status = 401
        self.requests: list[Recorded] = []
        self.faults: list[Fault] = []
        self.stopping = threading.Event()
        self.lock = threading.Lock()
        self.tokens: dict[str, int] = {}
        self.signatures: dict[str, int] = {}
        self.tls = tls is not None
        self.unix = unix
        self._server = _Server(("127.0.0.1", 0), _Handler) if unix is None else _UnixServer(str(unix), _Handler)
        self._server.faulty = self
        if tls is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(tls[0], tls[1])
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self.away = False

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self._server.server_address[1]}"

    @property
    def url(self) -> str:
        return f"{'https' if self.tls else 'http'}://{self.host}"

    def add(self, data: bytes) -> str:
        """Serves data; its hex digest."""
        digest = sha256(data).hexdigest()
        self.blobs[digest] = data
        return digest

    def inject(self, kind: str, **fields: Any) -> Fault:
        fault = Fault(kind, **fields)
        with self.lock:
            self.faults.append(fault)
        return fault

    def heal(self) -> None:
        with self.lock:
            self.faults.clear()

    def ranges(self, digest: str = "") -> list[tuple[int, int]]:
        """The ranges of a blob (of all) that were asked for, in order."""
        with self.lock:
            return [(one.first, one.last) for one in self.requests if one.first >= 0 and digest in one.path]

    def __enter__(self) -> Self:
        self._start()
        return self

    def _start(self) -> None:
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self._thread.start()

    def __exit__(self, *exc: object) -> None:
        self.stopping.set()
        self._server.shutdown()
        self._server.server_close()

    def go_away(self) -> None:
        """The server is stopped: its port refuses connections, those there were end with their next request."""
        self.away = True
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def come_back(self) -> None:
        """It is started again, on the same port."""
        self._server = _Server(self._server.server_address, _Handler)  # type: ignore[arg-type]
        self._server.faulty = self
        self.away = False
        self._start()

    def take_fault(self, line: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.match in line and fault.times != 0:
                    fault.times -= 1
                    return fault
        return None


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    faulty: FaultyServer

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that give up are what the tests are about."""


class _UnixServer(_Server):
    address_family = socket.AF_UNIX

    def server_bind(self) -> None:
        self.socket.bind(self.server_address)
        self.server_name, self.server_port = "localhost", 0

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, _ = self.socket.accept()
        return connection, ("unix", 0)


class _Cut(Exception):
    """The connection is to end here."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self._handle()

    do_HEAD = do_POST = do_PUT = do_PATCH = do_GET

    def _handle(self) -> None:
        self.faulty = self.server.faulty
        self.recorded = False
        self.range = _parse_range(self.headers.get("Range", ""))
        try:
            self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self._answer()
        except (_Cut, ConnectionError, ssl.SSLError):
            self.close_connection = True
        finally:
            if not self.recorded:
                self._record(0)

    def _record(self, status: int) -> None:
        """Before the answer goes out: a client that has it finds its request recorded."""
        first, last = self.range or (-1, -1)
        self.recorded = True
        with self.faulty.lock:
            self.faulty.requests.append(
                Recorded(
                    self.command,
                    self.path,
                    first,
                    last,
                    self.headers.get("Authorization", ""),
                    status,
                    dict(self.headers),
                )
            )

    def _answer(self) -> None:
        faulty = self.faulty
        if faulty.away:
            raise _Cut
        path = self.path.partition("?")[0]
        fault = faulty.take_fault(f"{self.command} {self.path}")
        if fault is not None and self._apply_before(fault):
            return
        if path in (TOKEN_PATH, f"/moved{TOKEN_PATH}"):
            self._answer_token()
            return
        if not path.startswith("/store/") and not self._is_logged_in():
            status = faulty.expired_status if self.headers.get("Authorization") else 401
            self._send(status, b"", {"WWW-Authenticate": self._challenge()} if status == 401 else None)
            return
        if path.startswith("/store/") and not self._has_signature():
            self._send(403, b"expired")
            return
        found = BLOB.search(path)
        if faulty.unix is not None and path == "/":
            found = BLOB.search("/" + next(iter(faulty.blobs), ""))
        data = faulty.blobs.get(found.group(1)) if found else None
        if data is None and faulty.upstream:
            self._pass_on(fault)
        elif data is None:
            self._send(404, b'{"errors":[{"code":"BLOB_UNKNOWN","message":"blob unknown"}]}')
        else:
            self._send_blob(data, fault)

    def _apply_before(self, fault: Fault) -> bool:
        """Faults that replace the answer; True when it has been given."""
        kind = fault.kind
        if kind == "delay":
            self.faulty.stopping.wait(fault.seconds)
        elif kind == "reset" and fault.at_bytes == 0:
            self._reset()
        elif kind == "status":
            self._send(fault.status, fault.text.encode(fault.charset), fault.headers)
            return True
        elif kind == "garbage":
            self.wfile.write(fault.text.encode("latin-1"))
            raise _Cut
        elif kind == "slow_headers":
            self.wfile.write(b"HTTP/1.1 206 Partial Content\r\nX-Slow: ")
            while not self.faulty.stopping.wait(fault.seconds):
                self.wfile.write(b"a")
            raise _Cut
        elif kind == "redirect":
            digest = BLOB.search(self.path.partition("?")[0])
            assert digest is not None
            with self.faulty.lock:
                signature = str(len(self.faulty.signatures))
                self.faulty.signatures[signature] = fault.at_bytes or 1 << 30
            self._send(307, b"", {"Location": f"{fault.text}/store/{digest.group(1)}?sig={signature}"})
            return True
        elif kind == "redirect_loop":
            self._send(302, b"", {"Location": self.path})
            return True
        elif kind == "redirect_bad":
            self._send(302, b"", {"Location": fault.text} if fault.text else {})
            return True
        return False

    def _send_blob(self, data: bytes, fault: Fault | None) -> None:
        kind, at = (fault.kind, fault.at_bytes) if fault is not None else ("", 0)
        total = len(data)
        headers = {"Docker-Content-Digest": f"sha256:{sha256(data).hexdigest()}"}
        if self.range is None or kind == "ignore_range":
            self._send_body(200, data, headers, fault)
            return
        first, last = self.range[0], min(self.range[1], total - 1)
        if first >= total:
            self._send(416, b"", {"Content-Range": f"bytes */{total}"})
            return
        if kind == "shift_range":
            first, last = first + at, last + at
        if kind == "short_range":
            last = min(last, first + at - 1)
        body = data[first : last + 1]
        shown = total + at if kind == "wrong_total" else total
        label = at if kind == "mislabel_range" else 0
        headers["Content-Range"] = f"bytes {first + label}-{last + label}/{shown}"
        if kind == "no_content_range":
            del headers["Content-Range"]
        elif kind == "long_body":
            body = data[first : last + 1 + at]
            headers["Content-Range"] = f"bytes {first}-{first + len(body) - 1}/{total}"
        elif kind == "multipart":
            headers["Content-Type"] = "multipart/byteranges; boundary=X"
            part = f"--X\r\nContent-Range: {headers.pop('Content-Range')}\r\n\r\n".encode()
            body = part + body + b"\r\n--X--\r\n"
        self._send_body(206, body, headers, fault)

    def _send_body(self, status: int, body: bytes, headers: dict[str, str], fault: Fault | None) -> None:
        kind = fault.kind if fault is not None else ""
        at = fault.at_bytes if fault is not None else 0
        if fault is not None and kind == "restatus":
            status, headers = fault.status, {**headers, **fault.headers}
        elif fault is not None and kind == "encode":
            headers = {**headers, "Content-Encoding": fault.text}
        if kind == "corrupt" and at < len(body):
            body = body[:at] + bytes([body[at] ^ 0x40]) + body[at + 1 :]
        self._record(status)
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if kind == "chunked":
            self.send_header("Transfer-Encoding", "chunked")
        else:
            self.send_header("Content-Length", str(len(body)))
        if kind == "close":
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault is None or kind not in ("truncate", "reset", "stall", "trickle", "chunked"):
            self.wfile.write(body)
        elif kind == "chunked":
            for start in range(0, len(body), 50_000):
                piece = body[start : start + 50_000]
                self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
            self.wfile.write(b"0\r\n\r\n")
        elif kind == "trickle":
            for start in range(0, len(body), max(at, 1)):
                self.wfile.write(body[start : start + max(at, 1)])
                if self.faulty.stopping.wait(fault.seconds):
                    raise _Cut
        else:
            self.wfile.write(body[:at])
            self.wfile.flush()
            if kind == "truncate":
                raise _Cut
            if kind == "reset":
                self._reset()
            self.faulty.stopping.wait(fault.seconds)
            self.wfile.write(body[at:])

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self._send_body(status, body, headers or {}, None)

    def _reset(self) -> None:
        """RST instead of FIN: linger of 0 seconds."""
        with contextlib.suppress(OSError):
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        raise _Cut

    def _is_logged_in(self) -> bool:
        import base64

        if self.faulty.basic_user:
            wanted = base64.b64encode(self.faulty.basic_user.encode()).decode()
            return self.headers.get("Authorization", "") == f"Basic {wanted}"
        return self.faulty.token_user is None or self._has_token()

    def _challenge(self) -> str:
        if self.faulty.basic_user:
            return 'Basic realm="faulty"'
        return f'Bearer realm="{self.faulty.url}{TOKEN_PATH}",service="faulty",scope="repository:x:pull"'

    def _has_token(self) -> bool:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        with self.faulty.lock:
            left = self.faulty.tokens.get(token, 0)
            if left > 0:
                self.faulty.tokens[token] = left - 1
            return left > 0

    def _has_signature(self) -> bool:
        signature = self.path.rpartition("sig=")[2]
        with self.faulty.lock:
            left = self.faulty.signatures.get(signature, 0)
            if left > 0:
                self.faulty.signatures[signature] = left - 1
            return left > 0

    def _answer_token(self) -> None:
        import base64
        import urllib.parse

        form = urllib.parse.parse_qs(self.body.decode())
        login = f"{form.get('username', [''])[0]}:{form.get('password', [''])[0]}"
        header = self.headers.get("Authorization", "")
        if form.get("grant_type") == ["refresh_token"]:  # an identity token
            login = f"refresh:{form.get('refresh_token', [''])[0]}"
        if header.startswith("Basic "):
            login = base64.b64decode(header[6:]).decode()
        if self.faulty.token_user and login != self.faulty.token_user:
            self._send(401, b"{}")
            return
        with self.faulty.lock:
            token = f"token{len(self.faulty.tokens)}"
            self.faulty.tokens[token] = self.faulty.token_uses
        self._send(200, json.dumps({"token": token, "expires_in": self.faulty.token_life_s}).encode())

    def _pass_on(self, fault: Fault | None) -> None:
        """To the registry behind; the fault is put into its answer's body."""
        connection = http.client.HTTPConnection(self.faulty.upstream, timeout=30)
        sent = {name: value for name, value in self.headers.items() if name.lower() not in ("host", "connection")}
        connection.request(
            self.command, self.path, body=self.body or None, headers={**sent, "Host": self.headers["Host"]}
        )
        answer = connection.getresponse()
        headers = {
            name: value
            for name, value in answer.getheaders()
            if name.lower() not in ("content-length", "transfer-encoding", "connection", "date", "server")
        }
        data = answer.read()
        if self.command == "HEAD":
            self._record(answer.status)
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in ("connection", "date", "server"):
                    self.send_header(name, value)
            self.end_headers()
        else:
            self._send_body(answer.status, data, headers, fault)
        connection.close()


def _parse_range(text: str) -> tuple[int, int] | None:
    found = re.fullmatch(r"bytes=(\d+)-(\d+)", text)
    return (int(found.group(1)), int(found.group(2))) if found else None
