"""A QEMU machine: its command line, its life with deadlines, its monitor (through the qemu.qmp library).

The recipe (kernel command line, CPU, devices) is the one that booted every time when it was measured (6.1, TCG).
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from virtiofsd_nydus.errors import Cause, Failure, UsageFailure
from virtiofsd_nydus.vmm.guest import Guest
from virtiofsd_nydus.vmm.lifetime import Lifetime

if TYPE_CHECKING:
    import asyncio

    from qemu.qmp import QMPClient

QEMU = "qemu-system-x86_64"
# tsc, timer, rng, mitigations, nokaslr, tests: each saves boot time under TCG. oops=panic: an oops in a kernel
# thread would hang the guest. init_on_alloc=0: zeroing every page costs a tenth of all copying under TCG.
KERNEL_ARGUMENTS = (
    "console=ttyS0 quiet panic=-1 oops=panic reboot=t tsc=reliable no_timer_check "
    "random.trust_cpu=on mitigations=off nokaslr cryptomgr.notests 8250.nr_uarts=1 init_on_alloc=0"
)
# rep movsb, which erms makes the kernel use, runs byte by byte under TCG
TCG = ("-accel", "tcg,thread=multi", "-cpu", "max,-erms")
KVM = ("-accel", "kvm", "-cpu", "host")
EXIT_PORT = 0x501  # isa-debug-exit; vm-images/init.c writes there
BUILD_S = 30.0  # from QEMU's start to its connection: it waits for the servers' first answers
GONE_S = 5.0  # how long QEMU may take to end once its guest has ended or it was told to
QEMU_FAILED = 1  # its exit status for a machine it cannot build
SERVER_GONE_S = 0.3  # by how much a server's end may come after QEMU's, when it is the cause
# vhost-user-fs's largest, so that a read may carry 256 pages (queue size - 4 at least)
QUEUE_SIZE = 1024
MEMORY_MIN_MIB = 96  # the kernel unpacks itself and its initramfs into it
SOCKET_PATH_BYTES = 107  # sizeof sun_path - 1
CONSOLE, MONITOR, CONTROL = "console.log", "monitor", "control"  # in a machine's directory


@dataclass(frozen=True)
class GuestFiles:
    """Kernel and initramfs, as vm-images/build.py makes them."""

    kernel: Path
    initrd: Path

    @classmethod
    def find(
        cls, kernel: str | Path | None = None, initrd: str | Path | None = None, *, busybox: bool = False
    ) -> "GuestFiles":
        """The given files, else those of $VIRTIOFSD_NYDUS_GUEST_DIR, a source tree's build/guest or the system's.
        busybox: with /bin/busybox in the initramfs."""
        name = "initramfs-busybox.cpio" if busybox else "initramfs.cpio"
        directories = [
            Path(__file__).resolve().parents[2] / "build" / "guest",
            Path("/usr/share/virtiofsd-nydus/guest"),
        ]
        if chosen := os.environ.get("VIRTIOFSD_NYDUS_GUEST_DIR"):
            directories = [Path(chosen)]
        directory = next((d for d in directories if (d / "vmlinuz").exists()), directories[0])
        files = cls(Path(kernel or directory / "vmlinuz"), Path(initrd or directory / name))
        for what, path in (("kernel", files.kernel), ("initramfs", files.initrd)):
            if not path.is_file():
                raise Failure(
                    f"no guest {what} at {path}: run make guest, or name one with "
                    f"--{'kernel' if what == 'kernel' else 'initrd'}",
                    Cause.MISSING,
                )
        return files


@dataclass(frozen=True)
class Share:
    """One vhost-user-fs device."""

    socket_path: str | Path
    tag: str = "vfs"
    queue_size: int = QUEUE_SIZE


@dataclass(frozen=True)
class MachineConfig:
    files: GuestFiles
    shares: Sequence[Share] = ()
    memory: str = "512M"
    cpus: int = 1
    accel: str = "tcg"  # tcg or kvm: accel.py has chosen
    kernel_arguments: str = ""  # added to KERNEL_ARGUMENTS
    extra: Sequence[str] = ()  # words added to QEMU's command line
    # (this, a directory for its sockets) -> QEMU's words for the machine: processors, memory with share=on, kernel,
    # shares, and one virtio-serial bus with port 1 free; None: machine_words
    words: "Callable[[MachineConfig, Path], list[str]] | None" = None
    die_with_parent: bool = False  # SIGKILL to QEMU when the *thread* that starts it ends
    # pidfds -> what their ending means: end every wait for the guest
    watches: Mapping[int, Callable[[], Failure]] = field(default_factory=dict)


def find_program(name: str, package: str) -> str:
    path = shutil.which(name)
    if path is None:
        raise Failure(f"{name} is not installed: apt-get install {package}", Cause.MISSING)
    return path


def check_memory(size: str) -> None:
    """Raises UsageFailure for what is no size, or too small for the guest's kernel."""
    match = re.fullmatch(r"([1-9][0-9]{0,8})([MG]?)", size)
    if not match:
        raise UsageFailure(f"{size!r} is no memory size: use 512M or 2G, say")
    mib = int(match.group(1)) * (1024 if match.group(2) == "G" else 1)
    if mib < MEMORY_MIN_MIB:
        raise UsageFailure(f"a guest does not boot in {size}: give it {MEMORY_MIN_MIB}M at least")


