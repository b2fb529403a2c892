"""Guests for tests: kernel and initramfs by `make guest`, QEMU under TCG (never KVM: it may hang the test host)."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.peers.registry import LocalRegistry
from virtiofsd_nydus.vmm.guest import Deadline
from virtiofsd_nydus.vmm.qemu import GuestFiles, Machine, MachineConfig, Share
from virtiofsd_nydus.vmm.servers import PeerVirtiofsd

ROOT = Path(__file__).resolve().parents[2]
CLI = [sys.executable, "-m", "virtiofsd_nydus.cli.main"]
BUSYBOX = Path("/bin/busybox")
APPLETS = ("sh", "cat", "echo", "sleep", "id", "ls", "seq", "sha256sum", "kill", "true", "touch", "stat")
# A boot takes 2.3 s alone; a loaded machine takes many times that
BOOT_SECONDS = 60


@pytest.fixture(scope="session")
def guest_files() -> GuestFiles:
    return GuestFiles.find()


@pytest.fixture(scope="session")
def busybox_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small tree that a guest can run commands in."""
    root = tmp_path_factory.mktemp("root")
    (root / "bin").mkdir()
    (root / "bin" / "busybox").write_bytes(BUSYBOX.read_bytes())
    (root / "bin" / "busybox").chmod(0o755)
    for applet in APPLETS:
        (root / "bin" / applet).symlink_to("busybox")
    (root / "tmp").mkdir(mode=0o1777)
    (root / "lower.txt").write_text("from the lower layer\n")
    return root


@pytest.fixture(scope="session")
def peer(busybox_root: Path) -> PeerVirtiofsd:
    """QEMU's own virtiofsd on that tree, not yet started: one `with` per boot (it serves one guest)."""
    if os.geteuid() != 0:
        pytest.skip("QEMU's virtiofsd needs root")
    return PeerVirtiofsd(busybox_root)


@pytest.fixture(scope="module")
def machine(guest_files: GuestFiles, peer: PeerVirtiofsd) -> Iterator[Machine]:
    """A booted guest whose root is mounted, for tests that leave it as they found it."""
    with peer as server, Machine(MachineConfig(guest_files, [Share(server.socket_path)])) as booted:
        deadline = Deadline(BOOT_SECONDS, "the boot")
        booted.guest.wait_hello(deadline)
        booted.guest.mount("vfs", deadline)
        yield booted


def run_tool(*words: str | Path) -> str:
    return subprocess.run([str(word) for word in words], check=True, capture_output=True, text=True, cwd=ROOT).stdout


@pytest.fixture(scope="session")
def demo_image() -> str:
    """The demo image as an OCI layout: kept in build/, made when it is not there."""
    return run_tool(sys.executable, "scripts/make-demo-image.py").strip()


@pytest.fixture(scope="session")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalRegistry]:
    with LocalRegistry(tmp_path_factory.mktemp("registry")) as running:
        yield running


@pytest.fixture(scope="session")
def nydus_image(demo_image: str, registry: LocalRegistry) -> str:
    """The demo image, converted into the registry."""
    target = f"docker://{registry.host}/demo:nydus"
    run_tool(*CLI, "convert", demo_image, target)
    return target


@pytest.fixture
def deadline() -> Deadline:
    return Deadline(BOOT_SECONDS, "the test's guest work")
