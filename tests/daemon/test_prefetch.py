"""Prefetch over the API: by the image's table, by a list, of everything; its progress, its end, and what limits it."""

import http.client
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest

from tests.peers.faulty_server import FaultyServer
from tests.system.daemon import wait_until
from virtiofsd_nydus.builder.options import BuildOptions
from virtiofsd_nydus.cli.build import build_image
from virtiofsd_nydus.cli.main import main
from virtiofsd_nydus.daemon.mounts import ImageMount
from virtiofsd_nydus.daemon.prefetch import add_chunk, read_list
from virtiofsd_nydus.daemon.service import Service, Sockets
from virtiofsd_nydus.errors import UsageFailure
from virtiofsd_nydus.fakeguest.fakeguest import FakeGuest
from virtiofsd_nydus.log import Log
from virtiofsd_nydus.reader.bootstrap import Bootstrap
from virtiofsd_nydus.storage.config import parse_config

CHUNK_BYTES = 16 << 10
FILE_CHUNKS = 20
ROUTE = "/api/ext/v1/prefetch"


class Tree:
    """hot/one, hot/deep/two, cold/three, lone: random bytes, so that each chunk is its own. The table names /hot."""

    def __init__(self, directory: Path, *, fs_version: int = 6, prefetch_policy: str = "fs") -> None:
        random = Random("prefetch")
        self.files = {
            name: random.randbytes(FILE_CHUNKS * CHUNK_BYTES)
            for name in ("hot/one", "hot/deep/two", "cold/three", "lone")
        }
        source = directory / "source"
        for name, data in self.files.items():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes(data)
        self.bootstrap = directory / "image.boot"
        options = BuildOptions(
            fs_version=fs_version, chunk_size=CHUNK_BYTES, prefetch_policy=prefetch_policy, prefetch_patterns=("/hot",)
        )
        build_image(source, self.bootstrap, directory / "blobs", options)
        (self.blob,) = [path for path in (directory / "blobs").iterdir() if not path.name.startswith(".")]

    def chunks(self, *names: str) -> set[int]:
        with Bootstrap(self.bootstrap) as image:
            return {chunk.chunk_index for name in names for chunk in image.chunks(image.resolve(name))}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    return Tree(tmp_path_factory.mktemp("tree"))


class Daemon:
    """A service on the image behind a server that can fail, with an API."""

    def __init__(self, tree: Tree, directory: Path, server: FaultyServer) -> None:
        self.tree, self.server, self.directory = tree, server, directory
        self.service = Service(Log("info", str(directory / "log")), read_deadline_ms=5000)

    def config(self, **prefetch: object) -> str:
        return json.dumps(
            {
                "version": 2,
                "backend": {
                    "type": "registry",
                    "registry": {"scheme": "http", "host": self.server.host, "repo": "a/b", "timeout": 2},
                },
                "cache": {"type": "blobcache", "filecache": {"work_dir": str(self.directory / "cache")}},
                "rafs": {"prefetch": prefetch},
            }
        )

    def start(self, files: list[str] | None = None, with_image: bool = True, **prefetch: object) -> None:
        config = parse_config(self.config(**prefetch))
        self.service.start(
            Sockets(sock=str(self.directory / "fs.sock"), apisock=str(self.directory / "api.sock")),
            ImageMount("/", str(self.tree.bootstrap), config, files) if with_image else None,
        )

    def call(self, method: str, path: str, body: object = None) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("localhost", timeout=60)
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.connect(str(self.directory / "api.sock"))
        connection.request(method, path, body=None if body is None else json.dumps(body))
        answer = connection.getresponse()
        raw = answer.read()
        connection.close()
        return answer.status, json.loads(raw) if raw else None

    def progress(self, mountpoint: str = "/") -> dict[str, Any]:
        found: dict[str, Any] = self.call("GET", ROUTE)[1][mountpoint]
        return found

    def wait_for(self, state: str) -> dict[str, Any]:
        found: dict[str, Any] = wait_until(
            lambda: one if (one := self.progress())["state"] == state else None, f"prefetch {state}"
        )
        return found

    def ready(self) -> int:
        (blob,) = self.call("GET", "/api/ext/v1/stats")[1]["blobs"].values()
        return int(blob["ready_chunks"])

    def counters(self) -> dict[str, int]:
        found: dict[str, int] = self.call("GET", "/api/ext/v1/stats")[1]["engine"]
        return found