def check_socket_path(path: str | Path) -> None:
    if len(os.fsencode(path)) > SOCKET_PATH_BYTES:
        raise Failure(
            f"socket path too long ({len(os.fsencode(path))} bytes, the limit is {SOCKET_PATH_BYTES}): {path}"
        )


def machine_words(config: MachineConfig, directory: Path) -> list[str]:
    """The machine as our own guests have it. See MachineConfig.words."""
    words = [
        "-machine",
        "q35",
        *(KVM if config.accel == "kvm" else TCG),
        "-smp",
        str(config.cpus),
        "-m",
        config.memory,
        "-nodefaults",
        "-no-user-config",
        "-display",
        "none",
        "-no-reboot",
        "-kernel",
        str(config.files.kernel),
        "-initrd",
        str(config.files.initrd),
        "-append",
        f"{KERNEL_ARGUMENTS} {config.kernel_arguments}".strip(),
        # vhost-user needs guest memory that another process can map
        "-object",
        f"memory-backend-memfd,id=memory,size={config.memory},share=on",
        "-numa",
        "node,memdev=memory",
        "-device",
        "virtio-serial-pci",
    ]
    for number, share in enumerate(config.shares):
        words += [
            "-chardev",
            f"socket,id=share{number},path={escape(share.socket_path)}",
            "-device",
            f"vhost-user-fs-pci,chardev=share{number},tag={share.tag},queue-size={share.queue_size}",
        ]
    return words


def escape(path: str | Path) -> str:
    """A path as a value among QEMU's comma-separated ones."""
    return str(path).replace(",", ",,")


def command_line(config: MachineConfig, directory: Path) -> list[str]:
    """QEMU's words: the machine, and what connects it with its Machine, whose files lie in `directory`."""
    for share in config.shares:
        check_socket_path(share.socket_path)
    return [
        find_program(QEMU, "qemu-system-x86"),
        *(config.words or machine_words)(config, directory),
        "-chardev",
        f"file,id=console,path={directory / CONSOLE}",
        "-serial",
        "chardev:console",
        "-chardev",
        f"socket,id=monitor,path={directory / MONITOR},server=on,wait=off",
        "-mon",
        "chardev=monitor,mode=control",
        "-device",
        f"isa-debug-exit,iobase={EXIT_PORT:#x},iosize=1",
        "-chardev",
        f"socket,id=control,path={directory / CONTROL}",
        "-device",
        "virtserialport,chardev=control,name=control",
        *config.extra,
    ]


