"""Metrics over the API: every key of nydusd's documents with its meaning, Prometheus text, hot changes of the login."""

import base64
import http.client
import json
import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.peers.faulty_server import FaultyServer
from tests.store.conftest import Image
from tests.system.daemon import wait_until
from virtiofsd_nydus.daemon.config import parse_config
from virtiofsd_nydus.daemon.log import Log
from virtiofsd_nydus.daemon.service import Service
from virtiofsd_nydus.vmm.fakeguest import FakeGuest

SECRET = "the-secret-word"
AUTH = base64.b64encode(f"someone:{SECRET}".encode()).decode()

GLOBAL_KEYS = {
    "files_account_enabled", "access_pattern_enabled", "record_latest_read_files_enabled", "measure_latency", "id",
    "nr_opens", "data_read", "block_count_read", "fop_hits", "fop_errors", "fop_cumulative_latency_total",
    "read_latency_dist"}
BACKEND_KEYS = {
    "backend_type", "read_count", "read_errors", "read_amount_total", "read_cumulative_latency_millis_total",
    "read_cumulative_latency_millis_dist", "read_count_block_size_dist", "read_latency_sizes_dist"}
BLOBCACHE_KEYS = {
    "id", "underlying_files", "store_path", "partial_hits", "whole_hits", "total", "entries_count",
    "prefetch_data_amount", "prefetch_requests_count", "prefetch_workers", "prefetch_unmerged_chunks",
    "prefetch_cumulative_time_millis", "prefetch_begin_time_secs", "prefetch_begin_time_millis",
    "prefetch_end_time_secs", "prefetch_end_time_millis", "buffered_backend_size", "data_all_ready"}


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    return Image(tmp_path_factory.mktemp("image"), "zstd", "blake3")


class Daemon:
    """A service with the image behind a faulty registry that wants a token, and its API."""

    def __init__(self, image: Image, directory: Path, server: FaultyServer) -> None:
        self.image, self.server, self.directory = image, server, directory
        self.api = directory / "api.sock"
        self.log = directory / "log"
        self.service = Service(Log("info", str(self.log)), read_deadline_ms=3000)

    def config(self, identity: str, work_dir: str, **prefetch: object) -> str:
        return json.dumps({
            "version": 2, "id": identity,
            "backend": {"type": "registry", "registry": {
                "scheme": "http", "host": self.server.host, "repo": "a/b", "auth": AUTH, "timeout": 1}},
            "cache": {"type": "blobcache", "filecache": {"work_dir": str(self.directory / work_dir)}},
            "rafs": {"iostats_files": True, "prefetch": prefetch}})

    def start(self, with_image: bool = True, **prefetch: object) -> None:
        if not with_image:
            self.service.start(sock=str(self.directory / "fs.sock"), fd=None, apisock=str(self.api), bootstrap=None,
                               config=None)
            return
        self.service.start(sock=str(self.directory / "fs.sock"), fd=None, apisock=str(self.api),
                           bootstrap=str(self.image.bootstrap), mountpoint="/",
                           config=parse_config(self.config("conf-1", "cache", **prefetch)))

    def call(self, path: str, method: str = "GET", body: object = None) -> tuple[int, Any]:
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

    def read(self, name: str) -> bytes:
        """Reads a file as a guest that has just booted."""
        with FakeGuest(self.directory / "fs.sock") as guest:
            guest.fuse.init()
            return guest.fuse.read_file(name)


@pytest.fixture
def daemon(image: Image, tmp_path: Path) -> Iterator[Callable[..., Daemon]]:
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
        for one in made:
            one.service.stop()
            text = one.log.read_text()
            assert SECRET not in text and AUTH not in text


def prometheus(text: str) -> dict[str, float]:
    """Samples by name with labels; the text is checked line by line."""
    found: dict[str, float] = {}
    typed: set[str] = set()
    for line in text.splitlines():
        if line.startswith("# "):
            match = re.fullmatch(r"# (?:HELP (\w+) \S.*|TYPE (\w+) (?:counter|gauge))", line)
            assert match, line
            typed.add(match.group(1) or match.group(2))
            continue
        match = re.fullmatch(r'((\w+)(?:\{(?:\w+="[^"\n]*",?)+\})?) (-?[0-9.]+)', line)
        assert match and match.group(2) in typed, line
        found[match.group(1)] = float(match.group(3))
    assert text.endswith("\n")
    return found


