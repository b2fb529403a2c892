"""Backends localdisk and http-proxy: partitions that sfdisk made, and servers on TCP and unix sockets."""

import hashlib
import subprocess
import uuid
from pathlib import Path

import pytest

from tests.peers.faulty_server import FaultyServer
from tests.storage.conftest import DATA, read
from virtiofsd_nydus.errors import Cause, Failure
from virtiofsd_nydus.storage.factory import create_backend

BLOB = hashlib.sha256(DATA).hexdigest()
MIB = 1 << 20


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """A disk image with two partitions; the second holds the blob: its id is name and GUID."""
    path = tmp_path / "disk.img"
    with path.open("wb") as stream:
        stream.truncate(16 * MIB)
    guid = uuid.UUID(hex=BLOB[32:])
    script = (
        "label: gpt\n"
        f"start=2048, size=2048, name=other, uuid={uuid.UUID(int=5)}\n"
        f"start=8192, size=8192, name={BLOB[:32]}, uuid={guid}\n"
    )
    program = "/usr/sbin/sfdisk" if Path("/usr/sbin/sfdisk").exists() else "sfdisk"
    subprocess.run([program, "-q", str(path)], input=script.encode(), check=True, capture_output=True)
    with path.open("r+b") as stream:
        stream.seek(8192 * 512)
        stream.write(DATA)
    return path


@pytest.mark.peer
def test_localdisk(disk: Path) -> None:
    backend = create_backend("localdisk", {"device_path": str(disk)})
    assert read(backend, BLOB, 0, len(DATA)) == DATA
    assert read(backend, BLOB, 12345, 300_000) == DATA[12345:312345]
    assert backend.blob_size(BLOB) == 8192 * 512
    assert backend.meter.nydusd_metrics()["read_count"] == 2
    with pytest.raises(Failure, match="no partition") as caught:
        read(backend, "0" * 64, 0, 1)
    assert caught.value.cause is Cause.MISSING
    with pytest.raises(Failure, match="the image wants") as caught:
        read(backend, BLOB, 8192 * 512 - 1, 2)  # never into the next partition
    assert caught.value.cause is Cause.FORMAT
    backend.close()


@pytest.mark.peer
def test_localdisk_with_a_damaged_table(disk: Path) -> None:
    """The backup table at the end serves; with both damaged there is a clear line."""
    with disk.open("r+b") as stream:
        stream.seek(512 + 20)
        stream.write(b"\xff")
    assert read(create_backend("localdisk", {"device_path": str(disk)}), BLOB, 5, 10) == DATA[5:15]
    with disk.open("r+b") as stream:
        stream.seek(-512 + 20, 2)
        stream.write(b"\xff")
    with pytest.raises(Failure, match="no GUID partition table") as caught:
        read(create_backend("localdisk", {"device_path": str(disk)}), BLOB, 5, 10)
    assert caught.value.cause is Cause.FORMAT


@pytest.mark.parametrize("size", [0, 1, 511, 512, 600, 5000])
def test_localdisk_without_a_table(tmp_path: Path, size: int) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(size))
    with pytest.raises(Failure, match="no GUID partition table"):
        read(create_backend("localdisk", {"device_path": str(path)}), BLOB, 0, 1)
    path.write_bytes(DATA)
    assert read(create_backend("localdisk", {"device_path": str(path), "disable_gpt": True}), "x", 5, 10) == DATA[5:15]
    with pytest.raises(Failure, match="cannot open the device") as caught:
        read(create_backend("localdisk", {"device_path": str(tmp_path / "none")}), BLOB, 0, 1)
    assert caught.value.cause is Cause.MISSING


def test_http_proxy(server: FaultyServer) -> None:
    server.add(DATA)
    backend = create_backend("http-proxy", {"addr": server.url, "path": "/some/blobs/"})
    assert read(backend, BLOB, 5, 100_000) == DATA[5:100_005]
    assert server.requests[0].path == f"/some/blobs/{BLOB}"
    server.inject("redirect")
    assert read(backend, BLOB, 5, 10) == DATA[5:15]
    server.inject("truncate", at_bytes=5)
    assert read(backend, BLOB, 5, 10) == DATA[5:15]
    server.inject("redirect_loop", times=-1)
    with pytest.raises(Failure, match="redirects"):
        read(backend, BLOB, 5, 10)
    with pytest.raises(Failure, match="not one"):
        read(backend, "../x", 5, 10)
    backend.close()


def test_unix_socket(tmp_path: Path) -> None:
    path = tmp_path / "blobs.sock"
    backend = create_backend("http-proxy", {"addr": str(path), "retry_limit": 1})
    with pytest.raises(Failure, match="No such file") as caught:
        read(backend, BLOB, 0, 1)
    assert caught.value.cause is Cause.NETWORK
    with FaultyServer({BLOB: DATA}, unix=path) as server:
        assert read(backend, BLOB, 5, 100_000) == DATA[5:100_005]
        assert backend.blob_size(BLOB) == len(DATA)
        assert [one.path for one in server.requests] == ["/"]
        named = create_backend("http-proxy", {"addr": str(path), "path": "blobs"})
        assert read(named, BLOB, 5, 10) == DATA[5:15]
        assert server.requests[-1].path == f"/blobs/{BLOB}"
    backend.close()
