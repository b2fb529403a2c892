"""Containers as Kata starts them: daemon, QEMU with Kata's own words, a sandbox directory, hot mounts by the API, the
pause container out of the passthrough, and an overlay in the guest whose upper lies there and whose lower is the image.

What stands in for Kata is the host's mount choreography and the agent's storages; neither agent nor vsock runs.
Both layouts: "go" (the sandbox directory is a read-only bind, SIGTERM ends the daemon) and "rs" (runtime-rs: the
writable directory, an encoded query, --hybrid-mode, SIGKILL). Needs root, and a mount namespace of its own.
"""

import ctypes
import os
import secrets
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import IO, Any

from virtiofsd_nydus.errors import Cause, Failure
from virtiofsd_nydus.kata import qemu as kata_qemu
from virtiofsd_nydus.vmm.guest import Deadline, Guest, Job
from virtiofsd_nydus.vmm.lifetime import Lifetime
from virtiofsd_nydus.vmm.qemu import GuestFiles, Machine, MachineConfig, Share
from virtiofsd_nydus.vmm.servers import call_api

TAG = "kataShared"
GUEST_SHARED = "/run/kata-containers/shared"
SANDBOX = "sb1"
BUSYBOX = Path("/bin/busybox")  # all there is in the pause container
STOP_S = 5.0  # Kata's, from SIGTERM to SIGKILL
READY_S = 10.0  # runtime-rs's, for the whole wait
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
    """One container's image and its active snapshot: snapshot_dir holds fs and work, the overlay's upper and work.
    volumes: where in the container -> the file or directory of the host that is bound there."""

    id: str
    bootstrap: Path
    config: str
    snapshot_dir: Path
    volumes: Mapping[str, Path] = field(default_factory=dict)


@dataclass(frozen=True)
class Storage:
    """What the runtime asks the agent to mount: agent.proto's Storage, the fields that are used."""

    driver: str
    source: str
    fstype: str
    mount_point: str
    options: tuple[str, ...] = ()

    @property
    def command(self) -> str:
        options = f"-o {','.join(self.options)} " if self.options else ""
        return f"mkdir -p {self.mount_point}; mount -t {self.fstype} {options}{self.source} {self.mount_point}"


