"""The same random work on the passthrough and on the host's own file system, as programs see both: on /dev/fuse and in
a guest. No result, error, attribute, xattr, listing or byte differs.

More of it: EXERCISE_STEPS=names,data,tree EXERCISE_SEED=n.
"""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fuse.host import has_fuse, umount_below
from tests.passthrough import exercise
from tests.passthrough.conftest import DESCRIPTORS, DROP_HANDLES, HANDLES, only_handles
from tests.passthrough.exercise import PROTECTIONS, arguments, compare
from tests.passthrough.host import PassthroughMount
from virtiofsd_nydus.vmm.guest import Deadline
from virtiofsd_nydus.vmm.qemu import GuestFiles, Machine, MachineConfig, Share
from virtiofsd_nydus.vmm.servers import NydusDaemon

SEED = int(os.environ.get("EXERCISE_SEED", "1"))
GUEST_SECONDS = 120
TIMEOUT_S = 3000


def steps(default: tuple[int, int, int]) -> tuple[int, int, int]:
    names, data, tree = map(int, os.environ.get("EXERCISE_STEPS", ",".join(map(str, default))).split(","))
    return names, data, tree


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exercise.build(tmp_path_factory.mktemp("exercise"))


def run_on(program: Path, directory: Path, counts: tuple[int, int, int]) -> str:
    return subprocess.run(
        [str(program), *arguments(directory, SEED, counts)],
        check=True,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    ).stdout


@pytest.fixture(params=[HANDLES, DESCRIPTORS])
def mount(request: pytest.FixtureRequest, source: Path, tmp_path: Path) -> Iterator[Path]:
    reason = has_fuse()
    if reason:
        pytest.skip(reason)
    with PassthroughMount(source, tmp_path, DROP_HANDLES if request.param == DESCRIPTORS else ()) as mounted:
        yield mounted.mountpoint
    umount_below(tmp_path)


def test_on_dev_fuse(program: Path, source: Path, mount: Path, tmp_path: Path) -> None:
    counts = steps((400, 300, 600))
    (tmp_path / "plain").mkdir()
    compare(run_on(program, tmp_path / "plain", counts), run_on(program, mount, counts))


@pytest.mark.guest
@only_handles
def test_in_a_guest(program: Path, source: Path, daemon: NydusDaemon, tmp_path: Path) -> None:
    counts = steps((120, 120, 300))
    (tmp_path / "plain").mkdir()
    expected = run_on(program, tmp_path / "plain", counts)
    (source / "work").mkdir()
    (source / "exercise").write_bytes(program.read_bytes())
    (source / "exercise").chmod(0o755)
    limits = [f"echo {Path('/proc/sys/fs', name).read_text().strip()} > /proc/sys/fs/{name}" for name in PROTECTIONS]
    script = "; ".join(
        [
            "mkdir -p /proc /run/share; [ -e /proc/self ] || mount -t proc proc /proc",
            *limits,
            "mount -t virtiofs vfs /run/share",
            "exec /run/share/exercise " + " ".join(arguments("/run/share/work", SEED, counts)),
        ]
    )
    files = GuestFiles.find(busybox=True)
    deadline = Deadline(TIMEOUT_S if "EXERCISE_STEPS" in os.environ else GUEST_SECONDS, "the guest's exercise")
    with Machine(MachineConfig(files, [Share(daemon.socket_path)])) as machine:
        machine.guest.wait_hello(deadline)
        job = machine.guest.run(["/bin/busybox", "sh", "-c", script], deadline, chroot=False)
    assert job.status == 0, job.stderr.decode(errors="replace")
    compare(expected, job.text)
