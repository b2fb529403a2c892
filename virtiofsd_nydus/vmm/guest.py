"""The control channel of a test guest: commands in; output, exit status and phases out.

The other end is vm-images/init.c, behind a virtio-serial port. Frames, little endian, both ways: u32 payload
length, u16 type, u16 job, payload. A start of the guest (also one after a reset) says MAGIC and a HELLO frame first.
"""

import selectors
import socket
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypedDict, Unpack

from virtiofsd_nydus.errors import Cause, Failure

PROTOCOL = 1
MAGIC = b"\r\nguest hello\r\n\0"
HEADER = struct.Struct("<IHH")
# Payloads begin with: protocol, now and init's start; now; errno; start, end and status. Times: us of the boot clock
HELLO, PHASE, ERROR_CODE, ENDED = struct.Struct("<IQQ"), struct.Struct("<Q"), struct.Struct("<I"), struct.Struct("<QQI")
# init.c reads up to 256 KiB; it never says more than 32 KiB at a time
MAX_FRAME_BYTES = 256 * 1024

# A request fits in the socket's buffer; one that waits longer than this has met a guest that is stopped or hung
SEND_S = 10

REQ_MOUNT, REQ_EXEC, REQ_KILL, REQ_EXIT, REQ_UNMOUNT = 1, 2, 3, 4, 5
SAY_HELLO, SAY_PHASE, SAY_STDOUT, SAY_STDERR, SAY_ENDED, SAY_ERROR = 16, 17, 18, 19, 20, 21
MOUNT_OVERLAY, MOUNT_SPECIAL = 1, 2
EXEC_CHROOT = 1

DEFAULT_ENV = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "TERM": "dumb",
    "LC_ALL": "C.UTF-8",
}

Sink = Callable[[bytes], object]


class CommandOptions(TypedDict, total=False):
    """How a command runs. cwd: "/" unless said. env: replaces DEFAULT_ENV's values name by name. chroot: in the mounted
    root (so unless said), else in the initramfs. stdout, stderr: take the streams, which are collected else."""

    cwd: str
    env: Mapping[str, str] | None
    chroot: bool
    stdout: Sink | None
    stderr: Sink | None


@dataclass
class Deadline:
    """A point in time by which `what` must be done."""

    seconds: float
    what: str
    at: float = field(init=False)

    def __post_init__(self) -> None:
        self.at = time.monotonic() + self.seconds

    def remaining(self) -> float:
        """Seconds left; a DEADLINE Failure when there are none."""
        left = self.at - time.monotonic()
        if left <= 0:
            raise Failure(f"{self.what} did not end within {self.seconds:g} s", Cause.DEADLINE)
        return left


@dataclass
class Job:
    """A command started in the guest. Streams are collected in stdout and stderr unless a sink took them."""

    id: int
    argv: Sequence[str]
    stdout_sink: Sink | None = None
    stderr_sink: Sink | None = None
    stdout: bytearray = field(default_factory=bytearray)
    stderr: bytearray = field(default_factory=bytearray)
    status: int | None = None  # exit status, 128 + signal when killed; None while it runs
    started_at: float = 0.0  # time.monotonic() of this host
    ended_at: float = 0.0

    @property
    def text(self) -> str:
        return self.stdout.decode(errors="surrogateescape")


