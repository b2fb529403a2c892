"""squid as a forward proxy on a free loopback port: the stand-in for a peer daemon such as Dragonfly's."""

import os
import pwd
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Self

from tests.peers.registry import find_free_port

START_LIMIT_S = 30.0


class Squid:
    """A context manager; stop() and start() may be repeated, the port stays."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.port = find_free_port()
        self.log_path = directory / "access.log"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        self.directory.mkdir(parents=True, exist_ok=True)
        if os.getuid() == 0:  # squid drops root
            for path in (self.directory, *list(self.directory.parents)[:3]):
                path.chmod(0o755)
            user = pwd.getpwnam("proxy")
            os.chown(self.directory, user.pw_uid, user.pw_gid)
        (self.directory / "squid.conf").write_text(
            f"http_port 127.0.0.1:{self.port}\n"
            "acl denied urlpath_regex /denied/\nhttp_access deny denied\nhttp_access allow all\n"
            f"access_log stdio:{self.log_path}\ncache_log {self.directory}/cache.log\n"
            f"pid_filename {self.directory}/squid.pid\ncoredump_dir {self.directory}\n"
            "cache deny all\nshutdown_lifetime 0 seconds\nvisible_hostname squid.test\nvia off\n"
            "pinger_enable off\nbuffered_logs off\n"
        )
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def start(self) -> None:
        program = shutil.which("squid") or "/usr/sbin/squid"
        self._process = subprocess.Popen(
            [program, "-N", "-f", str(self.directory / "squid.conf")],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        deadline = time.monotonic() + START_LIMIT_S
        while self._process.poll() is None and time.monotonic() < deadline:
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
                return
            except OSError:
                time.sleep(0.02)  # between two polls; the deadline decides
        log = self.directory / "cache.log"
        raise RuntimeError(f"squid did not start: {log.read_text(errors='replace')[-500:] if log.exists() else ''}")

    def stop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.send_signal(signal.SIGKILL)
            process.wait()

    def requests(self) -> list[str]:
        """`METHOD ADDRESS` of every request answered, in order."""
        if not self.log_path.exists():
            return []
        return [" ".join(line.split()[5:7]) for line in self.log_path.read_text().splitlines()]
