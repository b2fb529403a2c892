"""Metrics over the API: every key of nydusd's documents, mount by mount; hot changes of the login."""

import base64
import re
import shutil
import threading
import time
from collections.abc import Callable

import pytest

from tests.daemon.conftest import Daemon
from tests.peers.faulty_server import FaultyServer
from tests.store.conftest import Image
from tests.system.daemon import wait_until

GLOBAL_KEYS = {
    "files_account_enabled",
    "access_pattern_enabled",
    "record_latest_read_files_enabled",
    "measure_latency",
    "id",
    "nr_opens",
    "data_read",
    "block_count_read",
    "fop_hits",
    "fop_errors",
    "fop_cumulative_latency_total",
    "read_latency_dist",
}
BACKEND_KEYS = {
    "backend_type",
    "read_count",
    "read_errors",
    "read_amount_total",
    "read_cumulative_latency_millis_total",
    "read_cumulative_latency_millis_dist",
    "read_count_block_size_dist",
    "read_latency_sizes_dist",
}
BLOBCACHE_KEYS = {
    "underlying_files",
    "store_path",
    "partial_hits",
    "whole_hits",
    "total",
    "entries_count",
    "prefetch_data_amount",
    "prefetch_requests_count",
    "prefetch_workers",
    "prefetch_unmerged_chunks",
    "prefetch_cumulative_time_millis",
    "prefetch_begin_time_secs",
    "prefetch_begin_time_millis",
    "prefetch_end_time_secs",
    "prefetch_end_time_millis",
    "buffered_backend_size",
    "data_all_ready",
}
FILE_KEYS = {"total_fops", "data_read", "block_count_read", "fop_hits", "fop_errors"}
GETATTR, READ, LOOKUP = 0, 4, 9
READ_BYTES = 131072  # what the fake guest asks for at a time


def test_keys_and_meaning(image: Image, daemon: Callable[..., Daemon]) -> None:
    one = daemon()
    name = "file-11"
    size = len(image.files[name])
    for _ in range(2):
        assert one.read(name) == image.files[name]
    status, found = one.call("/api/v1/metrics")
    assert status == 200 and set(found) == GLOBAL_KEYS
    assert found["files_account_enabled"] is found["measure_latency"] is True and found["id"] == "/"
    assert [len(found[key]) for key in ("fop_hits", "fop_errors", "block_count_read", "read_latency_dist")] == [
        15,
        15,
        8,
        8,
    ]
    assert found["data_read"] == 2 * size
    full, rest = divmod(size, READ_BYTES)
    # Buckets begin at 0, 1K, 4K, 16K, 64K, 128K, 512K, 1M. The fake guest reads until nothing comes
    sizes = [0] * 8
    sizes[5] = 2 * full
    sizes[sum(rest >= bound << 10 for bound in (1, 4, 16, 64, 128, 512, 1024))] += 2
    ends = sum(found["block_count_read"]) - sum(sizes)
    sizes[0] += ends
    assert found["block_count_read"] == sizes and ends in (0, 2)
    assert found["fop_hits"][READ] == 2 * (full + 1) + ends
    assert found["fop_hits"][LOOKUP] == 2 and found["fop_errors"] == [0] * 15  # one lookup a read
    assert sum(found["read_latency_dist"]) == 2 * (full + 1)  # of those that gave bytes
    latencies = found["fop_cumulative_latency_total"]
    assert latencies[READ] > 0 and sum(latencies) == latencies[READ]
    asked = len(one.server.ranges(image.blob.name)) - 1  # less the one that was answered 401
    status, found = wait_until(
        lambda: (answer := one.call("/api/v1/metrics/backend?id=/"))[1]["read_count"] == asked and answer,
        "the last attempt is over",
    )  # which its reader does not wait for
    assert status == 200 and set(found) == BACKEND_KEYS
    assert found["backend_type"] == "registry" and found["read_errors"] == 0
    assert sum(found["read_count_block_size_dist"]) == found["read_count"]
    assert 0 < found["read_amount_total"] <= image.blob.stat().st_size
    status, found = one.call("/api/v1/metrics/blobcache?id=conf-1")
    assert status == 200 and set(found) == BLOBCACHE_KEYS
    assert found["underlying_files"] == [f"{image.blob.name}.blob.data"]
    assert found["store_path"] == str(one.directory / "cache")
    assert found["entries_count"] > 0 and found["data_all_ready"] is False
    assert found["total"] == 2 * (full + 1) > found["partial_hits"] >= full + 1
    assert found["whole_hits"] == found["buffered_backend_size"] == 0
    assert not [key for key in found if key.startswith("prefetch_") and found[key]]
    assert one.call("/api/v1/metrics/inflight") == (204, "")


