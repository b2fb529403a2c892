"""Stands between daemons and the registry: writes down every range of a blob that goes by, and can hold, delay or
damage them. The registry's own access log tells how many bytes it sent, but not which."""

import http.client
import itertools
import re
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple, Self

BLOB_PATH = re.compile(r"/blobs/sha256:([0-9a-f]{64})$")
CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/\d+")
PASSED_ON = (
    "Content-Type",
    "Content-Range",
    "ETag",
    "WWW-Authenticate",
    "Docker-Content-Digest",
    "Location",
    "Accept-Ranges",
    "Docker-Distribution-Api-Version",
)


class SentRange(NamedTuple):
    """Bytes [start, end) of a blob that were sent to a daemon."""

    blob_id: str
    start: int
    end: int


class RangeProxy:
    """A context manager. gate: cleared = answers with blob bytes are held until it is set again."""

    def __init__(self, registry_host: str) -> None:
        self.registry_host = registry_host
        self.ranges: list[SentRange] = []
        self.held = threading.Semaphore(0)  # released once for each answer that the gate holds
        self.gate = threading.Event()
        self.gate.set()
        self.damage: Callable[[SentRange, bytes], bytes] | None = None
        self.asked = threading.Condition()
        self._lock = threading.Lock()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            # Headers and body in one segment: else Nagle and delayed ACKs cost 40 ms an answer
            wbufsize = -1
            disable_nagle_algorithm = True

            def do_GET(self) -> None:
                owner.forward(self)

            do_HEAD = do_GET

            def log_message(self, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.gate.set()
        self._server.shutdown()
        self._server.server_close()

    def forward(self, handler: BaseHTTPRequestHandler) -> None:
        upstream = http.client.HTTPConnection(self.registry_host, timeout=30)
        headers = {name: value for name, value in handler.headers.items() if name.lower() != "host"}
        try:
            upstream.request(handler.command, handler.path, headers=headers)
            answer = upstream.getresponse()
            body = answer.read()
        except OSError:
            handler.close_connection = True
            return
        finally:
            upstream.close()
        sent = self._find_range(handler.path, answer, len(body))
        if sent is not None and handler.command == "GET":
            with self.asked:
                self.asked.notify_all()
            if not self.gate.is_set():
                self.held.release()
                self.gate.wait()
            if self.damage is not None:
                body = self.damage(sent, body)
            with self._lock:
                self.ranges.append(sent)
        try:
            handler.send_response(answer.status)
            for name in PASSED_ON:
                if (value := answer.headers.get(name)) is not None:
                    handler.send_header(name, value)
            length = answer.headers.get("Content-Length", "0") if handler.command == "HEAD" else str(len(body))
            handler.send_header("Content-Length", length)
            handler.end_headers()
            if handler.command != "HEAD":
                handler.wfile.write(body)
            handler.wfile.flush()
        except OSError:  # the daemon was killed
            handler.close_connection = True

    @staticmethod
    def _find_range(path: str, answer: http.client.HTTPResponse, length: int) -> SentRange | None:
        blob = BLOB_PATH.search(path.partition("?")[0])
        if blob is None or answer.status not in (200, 206):
            return None
        found = CONTENT_RANGE.match(answer.headers.get("Content-Range", ""))
        start = int(found.group(1)) if found else 0
        return SentRange(blob.group(1), start, start + length)

    def clear(self) -> None:
        with self._lock:
            self.ranges.clear()

    def sent_bytes(self) -> int:
        with self._lock:
            return sum(one.end - one.start for one in self.ranges)

    def overlaps(self, limits: dict[str, int]) -> list[tuple[SentRange, SentRange]]:
        """Pairs of ranges with bytes in common below limits[blob id]."""
        with self._lock:
            found = sorted(one for one in self.ranges if one.start < limits.get(one.blob_id, 0))
        return [
            (one, two) for one, two in itertools.pairwise(found) if one.blob_id == two.blob_id and two.start < one.end
        ]
