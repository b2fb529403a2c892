"""Guests under a QEMU that can migrate them (8.2 or newer): live and under load, and several from one file."""

import hashlib
import random
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.fakeguest.support import Image, build_image
from virtiofsd_nydus.vmm.guest import Deadline, Job
from virtiofsd_nydus.vmm.migrate import VARIABLE, MovableMachine, move_guest, unpacked_qemu
from virtiofsd_nydus.vmm.qemu import GuestFiles
from virtiofsd_nydus.vmm.servers import NydusDaemon

pytestmark = [
    pytest.mark.guest,
    pytest.mark.peer,
    pytest.mark.skipif(unpacked_qemu() is None, reason=f"${VARIABLE} names no unpacked QEMU of 8.2 or newer"),
]

FILES = 30
FILE_BYTES = 200_000
# Without its page cache the guest asks the daemon for every byte again, round by round
LOOP = "cd /newroot; while true; do echo 3 > /proc/sys/vm/drop_caches; sha256sum f*; echo round; done"
ROUND_S = 60.0


def make_image(base: Path) -> Image:
    """Files f0, f1, ... of random bytes."""
    (base / "tree").mkdir()
    for number in range(FILES):
        (base / "tree" / f"f{number}").write_bytes(random.Random(number).randbytes(FILE_BYTES))
    return build_image(base / "tree", base / "out")


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    return make_image(tmp_path_factory.mktemp("moving"))


class Moving:
    """A guest that hashes the image in a loop, wherever it is."""

    def __init__(self, stack: ExitStack, image: Image, directory: Path) -> None:
        self.stack, self.image, self.directory = stack, image, directory
        self.wanted = sorted(
            f"{hashlib.sha256((image.tree / f'f{number}').read_bytes()).hexdigest()}  f{number}"
            for number in range(FILES)
        )
        self.machine = self.make_machine(incoming=False)
        self.machine.guest.wait_hello(Deadline(120, "boot"))
        self.machine.guest.mount("vfs", Deadline(60, "mount"), overlay=False, special=False)
        self.job: Job = self.machine.guest.start(["/bin/busybox", "sh", "-c", LOOP], chroot=False)

    def make_machine(self, *, incoming: bool) -> MovableMachine:
        """One with a daemon of its own."""
        qemu = unpacked_qemu()
        assert qemu is not None
        words = ["--bootstrap", str(self.image.bootstrap), "--localfs-dir", str(self.image.blob_dir)]
        daemon = self.stack.enter_context(NydusDaemon(words))
        files = GuestFiles.find(busybox=True)
        return self.stack.enter_context(MovableMachine(qemu, files, daemon.socket_path, incoming=incoming))

    def wait_rounds(self, count: int) -> None:
        until = self.job.text.count("round") + count
        deadline = Deadline(ROUND_S * count, "rounds of the guest")
        while self.job.text.count("round") < until:
            self.machine.guest.wait_more(deadline)

    def check(self) -> None:
        """Every whole round so far has every file right."""
        rounds = self.job.text.split("round\n")[:-1]
        assert rounds and not self.job.stderr, self.job.stderr
        for text in rounds:
            assert sorted(text.splitlines()) == self.wanted


def test_a_guest_moves_while_it_reads(image: Image, tmp_path: Path) -> None:
    with ExitStack() as stack:
        moving = Moving(stack, image, tmp_path)
        moving.wait_rounds(1)
        for _ in range(2):
            target = moving.make_machine(incoming=True)
            move_guest(moving.machine, target, tmp_path)
            moving.machine.process.kill()
            moving.machine = target
            moving.wait_rounds(2)
        moving.check()


def test_clones_of_one_file(image: Image, tmp_path: Path) -> None:
    """Each goes on from where the guest was written down, and reads what it read."""
    with ExitStack() as stack:
        moving = Moving(stack, image, tmp_path)
        moving.wait_rounds(1)
        moving.machine.leave_to(f"file:{tmp_path / 'guest'}")
        moving.machine.wait_moved()
        for _ in range(2):
            clone = moving.make_machine(incoming=True)
            clone.come_from(f"file:{tmp_path / 'guest'}")
            clone.wait_moved()
            clone.execute("cont")
            clone.adopt(moving.machine)
            job = clone.guest.run(
                ["/bin/busybox", "sh", "-c", "cd /newroot; echo 3 > /proc/sys/vm/drop_caches; sha256sum f*"],
                Deadline(ROUND_S, "a clone's reading"),
                chroot=False,
            )
            assert sorted(job.text.splitlines()) == moving.wanted
            clone.process.kill()