def test_a_slow_read_shows_in_the_latencies(image: Image, daemon: Callable[..., Daemon]) -> None:
    """It begins when the guest asks, not when the bytes are there."""
    one = daemon()
    one.server.inject("delay", seconds=0.6, match="/blobs/")
    assert one.read("file-01") == image.files["file-01"]
    found = one.call("/api/v1/metrics")[1]
    assert sum(found["read_latency_dist"]) == 1 and not sum(found["read_latency_dist"][:5])  # over 500 ms
    assert found["fop_cumulative_latency_total"][READ] >= 600_000


def test_single_files(image: Image, daemon: Callable[..., Daemon]) -> None:
    one = daemon()
    before = time.time()
    with one.guest() as guest:
        guest.fuse.init()
        inos = {}
        for name in ("file-01", "file-02", "file-03"):
            inos[name] = guest.fuse.walk(name).nodeid & (1 << 48) - 1
        for name, times in (("file-01", 3), ("file-02", 1)):
            for _ in range(times):
                assert guest.fuse.read_file(name) == image.files[name]
        with pytest.raises(OSError):
            guest.fuse.getattr(guest.fuse.walk("file-01").nodeid + (1 << 40))  # no such inode
    status, files = one.call("/api/v1/metrics/files")
    assert status == 200 and all(set(of_file) == FILE_KEYS for of_file in files.values())
    first, second = files[str(inos["file-01"])], files[str(inos["file-02"])]
    assert str(inos["file-03"]) not in files  # only looked up, which is its directory's
    assert len(files) == 3
    assert first["data_read"] == 3 * len(image.files["file-01"]) and first["fop_hits"][READ] >= 3
    assert second["data_read"] == len(image.files["file-02"])
    assert sum(first["block_count_read"]) == first["fop_hits"][READ]
    assert first["total_fops"] == sum(first["fop_hits"]) + sum(first["fop_errors"])
    status, patterns = one.call("/api/v1/metrics/pattern")
    assert status == 200
    by_ino = {one.pop("ino"): one for one in patterns}
    assert set(by_ino) == {inos["file-01"], inos["file-02"]}
    assert by_ino[inos["file-01"]]["nr_read"] == first["fop_hits"][READ]
    times = [
        by_ino[inos[name]]["first_access_time_secs"] + by_ino[inos[name]]["first_access_time_nanos"] / 1e9
        for name in ("file-01", "file-02")
    ]
    assert before <= times[0] <= times[1] <= time.time()
    status, latest = one.call("/api/v1/metrics/files?latest=true")
    shown = {ino for one in latest for ino in range(one[0], one[-1] + 1)}
    assert status == 200 and shown == {inos["file-01"], inos["file-02"]}
    assert one.call("/api/v1/metrics/files?latest=true") == (200, [])  # told once
    assert one.read("file-02") == image.files["file-02"]
    assert one.call("/api/v1/metrics/files?latest=true") == (200, [[inos["file-02"]]])


