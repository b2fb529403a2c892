"""The virtio-fs servers a guest can be booted on: our daemon, and QEMU's C virtiofsd for comparison.

Each is one process with one listening socket, in a temporary directory of its own; a context manager that leaves no
process and no directory behind.
"""

import http.client
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from virtiofsd_nydus.errors import Cause, Failure
from virtiofsd_nydus.vmm.guest import Deadline
from virtiofsd_nydus.vmm.qemu import check_socket_path, find_program

STOP_SECONDS = 5.0
# Debian 12: qemu-system-common; Debian 13: the package virtiofsd (the Rust one)
C_VIRTIOFSD = Path("/usr/lib/qemu/virtiofsd")
RUST_VIRTIOFSD = Path("/usr/libexec/virtiofsd")


class Server:
    """A vhost-user-fs server process. socket_path: where QEMU connects. pidfd: readable once it has ended."""

    name = "server"
    process: subprocess.Popen[bytes]

    def __init__(self, *, die_with_parent: bool = False) -> None:
        self.die_with_parent = die_with_parent
        self._stack = ExitStack()

    def command(self, directory: Path) -> list[str]:
        """The words to start it with; its sockets go into `directory`."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        try:
            self.directory = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="vnd-fs-")))
            self.socket_path = self.directory / "fs.sock"
            self.errors_path = self.directory / "log"
            check_socket_path(self.socket_path)
            words = self.command(self.directory)
            if self.die_with_parent:
                words = [find_program("setpriv", "util-linux"), "--pdeathsig", "KILL", *words]
            with self.errors_path.open("wb") as errors:
                self.process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=errors, stderr=errors,
                                                process_group=0)
            self._stack.callback(self.stop)
            self.pidfd = os.pidfd_open(self.process.pid)
            self._stack.callback(os.close, self.pidfd)
            self.wait_ready(Deadline(20, f"the start of {self.name}"))
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self._stack.close()

    def wait_ready(self, deadline: Deadline) -> None:
        """Until the socket is there. It is not connected to: a server takes a connection for its front-end."""
        while not self.socket_path.exists():
            self.check_alive()
            deadline.remaining()
            time.sleep(0.002)

    def check_alive(self) -> None:
        if self.process.poll() is not None:
            raise self.explain_end()

    def explain_end(self) -> Failure:
        status = self.process.wait()
        lines = self.log_text().strip().splitlines() or ["it said nothing"]
        how = f"signal {-status}" if status < 0 else f"status {status}"
        return Failure(f"{self.name} ended with {how}: {lines[-1]}", Cause.IO)

    def log_text(self) -> str:
        return self.errors_path.read_text(errors="replace")

    def stop(self) -> None:
        """SIGTERM, then SIGKILL after STOP_SECONDS."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(STOP_SECONDS)
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
            raise Failure(f"no virtiofsd at {C_VIRTIOFSD} or {RUST_VIRTIOFSD}: apt-get install qemu-system-common "
                          "(Debian 12) or virtiofsd (Debian 13)", Cause.MISSING)

    def command(self, directory: Path) -> list[str]:
        if self.program == C_VIRTIOFSD:
            return [str(self.program), f"--socket-path={self.socket_path}", "-o", f"source={self.shared}",
                    "-o", "cache=always,sandbox=chroot"]
        return [str(self.program), f"--socket-path={self.socket_path}", f"--shared-dir={self.shared}",
                "--cache=always", "--sandbox=chroot"]


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path, seconds: float) -> None:
        super().__init__("localhost", timeout=seconds)
        self._path = str(path)

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


class NydusDaemon(Server):
    """Our daemon, `virtiofsd-nydus virtiofs`, on one image.

    options: what follows --sock and --apisock (--bootstrap, --config, --localfs-dir ...).
    """

    name = "virtiofsd-nydus"

    def __init__(self, options: Sequence[str], *, die_with_parent: bool = False) -> None:
        super().__init__(die_with_parent=die_with_parent)
        self.options = list(options)

    def command(self, directory: Path) -> list[str]:
        self.api_path = directory / "api.sock"
        return [sys.executable, "-m", "virtiofsd_nydus.cli.main", "virtiofs", "--sock", str(self.socket_path),
                "--apisock", str(self.api_path), *self.options]

    def get(self, route: str, seconds: float = 5.0) -> Any:
        """GET on the daemon's API; the JSON it answers, None for an empty body."""
        connection = _UnixConnection(self.api_path, seconds)
        try:
            connection.request("GET", route)
            answer = connection.getresponse()
            body = answer.read()
        except OSError as error:
            self.check_alive()
            raise Failure(f"{self.name} does not answer {route}: {error}", Cause.IO) from None
        finally:
            connection.close()
        if answer.status >= 400:
            raise Failure(f"{self.name} answers {route} with {answer.status}", Cause.IO)
        return json.loads(body) if body else None

    def stats(self) -> dict[str, int]:
        """The engine's counters (vnd_stats)."""
        answer: dict[str, int] = self.get("/api/ext/v1/stats")
        return answer