@pytest.fixture
def daemon(tree: Tree, tmp_path: Path) -> Iterator[Daemon]:
    with FaultyServer({tree.blob.name: tree.blob.read_bytes()}) as server:
        one = Daemon(tree, tmp_path, server)
        yield one
        server.heal()
        one.service.stop()


def test_the_images_own_table(tree: Tree, daemon: Daemon) -> None:
    daemon.start(enable=True)
    found = daemon.wait_for("done")
    wanted = len(tree.chunks("hot/one", "hot/deep/two"))
    assert (found["ready_chunks"], found["chunks"]) == (wanted, wanted) and wanted == 2 * FILE_CHUNKS
    assert daemon.ready() == wanted, "nothing but what the table names"
    assert daemon.counters()["prefetch_bytes"] > 0


def test_the_beginning_of_a_blob(tmp_path: Path) -> None:
    """RAFS v5 can say how much of a blob is to be fetched; policy blob puts the named files there."""
    tree = Tree(tmp_path, fs_version=5, prefetch_policy="blob")
    with FaultyServer({tree.blob.name: tree.blob.read_bytes()}) as server:
        one = Daemon(tree, tmp_path, server)
        try:
            one.start(enable=True)
            found = one.wait_for("done")
            wanted = tree.chunks("hot/one", "hot/deep/two")
            assert wanted == set(range(2 * FILE_CHUNKS))
            assert found["ready_chunks"] == found["chunks"] == one.ready() == len(wanted)
        finally:
            one.service.stop()


def test_a_list_instead_of_the_table(tree: Tree, daemon: Daemon) -> None:
    daemon.start(["/lone", "/cold", "/not/there"])
    found = daemon.wait_for("done")
    assert found["chunks"] == daemon.ready() == len(tree.chunks("lone", "cold/three"))
    assert found["unknown_paths"] == ["/not/there"]


def test_nothing_unless_asked(daemon: Daemon) -> None:
    daemon.start()
    assert daemon.progress() == {"state": "none", "chunks": 0, "ready_chunks": 0}
    with FakeGuest(daemon.directory / "fs.sock") as guest:
        guest.fuse.init()
        guest.fuse.read_file("lone")
    assert daemon.counters()["prefetch_bytes"] == 0


def test_whole_image_after_the_table(tree: Tree, daemon: Daemon) -> None:
    """And what is named is fetched before the rest."""
    daemon.start(enable=True, prefetch_all=True)
    found = daemon.wait_for("done")
    assert found["ready_chunks"] == found["chunks"] == daemon.ready() == 4 * FILE_CHUNKS
    with Bootstrap(tree.bootstrap) as image:
        hot = [chunk.coff for name in ("hot/one", "hot/deep/two") for chunk in image.chunks(image.resolve(name))]
    first = daemon.server.ranges(tree.blob.name)[0]
    assert any(first[0] <= coff <= first[1] for coff in hot)


def test_root_in_the_list_is_everything(daemon: Daemon) -> None:
    daemon.start(["/"])
    assert daemon.wait_for("done")["chunks"] == 4 * FILE_CHUNKS


def test_list_of_an_api_mount(tree: Tree, daemon: Daemon) -> None:
    daemon.start(with_image=False)
    body = {"source": str(tree.bootstrap), "fs_type": "rafs", "config": daemon.config(), "prefetch_files": ["/lone"]}
    assert daemon.call("POST", "/api/v1/mount?mountpoint=/image", body)[0] == 204
    wait_until(lambda: daemon.progress("/image")["state"] == "done", "prefetch")
    assert daemon.ready() == len(tree.chunks("lone"))
    assert daemon.call("DELETE", "/api/v1/mount?mountpoint=/image")[0] == 204
    body["prefetch_files"] = ["relative"]
    assert daemon.call("POST", "/api/v1/mount?mountpoint=/image", body)[0] == 500
    assert daemon.call("GET", ROUTE) == (200, {})


