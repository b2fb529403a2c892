"""`mount --kernel`, and a guest, a FUSE mount and an EROFS mount of the same image at the same time."""

import subprocess
import sys
import threading
from itertools import pairwise
from pathlib import Path

import pytest

from tests import tree_listing
from tests.fusedev.conftest import StartHost
from tests.fusedev.host import VERB
from tests.peers.registry import LocalRegistry
from tests.system.conftest import CODECS, Converter, run_verb
from tests.system.daemon import Daemon, ServedImage
from tests.system.guest_tree import Record, differences, list_tree
from tests.system.range_proxy import RangeProxy
from virtiofsd_nydus.vmm.fakeguest import FakeGuest


@pytest.fixture(autouse=True)
def need_erofs() -> None:
    if "erofs" not in Path("/proc/filesystems").read_text() and subprocess.run(
            ["modprobe", "erofs"], capture_output=True).returncode:
        pytest.skip("this kernel has no EROFS")


def mount_words(image: ServedImage, target: Path, tmp_path: Path) -> list[str]:
    target.mkdir()
    (tmp_path / "cache").mkdir(exist_ok=True)
    config = image.write_config(tmp_path / "kernel.json", tmp_path / "cache")
    return ["mount", str(image.bootstrap), str(target), "--config", str(config), "--kernel"]


@pytest.mark.parametrize("codec", CODECS)
def test_tree_is_what_umoci_unpacks(converter: Converter, expected_tree: list[Record], mounts_dir: Path, tmp_path: Path,
                                    codec: str) -> None:
    target = mounts_dir / "k"
    run_verb(*mount_words(converter.convert(codec), target, tmp_path))
    assert differences(expected_tree, list(tree_listing.list_tree(target))) == []
    run_verb("umount", str(target))
    assert list(target.iterdir()) == []


def test_version_5_is_refused_in_a_line(mounts_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree/file").write_text("x")
    run_verb("build", "--fs-version", "5", "--bootstrap", str(tmp_path / "b"), "--blob-dir", str(tmp_path / "blobs"),
             str(tmp_path / "tree"))
    image = ServedImage(tmp_path / "b", "localfs", {"dir": str(tmp_path / "blobs")}, {})
    done = run_verb(*mount_words(image, mounts_dir / "k", tmp_path), status=1)
    assert "RAFS version 5" in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_each_chunk_is_fetched_once(image: ServedImage, registry: LocalRegistry, start_host: StartHost,
                                    expected_tree: list[Record], mounts_dir: Path, tmp_path: Path) -> None:
    """Three processes on one cache directory, at the same time: no byte of a blob goes over the wire twice."""
    with RangeProxy(registry.host) as proxy:
        served = image.with_backend(host=proxy.host)
        host = start_host(served=served)
        target = mounts_dir / "k"
        found: dict[str, list[Record]] = {}
        with Daemon(served, tmp_path / "cache") as daemon, FakeGuest(daemon.socket_path) as guest:
            guest.fuse.init()

            def list_host() -> None:
                done = subprocess.run([sys.executable, tree_listing.__file__, str(host.mountpoint)],
                                      capture_output=True, check=True)
                found["host"] = [tree_record(line) for line in done.stdout.splitlines()]

            def list_guest() -> None:
                found["guest"] = list(list_tree(guest.fuse))

            def list_kernel() -> None:
                subprocess.run([*VERB, *mount_words(served, target, tmp_path)], check=True, capture_output=True)
                found["kernel"] = list(tree_listing.list_tree(target))

            threads = [threading.Thread(target=work) for work in (list_guest, list_host, list_kernel)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(100)
        for who in ("guest", "host", "kernel"):
            assert differences(expected_tree, found[who]) == [], who
        ranges = sorted(set(proxy.ranges))
        assert len(ranges) == len(proxy.ranges)
        for before, after in pairwise(ranges):
            assert before.blob_id != after.blob_id or before.end <= after.start, (before, after)


def tree_record(line: bytes) -> Record:
    import json

    record: Record = json.loads(line)
    return record