def test_keys_and_meaning(image: Image, daemon: Callable[..., Daemon]) -> None:
    one = daemon()
    name = "file-11"
    assert one.read(name) == image.files[name]
    assert one.read(name) == image.files[name]
    status, found = one.call("/api/v1/metrics")
    assert status == 200 and set(found) == GLOBAL_KEYS
    assert found["files_account_enabled"] is True and found["id"] == "/"
    assert [len(found[key]) for key in ("fop_hits", "fop_errors", "block_count_read", "read_latency_dist")] == [
        15, 15, 8, 8]
    assert found["data_read"] == 2 * len(image.files[name])
    reads = -(-len(image.files[name]) // 131072)    # the fake guest asks for 128 KiB at a time
    assert found["fop_hits"][4] == sum(found["block_count_read"]) >= 2 * reads
    assert found["block_count_read"][4] >= 2 * (reads - 1)
    assert found["fop_hits"][9] == 2 and found["fop_errors"] == [0] * 15     # one lookup a read
    status, found = one.call("/api/v1/metrics/backend?id=/")
    assert status == 200 and set(found) == BACKEND_KEYS
    assert found["backend_type"] == "registry" and found["read_errors"] == 0
    assert found["read_count"] == len(one.server.ranges(image.blob.name)) - 1     # less the one that was answered 401
    assert sum(found["read_count_block_size_dist"]) == found["read_count"]
    assert 0 < found["read_amount_total"] <= image.blob.stat().st_size
    status, found = one.call("/api/v1/metrics/blobcache?id=conf-1")
    assert status == 200 and set(found) == BLOBCACHE_KEYS
    assert found["underlying_files"] == [image.blob.name] and found["store_path"] == str(one.directory / "cache")
    assert found["entries_count"] > 0 and found["data_all_ready"] is False
    assert found["total"] >= found["whole_hits"] > 0
    assert found["prefetch_data_amount"] == found["prefetch_workers"] == 0
    assert one.call("/api/v1/metrics/files") == (200, {})
    assert one.call("/api/v1/metrics/files?latest=true") == (200, [])
    assert one.call("/api/v1/metrics/pattern") == (200, [])
    assert one.call("/api/v1/metrics/inflight") == (204, "")


def test_prefetch_numbers(image: Image, daemon: Callable[..., Daemon]) -> None:
    one = daemon(enable=True, prefetch_all=True)
    found = wait_until(lambda: (answer := one.call("/api/v1/metrics/blobcache")[1])["data_all_ready"] and answer,
                       "everything fetched")
    assert found["prefetch_data_amount"] >= image.blob.stat().st_size * 0.9
    assert found["prefetch_workers"] > 0
    assert found["prefetch_end_time_secs"] >= found["prefetch_begin_time_secs"] > 1_600_000_000


def test_bandwidth_limit_of_prefetch(image: Image, daemon: Callable[..., Daemon]) -> None:
    """A tenth of the blob a second: prefetch keeps to it in the long run while a reader is served at once."""
    import time

    size = image.blob.stat().st_size
    began = time.monotonic()
    one = daemon(enable=True, prefetch_all=True, bandwidth_limit=size // 10)
    assert one.read("file-11") == image.files["file-11"]
    assert time.monotonic() - began < 3
    (mount,) = one.service._mounts.values()
    assert mount.prefetch_limit is not None
    wait_until(lambda: mount.prefetch_limit.debt_s() > 0 or one.call("/api/v1/metrics/blobcache")[1]["data_all_ready"],
               "the limit is used up")


def test_which_instance(image: Image, daemon: Callable[..., Daemon]) -> None:
    one = daemon(with_image=False)
    one.service.mount_rafs("/first", str(image.bootstrap), one.config("conf-1", "cache"))
    for path, name in (("", "GlobalMetrics"), ("/backend", "BackendMetrics"), ("/blobcache", "BlobcacheMetrics"),
                       ("/files", "FsFilesMetrics"), ("/pattern", "Pattern")):
        status, found = one.call(f"/api/v1/metrics{path}?id=other")
        assert status == 404 and found["message"] == f"{name}(Metrics(Stats(NoCounter)))"
        assert one.call(f"/api/v1/metrics{path}", "PUT", {})[0] == 400
    one.service.mount_rafs("/second", str(image.bootstrap), one.config("conf-2", "cache-2"))
    assert one.call("/api/v1/metrics")[0] == 404      # which of the two?
    assert one.call("/api/v1/metrics?id=/second")[1]["id"] == "/second"
    assert one.call("/api/v1/metrics/blobcache?id=conf-2")[1]["id"] == "conf-2"


def test_prometheus(image: Image, daemon: Callable[..., Daemon]) -> None:
    one = daemon()
    assert one.read("file-11") == image.files["file-11"]
    status, text = one.call("/api/ext/v1/metrics")
    found = prometheus(text)
    assert status == 200
    where = '{mountpoint="/",backend="registry"}'
    assert found["virtiofsd_nydus_needed_bytes_total"] >= len(image.files["file-11"])
    assert 0 < found["virtiofsd_nydus_fetched_bytes_total"] <= image.blob.stat().st_size
    assert found["virtiofsd_nydus_reads_waited_total"] >= 1
    assert found['virtiofsd_nydus_file_operations_total{operation="lookup"}'] == 1
    assert found["virtiofsd_nydus_oldest_wait_seconds"] == 0
    assert found["virtiofsd_nydus_wasted_bytes_total"] == 0     # bytes count on arrival, before the reader has them
    assert found[f"virtiofsd_nydus_backend_healthy{where}"] == 1
    assert found[f"virtiofsd_nydus_backend_login_refused{where}"] == 0
    assert found[f"virtiofsd_nydus_backend_received_bytes_total{where}"] >= found["virtiofsd_nydus_fetched_bytes_total"]


def test_a_read_that_hangs_shows(image: Image, daemon: Callable[..., Daemon]) -> None:
    import threading

    one = daemon()
    one.server.inject("delay", seconds=30, times=-1)

    def run() -> None:
        with pytest.raises(OSError):
            one.read("file-11")

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    status, found = wait_until(lambda: (answer := one.call("/api/v1/metrics/inflight"))[0] == 200 and answer,
                               "the read is in flight")
    assert status == 200 and found[0]["opcode"] == 15 and found[0]["timestamp_secs"] > 1_600_000_000
    assert prometheus(one.call("/api/ext/v1/metrics")[1])["virtiofsd_nydus_oldest_wait_seconds"] > 0
    thread.join(20)
    assert not thread.is_alive()
    assert one.call("/api/v1/metrics")[1]["fop_errors"][4] == 1
    found = prometheus(one.call("/api/ext/v1/metrics")[1])
    assert found['virtiofsd_nydus_backend_errors_total{mountpoint="/",backend="registry",cause="network"}'] >= 1


def test_login_changed_while_mounted(image: Image, daemon: Callable[..., Daemon]) -> None:
    one = daemon()
    one.server.token_user = "someone:other"
    with pytest.raises(OSError):
        one.read("file-11")
    assert one.call("/api/ext/v1/stats")[1]["backends"]["/"]["login"] == "refused"
    auth = base64.b64encode(b"someone:other").decode()
    assert one.call("/api/v1/config?id=/", "PUT", {"registry_auth": auth}) == (204, "")
    assert one.read("file-11") == image.files["file-11"]
    assert one.call("/api/v1/config?id=/") == (200, {"registry_auth": auth})
    assert one.call("/api/v1/config?id=/", "PUT", {"colour": "x"})[0] == 500
    assert one.call("/api/v1/config?id=/", "PUT", {"registry_auth": "###"})[0] == 500
    assert one.call("/api/v1/config?id=/", "PUT", {"registry_auth": 5})[0] == 400
    assert one.call("/api/v1/config?id=/none", "PUT", {"registry_auth": auth})[0] == 204    # kept for one that comes


def test_proxy_changed_while_mounted(image: Image, daemon: Callable[..., Daemon]) -> None:
    one = daemon()
    assert one.read("file-11") == image.files["file-11"]
    with FaultyServer(one.server.blobs) as peer:
        assert one.call("/api/v1/config", "PUT", {"proxy_url": peer.url}) == (204, "")
        assert one.read("file-10") == image.files["file-10"]
        assert len(peer.requests) >= 1
        assert one.call("/api/v1/config", "PUT", {"proxy_url": ""}) == (204, "")
        peer.requests.clear()
        assert one.read("file-09") == image.files["file-09"]
        assert peer.requests == []


def test_the_daemon_tells_its_configuration_without_secrets(daemon: Callable[..., Daemon]) -> None:
    found = daemon().call("/api/v1/daemon")[1]["backend_collection"]["/"]["config"]
    assert found["version"] == 2 and found["backend"]["registry"]["repo"] == "a/b"
