"""One boot: a guest on a virtio-fs server, one command in it, the times of its phases and what was fetched for it."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from virtiofsd_nydus.errors import Cause, Failure
from virtiofsd_nydus.vmm.guest import Deadline, Sink
from virtiofsd_nydus.vmm.qemu import GuestFiles, Machine, MachineConfig, Share
from virtiofsd_nydus.vmm.servers import NydusDaemon, Server

TAG = "vfs"


class TimedOut(Failure):
    """The boot's own deadline has passed."""


@dataclass(frozen=True)
class BootOptions:
    files: GuestFiles
    command: Sequence[str] = ()  # none: mount the root and end
    memory: str = "512M"
    cpus: int = 1
    accel: str = "tcg"  # tcg or kvm, chosen
    timeout_s: float = 120.0
    env: Mapping[str, str] = field(default_factory=dict)
    cwd: str = "/"
    die_with_parent: bool = False  # see MachineConfig


@dataclass
class BootReport:
    """What a boot took. Times are seconds since `started_at` of boot_guest; bytes and chunks are of blobs, 0 when the
    server is not ours."""

    status: int = 0
    kernel: str = ""
    accel: str = ""
    init_s: float = 0.0
    root_s: float = 0.0
    end_s: float = 0.0
    image_bytes: int = 0  # all blobs, as they lie in the registry
    image_chunks: int = 0
    fetched_bytes: int = 0  # of them, by this guest
    fetched_chunks: int = 0
    fetch_requests: int = 0
    counters: dict[str, int] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def describe(self) -> str:
        """The figures in two lines for people."""
        times = f"init {self.init_s:.2f} s, root mounted {self.root_s:.2f} s, command's end {self.end_s:.2f} s"
        if not self.image_bytes:
            return times
        return (
            f"{times}\nfetched {self.fetched_bytes / 1e6:.1f} MB of {self.image_bytes / 1e6:.1f} MB "
            f"({self.fetched_share:.1%}), {self.fetched_chunks} of {self.image_chunks} chunks, "
            f"{self.fetch_requests} requests"
        )

    @property
    def fetched_share(self) -> float:
        return self.fetched_bytes / self.image_bytes if self.image_bytes else 0.0


def boot_guest(
    server: Server, options: BootOptions, *, started_at: float, stdout: Sink | None = None, stderr: Sink | None = None
) -> BootReport:
    """Boots a guest on `server` (running) and runs the command, whose output goes to the sinks as it comes.

    started_at: time.monotonic() that all times count from. Raises TimedOut when options.timeout_s is over, another
    Failure when the guest, QEMU or the server fails. QEMU is gone when it returns or raises; the server is not.
    """
    deadline = Deadline(options.timeout_s, "the boot of the guest")
    config = MachineConfig(
        options.files,
        [Share(server.socket_path, TAG)],
        options.memory,
        options.cpus,
        options.accel,
        die_with_parent=options.die_with_parent,
        watches={server.pidfd: server.explain_end},
    )
    try:
        with Machine(config) as machine:
            guest = machine.guest
            guest.wait_hello(deadline)
            deadline.what = "the mount of the image in the guest"
            guest.mount(TAG, deadline)
            report = BootReport(kernel=guest.kernel, accel=options.accel)
            report.init_s = guest.phases["init"] - started_at
            report.root_s = report.end_s = guest.phases["root"] - started_at
            if options.command:
                deadline.what = f"the command {options.command[0]}"
                job = guest.run(
                    options.command, deadline, cwd=options.cwd, env=options.env, stdout=stdout, stderr=stderr
                )
                report.status = job.status or 0
                report.end_s = job.ended_at - started_at
            deadline.what = "the end of the guest"
            if isinstance(server, NydusDaemon):
                take_stats(report, server.stats())
            machine.shut_down()
    except Failure as failure:
        if failure.cause == Cause.DEADLINE and time.monotonic() >= deadline.at:
            raise TimedOut(str(failure), Cause.DEADLINE) from None
        raise
    return report


def take_stats(report: BootReport, stats: dict[str, Any]) -> None:
    report.counters = stats["engine"]
    report.image_bytes = sum(blob["compressed_bytes"] for blob in stats["blobs"].values())
    report.image_chunks = sum(blob["chunks"] for blob in stats["blobs"].values())
    report.fetched_bytes = report.counters["fetched_bytes"]
    report.fetched_chunks = report.counters["fetched_chunks"]
    report.fetch_requests = report.counters["fetch_jobs"]