def test_everything_on_request_and_blocking(daemon: Daemon) -> None:
    daemon.start()
    status, found = daemon.call("PUT", f"{ROUTE}?mountpoint=/&wait=60")
    assert (status, found["state"], found["ready_chunks"]) == (200, "done", 4 * FILE_CHUNKS)
    assert daemon.ready() == 4 * FILE_CHUNKS
    before = daemon.counters()["fetched_bytes"]
    assert daemon.call("PUT", f"{ROUTE}?wait=60")[0] == 200
    assert daemon.counters()["fetched_bytes"] == before, "what is here is not fetched again"


def test_a_failing_server_is_told(tree: Tree, daemon: Daemon) -> None:
    """The wait ends with what is missing; healed, the same request brings it."""
    daemon.start()
    daemon.server.inject("status", status=503, match=f"GET /v2/a/b/blobs/sha256:{tree.blob.name}", times=-1)
    status, told = daemon.call("PUT", f"{ROUTE}?wait=0.5", {"files": ["/lone"]})
    assert status == 503 and f"0 of {FILE_CHUNKS} chunks" in told["message"]
    assert daemon.progress()["state"] in ("running", "incomplete")
    daemon.server.heal()
    assert wait_until(lambda: daemon.call("PUT", f"{ROUTE}?wait=20", {"files": ["/lone"]})[0] == 200, "the files")


def test_cancelled(tree: Tree, daemon: Daemon) -> None:
    """Nothing is asked for any more, and readers are served as ever."""
    daemon.start()
    daemon.server.inject("trickle", at_bytes=4096, seconds=0.02, match="GET /v2/a/b/blobs", times=-1)
    assert daemon.call("PUT", ROUTE)[0] == 200
    wait_until(lambda: daemon.server.ranges(tree.blob.name), "a fetch")
    assert daemon.call("DELETE", ROUTE)[0] == 204
    assert daemon.progress()["state"] == "cancelled"
    wait_until(lambda: not daemon.service.engine.prefetch_pending(1), "the end of its jobs")
    asked = len(daemon.server.ranges())
    daemon.server.heal()
    assert daemon.ready() < 4 * FILE_CHUNKS and len(daemon.server.ranges()) == asked
    with FakeGuest(daemon.directory / "fs.sock") as guest:
        guest.fuse.init()
        for name, data in tree.files.items():
            assert guest.fuse.read_file(name) == data


def test_limit_holds_prefetch_alone(tree: Tree, daemon: Daemon) -> None:
    """A rate at which the image would take minutes: a reader gets its file at once all the same."""
    daemon.start(enable=True, prefetch_all=True, bandwidth_limit=4096)
    wait_until(lambda: daemon.counters()["prefetch_bytes"], "the burst")
    started = time.monotonic()
    with FakeGuest(daemon.directory / "fs.sock") as guest:
        guest.fuse.init()
        assert guest.fuse.read_file("lone") == tree.files["lone"]
    demand_s = time.monotonic() - started
    assert demand_s < 10
    assert daemon.call("DELETE", ROUTE)[0] == 204


def test_requests_that_are_wrong(daemon: Daemon, tmp_path: Path) -> None:
    daemon.start()
    for target, body, status in (
        (f"{ROUTE}?mountpoint=/other", None, 404),
        (ROUTE, {"files": "x"}, 400),
        (ROUTE, {"files": ["x"]}, 500),
        (f"{ROUTE}?wait=soon", None, 400),
    ):
        assert daemon.call("PUT", target, body)[0] == status, target
    listed = tmp_path / "list"
    listed.write_text("/a\n\n/b c\n")
    assert read_list(str(listed)) == ["/a", "/b c"]
    listed.write_text("a\n")
    with pytest.raises(UsageFailure, match="not absolute"):
        read_list(str(listed))
    assert main(["virtiofs", "--sock", str(tmp_path / "s"), "--prefetch-files", str(listed)]) == 2


@pytest.mark.parametrize(
    ("chunks", "ranges"),
    [([(0, 1), (0, 2), (0, 3)], [(0, 1, 3)]), ([(0, 1), (1, 2), (1, 4)], [(0, 1, 1), (1, 2, 1), (1, 4, 1)])],
)
def test_neighbours_are_one_range(chunks: list[tuple[int, int]], ranges: list[tuple[int, int, int]]) -> None:
    made: list[tuple[int, int, int]] = []
    for one in chunks:
        add_chunk(made, *one)
    assert made == ranges
