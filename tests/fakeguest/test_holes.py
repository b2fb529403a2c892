"""SEEK_DATA and SEEK_HOLE: chunks of zeroes are holes, so that a copy leaves them out."""

import os
from pathlib import Path

import pytest

from tests.fakeguest.support import assert_alive
from virtiofsd_nydus.builder.options import BuildOptions
from virtiofsd_nydus.cli.build import build_image
from virtiofsd_nydus.fakeguest.fakeguest import FakeGuest
from virtiofsd_nydus.vmm.servers import NydusDaemon

CHUNK = 1 << 16


@pytest.mark.parametrize("chunk_size", [1 << 12, CHUNK, 1 << 24])
@pytest.mark.parametrize("digester", ["blake3", "sha256"])
@pytest.mark.parametrize("fs_version", [5, 6])
def test_zeroes_are_holes(tmp_path: Path, fs_version: int, digester: str, chunk_size: int) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    with (tree / "sparse").open("wb") as out:  # hole, hole, data, hole, half a chunk of zeroes
        out.seek(2 * chunk_size + 100)
        out.write(b"data")
        out.truncate(4 * chunk_size + chunk_size // 2)
    (tree / "full").write_bytes(b"x" * 3 * chunk_size)
    options = BuildOptions(chunk_size=chunk_size, fs_version=fs_version, digester=digester)
    build_image(tree, tmp_path / "boot", tmp_path, options)
    words = ["--bootstrap", str(tmp_path / "boot"), "--localfs-dir", str(tmp_path)]
    with NydusDaemon(words) as daemon, FakeGuest(daemon.socket_path, queue_size=64) as guest:
        guest.fuse.init()

        def seek(name: str, offset: int, whence: int) -> int:
            return guest.fuse.lseek(guest.fuse.walk(name).nodeid, offset, whence)

        assert seek("sparse", 0, os.SEEK_HOLE) == 0
        assert seek("sparse", 5, os.SEEK_HOLE) == 5
        assert seek("sparse", 5, os.SEEK_DATA) == 2 * chunk_size
        assert seek("sparse", 2 * chunk_size + 7, os.SEEK_DATA) == 2 * chunk_size + 7
        assert seek("sparse", 2 * chunk_size + 7, os.SEEK_HOLE) == 3 * chunk_size
        assert seek("sparse", 3 * chunk_size, os.SEEK_DATA) == 4 * chunk_size  # the rest is less than a chunk: data
        assert seek("full", 0, os.SEEK_HOLE) == 3 * chunk_size
        assert seek("full", chunk_size, os.SEEK_DATA) == chunk_size
        with pytest.raises(OSError, match=r"Errno 6\]"):
            seek("full", 3 * chunk_size, os.SEEK_HOLE)
        assert_alive(daemon)
