"""What the keeper gives up of root's rights at start: the same as the engine does (csrc/base/privilege.c), which is not
loaded here. Its children can have no more than it has, so it keeps what they need."""

import ctypes
import os

PR_CAPBSET_READ, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 23, 24, 38
SYS_CAPSET = {"x86_64": 126, "aarch64": 91}
CAPABILITY_VERSION = 0x20080522  # _LINUX_CAPABILITY_VERSION_3
# CHOWN, DAC_OVERRIDE, DAC_READ_SEARCH, FOWNER, FSETID, SETGID, SETUID, SYS_ADMIN, MKNOD, SETFCAP
KEPT = (0, 1, 2, 3, 4, 6, 7, 21, 27, 31)


def reduce_privileges() -> None:
    """Goes on past what it may not do. Where the process does not run as root nothing is done."""
    if os.geteuid() != 0:
        return
    try:
        os.setgroups([])
    except OSError:  # some user namespaces refuse it
        pass
    libc = ctypes.CDLL(None, use_errno=True)
    for number in range(64):
        held = libc.prctl(PR_CAPBSET_READ, number, 0, 0, 0)
        if held < 0:  # the kernel has no more
            break
        if held and number not in KEPT:
            libc.prctl(PR_CAPBSET_DROP, number, 0, 0, 0)
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    _drop_held(libc)


def _drop_held(libc: ctypes.CDLL) -> None:
    number = SYS_CAPSET.get(os.uname().machine)
    if number is None:
        return
    kept = sum(1 << one for one in KEPT)
    with open("/proc/self/status") as status:
        facts = dict(line.split(":", 1) for line in status)
    sets = [int(facts[name], 16) & kept for name in ("CapEff", "CapPrm", "CapInh")]
    head = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION, 0)
    data = (ctypes.c_uint32 * 6)(*(one >> shift & 0xFFFFFFFF for shift in (0, 32) for one in sets))
    libc.syscall(number, head, data)
