"""A service in this process on a small image behind a registry that can fail and wants a token, with its API."""

import base64
import http.client
import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.peers.faulty_server import FaultyServer
from tests.store.conftest import Image
from virtiofsd_nydus.daemon.mounts import ImageMount, read_mount
from virtiofsd_nydus.daemon.service import Service, Sockets
from virtiofsd_nydus.fakeguest.fakeguest import FakeGuest
from virtiofsd_nydus.log import Log
from virtiofsd_nydus.storage.config import parse_config

SECRET = "the-secret-word"
AUTH = base64.b64encode(f"someone:{SECRET}".encode()).decode()
COUNT_ALL = {"iostats_files": True, "access_pattern": True, "latest_read_files": True}


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    return Image(tmp_path_factory.mktemp("image"), "zstd", "blake3")


class Daemon:
    def __init__(self, image: Image, directory: Path, server: FaultyServer) -> None:
        self.image, self.server, self.directory = image, server, directory
        self.api = directory / "api.sock"
        self.log = directory / "log"
        self.service = Service(Log("info", str(self.log)), read_deadline_ms=3000)

    def config(self, identity: str, work_dir: str, rafs: dict[str, bool] | None = None, **prefetch: object) -> str:
        return json.dumps(
            {
                "version": 2,
                "id": identity,
                "backend": {
                    "type": "registry",
                    "registry": {"scheme": "http", "host": self.server.host, "repo": "a/b", "auth": AUTH, "timeout": 1},
                },
                "cache": {"type": "blobcache", "filecache": {"work_dir": str(self.directory / work_dir)}},
                "rafs": {**(COUNT_ALL if rafs is None else rafs), "prefetch": prefetch},
            }
        )

    def start(self, with_image: bool = True, rafs: dict[str, bool] | None = None, **prefetch: object) -> None:
        sockets = Sockets(sock=str(self.directory / "fs.sock"), apisock=str(self.api))
        config = parse_config(self.config("conf-1", "cache", rafs, **prefetch))
        self.service.start(sockets, ImageMount("/", str(self.image.bootstrap), config) if with_image else None)

    def mount(self, path: str, config_text: str) -> None:
        """As an API call mounts the image."""
        self.service.table.mount_image(read_mount(path, str(self.image.bootstrap), config_text, None))

    def call(self, path: str, method: str = "GET", body: object = None) -> tuple[int, Any]:
        """Status and document, or text; no answer holds the login."""
        connection = http.client.HTTPConnection("localhost", timeout=20)
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.connect(str(self.api))
        connection.request(method, path, body=json.dumps(body) if body is not None else None)
        answer = connection.getresponse()
        raw = answer.read()
        connection.close()
        assert SECRET.encode() not in raw and AUTH.encode() not in raw
        if answer.headers.get("Content-Type") == "application/json":
            return answer.status, json.loads(raw)
        return answer.status, raw.decode()

    def stop(self) -> None:
        """Once is enough."""
        if self.service.state != "STOPPED":
            self.service.stop()

    def guest(self) -> FakeGuest:
        return FakeGuest(self.directory / "fs.sock")

    def read(self, name: str) -> bytes:
        """Reads a file as a guest that has just booted."""
        with self.guest() as guest:
            guest.fuse.init()
            return guest.fuse.read_file(name)


@pytest.fixture
def daemon(image: Image, tmp_path: Path) -> Iterator[Callable[..., Daemon]]:
    """Starts one; afterwards its log is looked through for the login."""
    made: list[Daemon] = []
    with FaultyServer() as server:
        server.blobs[image.blob.name] = image.blob.read_bytes()
        server.token_user = f"someone:{SECRET}"

        def daemon(**how: Any) -> Daemon:
            one = Daemon(image, tmp_path, server)
            made.append(one)
            one.start(**how)
            return one

        yield daemon
        server.heal()
        for one in made:
            one.stop()
            text = one.log.read_text()
            assert SECRET not in text and AUTH not in text
