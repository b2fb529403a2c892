"""Kills workers under a guest that works, and looks at what the guest got and how long it waited.

For scripts/kill-worker and a test. The guest hashes the image again and again with its caches dropped, and a second
program reads past the guest's cache: its ticks tell how long a death holds a guest up.
"""

import json
import os
import signal
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from tests.keeper.conftest import Image, KeptDaemon
from virtiofsd_nydus.vmm.guest import Deadline
from virtiofsd_nydus.vmm.qemu import GuestFiles, Machine, MachineConfig, Share

SIGNALS = {"kill": signal.SIGKILL, "segv": signal.SIGSEGV, "abort": signal.SIGABRT}
BOOT_S = 90.0
ROUND_S = 60.0  # for the guest to have gone on after a death
CALM_S = 0.6  # before a death: a worker that dies younger counts as a crash loop (workers.YOUNG_S)
SHELL = ["/bin/busybox", "sh", "-c"]
MOUNT = "/bin/busybox --install -s /bin; mkdir -p /m && mount -t virtiofs vfs /m"
HASHES = """
while :; do
    echo 3 > /proc/sys/vm/drop_caches
    find /m/image -type f | sort | xargs sha256sum | sha256sum
done"""
TICKS = """
while :; do
    dd if=/m/image/file0 bs=4096 count=1 iflag=direct 2>/dev/null | sha256sum
done"""

# Each number goes to the end of a file once; a directory of it is made, renamed and removed. A word for what fails.
WRITES = """
i=0
while :; do
    i=$((i + 1))
    echo $i >> /m/share/log || echo append $i
    mkdir /m/share/a$i || echo mkdir $i
    mv /m/share/a$i /m/share/b$i || echo rename $i
    rmdir /m/share/b$i || echo rmdir $i
done"""


@dataclass
class Stream:
    """Lines of a program in the guest, and when they came."""

    lines: list[str] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    rest: bytes = b""

    def __call__(self, data: bytes) -> None:
        *lines, self.rest = (self.rest + data).split(b"\n")
        for line in lines:
            self.lines.append(line.decode())
            self.times.append(time.monotonic())

    def longest_gap(self, since: float) -> float:
        """Between two lines, the later of which came after that time."""
        times = [max(since, self.times[0]), *self.times]
        return max((b - a for a, b in zip(self.times, self.times[1:], strict=False) if b > since), default=times[0])


@dataclass
class Found:
    """deaths: how many. stalls, monitor: seconds, one a death. wrong: what was not as it should be."""

    deaths: int = 0
    hashes: int = 0
    ticks: int = 0
    writes: int = 0
    stalls: list[float] = field(default_factory=list)
    monitor: list[float] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def describe(self) -> str:
        """One line of figures."""
        ms = sorted(round(1000 * one) for one in self.stalls)
        return (
            f"{self.deaths} deaths; {self.hashes} hashes of the tree, {self.ticks} direct reads, {self.writes} "
            f"appends beside as many directories made, renamed and removed; stall median "
            f"{statistics.median(ms):g} ms, longest {ms[-1]} ms; monitor answers within "
            f"{round(1000 * max(self.monitor))} ms; {len(self.wrong)} wrong"
        )


def mount_image(daemon: KeptDaemon, image: Image, path: str) -> None:
    """By a call of the API."""
    config = {
        "device": {
            "backend": {"type": "localfs", "config": {"dir": str(image.blobs)}},
            "cache": {"type": "blobcache", "config": {"work_dir": str(image.blobs)}},
        },
        "mode": "direct",
    }
    body = {"fs_type": "rafs", "source": str(image.bootstrap), "config": json.dumps(config)}
    status, answer = daemon.call("POST", f"/api/v1/mount?mountpoint={path}", body)
    assert status == 204, answer


def check_share(share: Path, found: Found) -> None:
    """What the guest wrote is on the host: each number once, in order, and no directory."""
    numbers = [int(line) for line in (share / "log").read_text().split()]
    found.writes = len(numbers)
    if numbers != list(range(1, len(numbers) + 1)):
        wrong = next(at for at, number in enumerate(numbers) if number != at + 1)
        found.wrong.append(f"append {wrong + 1}: {numbers[wrong - 2 : wrong + 3]}")
    left = sorted(path.name for path in share.iterdir() if path.name != "log")
    if len(left) > 1:  # of the number that was being worked on
        found.wrong.append(f"left in the share: {left}")


def kill_workers(image: Image, share: Path, rounds: int, kinds: Sequence[str] = ("kill",), seed: str = "") -> Found:
    """Boots a guest and kills its worker so many times, at random moments. share: an empty directory."""
    found, random = Found(), Random(seed)
    with KeptDaemon([]) as daemon:
        mount_image(daemon, image, "/image")
        body = {"fs_type": "passthrough_fs", "source": str(share), "config": ""}
        assert daemon.call("POST", "/api/v1/mount?mountpoint=/share", body)[0] == 204
        config = MachineConfig(
            GuestFiles.find(busybox=True),
            [Share(daemon.socket_path)],
            watches={daemon.pidfd: daemon.explain_end},
            die_with_parent=True,
        )
        with Machine(config) as machine:
            _run(daemon, machine, found, [SIGNALS[kinds[at % len(kinds)]] for at in range(rounds)], random)
        lines = daemon.log_text().splitlines()
    check_share(share, found)
    found.wrong += [line for line in lines if "error" in line and "the worker was ended by" not in line]
    return found


def _run(daemon: KeptDaemon, machine: Machine, found: Found, signals: list[signal.Signals], random: Random) -> None:
    guest = machine.guest
    deadline = Deadline(BOOT_S, "the guest's boot")
    guest.wait_hello(deadline)
    mounted = guest.run([*SHELL, MOUNT], deadline, chroot=False)
    assert mounted.status == 0, mounted.stderr
    hashes, ticks, faults, errors = Stream(), Stream(), Stream(), bytearray()
    jobs = [
        guest.start([*SHELL, script], chroot=False, stdout=sink, stderr=errors.extend)
        for script, sink in ((HASHES, hashes), (TICKS, ticks), (WRITES, faults))
    ]

    def go_on(count: int) -> None:
        """Until the guest has read directly so many times more."""
        wanted = len(ticks.lines) + count
        limit = Deadline(ROUND_S, "the guest after a death")
        while len(ticks.lines) < wanted:
            guest._pump(limit)

    def go_on_for(seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            go_on(1)

    go_on(5)
    while not hashes.lines:
        go_on(5)
    for how in signals:
        go_on_for(CALM_S + random.random() * 0.4)
        at = time.monotonic()
        os.kill(daemon.worker, how)
        machine.execute("query-status")
        found.monitor.append(time.monotonic() - at)
        go_on(3)
        found.stalls.append(ticks.longest_gap(at))
        found.deaths += 1
    go_on_for(CALM_S)
    for job in jobs:
        guest.kill(job, signal.SIGKILL)
    found.hashes, found.ticks = len(hashes.lines), len(ticks.lines)
    for name, stream in (("hash", hashes), ("direct read", ticks)):
        found.wrong += [f"{name}: {line}" for line in stream.lines if line != stream.lines[0]]
    found.wrong += faults.lines
    if errors:
        found.wrong.append(errors.decode(errors="replace"))


def make_image(directory: Path) -> Image:
    """The image that guests hash."""
    return Image(directory)
