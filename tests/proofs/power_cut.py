"""Power cuts: a cache on ext4 in a loop file; the file is copied at random moments while the cache is filled; each copy
is mounted as after a reboot and everything is read from it.

A copy is what the disk would hold at that moment: what the kernel had not written yet is not in it. The copy counts
only if no block was written meanwhile. It is attached to the same loop device, because the cache knows its file system
by number, and read under another boot id. Needs root and loop devices.
"""

import contextlib
import fcntl
import json
import os
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random

ROOT = Path(__file__).resolve().parents[2]
DISK_BYTES = 40 << 20
CUTS_PER_FILL = 10
FILL_S = 11.0  # how long cache_worker fills
WORKER = [sys.executable, "-m", "tests.proofs.cache_worker"]
LOOP_CTL_ADD = 0x4C80  # linux/loop.h
LOOP_FIRST = 100
BUSY_MAX_S = 60.0
BOOT_ID = "/proc/sys/kernel/random/boot_id"


@dataclass
class Cuts:
    """What was found: wrong files over all copies; chunks that were trusted at once, verified, fetched."""

    cuts: int = 0
    wrong: int = 0
    trusted: int = 0
    verified: int = 0
    fetched: int = 0
    torn: int = 0  # copies that were thrown away
    lines: list[str] = field(default_factory=list)


def can_mount() -> str:
    """Why it cannot be done here, "" if it can."""
    if os.geteuid() != 0:
        return "loop devices need root"
    for tool in ("losetup", "mkfs.ext4", "unshare", "cc"):
        if not shutil.which(tool):
            return f"no {tool}"
    probe = subprocess.run(["losetup", "-f"], capture_output=True)
    return "" if probe.returncode == 0 else "no loop devices"


def cut_power(sample_dir: Path, work: Path, count: int, seed: str, *, sync: bool = True) -> Cuts:
    """sync False: with the syncing of data taken out, which must show. In a mount namespace of its own: one that others
    copied from ours would keep the disk mounted."""
    command = [
        "unshare",
        "-m",
        sys.executable,
        "-m",
        "tests.proofs.power_cut",
        str(sample_dir),
        str(work),
        str(count),
        seed,
        *([] if sync else ["--no-sync"]),
    ]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return Cuts(**json.loads(done.stdout))


def cut(sample_dir: Path, work: Path, count: int, seed: str, sync: bool) -> Cuts:
    random = Random(seed)
    found = Cuts()
    preload = {} if sync else {"LD_PRELOAD": str(build_preload(work))}
    mountpoint = work / "mnt"
    mountpoint.mkdir()
    while found.cuts < count:
        disk = work / "disk"
        make_disk(disk)
        wanted = min(CUTS_PER_FILL, count - found.cuts)
        copies: list[Path] = []
        with attached(disk) as device, mounted(device, mountpoint):
            cache = mountpoint / "cache"
            cache.mkdir()
            os.sync()
            worker = subprocess.Popen(
                [*WORKER, "fill", str(sample_dir), str(cache), str(random.random())],
                cwd=ROOT,
                env={**os.environ, **preload},
                stdout=subprocess.PIPE,
            )
            try:
                assert worker.stdout is not None and worker.stdout.readline() == b"ready\n"
                moments = sorted(random.uniform(0, FILL_S) for _ in range(wanted))
                started = time.monotonic()
                for number, moment in enumerate(moments):
                    time.sleep(max(0.0, started + moment - time.monotonic()))  # the moments are the experiment
                    copies.append(copy_disk(disk, work / f"copy-{number}", device, worker, found))
            finally:
                worker.kill()
                worker.wait()
        for copy in copies:
            with attached(copy, device), mounted(device, mountpoint):
                add_check(found, check(sample_dir, mountpoint / "cache", work))
            copy.unlink()
            found.cuts += 1
        disk.unlink()
    return found


def build_preload(work: Path) -> Path:
    library = work / "drop_data_sync.so"
    subprocess.run(
        [
            *shlex.split(os.environ.get("CC", "cc")),
            "-std=gnu11",
            "-D_GNU_SOURCE",
            "-O1",
            "-Wall",
            "-Wextra",
            "-Werror",
            "-fPIC",
            "-shared",
            "-o",
            str(library),
            str(Path(__file__).with_name("drop_data_sync.c")),
        ],
        check=True,
    )
    return library


def make_disk(path: Path) -> None:
    with path.open("wb") as stream:
        stream.truncate(DISK_BYTES)
    subprocess.run(
        ["mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0", "-J", "size=4", str(path)],
        check=True,
        capture_output=True,
    )


def make_device() -> str:
    """A loop device of our own, out of the way of those who take the first free one."""
    number = LOOP_FIRST + os.getpid() % 800
    with open("/dev/loop-control", "rb") as control, contextlib.suppress(FileExistsError):
        fcntl.ioctl(control, LOOP_CTL_ADD, number)
    device = f"/dev/loop{number}"
    if not Path(device).exists():
        os.mknod(device, 0o600 | stat.S_IFBLK, os.makedev(7, number))
    return device


@contextmanager
def attached(disk: Path, device: str = "") -> Iterator[str]:
    device = device or make_device()
    until = time.monotonic() + BUSY_MAX_S
    while (done := subprocess.run(["losetup", device, str(disk)], capture_output=True, text=True)).returncode:
        # Letting go of what was attached before ends some time after losetup -d
        assert time.monotonic() < until, done.stderr
        time.sleep(0.05)
    try:
        yield device
    finally:
        subprocess.run(["losetup", "-d", device], check=True)


@contextmanager
def mounted(device: str, mountpoint: Path) -> Iterator[None]:
    subprocess.run(["mount", "-o", "commit=1", device, str(mountpoint)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(mountpoint)], check=True)


def copy_disk(disk: Path, copy: Path, device: str, worker: "subprocess.Popen[bytes]", found: Cuts) -> Path:
    """The disk as it is at one moment: the writer is stopped, and a copy during which the kernel wrote is made anew."""
    worker.send_signal(signal.SIGSTOP)
    try:
        while True:
            before = count_writes(device)
            copy.write_bytes(disk.read_bytes())
            if count_writes(device) == before:
                return copy
            found.torn += 1
    finally:
        worker.send_signal(signal.SIGCONT)


def count_writes(device: str) -> tuple[str, str]:
    """Writes that have ended, requests under way."""
    words = Path(f"/sys/block/{Path(device).name}/stat").read_text().split()
    return words[4], words[8]


def check(sample_dir: Path, cache: Path, work: Path) -> "dict[str, object]":
    """Reads everything, as after a reboot: the kernel's boot id is another one."""
    other = work / "boot_id"
    other.write_text("00000000-1111-4222-8333-444444444444\n")
    command = [
        "unshare",
        "-m",
        "sh",
        "-c",
        'mount --bind "$0" "$1" && shift && exec "$@"',
        str(other),
        BOOT_ID,
        *WORKER,
        "check",
        str(sample_dir),
        str(cache),
        "check",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    told: dict[str, object] = json.loads(done.stdout)
    return told


def add_check(found: Cuts, told: "dict[str, object]") -> None:
    wrong = told["wrong"]
    assert isinstance(wrong, list)
    found.wrong += len(wrong)
    for name in ("trusted", "verified", "fetched"):
        setattr(found, name, getattr(found, name) + told[name])
    found.lines += [f"cut {found.cuts}: wrong: {', '.join(wrong)}"] if wrong else []


if __name__ == "__main__":
    print(
        json.dumps(
            asdict(
                cut(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4], "--no-sync" not in sys.argv)
            )
        )
    )
