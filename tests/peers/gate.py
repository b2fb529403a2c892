"""A registry that can be stopped in mid-answer: it serves blobs of a directory while its gate is open."""

import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class GateRegistry:
    """blob_dir: files named by their id. A context manager; open at the start."""

    def __init__(self, blob_dir: Path) -> None:
        gate, self.waiting = self, threading.Semaphore(0)
        self.blob_dir = blob_dir
        self._open = threading.Event()
        self._open.set()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                gate.answer(self)

            do_HEAD = do_GET

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))

    def __enter__(self) -> "GateRegistry":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.open()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self._server.server_address[1]}"

    def open(self) -> None:
        self._open.set()

    def close(self) -> None:
        """From now on requests are taken and not answered."""
        while self.waiting.acquire(blocking=False):
            pass
        self._open.clear()

    def wait_asked(self, seconds: float = 10.0) -> None:
        """Until a request waits at the closed gate."""
        assert self.waiting.acquire(timeout=seconds), "the daemon asked for nothing"

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        if not self._open.is_set():
            self.waiting.release()
            self._open.wait()
        found = re.search(r"/blobs/sha256:([0-9a-f]{64})$", request.path)
        place = self.blob_dir / found.group(1) if found else None
        if place is None or not place.is_file():
            request.send_response(404 if request.path != "/v2/" else 200)
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        data = place.read_bytes()
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", request.headers.get("Range", ""))
        first, last = (int(wanted[1]), min(int(wanted[2]), len(data) - 1)) if wanted else (0, len(data) - 1)
        body = data[first : last + 1]
        request.send_response(206 if wanted else 200)
        if wanted:
            request.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        if request.command == "GET":
            request.wfile.write(body)
