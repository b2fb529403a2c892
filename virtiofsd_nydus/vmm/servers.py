"""The virtio-fs servers a guest can be booted on: our daemon, and QEMU's C virtiofsd for comparison.

Each is one process with one listening socket, in a temporary directory of its own; a context manager that leaves no
process and no directory behind.
"""

import contextlib
import http.client
import json
import os
import re
import select
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from virtiofsd_nydus.errors import Cause, Failure
from virtiofsd_nydus.vmm.lifetime import Lifetime
from virtiofsd_nydus.vmm.qemu import check_socket_path, find_program

STOP_S = 5.0
READY_S = 20.0
# Debian 12: qemu-system-common; Debian 13: the package virtiofsd (the Rust one)
C_VIRTIOFSD = Path("/usr/lib/qemu/virtiofsd")
RUST_VIRTIOFSD = Path("/usr/libexec/virtiofsd")


class Server(Lifetime):
    """A vhost-user-fs server process. socket_path: where QEMU connects. pidfd: readable once it has ended.

    The socket is ours and listens before the process starts, so QEMU can be started at once, beside the server.
    """

    name = "server"
    process: subprocess.Popen[bytes]

    def __init__(self, *, die_with_parent: bool = False) -> None:
        super().__init__()
        self.die_with_parent = die_with_parent

    def command(self, listener: int) -> list[str]:
        """The words to start it with; `listener` is the descriptor of the listening socket it inherits."""
        raise NotImplementedError

    def _start(self) -> None:
        self.directory = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="vnd-fs-")))
        self.socket_path = self.directory / "fs.sock"
        self.errors_path = self.directory / "log"
        check_socket_path(self.socket_path)
        # Our copy of the socket is closed once the server has its own: when it dies, QEMU is hung up on
        with socket.socket(socket.AF_UNIX) as listener, self.errors_path.open("wb") as errors:
            listener.bind(str(self.socket_path))
            listener.listen(1)
            words = self.command(listener.fileno())
            if self.die_with_parent:
                words = [find_program("setpriv", "util-linux"), "--pdeathsig", "KILL", *words]
            self.process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=errors,
                stderr=errors,
                process_group=0,
                pass_fds=[listener.fileno()],
            )
        self._stack.callback(self.stop)
        self.pidfd = os.pidfd_open(self.process.pid)
        self._stack.callback(os.close, self.pidfd)

    @property
    def family(self) -> list[int]:
        """All processes of the server, the one that serves last."""
        found = [self.process.pid]
        for pid in found:
            with contextlib.suppress(OSError):
                found += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
        return found

    @property
    def serving_pid(self) -> int:
        """The process that serves: the worker, or the daemon's only one."""
        return self.family[-1]

    def check_alive(self) -> None:
        if self.process.poll() is not None:
            raise self.explain_end()

    def explain_end(self) -> Failure:
        status = self.process.wait()
        lines = self.log_text().strip().splitlines() or ["it said nothing"]
        how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        return Failure(f"{self.name} {how}: {lines[-1].removeprefix(self.name).lstrip(' :')}", Cause.IO)

    def log_text(self) -> str:
        return self.errors_path.read_text(errors="replace")

    def stop(self) -> None:
        """SIGTERM, then SIGKILL after STOP_S."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
        self.process.wait()


class PeerVirtiofsd(Server):
    """QEMU's C virtiofsd, or the Rust one where that is what there is, on a directory. Needs root."""

    def __init__(self, directory: Path, *, die_with_parent: bool = False) -> None:
        super().__init__(die_with_parent=die_with_parent)
        self.shared = directory
        self.program = C_VIRTIOFSD if C_VIRTIOFSD.exists() else RUST_VIRTIOFSD
        self.name = "C virtiofsd" if self.program == C_VIRTIOFSD else "Rust virtiofsd"
        if not self.program.exists():
            raise Failure(
                f"no virtiofsd at {C_VIRTIOFSD} or {RUST_VIRTIOFSD}: apt-get install qemu-system-common "
                "(Debian 12) or virtiofsd (Debian 13)",
                Cause.MISSING,
            )

    def command(self, listener: int) -> list[str]:
        words = [str(self.program), f"--fd={listener}"]
        if self.program == C_VIRTIOFSD:
            return [*words, "-o", f"source={self.shared}", "-o", "cache=always,sandbox=chroot"]
        return [*words, f"--shared-dir={self.shared}", "--cache=always", "--sandbox=chroot"]


