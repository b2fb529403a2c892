"""Which accelerator to use. TCG is the default: it boots everywhere. KVM is used only where it has just been seen to
boot our guest: there are hosts whose /dev/kvm opens, accepts a machine and then runs no stock kernel.
"""

import os
from pathlib import Path

from virtiofsd_nydus.errors import Cause, Failure, UsageFailure
from virtiofsd_nydus.vmm.guest import Deadline
from virtiofsd_nydus.vmm.qemu import GuestFiles, Machine, MachineConfig

KVM_DEVICE = Path("/dev/kvm")
# A KVM guest says hello within 1 s; a host where it takes longer gains nothing by it
PROBE_S = 5.0


def probe_kvm(files: GuestFiles, seconds: float = PROBE_S) -> str:
    """Boots a bare guest with KVM. Returns "" when its init ran in time, else why KVM is not usable."""
    if not KVM_DEVICE.exists():
        return f"there is no {KVM_DEVICE}"
    if not os.access(KVM_DEVICE, os.R_OK | os.W_OK):
        return f"{KVM_DEVICE} may not be opened by this user"
    try:
        with Machine(MachineConfig(files, memory="256M", accel="kvm")) as machine:
            machine.guest.wait_hello(Deadline(seconds, "a probe guest's boot"))
    except Failure as failure:
        return f"{KVM_DEVICE} opens, but {failure}"
    return ""


def choose_accel(wanted: str, files: GuestFiles) -> str:
    """wanted: tcg, kvm or auto. Returns tcg or kvm; a Failure when KVM was asked for by name and does not work."""
    if wanted == "tcg":
        return "tcg"
    if wanted not in ("kvm", "auto"):
        raise UsageFailure(f"unknown accelerator {wanted!r}: use tcg, kvm or auto")
    reason = probe_kvm(files)
    if not reason:
        return "kvm"
    if wanted == "kvm":
        raise Failure(f"KVM is not usable here: {reason}; use --accel tcg", Cause.GUEST)
    return "tcg"
