"""Containers as Kata starts them: daemon, QEMU with Kata's virtio-fs device, a sandbox directory, hot mounts by the
API, an overlay in the guest whose upper lies in the passthrough and whose lower is the image.

What stands in for Kata is the host's mount choreography and the agent's storages; neither agent nor vsock runs.
Both layouts: "go" (the sandbox directory is a read-only bind, SIGTERM ends the daemon) and "rs" (runtime-rs: the
writable directory, an encoded query, --hybrid-mode, SIGKILL). Needs root, and a mount namespace of its own.
"""

import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.parse
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from virtiofsd_nydus.errors import Cause, Failure
from virtiofsd_nydus.vmm.guest import Deadline, Guest, Job
from virtiofsd_nydus.vmm.qemu import GuestFiles, Machine, MachineConfig, Share
from virtiofsd_nydus.vmm.servers import UnixConnection

TAG = "kataShared"
GUEST_SHARED = "/run/kata-containers/shared"
STOP_SECONDS = 5.0              # Kata's, from SIGTERM to SIGKILL
READY_SECONDS = 10.0            # runtime-rs's, for the whole wait
MNT_DETACH, UMOUNT_NOFOLLOW = 2, 8
CLONE_NEWNS, MS_REC, MS_PRIVATE = 0x20000, 0x4000, 1 << 18


