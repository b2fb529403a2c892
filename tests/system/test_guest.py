"""A real guest whose registry dies under it, at each stage of its boot. (Trees, programs, reboots and what is fetched:
tests/vmm.)"""

import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.peers.registry import LocalRegistry
from tests.system.conftest import resolve, run_verb
from tests.system.daemon import Daemon, ServedImage
from tests.system.image import LayerTar, run_tool
from virtiofsd_nydus.vmm.guest import Deadline
from virtiofsd_nydus.vmm.qemu import GuestFiles, Machine, MachineConfig, Share

pytestmark = pytest.mark.guest
BUSYBOX = Path("/bin/busybox")
DEADLINE_MS = 2000
BOOT_SECONDS = 60
EIO_MESSAGE = b"Input/output error"


@pytest.fixture(scope="module")
def guest_files() -> GuestFiles:
    return GuestFiles.find()


@pytest.fixture(scope="module")
def registry_of_its_own(
    oci_image: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[LocalRegistry, ServedImage]]:
    """The image with a shell in it, in a registry that a test may kill, and starts again."""
    tmp_path = tmp_path_factory.mktemp("shell")
    layout = oci_image.rpartition(":")[0]
    shutil.copytree(layout, tmp_path / "oci")
    source = f"{tmp_path / 'oci'}:{oci_image.rpartition(':')[2]}"
    layer = LayerTar(tmp_path / "layer.tar", 3)
    layer.add("usr/bin/busybox", BUSYBOX.read_bytes(), mode=0o755)
    for name in ("sh", "cat", "sha256sum"):
        layer.make_symlink(f"usr/bin/{name}", "busybox")
    for name in ("proc", "sys", "dev"):
        layer.make_dir(name)
    layer.close()
    run_tool("umoci", "raw", "add-layer", "--image", source, str(tmp_path / "layer.tar"))
    with LocalRegistry(tmp_path / "registry") as registry:
        reference = f"docker://{registry.host}/shell:v1"
        run_verb("convert", f"oci:{source}", reference)
        yield registry, resolve(reference, tmp_path / "bootstraps")


@pytest.mark.parametrize("stage", ["kernel", "init", "mounted", "command"])
def test_registry_killed_during_the_boot(
    registry_of_its_own: tuple[LocalRegistry, ServedImage], guest_files: GuestFiles, tmp_path: Path, stage: str
) -> None:
    """The guest gets as far as it can, what it lacks is EIO in time, and all goes on when the registry is back."""
    registry, image = registry_of_its_own
    deadline = Deadline(BOOT_SECONDS, f"the boot with its registry killed at {stage}")

    def pass_stage(name: str) -> None:
        if name == stage:
            registry.stop(signal.SIGKILL)

    with (
        Daemon(image, tmp_path / "cache", deadline_ms=DEADLINE_MS) as daemon,
        Machine(
            MachineConfig(guest_files, [Share(daemon.socket_path)], watches={daemon.pidfd: daemon.explain_end})
        ) as machine,
    ):
        guest = machine.guest
        pass_stage("kernel")
        guest.wait_hello(deadline)
        pass_stage("init")
        guest.mount("vfs", deadline)
        pass_stage("mounted")
        cached = guest.run(["sh", "-c", "cat /etc/passwd"], deadline)
        if stage == "command":
            assert cached.status == 0
            pass_stage("command")
            # the shell is cached, what it reads is not
            lost = guest.run(["sh", "-c", "sha256sum /large/second; cat /etc/passwd"], deadline)
            assert EIO_MESSAGE in lost.stderr
            assert (lost.status, lost.text) == (0, cached.text)
        else:
            assert cached.status in (126, 127), "a command was run whose bytes are nowhere"
        try:
            assert registry.host in daemon.wait_for_line("cause=network")
        finally:
            registry.start()
        again = guest.run(["sh", "-c", "sha256sum /large/second && cat /etc/passwd"], deadline)
        assert again.status == 0 and again.text.endswith("root:x:0:0:root:/root:/bin/sh\n")
        machine.shut_down()
