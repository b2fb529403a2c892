"""What leaves the registry: each chunk once, for however many reads, guests and daemons."""

import contextlib
import hashlib
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tests.peers.faulty_server import FaultyServer
from tests.peers.registry import LocalRegistry
from tests.proofs.sample import CHUNK_BYTES, make_sample
from tests.system.daemon import Daemon, ServedImage, data_ends
from tests.system.guest_tree import Record, differences, list_tree
from tests.system.range_proxy import RangeProxy
from virtiofsd_nydus.fakeguest.fakeguest import FakeGuest
from virtiofsd_nydus.fakeguest.fuse_client import FuseClient


def read_tree(daemon: Daemon) -> list[Record]:
    with FakeGuest(daemon.socket_path) as guest:
        guest.fuse.init()
        return list(list_tree(guest.fuse))


def test_what_was_read_is_never_fetched_again(
    image: ServedImage, registry: LocalRegistry, expected_tree: list[Record], tmp_path: Path
) -> None:
    """Not by the same guest, not by the next one on the daemon, not by another daemon on the cache."""
    with RangeProxy(registry.host) as proxy:
        served = image.with_backend(host=proxy.host)
        with Daemon(served, tmp_path / "cache") as daemon:
            with FakeGuest(daemon.socket_path) as guest:
                guest.fuse.init()
                first = list(list_tree(guest.fuse))
                assert proxy.ranges
                proxy.clear()
                assert list(list_tree(guest.fuse)) == first
            assert differences(expected_tree, read_tree(daemon)) == []
            with Daemon(served, tmp_path / "cache") as other:
                assert differences(expected_tree, read_tree(other)) == []
                assert other.counters()["fetch_jobs"] == 0
        assert proxy.ranges == []


def test_one_read_fetches_what_it_touches(image: ServedImage, registry: LocalRegistry, tmp_path: Path) -> None:
    """A file of one byte does not bring the image."""
    with RangeProxy(registry.host) as proxy, Daemon(image.with_backend(host=proxy.host), tmp_path / "cache") as daemon:
        with FakeGuest(daemon.socket_path) as guest:
            guest.fuse.init()
            guest.fuse.read_file("sizes/1")
        assert 0 < proxy.sent_bytes() < sum(image.blobs.values()) * 0.15


@dataclass(frozen=True)
class AmplifiedImage(ServedImage):
    """With amplify_io, by its name of version 2."""

    amplify_bytes: int = 0

    def write_config(self, path: Path, work_dir: Path) -> Path:
        super().write_config(path, work_dir)
        path.write_text(json.dumps({**json.loads(path.read_text()), "rafs": {"batch_size": self.amplify_bytes}}))
        return path


def test_amplify_io_says_how_far_a_miss_reaches(tmp_path: Path) -> None:
    """0: to the chunk that was read and no further; else over its neighbours."""
    sample = make_sample(tmp_path / "image", files=2, file_bytes=4 << 20)
    with FaultyServer({sample.blob.name: sample.blob.read_bytes()}) as server:
        for amplify, chunks in ((0, 1), (1, 2), (1 << 20, 4), (4 << 20, 16)):
            image = AmplifiedImage(
                sample.bootstrap,
                "registry",
                {"scheme": "http", "host": server.host, "repo": "a/b"},
                {},
                amplify_bytes=amplify,
            )
            server.requests.clear()
            with Daemon(image, tmp_path / f"cache-{amplify}") as daemon, FakeGuest(daemon.socket_path) as guest:
                guest.fuse.init()
                guest.fuse.read(guest.fuse.walk("00001").nodeid, 2 << 20, 4096)
            ((first, last),) = server.ranges(sample.blob.name)
            assert last + 1 - first == chunks * CHUNK_BYTES


def test_names_and_attributes_fetch_nothing(
    image: ServedImage, registry: LocalRegistry, expected_tree: list[Record], tmp_path: Path
) -> None:
    with RangeProxy(registry.host) as proxy, Daemon(image.with_backend(host=proxy.host), tmp_path / "cache") as daemon:
        with FakeGuest(daemon.socket_path) as guest:
            guest.fuse.init()
            for record in expected_tree:
                if record["path"] != "." and "\udce9" not in record["path"] and "\udcff" not in record["path"]:
                    assert guest.fuse.walk(record["path"]).attr.mode & 0o7777 == record["mode"]
        assert daemon.counters()["fetched_chunks"] == 0
        data = data_ends(image)
        assert [one for one in proxy.ranges if one.start < data[one.blob_id]] == []