@dataclass(eq=False)
class Sandbox(Lifetime):
    """A Kata sandbox: daemon, guest and pause container. Leaving it ends them and unmounts."""

    base: Path  # a directory for what Kata has at /run
    files: GuestFiles
    _: KW_ONLY
    layout: str = "go"
    memory: str = "512M"
    accel: str = "tcg"
    timeout_s: float = 180.0
    say: Callable[[str], object] = lambda line: None  # told each step

    def __post_init__(self) -> None:
        super().__init__()
        base = self.base
        self.deadline = Deadline(self.timeout_s, "the sandbox")
        shared = base / "kata-containers" / "shared" / "sandboxes" / SANDBOX
        if self.layout == "go":
            self.top = self.mounts = shared / "mounts"
            self.source, self.run_dir = shared / "shared", base / "vc" / "vm" / SANDBOX
            self.sock = self.run_dir / "vhost-fs.sock"
            self.guest_mounts = f"{GUEST_SHARED}/containers"
        else:
            # Only a container on an image has its directory at the top
            self.top = self.source = shared / "rw"
            self.mounts, self.run_dir = self.top / "passthrough", base / "kata" / SANDBOX / "root"
            self.sock = self.run_dir / "virtiofsd.sock"
            self.guest_mounts = f"{GUEST_SHARED}/containers/passthrough"
        self.api = self.run_dir / "nydusd-api.sock"
        self.process: subprocess.Popen[bytes] | None = None
        self.machine: Machine | None = None
        self.pause: Job | None = None
        self.volumes: dict[str, list[tuple[str, str]]] = {}  # container -> where, name below mounts
        self._more_memory = 0
        self._readers: list[threading.Thread] = []

    @property
    def guest(self) -> Guest:
        assert self.machine is not None
        return self.machine.guest

    # ---- steps 1 to 6: the sandbox

    def _start(self) -> None:
        self.say("1 sandbox directory")
        self.base.mkdir(parents=True, exist_ok=True)
        mount("-t", "tmpfs", "run", self.base)
        self._stack.callback(subprocess.run, ["umount", "-R", "-l", str(self.base)], capture_output=True)
        mount("--make-shared", self.base)
        for place in (self.mounts, self.source, self.run_dir):
            place.mkdir(parents=True, exist_ok=True)
        if self.layout == "go":
            mount("--bind", self.mounts, self.source)
            mount("--make-slave", self.source)
            mount("-o", "remount,bind,ro", self.source)
        self.say("2 daemon")
        self._start_daemon()
        self._wait_running()
        self.say("3 passthrough at /containers")
        self.call("POST", "/containers", {"fs_type": "passthrough_fs", "source": str(self.source), "config": ""})
        self.say("4 guest")
        words = kata_qemu.go_words if self.layout == "go" else kata_qemu.rs_words
        config = MachineConfig(self.files, [Share(self.sock, TAG, 1024)], self.memory, 1, self.accel, words=words)
        self.machine = self._stack.enter_context(Machine(config))
        self.guest.wait_hello(self.deadline)
        self.say("5, 6 virtio-fs in the guest; the pause container")
        self.start_agent()
        self.start_pause()

    def _start_daemon(self) -> None:
        """Go: one pipe for both streams, whose end is the daemon's. runtime-rs: two, standard input inherited."""
        rs = self.layout == "rs"
        for path in () if rs else (self.sock, self.api):
            with socket.socket(socket.AF_UNIX) as stale:  # runtime-rs removes such, Go leaves them to the daemon
                stale.bind(str(path))
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "virtiofsd_nydus.cli.main",
                "virtiofs",
                *(["--hybrid-mode"] if rs else []),
                "--log-level",
                "info",
                "--apisock",
                str(self.api),
                "--sock",
                str(self.sock),
            ],
            stdin=None if rs else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE if rs else subprocess.STDOUT,
        )
        self._stack.callback(self._stop_daemon)
        self.log: list[bytes] = []
        for stream in (self.process.stdout, self.process.stderr):
            if stream:
                self._readers.append(threading.Thread(target=self._read_log, args=(stream,), daemon=True))
                self._readers[-1].start()

    def _read_log(self, stream: IO[bytes]) -> None:
        with stream:
            self.log.extend(stream)

    def start_agent(self) -> None:
        """What the agent does for CreateSandbox."""
        self.shell(f"mkdir -p /run; mount -t tmpfs tmpfs /run; {self.shared_storage().command}")

    def shared_storage(self) -> Storage:
        options = ("nodev",) if self.layout == "rs" else ()
        return Storage("virtio-fs", TAG, "virtiofs", f"{GUEST_SHARED}/", options)

    def start_pause(self) -> None:
        """The pause container's root is the host's overlay, all of it in the passthrough: no image of ours."""
        below, bundle = self.base / "pause", self.base / "bundle"
        for place in (below / "bin", bundle / "upper", bundle / "work", bundle / "rootfs"):
            place.mkdir(parents=True)
        shutil.copy(BUSYBOX, below / "bin" / "busybox")
        options = f"lowerdir={below},upperdir={bundle / 'upper'},workdir={bundle / 'work'}"
        mount("-t", "overlay", "-o", options, "overlay", bundle / "rootfs")
        shared = self.mounts / SANDBOX / "rootfs"
        shared.mkdir(parents=True)
        mount("--bind", bundle / "rootfs", shared)
        mount("--make-slave", shared)
        self.create_pause(f"{self.guest_mounts}/{SANDBOX}/rootfs")

    def create_pause(self, guest_root: str) -> None:
        rootfs = self.rootfs(SANDBOX)
        self.shell(f"mkdir -p {rootfs}; mount --bind {guest_root} {rootfs}")
        self.pause = self.guest.start(
            ["/bin/busybox", "chroot", rootfs, "/bin/busybox", "sleep", "1000000"], chroot=False
        )

    def _wait_running(self) -> None:
        deadline = Deadline(READY_S, "the daemon's start")
        while True:
            assert self.process is not None
            if self.process.poll() is not None:
                for reader in self._readers:
                    reader.join(STOP_S)
                raise Failure(f"the daemon ended: {self.log_text().strip()}", Cause.IO)
            try:
                if call_api(self.api, "GET", "/api/v1/daemon")[1]["state"] == "RUNNING":
                    return
            except OSError:
                pass
            deadline.remaining()
            time.sleep(0.01)  # nothing tells when the API socket appears

    def log_text(self) -> str:
        """The daemon's log so far."""
        return b"".join(self.log).decode(errors="replace")

    def call(self, method: str, mountpoint: str, body: dict[str, Any] | None = None) -> None:
        """A mount or unmount; Kata takes 204 alone for success."""
        query = urllib.parse.quote(mountpoint, safe="") if self.layout == "rs" else mountpoint
        status, answer = call_api(self.api, method, f"/api/v1/mount?mountpoint={query}", body)
        if status != 204:
            raise Failure(f"{method} {mountpoint}: {status} {answer}", Cause.IO)

    def shell(self, script: str, **streams: Any) -> Job:
        """Runs a script with the initramfs's own busybox; a Failure unless it ends with 0."""
        job = self.guest.run(["/bin/busybox", "sh", "-ec", script], self.deadline, chroot=False, **streams)
        if job.status:
            said = job.stderr.decode(errors="replace").strip()
            raise Failure(f"in the guest, status {job.status}: {said}", Cause.GUEST)
        return job

    # ---- steps 7 to 12: a container

    @staticmethod
    def rootfs(cid: str) -> str:
        """Where in the guest a container's root is bound in the end."""
        return f"/run/kata-containers/{cid}/rootfs"

    def root_storage(self, cid: str) -> Storage:
        """The overlay of a container on an image."""
        inside = f"{GUEST_SHARED}/containers/{cid}"
        return Storage(
            "overlayfs",
            "overlay",
            "overlay",
            f"{inside}/rootfs",
            (
                f"upperdir={inside}/snapshotdir/fs",
                f"workdir={inside}/snapshotdir/work",
                f"lowerdir={GUEST_SHARED}/rafs/{cid}/lowerdir",
                "index=off",
            ),
        )

    def start_container(self, container: Container) -> None:
        cid = container.id
        self.say(f"7 {cid}: image mounted, snapshot and volumes bound")
        if self.layout == "go":
            self._mount_image(container)
            self._bind_snapshot(container)
        else:
            self._bind_snapshot(container)
            self._mount_image(container)
        self.volumes[cid] = [
            (where, self._bind_volume(cid, where, source)) for where, source in container.volumes.items()
        ]
        self.say(f"8, 9 {cid}: overlay in the guest")
        self.create_container(cid)

    def _mount_image(self, container: Container) -> None:
        self.call(
            "POST",
            f"/rafs/{container.id}/lowerdir",
            {"fs_type": "rafs", "source": str(container.bootstrap), "config": container.config},
        )

    def _bind_snapshot(self, container: Container) -> None:
        for name in ("fs", "work"):
            (container.snapshot_dir / name).mkdir(parents=True, exist_ok=True)
        for name in ("rootfs", "snapshotdir"):
            (self.top / container.id / name).mkdir(parents=True)
        bound = self.top / container.id / "snapshotdir"
        mount("--bind", container.snapshot_dir, bound)
        mount("--make-slave", bound)
        if self.layout == "go":
            mount("-o", "remount,bind,ro", bound)

    def _bind_volume(self, cid: str, where: str, source: Path) -> str:
        """Shares a file or directory; its name below self.mounts."""
        name = f"{cid}-{secrets.token_hex(8)}-{Path(where).name}"
        shared = self.mounts / name
        shared.mkdir() if source.is_dir() else shared.touch()
        mount("--bind", source, shared)
        mount("--make-private" if self.layout == "go" else "--make-slave", shared)
        return name

    def create_container(self, cid: str) -> None:
        """What the agent does for CreateContainer."""
        storage, rootfs = self.root_storage(cid), self.rootfs(cid)
        lines = [storage.command, f"mkdir -p {rootfs}; mount --bind {storage.mount_point} {rootfs}"]
        lines += [
            f"[ -d {rootfs}/{d} ] || mkdir {rootfs}/{d}; mount --bind /{d} {rootfs}/{d}" for d in ("proc", "dev", "sys")
        ]
        for where, name in self.volumes[cid]:
            source, target = f"{self.guest_mounts}/{name}", f"{rootfs}{where}"
            make = f"if [ -d {source} ]; then mkdir -p {target}; else mkdir -p {Path(target).parent}; : >> {target}; fi"
            lines.append(f"[ -e {target} ] || {{ {make}; }}; mount --bind {source} {target}")
        self.shell("; ".join(lines))

    def add_memory(self, mib: int) -> None:
        """Plugs memory in, as Kata does for a container's limit: the daemon is told a new memory table."""
        assert self.machine is not None
        self._more_memory += 1
        name = f"mem{self._more_memory}"
        self.say(f"{mib} MiB more memory")
        total = "$(grep MemTotal /proc/meminfo | tr -dc 0-9)"
        # Movable: the page cache, which the daemon reads into, goes there first
        online = "echo online_movable > /sys/devices/system/memory/auto_online_blocks"
        before = self.shell(f"{online}; echo {total}").text.strip()
        self.machine.execute(
            "object-add",
            {"qom-type": "memory-backend-file", "id": name, "size": mib << 20, "mem-path": "/dev/shm", "share": True},
        )
        self.machine.execute("device_add", {"driver": "pc-dimm", "id": f"dimm{name}", "memdev": name})
        self.shell(f"until [ {total} -ge {int(before) + (mib << 10)} ]; do sleep 0.1; done")

    def run_in(self, cid: str, argv: Sequence[str], **streams: Any) -> Job:
        """Step 10: a command in the container's root."""
        self.say(f"10 {cid}: {' '.join(argv)}")
        return self.guest.run(
            ["/bin/busybox", "chroot", self.rootfs(cid), *argv], self.deadline, chroot=False, **streams
        )

    def remove_container(self, container: Container) -> None:
        cid = container.id
        self.say(f"11 {cid}: unmounted in the guest")
        self.destroy_container(cid)
        self.say(f"12 {cid}: DELETE, host unmounted")
        for _, name in self.volumes.pop(cid):
            self._unmount(self.mounts / name, lazily=True)
            path = self.mounts / name
            path.rmdir() if path.is_dir() else path.unlink()
        self.call("DELETE", f"/rafs/{cid}/lowerdir")
        # runtime-rs unmounts this one plainly, so nothing may pin it any more
        self._unmount(self.top / cid / "snapshotdir", lazily=self.layout == "go")
        if self.layout == "go":  # runtime-rs leaves the directory until the sandbox's end
            shutil.rmtree(self.top / cid)

    @staticmethod
    def _unmount(place: Path, *, lazily: bool) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.umount2(os.fsencode(place), MNT_DETACH | UMOUNT_NOFOLLOW if lazily else 0):
            raise Failure(f"umount {place}: {os.strerror(ctypes.get_errno())}", Cause.IO)

    def destroy_container(self, cid: str) -> None:
        """What the agent does for RemoveContainer."""
        self.shell(
            f"for m in $(cut -d' ' -f2 /proc/mounts | grep ^{self.rootfs(cid)} | sort -r); do umount $m; done; "
            f"umount {self.root_storage(cid).mount_point}"
        )

    # ---- step 13

    def check_pause(self) -> None:
        """Raises a Failure when the pause container has ended."""
        assert self.pause is not None
        if self.pause.status is not None:
            said = self.pause.stderr.decode(errors="replace").strip()
            raise Failure(f"the pause container ended with {self.pause.status}: {said}", Cause.GUEST)

    def _stop_daemon(self) -> None:
        self.say("13 end")
        assert self.process is not None
        late = False
        if self.layout == "go":
            self.process.terminate()
            try:
                self.process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                late = True
        self.process.kill()
        self.process.wait()
        for reader in self._readers:  # at the pipes' end, which is how Go learns of the daemon's
            reader.join(STOP_S)
            late = late or reader.is_alive()
        if late:
            raise Failure(f"{STOP_S:g} s after SIGTERM the daemon runs, or something holds its output", Cause.DEADLINE)
