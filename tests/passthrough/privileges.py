"""What the threads of a running process may do, as the kernel tells it."""

import contextlib
from pathlib import Path

KEPT_NAMES = {
    "CHOWN": 0,
    "DAC_OVERRIDE": 1,
    "DAC_READ_SEARCH": 2,
    "FOWNER": 3,
    "FSETID": 4,
    "SETGID": 6,
    "SETUID": 7,
    "SYS_ADMIN": 21,
    "MKNOD": 27,
    "SETFCAP": 31,
}
KEPT = sum(1 << number for number in KEPT_NAMES.values())


def read_status(path: Path) -> dict[str, str]:
    return dict(line.split(":\t", 1) for line in path.read_text().splitlines() if ":\t" in line)


def thread_status(pid: int) -> list[dict[str, str]]:
    """/proc/PID/task/*/status, the process's first thread first."""
    tasks = sorted(Path(f"/proc/{pid}/task").iterdir(), key=lambda task: int(task.name))
    found = []
    for task in tasks:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a thread on demand may have ended meanwhile
            found.append(read_status(task / "status"))
    return found


def held(status: dict[str, str], which: str) -> int:
    return int(status[which], 16)


def check_reduced(pid: int, *, bounding: bool = True) -> list[str]:
    """Every thread has what it may have and no more; the threads' names. bounding: that set was reduced as well."""
    own = held(read_status(Path("/proc/self/status")), "CapPrm")
    threads = thread_status(pid)
    for status in threads:
        about = (status["Name"], {name: status[name] for name in status if name.startswith(("Cap", "NoNew", "Groups"))})
        assert held(status, "CapPrm") == KEPT & own, about
        assert held(status, "CapEff") & ~KEPT == 0, about
        assert held(status, "CapInh") & ~KEPT == 0 and held(status, "CapAmb") & ~KEPT == 0, about
        assert not bounding or held(status, "CapBnd") & ~KEPT == 0, about
        assert status["NoNewPrivs"] == "1", about
        assert status["Groups"].split() == [], about
    return [status["Name"] for status in threads]