PROCESSES = 8


def test_eight_cold_daemons_fetch_each_chunk_once(
    image: ServedImage, registry: LocalRegistry, expected_tree: list[Record], tmp_path: Path
) -> None:
    """All read the whole image from one empty cache, each beginning somewhere else. The registry's own access log says
    what left it."""
    limits = data_ends(image)
    files = [record for record in expected_tree if record["kind"] == "file" and record["path"].isprintable()]
    together = threading.Barrier(PROCESSES)

    def run(daemon: Daemon, number: int) -> list[str]:
        at = number * len(files) // PROCESSES
        with FakeGuest(daemon.socket_path) as guest:
            guest.fuse.init()
            together.wait(60)
            return [
                record["path"]
                for record in [*files[at:], *files[:at]]
                if hashlib.sha256(guest.fuse.read_file(record["path"])).hexdigest() != record["sha256"]
            ]

    registry.clear_log()
    with RangeProxy(registry.host) as proxy, ThreadPoolExecutor(PROCESSES) as pool, contextlib.ExitStack() as stack:
        served = image.with_backend(host=proxy.host)
        daemons = [
            stack.enter_context(Daemon(served, tmp_path / "cache", deadline_ms=60_000)) for _ in range(PROCESSES)
        ]
        for wrong in pool.map(run, daemons, range(PROCESSES)):
            assert wrong == []
        fetched = [daemon.counters()["fetched_chunks"] for daemon in daemons]
        assert proxy.overlaps(limits) == []
        sent = {
            blob: sum(
                min(one.end, limits[blob]) - one.start
                for one in proxy.ranges
                if one.blob_id == blob and one.start < limits[blob]
            )
            for blob in limits
        }
    assert sum(count > 0 for count in fetched) > 1, "one daemon did all the work: the test shows nothing"
    for blob, data in sent.items():  # the log counts the chunk descriptions too, which each may need before others
        assert data <= limits[blob]
        assert registry.blob_bytes(blob) <= limits[blob] + PROCESSES * (image.blobs[blob] - limits[blob])


def test_two_cold_daemons_fetch_each_chunk_once(
    image: ServedImage, registry: LocalRegistry, expected_tree: list[Record], tmp_path: Path
) -> None:
    """Both read the whole image at the same time from one empty cache, one of them backwards."""
    limits = data_ends(image)
    together = threading.Barrier(2)

    def read_backwards(fuse: FuseClient) -> None:
        files = [record for record in expected_tree if record["kind"] == "file"]
        for record in reversed(files):
            if record["path"].isascii():
                fuse.read_file(record["path"])

    def run(daemon: Daemon, backwards: bool) -> list[Record]:
        with FakeGuest(daemon.socket_path) as guest:
            guest.fuse.init()
            together.wait(30)
            if backwards:
                read_backwards(guest.fuse)
            return list(list_tree(guest.fuse))

    registry.clear_log()
    with RangeProxy(registry.host) as proxy, ThreadPoolExecutor(2) as pool:
        served = image.with_backend(host=proxy.host)
        with Daemon(served, tmp_path / "cache") as one, Daemon(served, tmp_path / "cache") as two:
            results = [pool.submit(run, one, False), pool.submit(run, two, True)]
            for result in results:
                assert differences(expected_tree, result.result()) == []
            fetched = [daemon.counters()["fetched_chunks"] for daemon in (one, two)]
        assert proxy.overlaps(limits) == []
        data_bytes = {
            blob: sum(
                min(r.end, limits[blob]) - r.start for r in proxy.ranges if r.blob_id == blob and r.start < limits[blob]
            )
            for blob in limits
        }
    assert all(count > 0 for count in fetched), "one daemon did all the work: the test shows nothing"
    # What the registry itself says it sent, chunk descriptions included, which either daemon may need first
    for blob, data in data_bytes.items():
        assert data <= registry.blob_bytes(blob) <= limits[blob] + 2 * (image.blobs[blob] - limits[blob])
