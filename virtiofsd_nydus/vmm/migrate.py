"""A guest that goes from one QEMU to another: live, or through a file, one or several from it. Needs QEMU 8.2 or newer.

$VIRTIOFSD_NYDUS_QEMU names the directory that such a QEMU's packages were unpacked into (`dpkg-deb -x`), where the
installed one is older. For tests and demonstrations.
"""

import os
import time
from pathlib import Path

from virtiofsd_nydus.errors import Cause, Failure
from virtiofsd_nydus.vmm.qemu import GuestFiles, Machine, MachineConfig, Share, command_line, escape

VARIABLE = "VIRTIOFSD_NYDUS_QEMU"
PROGRAM = Path("usr/bin/qemu-system-x86_64")
LOOK_S = 0.01
MOVE_S = 120.0
ANSWER_S = 30.0  # of QEMU's monitor: it stands still while the daemon takes the state


def unpacked_qemu() -> Path | None:
    """The directory of the newer QEMU, None where there is none."""
    root = os.environ.get(VARIABLE, "")
    return Path(root) if root and (Path(root) / PROGRAM).exists() else None


class MovableMachine(Machine):
    """A machine of the newer QEMU. incoming: it waits for a guest, instead of booting one."""

    def __init__(self, qemu: Path, files: GuestFiles, share: Path, *, incoming: bool = False) -> None:
        # Debian's kernels do not boot on TCG's largest processor there
        extra = ["-cpu", "Nehalem", "-L", str(qemu / "usr/share/qemu"), "-L", "/usr/share/seabios"]
        if incoming:
            extra += ["-incoming", "defer"]
        super().__init__(MachineConfig(files, [Share(share)], memory="256M", extra=extra))
        self._program = str(qemu / PROGRAM)

    def make_words(self, directory: Path) -> list[str]:
        return [self._program, *command_line(self.config, directory)[1:]]

    def leave_to(self, uri: str) -> None:
        """Begins to send the guest there."""
        self.execute("migrate", {"uri": uri}, ANSWER_S)

    def come_from(self, uri: str) -> None:
        """Begins to take a guest from there."""
        self.execute("migrate-incoming", {"uri": uri}, ANSWER_S)

    def wait_moved(self) -> dict[str, object]:
        """What QEMU tells of a migration that has ended well. Raises Failure."""
        until = time.monotonic() + MOVE_S
        while time.monotonic() < until:
            told: dict[str, object] = self.execute("query-migrate", None, ANSWER_S)
            if told.get("status") == "completed":
                return told
            if told.get("status") in ("failed", "cancelled"):
                raise Failure(f"the migration failed: {told.get('error-desc', 'QEMU does not say why')}", Cause.GUEST)
            time.sleep(LOOK_S)
        raise Failure(f"the migration did not end within {MOVE_S:g} s", Cause.DEADLINE)

    def adopt(self, other: Machine) -> None:
        """Goes on with the guest's commands that another machine has begun."""
        self.guest.adopt(other.guest)


def move_guest(source: MovableMachine, target: MovableMachine, directory: Path) -> dict[str, object]:
    """Takes a running guest from source to target, which has been made with incoming. What the source tells of it."""
    place = directory / "move"
    place.unlink(missing_ok=True)
    uri = f"unix:{escape(place)}"
    target.come_from(uri)
    source.leave_to(uri)
    told = source.wait_moved()
    target.wait_moved()
    target.adopt(source)
    return told