class Machine(Lifetime):
    """One QEMU process and the guest in it. Leaving the context ends QEMU in any case and removes the machine's
    temporary directory. Used by one thread."""

    guest: Guest

    def __init__(self, config: MachineConfig) -> None:
        super().__init__()
        self.config = config
        self._runner: asyncio.Runner | None = None
        self._qmp: QMPClient | None = None

    def _start(self) -> None:
        directory = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="vnd-vm-")))
        self.console_path, self.errors_path = directory / CONSOLE, directory / "qemu.err"
        self.monitor_path = directory / MONITOR
        words = self.make_words(directory)
        check_socket_path(self.monitor_path)
        if self.config.die_with_parent:
            words = [find_program("setpriv", "util-linux"), "--pdeathsig", "KILL", *words]
        with socket.socket(socket.AF_UNIX) as listener, self.errors_path.open("wb") as errors:
            listener.bind(str(directory / CONTROL))
            listener.listen(1)
            # A process group of its own: an interrupt from the terminal reaches us alone, and we end QEMU in order
            self.process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=errors, stderr=errors, process_group=0
            )
            self._stack.callback(self._end_process)
            # QEMU connects while it builds the machine, after the shares' servers have answered it
            self.pidfd = os.pidfd_open(self.process.pid)
            self._stack.callback(os.close, self.pidfd)
            stream = self._accept(listener)
        watches = {self.pidfd: self.explain_end, **self.config.watches}
        self.guest = Guest(stream, self.explain_end, watches)
        self._stack.callback(self.guest.close)

    def make_words(self, directory: Path) -> list[str]:
        """QEMU and its command line."""
        return command_line(self.config, directory)

    def _accept(self, listener: socket.socket) -> socket.socket:
        import selectors

        with selectors.DefaultSelector() as selector:
            selector.register(listener, selectors.EVENT_READ, None)
            selector.register(self.pidfd, selectors.EVENT_READ, self.explain_end)
            for fd, explain in self.config.watches.items():
                selector.register(fd, selectors.EVENT_READ, explain)
            events = selector.select(BUILD_S)
        if not events:
            raise Failure(f"QEMU did not build the machine within {BUILD_S:g} s", Cause.DEADLINE)
        for key, _ in events:
            if key.data is not None:
                raise key.data()
        return listener.accept()[0]

    # ---- the end

    def _end_process(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()

    def shut_down(self) -> None:
        """Ends the guest in order (commands killed, root unmounted) and waits for QEMU to go."""
        self.guest.request_exit(0)
        try:
            status = self.process.wait(GONE_S)
        except subprocess.TimeoutExpired:
            raise Failure(f"QEMU did not end within {GONE_S:g} s of its guest", Cause.DEADLINE) from None
        if status != 1:  # (0 << 1) | 1, isa-debug-exit's form
            raise self.explain_end()

    def explain_end(self) -> Failure:
        """Why the machine has ended, as far as its servers, its console and QEMU's own words tell."""
        try:
            status = self.process.wait(GONE_S)
        except subprocess.TimeoutExpired:
            return Failure("the guest closed its control channel", Cause.GUEST)
        console = self.console_text()
        for line in console.splitlines():
            for mark in ("Kernel panic", "Unable to mount root fs"):
                if mark in line:
                    return Failure(f"the guest's kernel died: {line[line.index(mark) :].strip()}", Cause.GUEST)
        if status == QEMU_FAILED:
            import select

            # A server that dies while the machine is built takes QEMU with it: the server's reason is the one to tell
            ended, _, _ = select.select(list(self.config.watches), [], [], SERVER_GONE_S)
            for fd in ended:
                return self.config.watches[fd]()
        errors = self.errors_path.read_text(errors="replace").strip().splitlines()
        if errors:
            # Hints on the command line may follow the line that says what is wrong
            line = next((line for line in reversed(errors) if line.startswith(QEMU)), errors[-1])
            return Failure(f"QEMU ended with status {status}: {line.removeprefix(QEMU + ': ')}", Cause.GUEST)
        if status < 0:
            return Failure(f"QEMU was killed by {signal.Signals(-status).name}", Cause.GUEST)
        last = console.strip().splitlines()[-1:] or ["its console is empty"]
        return Failure(f"the guest ended early (QEMU's status {status}): {last[0].strip()}", Cause.GUEST)

    def console_text(self) -> str:
        """What the guest's kernel and init have written to the serial console."""
        try:
            return self.console_path.read_text(errors="replace")
        except FileNotFoundError:
            return ""

    # ---- the monitor

    def execute(self, command: str, arguments: dict[str, object] | None = None, seconds: float = GONE_S) -> Any:
        """One QMP command; its return value. The connection is made at the first one."""
        import asyncio

        from qemu.qmp import ExecuteError, QMPClient, QMPError

        if self._runner is None:
            self._runner = asyncio.Runner()
            self._stack.callback(self._runner.close)

        async def talk() -> object:
            if self._qmp is None:
                client = QMPClient("machine")
                await client.connect(str(self.monitor_path))
                self._qmp = client
            return await self._qmp.execute(command, arguments)

        async def talk_in_time() -> object:
            async with asyncio.timeout(seconds):
                return await talk()

        try:
            return self._runner.run(talk_in_time())
        except TimeoutError:
            raise Failure(f"QEMU did not answer {command} within {seconds:g} s", Cause.DEADLINE) from None
        except ExecuteError as error:
            raise Failure(f"QEMU refused {command}: {error}") from None
        except (QMPError, OSError):
            raise self.explain_end() from None

    def pause(self) -> None:
        self.execute("stop")

    def resume(self) -> None:
        self.execute("cont")

    def reset(self) -> None:
        """Resets the machine: the guest boots anew on the same devices and sockets. Wait for its hello next."""
        # -no-reboot would make this the machine's end; it stays in force for what the guest does by itself
        self.execute("set-action", {"reboot": "reset"})
        self.guest.forget_boot()
        self.execute("system_reset")

    def forbid_reboot(self) -> None:
        """After reset() and the hello: a panic ends QEMU again."""
        self.execute("set-action", {"reboot": "shutdown"})
