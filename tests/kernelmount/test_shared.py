"""A guest, a FUSE mount and a lazy EROFS mount read the same image at the same time, from one cache directory."""

import json
import subprocess
import sys
import threading
from pathlib import Path

from tests import tree_listing
from tests.fusedev.conftest import StartHost
from tests.kernelmount.kernel import KernelMount
from tests.system.daemon import Daemon, ServedImage, data_ends
from tests.system.guest_tree import Record, differences, list_tree
from tests.system.range_proxy import RangeProxy
from virtiofsd_nydus.vmm.fakeguest import FakeGuest


def test_each_chunk_is_fetched_once(image: ServedImage, proxy: RangeProxy, start_host: StartHost,
                                    expected_tree: list[Record], mounts_dir: Path, tmp_path: Path) -> None:
    """No byte of a blob goes over the wire twice."""
    served = image.with_backend(host=proxy.host)
    host = start_host(served=served)
    found: dict[str, list[Record]] = {}
    with KernelMount(served, mounts_dir / "k", tmp_path) as kernel, \
            Daemon(served, tmp_path / "cache") as daemon, FakeGuest(daemon.socket_path) as guest:
        guest.fuse.init()

        def list_mount(name: str, root: Path) -> None:
            done = subprocess.run([sys.executable, tree_listing.__file__, str(root)], capture_output=True, check=True)
            found[name] = [tree_record(line) for line in done.stdout.splitlines()]

        def list_guest() -> None:
            found["guest"] = list(list_tree(guest.fuse))

        threads = [threading.Thread(target=list_guest),
                   threading.Thread(target=list_mount, args=("host", host.mountpoint)),
                   threading.Thread(target=list_mount, args=("kernel", kernel.target))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(100)
    for who in ("guest", "host", "kernel"):
        assert differences(expected_tree, found[who]) == [], who
    assert proxy.overlaps(data_ends(image)) == []


def tree_record(line: bytes) -> Record:
    record: Record = json.loads(line)
    return record
