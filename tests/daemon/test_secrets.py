"""No secret leaves the daemon: not by its log, nor by its API, nor by what `ps` shows of it and its children."""

import base64
import contextlib
import http.client
import json
import socket
from pathlib import Path
from typing import Any

import pytest

from tests.peers.faulty_server import FaultyServer
from tests.store.conftest import Image
from tests.system.daemon import Daemon, ServedImage
from virtiofsd_nydus.daemon.api import ROUTES
from virtiofsd_nydus.fakeguest.fakeguest import FakeGuest

SECRET = "hunter2-the-secret"
LOGIN = base64.b64encode(f"someone:{SECRET}".encode()).decode()
# GET gives back what a hot change gave, as nydusd does (docs/operations.md); none is made here
QUERIES = ("", "?id=/", "?mountpoint=/", "?latest=true")
NAMES = ("registry", "registry token", "proxy", "mirror", "s3", "oss", "http-proxy")


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    return Image(tmp_path_factory.mktemp("image"), "zstd", "blake3")


def get_raw(api: Path, target: str) -> bytes:
    connection = http.client.HTTPConnection("localhost", timeout=20)
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.connect(str(api))
    with contextlib.closing(connection):
        connection.request("GET", target)
        return connection.getresponse().read()


def command_lines(pid: int) -> bytes:
    """Of a process and all below it."""
    found = Path(f"/proc/{pid}/cmdline").read_bytes()
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # threads and children come and go
            for child in (task / "children").read_text().split():
                found += command_lines(int(child))
    return found


def backends(server: FaultyServer) -> dict[str, tuple[str, dict[str, Any]]]:
    """Each refuses its login or cannot be reached, so that there is something to log."""
    host = {"scheme": "http", "timeout": 1, "connect_timeout": 1}
    objects = {
        **host,
        "endpoint": server.host,
        "bucket_name": "bucket",
        "access_key_id": "someone",
        "access_key_secret": SECRET,
    }
    return {
        "registry": ("registry", {**host, "host": server.host, "repo": "a/b", "auth": LOGIN}),
        "registry token": ("registry", {**host, "host": server.host, "repo": "a/b", "registry_token": SECRET}),
        "proxy": (
            "registry",
            {
                **host,
                "host": server.host,
                "repo": "a/b",
                "proxy": {"url": f"http://someone:{SECRET}@127.0.0.1:1", "fallback": False},
            },
        ),
        "mirror": (
            "registry",
            {
                **host,
                "host": server.host,
                "repo": "a/b",
                "auth": LOGIN,
                "mirrors": [{"host": "http://127.0.0.1:1", "headers": {"X-Key": SECRET}, "auth_through": True}],
            },
        ),
        "s3": ("s3", {**objects, "region": "us-east-1", "session_token": f"token-{SECRET}"}),
        "oss": ("oss", {**objects, "session_token": f"token-{SECRET}"}),
        "http-proxy": ("http-proxy", {**host, "addr": f"http://someone:{SECRET}@{server.host}"}),
    }


@pytest.mark.parametrize("name", NAMES)
def test_no_secret_leaves(image: Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("NYDUS_HEADER_X-Key", SECRET)
    if name.startswith("registry"):
        monkeypatch.setenv("IMAGE_PULL_AUTH", LOGIN)
    with FaultyServer({image.blob.name: image.blob.read_bytes()}) as server:
        server.token_user = "someone:other"
        server.inject("status", status=403, match=image.blob.name, times=-1)
        kind, config = backends(server)[name]
        served = ServedImage(image.bootstrap, kind, config, {})
        with Daemon(served, tmp_path / "cache", deadline_ms=600, extra=["--log-level", "debug"]) as daemon:
            with FakeGuest(daemon.socket_path) as guest, pytest.raises(OSError):
                guest.fuse.init()
                guest.fuse.read_file("file-05")
            told = b"".join(
                get_raw(daemon.api_path, route + query)
                for route, methods in ROUTES.items()
                if "GET" in methods
                for query in QUERIES
            )
            told += command_lines(daemon.process.pid)
            assert json.loads(get_raw(daemon.api_path, "/api/v1/daemon"))["state"] == "RUNNING"
        told += daemon.log_text().encode()
    assert image.blob.name[:16].encode() in told, "nothing was said: the test shows nothing"
    for secret in (SECRET, LOGIN, LOGIN.rstrip("="), base64.b64encode(SECRET.encode()).decode()):
        assert secret.encode() not in told