class CommandServer(Server):
    """Any server, by its command line: `{sock}` stands for the socket that it makes, other `{name}`s for values."""

    def __init__(self, name: str, words: Sequence[str], values: dict[str, str]) -> None:
        super().__init__()
        self.name, self.words, self.values = name, list(words), values

    def command(self, listener: int) -> list[str]:
        self.socket_path = self.directory / "own.sock"
        known = {**self.values, "sock": str(self.socket_path)}
        return [re.sub(r"\{(\w+)\}", lambda match: known.get(match[1], match[0]), word) for word in self.words]

    def _start(self) -> None:
        super()._start()
        until_s = time.monotonic() + READY_S
        while not self.socket_path.exists():
            self.check_alive()
            if time.monotonic() > until_s:
                raise Failure(f"{self.name} made no socket in {READY_S} s: {self.log_text()[-200:]}", Cause.IO)
            select.select([self.pidfd], [], [], 0.02)


class UnixConnection(http.client.HTTPConnection):
    """HTTP to a unix socket."""

    def __init__(self, path: Path, seconds: float) -> None:
        super().__init__("localhost", timeout=seconds)
        self._path = str(path)

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def call_api(path: Path, method: str, target: str, body: object = None, seconds: float = 30.0) -> tuple[int, Any]:
    """One request to a daemon's API on a connection of its own: the status, and the JSON answered, None for an empty
    body. body: what becomes JSON. seconds: Kata's own limit. Raises OSError when the daemon does not answer."""
    connection = UnixConnection(path, seconds)
    try:
        connection.request(
            method, target, None if body is None else json.dumps(body), {"Content-Type": "application/json"}
        )
        answer = connection.getresponse()
        raw = answer.read()
        return answer.status, json.loads(raw) if raw else None
    finally:
        connection.close()


class NydusDaemon(Server):
    """Our daemon, `virtiofsd-nydus virtiofs`, on one image.

    options: what follows --fd and --apisock (--bootstrap, --config, --localfs-dir ...).
    """

    name = "virtiofsd-nydus"
    verb = "virtiofs"

    def __init__(self, options: Sequence[str], *, die_with_parent: bool = False) -> None:
        super().__init__(die_with_parent=die_with_parent)
        self.options = list(options)

    def command(self, listener: int) -> list[str]:
        self.api_path = self.directory / "api.sock"
        return [
            sys.executable,
            "-m",
            "virtiofsd_nydus.cli.main",
            self.verb,
            "--fd",
            str(listener),
            "--apisock",
            str(self.api_path),
            *self.options,
        ]

    def explain_end(self) -> Failure:
        """The failure to raise when the server has ended: its own last line, if it ended by itself."""
        lines = self.log_text().strip().splitlines()
        if self.process.wait() == 1 and lines:
            return Failure(f"the daemon: {lines[-1].removeprefix('virtiofsd-nydus virtiofs: ')}", Cause.IO)
        return super().explain_end()

    def get(self, route: str, seconds: float = 5.0) -> Any:
        """GET on the daemon's API; the JSON it answers, None for an empty body."""
        try:
            status, body = call_api(self.api_path, "GET", route, seconds=seconds)
        except OSError as error:
            self.check_alive()
            raise Failure(f"{self.name} does not answer {route}: {error}", Cause.IO) from None
        if status >= 400:
            raise Failure(f"{self.name} answers {route} with {status}", Cause.IO)
        return body

    def stats(self) -> dict[str, Any]:
        """{"engine": the counters of vnd_stats, "blobs": {id: chunks, bytes, readiness}}."""
        answer: dict[str, Any] = self.get("/api/ext/v1/stats")
        return answer