def test_single_files_only_where_asked(image: Image, daemon: Callable[..., Daemon]) -> None:
    one = daemon(rafs={"access_pattern": True})
    assert one.read("file-01") == image.files["file-01"]
    assert one.call("/api/v1/metrics/files") == (200, {})
    assert one.call("/api/v1/metrics/files?latest=true") == (200, [])
    assert len(one.call("/api/v1/metrics/pattern")[1]) == 1


def test_each_mount_counts_for_itself(image: Image, daemon: Callable[..., Daemon]) -> None:
    one = daemon(with_image=False)
    for name, rafs in (("first", None), ("second", {})):
        one.mount(f"/{name}", one.config(f"conf-{name}", name, rafs))
    assert one.read("first/file-05") == image.files["file-05"]
    first, second = (one.call(f"/api/v1/metrics?id=/{name}")[1] for name in ("first", "second"))
    assert first["id"] == "/first" and second["id"] == "/second"
    assert first["data_read"] == len(image.files["file-05"])
    assert second["data_read"] == sum(second["fop_hits"]) == sum(second["read_latency_dist"]) == 0
    assert first["fop_hits"][LOOKUP] == 1  # of file-05; /first is not in the image
    for name, nothing in (("first", False), ("second", True)):
        cache = one.call(f"/api/v1/metrics/blobcache?id=conf-{name}")[1]
        assert (cache["total"] == 0) is (cache["entries_count"] == 0) is nothing
        assert cache["store_path"] == str(one.directory / name)
        assert (one.call(f"/api/v1/metrics/files?id=/{name}")[1] == {}) is nothing
        assert (one.call(f"/api/v1/metrics/pattern?id=/{name}")[1] == []) is nothing
        assert bool(one.service.table.find(f"/{name}").backend.meter.own_metrics()["received_bytes"]) is not nothing
    assert one.read("second/file-05") == image.files["file-05"]
    assert one.call("/api/v1/metrics?id=/second")[1]["data_read"] == len(image.files["file-05"])
    assert one.call("/api/v1/metrics?id=/first")[1] == first


def test_chunks_found_in_the_cache_are_whole_hits(image: Image, daemon: Callable[..., Daemon]) -> None:
    """Another tool's cache, or ours without our own map: verified first, not fetched."""
    one = daemon()
    assert one.read("file-11") == image.files["file-11"]
    kept = one.call("/api/v1/metrics/blobcache")[1]["entries_count"]
    one.stop()
    shutil.rmtree(one.directory / "cache" / ".virtiofsd-nydus")
    again = daemon()
    assert again.read("file-11") == image.files["file-11"]
    found = wait_until(
        lambda: (answer := again.call("/api/v1/metrics/blobcache")[1])["whole_hits"] and answer, "chunks were verified"
    )
    assert 0 < found["whole_hits"] <= kept
    assert again.call("/api/v1/metrics/backend")[1]["read_count"] == 0


def test_prefetch_numbers(image: Image, daemon: Callable[..., Daemon]) -> None:
    began = time.time()
    one = daemon(enable=True, prefetch_all=True)
    chunks = sum(blob.chunk_count for blob in one.service.table.find("/").image.blobs())
    found = wait_until(
        lambda: (
            (answer := one.call("/api/v1/metrics/blobcache")[1])["data_all_ready"]
            and answer["prefetch_unmerged_chunks"] >= chunks
            and answer
        ),
        "everything fetched",
    )
    size = image.blob.stat().st_size
    assert 0.9 * size < found["prefetch_data_amount"] <= size
    assert found["prefetch_unmerged_chunks"] == chunks == found["entries_count"]
    assert 1 <= found["prefetch_requests_count"] <= chunks
    assert found["prefetch_workers"] > 0
    first, last = (
        found[f"prefetch_{name}_time_secs"] + found[f"prefetch_{name}_time_millis"] / 1000 for name in ("begin", "end")
    )
    assert int(began) <= first <= last <= time.time()
    taken_ms = found["prefetch_cumulative_time_millis"]
    assert taken_ms / 1000 <= (last - first + 0.01) * found["prefetch_workers"]
    assert found["total"] == 0  # no guest has read


