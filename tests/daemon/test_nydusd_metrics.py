"""The real nydusd as the judge of our metrics: both mount one image and see the same reads.

Runs where NYDUSD names a nydusd, as root with /dev/fuse."""

import json
import mmap
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import pytest

from tests.fuse.host import VERB
from tests.system.daemon import WAIT_SECONDS, wait_until
from virtiofsd_nydus.vmm.servers import UnixConnection

NYDUSD = os.environ.get("NYDUSD", "")
pytestmark = [
    pytest.mark.peer,
    pytest.mark.skipif(not shutil.which(NYDUSD), reason="NYDUSD names no nydusd"),
    pytest.mark.skipif(os.geteuid() != 0 or not Path("/dev/fuse").exists(), reason="needs root and /dev/fuse"),
]

PAGE = 4096
FILES = {"one": 3 << 20, "two": 700_001, "three": 5000}
READS = [
    ("one", 0, 4096),
    ("one", 0, 131072),
    ("one", 1 << 20, 1 << 20),
    ("one", 65536, 65536),
    ("two", 0, 262144),
    ("two", 655360, 65536),
    ("three", 0, 8192),
    ("three", 0, 8192),
    ("two", 1 << 20, 4096),
]
READ_FOP, LOOKUP_FOP = 4, 9


class Peer:
    """A daemon on the image, with its API."""

    def __init__(self, api: Path, mount: Path) -> None:
        self.api, self.mount = api, mount

    def get(self, route: str) -> tuple[int, Any]:
        connection = UnixConnection(self.api, WAIT_SECONDS)
        try:
            connection.request("GET", f"/api/v1/metrics{route}")
            answer = connection.getresponse()
            data = answer.read()
            return answer.status, json.loads(data) if data else None
        finally:
            connection.close()

    def read(self, name: str, offset: int, size: int) -> int:
        """One READ, whatever the kernel would like to read ahead. size: of whole pages."""
        fd = os.open(self.mount / name, os.O_RDONLY | os.O_DIRECT)
        try:
            with mmap.mmap(-1, size) as buffer:
                return os.preadv(fd, [buffer], offset)
        finally:
            os.close(fd)


@contextmanager
def serve(words: list[str], directory: Path, image: Path) -> Iterator[Peer]:
    directory.mkdir()
    for name in ("work", "mnt"):
        (directory / name).mkdir()
    config = directory / "config.json"
    config.write_text(
        json.dumps(
            {
                "device": {
                    "id": "/one",
                    "backend": {"type": "localfs", "config": {"dir": str(image / "blobs")}},
                    "cache": {"type": "blobcache", "config": {"work_dir": str(directory / "work")}},
                },
                "mode": "direct",
                "digest_validate": False,
                "enable_xattr": True,
                "iostats_files": True,
                "access_pattern": True,
                "latest_read_files": True,
                "fs_prefetch": {"enable": False},
            }
        )
    )
    peer = Peer(directory / "api.sock", directory / "mnt")
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(
            [
                *words,
                "--config",
                str(config),
                "--bootstrap",
                str(image / "image.boot"),
                "--mountpoint",
                str(peer.mount),
                "--apisock",
                str(peer.api),
            ],
            stdout=log,
            stderr=log,
        )
    try:
        wait_until(lambda: process.poll() is not None or (peer.mount.is_mount() and peer.api.exists()), "the mount")
        assert process.poll() is None, (directory / "log").read_text()
        yield peer
    finally:
        process.terminate()
        process.wait(WAIT_SECONDS)


@pytest.fixture(scope="module", params=["5", "6"])
def peers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Peer, Peer]]:
    """nydusd and ours, after the same reads."""
    directory = tmp_path_factory.mktemp("peers")
    source, random = directory / "source", Random("metrics")
    source.mkdir()
    for name, size in FILES.items():
        (source / name).write_bytes(random.randbytes(size))
    subprocess.run(
        [
            *VERB,
            "build",
            str(source),
            "--bootstrap",
            str(directory / "image.boot"),
            "--blob-dir",
            str(directory / "blobs"),
            "--fs-version",
            request.param,
        ],
        check=True,
        capture_output=True,
    )
    nydusd = [NYDUSD, "fuse", "--rlimit-nofile", "0", "--log-level", "error"]
    with (
        serve(nydusd, directory / "nydusd", directory) as theirs,
        serve([*VERB, "fuse", "--fuse-passthrough", "off"], directory / "ours", directory) as ours,
    ):
        for peer in (theirs, ours):
            for name, offset, size in READS:
                assert peer.read(name, offset, size) == max(0, min(size, FILES[name] - offset))
        yield theirs, ours


