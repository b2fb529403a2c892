"""A guest, a FUSE mount and a lazy EROFS mount read the same image at the same time, from one cache directory."""

import hashlib
import json
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import tree_listing
from tests.fuse.conftest import StartHost
from tests.kernelmount.kernel import KernelMount
from tests.peers.registry import LocalRegistry
from tests.system.daemon import Daemon, ServedImage, data_ends
from tests.system.guest_tree import Record, differences, list_tree
from tests.system.range_proxy import RangeProxy
from tests.system.test_guest import guest_files, registry_of_its_own  # noqa: F401
from virtiofsd_nydus.fakeguest.fakeguest import FakeGuest
from virtiofsd_nydus.vmm.guest import Deadline
from virtiofsd_nydus.vmm.qemu import GuestFiles, Machine, MachineConfig, Share

BOOT_SECONDS = 120
# The image's own; the guest has mounted others beside it
PLACES = ("etc", "large", "sizes", "usr")
IN_GUEST = f"cd / && busybox find {' '.join(PLACES)} -type f -print0 | busybox xargs -0 sha256sum"


def run_together(*works: Callable[[], None]) -> None:
    threads = [threading.Thread(target=work) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(150)


def test_each_chunk_is_fetched_once(
    image: ServedImage,
    proxy: RangeProxy,
    start_host: StartHost,
    expected_tree: list[Record],
    mounts_dir: Path,
    tmp_path: Path,
) -> None:
    """No byte of a blob goes over the wire twice."""
    served = image.with_backend(host=proxy.host)
    host = start_host(served=served)
    found: dict[str, list[Record]] = {}
    with (
        KernelMount(served, mounts_dir / "k", tmp_path) as kernel,
        Daemon(served, tmp_path / "cache") as daemon,
        FakeGuest(daemon.socket_path) as guest,
    ):
        guest.fuse.init()

        def list_mount(name: str, root: Path) -> None:
            done = subprocess.run([sys.executable, tree_listing.__file__, str(root)], capture_output=True, check=True)
            found[name] = [tree_record(line) for line in done.stdout.splitlines()]

        def list_guest() -> None:
            found["guest"] = list(list_tree(guest.fuse))

        run_together(
            list_guest, lambda: list_mount("host", host.mountpoint), lambda: list_mount("kernel", kernel.target)
        )
    for who in ("guest", "host", "kernel"):
        assert differences(expected_tree, found[who]) == [], who
    assert proxy.overlaps(data_ends(image)) == []


def tree_record(line: bytes) -> Record:
    record: Record = json.loads(line)
    return record


def hash_tree(root: Path) -> dict[str, str]:
    """Path to digest of every regular file in PLACES."""
    found = {}
    for place in PLACES:
        for directory, _, names in os.walk(root / place):
            for name in names:
                path = Path(directory, name)
                if stat.S_ISREG(path.lstat().st_mode):
                    found[str(path.relative_to(root))] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


@pytest.mark.guest
def test_the_registrys_log_with_a_real_guest(
    registry_of_its_own: tuple[LocalRegistry, ServedImage],  # noqa: F811
    guest_files: GuestFiles,  # noqa: F811
    start_host: StartHost,
    mounts_dir: Path,
    tmp_path: Path,
) -> None:
    """QEMU's guest, FUSE and EROFS, each reading every file: the registry has sent each blob's bytes once."""
    registry, image = registry_of_its_own
    registry.clear_log()
    found: dict[str, dict[str, str]] = {}
    host = start_host(served=image)
    deadline = Deadline(BOOT_SECONDS, "the guest's part")
    with (
        KernelMount(image, mounts_dir / "k", tmp_path) as kernel,
        Daemon(image, tmp_path / "cache") as daemon,
        Machine(
            MachineConfig(guest_files, [Share(daemon.socket_path)], watches={daemon.pidfd: daemon.explain_end})
        ) as machine,
    ):
        machine.guest.wait_hello(deadline)
        machine.guest.mount("vfs", deadline)

        def hash_guest() -> None:
            done = machine.guest.run(["sh", "-c", IN_GUEST], deadline)
            assert done.status == 0, done.stderr
            found["guest"] = {name: digest for digest, name in (line.split("  ", 1) for line in done.text.splitlines())}

        def hash_mount(name: str, root: Path) -> None:
            found[name] = hash_tree(root)

        run_together(
            hash_guest, lambda: hash_mount("fuse", host.mountpoint), lambda: hash_mount("kernel", kernel.target)
        )
        machine.shut_down()
    assert len(found["kernel"]) > 20
    assert found["guest"] == found["kernel"] == found["fuse"]
    for blob_id, size in image.blobs.items():
        sent = registry.blob_bytes(blob_id)
        assert sent <= size, f"{sent} bytes of a blob of {size}"
    assert sum(registry.blob_bytes(blob_id) for blob_id in image.blobs) > 0.9 * sum(data_ends(image).values())