def test_bandwidth_limit_of_prefetch(image: Image, daemon: Callable[..., Daemon]) -> None:
    """A tenth of the blob a second: prefetch keeps to it in the long run while a reader is served at once."""
    size = image.blob.stat().st_size
    began = time.monotonic()
    one = daemon(enable=True, prefetch_all=True, bandwidth_limit=size // 10)
    assert one.read("file-11") == image.files["file-11"]
    assert time.monotonic() - began < 3
    (mount,) = one.service.table.images()
    assert mount.opened.origin.prefetch_limit is not None
    wait_until(
        lambda: (
            mount.opened.origin.prefetch_limit.debt_s() > 0
            or one.call("/api/v1/metrics/blobcache")[1]["data_all_ready"]
        ),
        "the limit is used up",
    )


def test_which_instance(image: Image, daemon: Callable[..., Daemon]) -> None:
    one = daemon(with_image=False)
    one.mount("/first", one.config("conf-1", "cache"))
    for path, name in (
        ("", "GlobalMetrics"),
        ("/backend", "BackendMetrics"),
        ("/blobcache", "BlobcacheMetrics"),
        ("/files", "FsFilesMetrics"),
        ("/pattern", "Pattern"),
    ):
        status, found = one.call(f"/api/v1/metrics{path}?id=other")
        assert status == 404 and found["message"] == f"{name}(Metrics(Stats(NoCounter)))"
        assert one.call(f"/api/v1/metrics{path}", "PUT", {})[0] == 400
    one.mount("/second", one.config("conf-2", "cache-2"))
    assert one.call("/api/v1/metrics")[0] == 404  # which of the two?
    assert one.call("/api/v1/metrics?id=/second")[1]["id"] == "/second"
    assert one.call("/api/v1/metrics/blobcache?id=conf-2")[1]["store_path"].endswith("cache-2")


def test_reads_that_hang_show(image: Image, daemon: Callable[..., Daemon]) -> None:
    """Each of them, with what nydusd's clients look at; and each mount's oldest."""
    one = daemon(with_image=False)
    for name in ("first", "second"):
        one.mount(f"/{name}", one.config(name, name))
    one.server.inject("delay", seconds=30, times=-1)

    def run(name: str) -> None:
        with pytest.raises(OSError):
            one.read(f"first/{name}")

    threads = [threading.Thread(target=run, args=(name,), daemon=True) for name in ("file-05", "file-11")]
    for thread in threads:
        thread.start()
    found = wait_until(
        lambda: len(answer := one.call("/api/v1/metrics/inflight")[1]) == 2 and answer, "both reads are in flight"
    )
    assert all(set(read) == {"inode", "opcode", "unique", "timestamp_secs"} for read in found)
    assert {read["opcode"] for read in found} == {15}
    assert len({read["inode"] for read in found}) == 2
    assert all(0 <= time.time() - read["timestamp_secs"] < 20 for read in found)
    text = wait_until(lambda: one.call("/api/ext/v1/metrics")[1], "the text")
    waits = {match[1]: float(match[2]) for match in re.finditer(r'oldest_wait_seconds\{mountpoint="(.*)"\} (.*)', text)}
    assert waits["/first"] > 0 and waits["/second"] == 0
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    assert one.call("/api/v1/metrics/inflight") == (204, "")
    found = one.call("/api/v1/metrics?id=/first")[1]
    assert found["fop_errors"][READ] == 2 and found["data_read"] == 0
    assert sum(found["read_latency_dist"]) == 0
    assert one.call("/api/v1/metrics?id=/second")[1]["fop_errors"] == [0] * 15
    assert re.search(
        r'backend_errors_total\{mountpoint="/first",backend="registry",cause="network"\} [1-9]',
        one.call("/api/ext/v1/metrics")[1],
    )


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
    assert one.call("/api/v1/config?id=/none", "PUT", {"registry_auth": auth})[0] == 204  # kept for one that comes


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