def test_global(peers: tuple[Peer, Peer]) -> None:
    (status, theirs), (_, ours) = (peer.get("") for peer in peers)
    assert status == 200 and set(ours) == set(theirs)
    for key in (
        "files_account_enabled",
        "access_pattern_enabled",
        "record_latest_read_files_enabled",
        "measure_latency",
        "nr_opens",
        "data_read",
        "block_count_read",
        "id",
    ):
        assert ours[key] == theirs[key], key
    for fop in (READ_FOP, LOOKUP_FOP):
        assert ours["fop_hits"][fop] == theirs["fop_hits"][fop]
    assert ours["fop_errors"] == theirs["fop_errors"]
    assert sum(ours["read_latency_dist"]) == sum(theirs["read_latency_dist"])
    assert [bool(total) for total in ours["fop_cumulative_latency_total"]] == [
        bool(total) for total in theirs["fop_cumulative_latency_total"]
    ]


def test_files(peers: tuple[Peer, Peer]) -> None:
    (status, theirs), (_, ours) = (peer.get("/files") for peer in peers)
    assert status == 200
    read = {ino: one for ino, one in ours.items() if one["data_read"]}
    assert len(read) == len(FILES) and set(read) == {ino for ino, one in theirs.items() if one["data_read"]}
    for ino, one in read.items():
        assert set(one) == set(theirs[ino])
        assert one["data_read"] == theirs[ino]["data_read"]
        assert one["block_count_read"] == theirs[ino]["block_count_read"]
        assert one["fop_hits"][READ_FOP] == theirs[ino]["fop_hits"][READ_FOP]


def test_pattern(peers: tuple[Peer, Peer]) -> None:
    (status, theirs), (_, ours) = (peer.get("/pattern") for peer in peers)
    assert status == 200 and {tuple(sorted(one)) for one in ours} == {tuple(sorted(one)) for one in theirs}
    assert {one["ino"]: one["nr_read"] for one in ours} == {one["ino"]: one["nr_read"] for one in theirs}
    seconds = [{one["ino"]: one["first_access_time_secs"] for one in document} for document in (theirs, ours)]
    assert all(abs(seconds[0][ino] - seconds[1][ino]) < 60 for ino in seconds[0])


def test_latest(peers: tuple[Peer, Peer]) -> None:
    theirs, ours = (peer.get("/files?latest=true") for peer in peers)
    assert theirs == ours and ours[1]
    assert [peer.get("/files?latest=true") for peer in peers] == [(200, []), (200, [])]


def test_backend(peers: tuple[Peer, Peer]) -> None:
    """How much is fetched in how many pieces is each one's own affair; what is shown of it adds up alike."""
    for status, found in (peer.get("/backend") for peer in peers):
        assert status == 200 and found["backend_type"] == "localfs" and found["read_errors"] == 0
        assert found["read_count"] == sum(found["read_count_block_size_dist"])
        assert [sum(row) for row in found["read_latency_sizes_dist"]] == found["read_count_block_size_dist"]
        assert found["read_cumulative_latency_millis_total"] == sum(found["read_cumulative_latency_millis_dist"])
        assert found["read_amount_total"] > 0
    assert len({frozenset(peer.get("/backend")[1]) for peer in peers}) == 1


def test_blobcache(peers: tuple[Peer, Peer]) -> None:
    (status, theirs), (_, ours) = (peer.get("/blobcache") for peer in peers)
    assert status == 200 and set(ours) == set(theirs)
    assert ours["underlying_files"] == theirs["underlying_files"] and ours["data_all_ready"] is theirs["data_all_ready"]
    for key in (
        "prefetch_data_amount",
        "prefetch_requests_count",
        "prefetch_unmerged_chunks",
        "whole_hits",
        "buffered_backend_size",
        "prefetch_cumulative_time_millis",
        "prefetch_end_time_secs",
        "total",
    ):
        assert ours[key] == theirs[key], key
    assert 0 < ours["partial_hits"] <= ours["total"]


def test_inflight(peers: tuple[Peer, Peer]) -> None:
    assert [peer.get("/inflight") for peer in peers] == [(204, None), (204, None)]