def own_mount_namespace() -> None:
    """Leaves the caller's mount namespace: what is mounted from here on goes with the process."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNS) or libc.mount(None, b"/", None, MS_REC | MS_PRIVATE, None):
        raise Failure(f"no mount namespace of its own: {os.strerror(ctypes.get_errno())}; run it as root", Cause.IO)


def mount(*words: str | Path) -> None:
    done = subprocess.run(["mount", *map(str, words)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise Failure(f"mount {' '.join(map(str, words))}: {done.stderr.strip()}", Cause.IO)


@dataclass(frozen=True)
class Container:
    """One container's image and its active snapshot: snapshot_dir holds fs and work, the overlay's upper and work."""

    id: str
    bootstrap: Path
    config: str
    snapshot_dir: Path


class Sandbox:
    """A Kata sandbox. A context manager: leaving it ends guest and daemon and unmounts.

    base: a directory that Kata would have at /run. say: told each step.
    """

    def __init__(self, base: Path, files: GuestFiles, *, layout: str = "go", memory: str = "512M", accel: str = "tcg",
                 timeout_s: float = 180.0, say: Callable[[str], object] = lambda line: None) -> None:
        self.base, self.files, self.layout, self.memory, self.accel = base, files, layout, memory, accel
        self.say = say
        self.deadline = Deadline(timeout_s, "the sandbox")
        self._stack = ExitStack()
        sandbox = base / "kata-containers" / "shared" / "sandboxes" / "sb1"
        self.mounts = sandbox / ("mounts" if layout == "go" else "rw/passthrough")
        self.source = sandbox / ("shared" if layout == "go" else "rw")
        self.run_dir = base / "vc" / "vm" / "sb1"
        self.api, self.sock = self.run_dir / "nydusd-api.sock", self.run_dir / "vhost-fs.sock"
        self.process: subprocess.Popen[bytes] | None = None
        self.machine: Machine | None = None

    @property
    def guest(self) -> Guest:
        assert self.machine is not None
        return self.machine.guest

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self._stack.close()

    # ---- steps 1 to 6: the sandbox

    def _start(self) -> None:
        self.say("1 sandbox directory")
        for place in (self.mounts, self.source, self.run_dir):
            place.mkdir(parents=True, exist_ok=True)
        mount("--bind", self.base, self.base)
        self._stack.callback(subprocess.run, ["umount", "-R", "-l", str(self.base)], capture_output=True)
        mount("--make-shared", self.base)
        if self.layout == "go":
            mount("--bind", self.mounts, self.source)
            mount("--make-slave", self.source)
            mount("-o", "remount,bind,ro", self.source)
        self.say("2 daemon")
        hybrid = ["--hybrid-mode"] if self.layout == "rs" else []
        self.log_path = self.run_dir / "daemon.log"
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "virtiofsd_nydus.cli.main", "virtiofs", *hybrid, "--log-level", "info",
                 "--apisock", str(self.api), "--sock", str(self.sock)],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self._stack.callback(self._stop_daemon)
        self._wait_running()
        self.say("3 passthrough at /containers")
        self.call("POST", "/containers", {"fs_type": "passthrough_fs", "source": str(self.source), "config": ""})
        self.say("4 guest")
        config = MachineConfig(self.files, [Share(self.sock, TAG, 1024)], self.memory, 1, self.accel)
        self.machine = self._stack.enter_context(Machine(config))
        self.guest.wait_hello(self.deadline)
        self.say("5, 6 virtio-fs in the guest")
        option = "" if self.layout == "go" else "-o nodev"
        self.shell(f"mkdir -p /run; mount -t tmpfs tmpfs /run; mkdir -p {GUEST_SHARED} && "
                   f"mount -t virtiofs {option} {TAG} {GUEST_SHARED}")

    def _wait_running(self) -> None:
        deadline = Deadline(READY_SECONDS, "the daemon's start")
        while True:
            assert self.process is not None
            if self.process.poll() is not None:
                raise Failure(f"the daemon ended: {self.log_path.read_text(errors='replace').strip()}", Cause.IO)
            try:
                if json.loads(self._request("GET", "/api/v1/daemon")[1])["state"] == "RUNNING":
                    return
            except OSError:
                pass
            deadline.remaining()
            time.sleep(0.01)    # the API socket is not there yet: nothing tells of it

    def _request(self, method: str, target: str, body: object = None) -> tuple[int, bytes]:
        connection = UnixConnection(self.api, 30.0)     # Kata's own limit
        try:
            connection.request(method, target, None if body is None else json.dumps(body),
                               {"Content-Type": "application/json"})
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def call(self, method: str, mountpoint: str, body: dict[str, Any] | None = None) -> None:
        """A mount or unmount; Kata takes 204 alone for success."""
        query = urllib.parse.quote(mountpoint, safe="") if self.layout == "rs" else mountpoint
        status, answer = self._request(method, f"/api/v1/mount?mountpoint={query}", body)
        if status != 204:
            raise Failure(f"{method} {mountpoint}: {status} {answer.decode(errors='replace')}", Cause.IO)

    def shell(self, script: str, **streams: Any) -> Job:
        """Runs a script with the initramfs's own busybox; a Failure unless it ends with 0."""
        job = self.guest.run(["/bin/busybox", "sh", "-ec", script], self.deadline, chroot=False, **streams)
        if job.status:
            said = job.stderr.decode(errors="replace").strip()
            raise Failure(f"in the guest, status {job.status}: {said}", Cause.GUEST)
        return job

    # ---- steps 7 to 12: a container

    def start_container(self, container: Container) -> None:
        cid, shared = container.id, f"{GUEST_SHARED}/containers"
        inside = f"{shared}/{cid}" if self.layout == "go" else f"{shared}/passthrough/{cid}"
        self.say(f"7 {cid}: image mounted, snapshot bound")
        self.call("POST", f"/rafs/{cid}/lowerdir",
                  {"fs_type": "rafs", "source": str(container.bootstrap), "config": container.config})
        for name in ("fs", "work"):
            (container.snapshot_dir / name).mkdir(parents=True, exist_ok=True)
        for name in ("rootfs", "snapshotdir"):
            (self.mounts / cid / name).mkdir(parents=True, exist_ok=True)
        bound = self.mounts / cid / "snapshotdir"
        mount("--bind", container.snapshot_dir, bound)
        mount("--make-slave", bound)
        if self.layout == "go":
            mount("-o", "remount,bind,ro", bound)
        self.say(f"8, 9 {cid}: overlay in the guest")
        rootfs = f"/run/kata-containers/{cid}/rootfs"
        self.shell(f"mkdir -p {inside}/rootfs; mount -t overlay -o upperdir={inside}/snapshotdir/fs,"
                   f"workdir={inside}/snapshotdir/work,lowerdir={GUEST_SHARED}/rafs/{cid}/lowerdir,index=off overlay "
                   f"{inside}/rootfs; mkdir -p {rootfs}; mount --bind {inside}/rootfs {rootfs}; "
                   f"for d in proc dev sys; do [ -d {rootfs}/$d ] || mkdir {rootfs}/$d; mount --bind /$d {rootfs}/$d; "
                   "done")

    def run_in(self, cid: str, argv: Sequence[str], **streams: Any) -> Job:
        """Step 10: a command in the container's root."""
        self.say(f"10 {cid}: {' '.join(argv)}")
        return self.guest.run(["/bin/busybox", "chroot", f"/run/kata-containers/{cid}/rootfs", *argv], self.deadline,
                              chroot=False, **streams)

    def remove_container(self, container: Container) -> None:
        cid = container.id
        self.say(f"11 {cid}: unmounted in the guest")
        rootfs = f"/run/kata-containers/{cid}/rootfs"
        inside = f"{GUEST_SHARED}/containers/{'' if self.layout == 'go' else 'passthrough/'}{cid}/rootfs"
        self.shell(f"umount {rootfs}/sys {rootfs}/dev {rootfs}/proc {rootfs} {inside}")
        self.say(f"12 {cid}: DELETE, host unmounted")
        self.call("DELETE", f"/rafs/{cid}/lowerdir")
        bound = self.mounts / cid / "snapshotdir"
        libc = ctypes.CDLL(None, use_errno=True)
        # runtime-rs: plain, so nothing may pin it
        flags = MNT_DETACH | UMOUNT_NOFOLLOW if self.layout == "go" else 0
        if libc.umount2(os.fsencode(bound), flags):
            raise Failure(f"umount {bound}: {os.strerror(ctypes.get_errno())}", Cause.IO)
        shutil.rmtree(self.mounts / cid)

    # ---- step 13

    def _stop_daemon(self) -> None:
        self.say("13 end")
        assert self.process is not None
        if self.layout == "go":
            self.process.terminate()
            try:
                self.process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self.process.send_signal(signal.SIGKILL)
        else:
            self.process.kill()
        self.process.wait()