class Guest:
    """The host's end of the channel. One thread uses it. Every wait has a deadline.

    stream: connected socket, owned. explain_end: called when the channel closes; gives the Failure to raise.
    watches: file descriptors (pidfds) whose becoming readable ends every wait: the call gives the Failure.
    """

    def __init__(
        self,
        stream: socket.socket,
        explain_end: Callable[[], Failure],
        watches: Mapping[int, Callable[[], Failure]] | None = None,
    ) -> None:
        self.kernel = ""
        self.phases: dict[str, float] = {}  # name -> time.monotonic() of this host
        self.boots = 0
        self._stream = stream
        stream.settimeout(SEND_S)
        self._explain_end = explain_end
        self._in = bytearray()
        self._synced = False
        self._clock_offset = 0.0  # host monotonic - guest boot clock, seconds
        self._jobs: dict[int, Job] = {}
        self._next_job = 1
        self._errors: list[str] = []
        self._selector = selectors.DefaultSelector()
        self._selector.register(stream, selectors.EVENT_READ, None)
        for fd, explain in (watches or {}).items():
            self._selector.register(fd, selectors.EVENT_READ, explain)

    def close(self) -> None:
        self._selector.close()
        self._stream.close()

    def adopt(self, other: "Guest") -> None:
        """Goes on with the guest of another channel, which has stopped there: with its commands, and with the part of
        a frame that came there."""
        other._stream.setblocking(False)
        try:
            while data := other._stream.recv(MAX_FRAME_BYTES):
                other._in += data
        except BlockingIOError:
            pass
        self._in, self._synced = bytearray(other._in), True
        self._jobs, self._next_job = dict(other._jobs), other._next_job
        self._clock_offset, self.phases = other._clock_offset, dict(other.phases)
        self.kernel, self.boots = other.kernel, other.boots

    def wait_more(self, deadline: Deadline) -> None:
        """Waits for whatever the guest says next."""
        self._pump(deadline)

    # ---- what tests and commands call

    def wait_hello(self, deadline: Deadline) -> None:
        """Waits until the guest's init has told that it runs; after a reset, too."""
        while "init" not in self.phases:
            self._pump(deadline)

    def mount(self, tag: str, deadline: Deadline, *, overlay: bool = True, special: bool = True) -> None:
        """Mounts the virtio-fs `tag` as the root of commands. overlay: under a writable tmpfs, else read-only as it
        is. special: with /proc, /sys and /dev in it."""
        flags = (MOUNT_OVERLAY if overlay else 0) | (MOUNT_SPECIAL if special else 0)
        self.phases.pop("root", None)
        self._send(REQ_MOUNT, 0, struct.pack("<I", flags) + tag.encode() + b"\0")
        self._wait_phase("root", deadline)

    def unmount(self, deadline: Deadline) -> None:
        self.phases.pop("unmounted", None)
        self._send(REQ_UNMOUNT, 0, b"")
        self._wait_phase("unmounted", deadline)

    def start(self, argv: Sequence[str], **how: Unpack[CommandOptions]) -> Job:
        """Starts a command and returns at once."""
        cwd, env, chroot = how.get("cwd", "/"), how.get("env"), how.get("chroot", True)
        words = {**DEFAULT_ENV, **(env or {})}
        strings = [cwd, *argv, *(f"{name}={value}" for name, value in words.items())]
        if not argv or any("\0" in word for word in strings):
            raise Failure("a command for the guest needs at least one word and no NUL byte")
        payload = struct.pack("<III", EXEC_CHROOT if chroot else 0, len(argv), len(words)) + b"".join(
            word.encode(errors="surrogateescape") + b"\0" for word in strings
        )
        if len(payload) > MAX_FRAME_BYTES:
            raise Failure(f"the command's words take {len(payload)} bytes; the guest takes {MAX_FRAME_BYTES}")
        job = Job(self._next_job, list(argv), how.get("stdout"), how.get("stderr"))
        self._next_job = self._next_job % 0xFFFF + 1
        self._jobs[job.id] = job
        self._send(REQ_EXEC, job.id, payload)
        return job

    def wait(self, job: Job, deadline: Deadline) -> Job:
        while job.status is None:
            self._pump(deadline)
        return job

    def run(self, argv: Sequence[str], deadline: Deadline, **how: Unpack[CommandOptions]) -> Job:
        """Runs a command to its end."""
        return self.wait(self.start(argv, **how), deadline)

    def kill(self, job: Job, signal: int) -> None:
        """Sends a signal to the command's process group."""
        self._send(REQ_KILL, job.id, struct.pack("<I", signal))

    def request_exit(self, code: int = 0) -> None:
        """Asks init to kill all commands, unmount and end the machine: QEMU then exits with (code << 1) | 1."""
        self._send(REQ_EXIT, 0, struct.pack("<I", code))

    def forget_boot(self) -> None:
        """Call it when the machine is reset: jobs are forgotten and the next HELLO is awaited."""
        self._synced = False
        self._in.clear()
        self._jobs.clear()
        self.phases.clear()

    # ---- the channel

    def _wait_phase(self, name: str, deadline: Deadline) -> None:
        while name not in self.phases:
            self._pump(deadline)
            if self._errors:
                raise Failure(f"in the guest: {self._errors.pop(0)}", Cause.GUEST)

    def _send(self, kind: int, job: int, payload: bytes) -> None:
        try:
            self._stream.sendall(HEADER.pack(len(payload), kind, job) + payload)
        except TimeoutError:
            raise Failure("the guest no longer reads its control channel", Cause.DEADLINE) from None
        except OSError:
            raise self._explain_end() from None

    def _pump(self, deadline: Deadline) -> None:
        """Waits for frames and takes those that have come."""
        events = self._selector.select(deadline.remaining())
        for key, _ in events:
            if key.data is None:
                self._read_frames()
                return
        for key, _ in events:
            raise key.data()

    def _read_frames(self) -> None:
        try:
            data = self._stream.recv(256 * 1024)
        except ConnectionError:
            data = b""
        if not data:
            raise self._explain_end()
        self._in += data
        if not self._synced:
            start = self._in.find(MAGIC)
            if start < 0:
                del self._in[: -len(MAGIC)]
                return
            del self._in[: start + len(MAGIC)]
            self._synced = True
        done = 0
        while len(self._in) - done >= HEADER.size:
            length, kind, job = HEADER.unpack_from(self._in, done)
            if length > MAX_FRAME_BYTES:
                raise Failure("the guest's control channel carries nonsense", Cause.GUEST)
            if len(self._in) - done - HEADER.size < length:
                break
            start = done + HEADER.size
            self._take(kind, job, bytes(self._in[start : start + length]))
            done = start + length
        del self._in[:done]

    def _take(self, kind: int, job_id: int, payload: bytes) -> None:
        """Takes one frame; a frame of an unknown kind or job is passed over."""
        job = self._jobs.get(job_id)
        if kind == SAY_HELLO and len(payload) >= HELLO.size:
            self._take_hello(payload)
        elif kind == SAY_PHASE and len(payload) > PHASE.size:
            (now_us,) = PHASE.unpack_from(payload)
            self.phases[payload[PHASE.size :].decode(errors="replace")] = self._host_time(now_us)
        elif kind == SAY_ERROR and len(payload) >= ERROR_CODE.size:
            self._take_error(job, payload[ERROR_CODE.size :].decode(errors="replace"))
        elif job is not None:
            self._take_of_job(kind, job, payload)

    def _take_hello(self, payload: bytes) -> None:
        """The guest's init has started: its clock, its kernel."""
        protocol, now_us, init_us = HELLO.unpack_from(payload)
        if protocol != PROTOCOL:
            raise Failure(f"the guest's init speaks protocol {protocol}, not {PROTOCOL}: run make guest")
        self._clock_offset = time.monotonic() - now_us / 1e6
        self.phases = {"init": self._host_time(init_us), "ready": self._host_time(now_us)}
        self.kernel = payload[HELLO.size :].decode(errors="replace")
        self.boots += 1

    def _take_error(self, job: Job | None, text: str) -> None:
        """A command that could not be started ends with 126; another error is for the next wait."""
        if job is None:
            self._errors.append(text)
            return
        job.stderr_sink = None
        job.stderr.extend(text.encode())
        job.status = 126
        del self._jobs[job.id]

    def _take_of_job(self, kind: int, job: Job, payload: bytes) -> None:
        """Output of a command, or its end."""
        if kind == SAY_STDOUT:
            (job.stdout_sink or job.stdout.extend)(payload)
        elif kind == SAY_STDERR:
            (job.stderr_sink or job.stderr.extend)(payload)
        elif kind == SAY_ENDED and len(payload) == ENDED.size:
            start_us, end_us, job.status = ENDED.unpack(payload)
            job.started_at, job.ended_at = self._host_time(start_us), self._host_time(end_us)
            del self._jobs[job.id]

    def _host_time(self, guest_us: int) -> float:
        return self._clock_offset + guest_us / 1e6
