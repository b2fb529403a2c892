"""A real registry (Debian's docker-registry) on a free loopback port: plain, behind a login, with tokens, with TLS.

Used by the tests and by `make demo`; needs nothing but the standard library, docker-registry, and htpasswd or openssl
for the variants that have a login or TLS.
"""

import base64
import contextlib
import http.client
import re
import shutil
import signal
import socket
import ssl
import subprocess
import time
from pathlib import Path
from typing import NamedTuple, Self

from tests.peers import token_server

START_LIMIT_S = 20.0
QUIET_S = 0.05  # between two looks at the log's size
# Combined log format, as docker-registry writes it for each request.
ACCESS_LINE = re.compile(r'^(\S+) \S+ \S+ \[[^]]*\] "(\S+) (\S+) [^"]*" (\d{3}) (\d+)')
BLOB_PATH = re.compile(r"/blobs/sha256:([0-9a-f]{64})")


class LoggedRequest(NamedTuple):
    """One line of the access log. body_bytes: what was sent."""

    method: str
    path: str
    status: int
    body_bytes: int

    @property
    def blob_id(self) -> str:
        """Hex digest of the blob asked for, "" for another request."""
        found = BLOB_PATH.search(self.path)
        return found.group(1) if found else ""


class LocalRegistry:
    """directory: storage, configuration and log; what a former run stored in it is still there.

    auth: "" | "htpasswd" | "token". A context manager; start() and stop() may be repeated, the port stays."""

    def __init__(
        self,
        directory: Path,
        *,
        auth: str = "",
        tls: bool = False,
        username: str = "someone",
        password: str = "a-secret",
        anonymous_pull: bool = False,
        token_ttl_s: int = 300,
    ) -> None:
        self.directory = Path(directory)
        self.username = username
        self.password = password
        self.tls = tls
        self.port = 0
        self.log_path = self.directory / "registry.log"
        self.token_server: token_server.TokenServer | None = None
        self._auth = auth
        self._anonymous_pull = anonymous_pull
        self._token_ttl_s = token_ttl_s
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def ca_cert(self) -> Path:
        """The certificate that vouches for a TLS registry."""
        return self.directory / "tls.pem"

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def start(self) -> None:
        if self._process is not None:
            return
        program = shutil.which("docker-registry")
        if program is None:
            raise RuntimeError("docker-registry is not installed: apt-get install docker-registry")
        (self.directory / "storage").mkdir(parents=True, exist_ok=True)
        self.port = self.port or find_free_port()
        config = self.directory / "config.yml"
        config.write_text(self._make_config())
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                [program, "serve", str(config)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._wait_ready()

    def stop(self, how: signal.Signals = signal.SIGTERM) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.send_signal(how)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if self.token_server is not None:
            self.token_server.stop()
            self.token_server = None

    def requests(self) -> list[LoggedRequest]:
        """Every answered request since the log was last cleared.

        The registry writes a line after the answer's last byte, so a client is a moment ahead of the log: it is read
        when it has stopped growing."""
        size = -1
        while size != (size := self.log_path.stat().st_size):
            time.sleep(QUIET_S)
        out = []
        for line in self.log_path.read_text(errors="replace").splitlines():
            found = ACCESS_LINE.match(line)
            if found:
                out.append(LoggedRequest(found.group(2), found.group(3), int(found.group(4)), int(found.group(5))))
        return out

    def clear_log(self) -> None:
        with self.log_path.open("r+b") as log:  # the server appends, so its next line starts at 0 again
            log.truncate(0)

    def blob_requests(self, blob_id: str = "") -> list[LoggedRequest]:
        """GETs of blobs that sent bytes (status 200 or 206), of one blob or of all."""
        return [
            request
            for request in self.requests()
            if request.method == "GET"
            and request.status in (200, 206)
            and request.blob_id
            and blob_id in ("", request.blob_id)
        ]

    def blob_bytes(self, blob_id: str = "") -> int:
        """Bytes of blobs sent since the log was last cleared."""
        return sum(request.body_bytes for request in self.blob_requests(blob_id))

    def blob_file(self, blob_id: str) -> Path:
        """Where the registry keeps a blob, for tests that damage it."""
        return self.directory / f"storage/docker/registry/v2/blobs/sha256/{blob_id[:2]}/{blob_id}/data"

    def _make_config(self) -> str:
        lines = [
            "version: 0.1",
            "log:",
            "  level: info",
            "  accesslog:",
            "    disabled: false",
            "storage:",
            "  filesystem:",
            f"    rootdirectory: {self.directory / 'storage'}",
            "  delete:",
            "    enabled: true",
            "http:",
            f"  addr: {self.host}",
            "  secret: of-this-test-only",
        ]
        if self.tls:
            make_certificate(self.directory, "tls")
            lines += ["  tls:", f"    certificate: {self.ca_cert}", f"    key: {self.directory / 'tls.key'}"]
        if self._auth == "htpasswd":
            file = self.directory / "htpasswd"
            made = subprocess.run(["htpasswd", "-Bbn", self.username, self.password], check=True, capture_output=True)
            file.write_bytes(made.stdout)
            lines += ["auth:", "  htpasswd:", "    realm: tests", f"    path: {file}"]
        elif self._auth == "token":
            make_certificate(self.directory, "token")
            self.token_server = token_server.TokenServer(
                self.directory / "token.pem",
                self.directory / "token.key",
                {self.username: self.password},
                anonymous_pull=self._anonymous_pull,
                ttl_s=self._token_ttl_s,
            )
            self.token_server.start()
            lines += [
                "auth:",
                "  token:",
                f"    realm: {self.token_server.url}",
                f"    service: {token_server.SERVICE}",
                f"    issuer: {token_server.ISSUER}",
                f"    rootcertbundle: {self.directory / 'token.pem'}",
            ]
        return "\n".join(lines) + "\n"

    def _wait_ready(self) -> None:
        deadline = time.monotonic() + START_LIMIT_S
        assert self._process is not None
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                break
            with contextlib.suppress(OSError, http.client.HTTPException):
                self._ping()
                return
            time.sleep(0.02)  # between two polls; the deadline decides
        tail = "\n".join(self.log_path.read_text(errors="replace").splitlines()[-5:])
        self.stop()
        raise RuntimeError(f"docker-registry did not start on {self.host}: {tail}")

    def _ping(self) -> None:
        if self.tls:
            context = ssl.create_default_context(cafile=str(self.ca_cert))
            connection: http.client.HTTPConnection = http.client.HTTPSConnection(
                "127.0.0.1", self.port, timeout=5, context=context
            )
        else:
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        login = base64.b64encode(f"{self.username}:{self.password}".encode()).decode()
        connection.request("GET", "/v2/", headers={"Authorization": f"Basic {login}"} if self._auth else {})
        connection.getresponse().read()
        connection.close()


def find_free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def make_certificate(directory: Path, name: str) -> None:
    """directory/NAME.pem and NAME.key: self-signed, for 127.0.0.1 and localhost. Kept when there."""
    if (directory / f"{name}.pem").exists():
        return
    subprocess.run(
        [
            "openssl",
            "req",
            "-x509",
            "-newkey",
            "rsa:2048",
            "-nodes",
            "-days",
            "30",
            "-subj",
            f"/CN={name}",
            "-addext",
            "subjectAltName=IP:127.0.0.1,DNS:localhost",
            "-keyout",
            str(directory / f"{name}.key"),
            "-out",
            str(directory / f"{name}.pem"),
        ],
        check=True,
        capture_output=True,
    )
