"""A disk as files: a directory with the flat disk, the bootstrap and each blob, read through a FUSE session."""

import subprocess
import sys
from pathlib import Path

import pytest

from virtiofsd_nydus.engine import SESSION_RAFS, Disk, Vfs
from virtiofsd_nydus.fakeguest.fakeguest import FakeGuest
from virtiofsd_nydus.storage.config import localfs_config
from virtiofsd_nydus.storage.opened import make_origin, open_with_engine
from virtiofsd_nydus.vhost.device import EngineDevice
from virtiofsd_nydus.vhost.server import VhostServer

BLOCK = 4096


@pytest.fixture(scope="module")
def blobs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with `boot` and the blob of three files."""
    directory = tmp_path_factory.mktemp("disk")
    tree = directory / "tree"
    tree.mkdir()
    for number in range(3):
        (tree / f"file{number}").write_bytes(bytes([65 + number]) * (BLOCK * 40 * number + 1000))
    words = ["build", "--bootstrap", str(directory / "boot"), "--blob-dir", str(directory), str(tree)]
    subprocess.run([sys.executable, "-m", "virtiofsd_nydus.cli.main", *words], check=True, capture_output=True)
    return directory


def test_a_directory_of_devices(blobs: Path, tmp_path: Path) -> None:
    """The flat disk is its devices, each at its place; a read across their borders is one read."""
    config = localfs_config(str(blobs))
    with open_with_engine(str(blobs / "boot"), lambda: make_origin(config, print), work_dir=str(tmp_path)) as opened:
        disk, vfs = Disk(opened.rafs), Vfs(opened.engine, SESSION_RAFS)
        blob = opened.rafs.blobs()[0].id
        vfs.mount_disk("/", disk)
        server = VhostServer(
            lambda: EngineDevice(opened.engine, vfs, 2), path=str(tmp_path / "s"), say=lambda *_, **__: None
        )
        server.start()
        try:
            with FakeGuest(tmp_path / "s") as guest:
                fuse = guest.fuse
                fuse.init()
                names = {one.name.decode() for one in fuse.readdir(1)}
                assert names == {".", "..", "disk", "bootstrap", blob}
                flat, first, second = (fuse.read_file(name) for name in ("disk", "bootstrap", blob))
                assert first == (blobs / "boot").read_bytes()
                assert flat.startswith(first) and flat.endswith(second)
                assert len(flat) == disk.size_bytes and len(second) % BLOCK == 0
                assert not any(flat[len(first) : len(flat) - len(second)])
                entry = fuse.walk("disk")
                at = len(flat) - len(second) - BLOCK
                assert fuse.read(entry.nodeid, at, 2 * BLOCK) == flat[at : at + 2 * BLOCK]
                assert fuse.read(entry.nodeid, len(flat) - 10, BLOCK) == flat[-10:]
                with pytest.raises(OSError, match="no such entry"):
                    fuse.walk("other")
        finally:
            server.close()
            vfs.close()
            disk.close()
