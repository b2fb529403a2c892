"""Many small files, cold: neighbouring misses become few requests."""

import hashlib
from pathlib import Path

import pytest

from tests.peers.faulty_server import FaultyServer
from tests.proofs.sample import Sample, make_sample
from tests.system.daemon import Daemon, ServedImage
from virtiofsd_nydus.fakeguest.fakeguest import FakeGuest

FILES, FILE_BYTES = 10_000, 4096
CHUNKS_PER_REQUEST = 64


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Sample:
    return make_sample(tmp_path_factory.mktemp("small"), FILES, FILE_BYTES, FILE_BYTES)


@pytest.mark.parametrize(("backwards", "count"), [(False, FILES), (True, FILES // 4)])
def test_small_files(sample: Sample, tmp_path: Path, backwards: bool, count: int) -> None:
    """By name, as the image has them, at most one request for 64 chunks. Backwards, where speculation would otherwise
    find nothing to take along, not many more."""
    names = sorted(sample.files, reverse=backwards)[:count]
    with FaultyServer({sample.blob.name: sample.blob.read_bytes()}) as server:
        image = ServedImage(sample.bootstrap, "registry", {"scheme": "http", "host": server.host, "repo": "a/b"}, {})
        with Daemon(image, tmp_path / "cache", deadline_ms=60_000) as daemon, FakeGuest(daemon.socket_path) as guest:
            guest.fuse.init()
            for name in names:
                assert hashlib.sha256(guest.fuse.read_file(name)).hexdigest() == sample.files[name]
            assert daemon.ready_chunks() >= count
        asked = len(server.ranges(sample.blob.name))
    assert asked <= count // CHUNKS_PER_REQUEST * (2 if backwards else 1)
