"""A `fuse` daemon as a process, and the mount table."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.system.daemon import WAIT_SECONDS, ServedImage, wait_until
from virtiofsd_nydus.fuse.mounts import find_mount
from virtiofsd_nydus.vmm.servers import UnixConnection

VERB = (sys.executable, "-m", "virtiofsd_nydus.cli.main")


def has_fuse() -> str:
    """Why mounts cannot be tried here; "" when they can."""
    if os.geteuid() != 0:
        return "mounts on the host need root"
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR))
    except OSError as error:
        return f"/dev/fuse: {error.strerror}"
    return ""


def umount_below(directory: Path) -> None:
    """Whatever is mounted on or under a directory, the deepest first."""
    for line in reversed(Path("/proc/self/mountinfo").read_text().splitlines()):
        target = line.split()[4]
        if target == str(directory) or target.startswith(f"{directory}/"):
            subprocess.run(["umount", "-l", target], check=False, capture_output=True)


class HostDaemon:
    """virtiofsd-nydus fuse, RUNNING (or in `state`) on its API once entered. run: its sockets, log, configuration."""

    def __init__(
        self,
        image: ServedImage,
        mountpoint: Path,
        run: Path,
        *,
        cache: Path,
        extra: Sequence[str] = (),
        deadline_ms: int = 10_000,
        bootstrap: bool = True,
        state: str = "RUNNING",
        number: int = 0,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.image, self.mountpoint, self.run, self.state = image, mountpoint, run, state
        run.mkdir(exist_ok=True)
        if find_mount(str(mountpoint)) is None:  # else not to be touched: perhaps no daemon serves it
            mountpoint.mkdir(exist_ok=True)
        cache.mkdir(exist_ok=True, parents=True)
        self.api_path = run / f"api{number}.sock"
        self.log_path = run / f"log{number}"
        self.config = image.write_config(run / "config.json", cache)
        self.words = [
            *VERB,
            "fuse",
            "--mountpoint",
            str(mountpoint),
            "--apisock",
            str(self.api_path),
            "--read-deadline-ms",
            str(deadline_ms),
            *extra,
        ]
        if bootstrap:
            self.words += ["--bootstrap", str(image.bootstrap), "--config", str(self.config)]
        self.env = {**os.environ, **(env or {})}

    def __enter__(self) -> Self:
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(self.words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self.env)
        try:
            wait_until(lambda: self.process.poll() is not None or self.api_state() == self.state, "the daemon's start")
            assert self.process.poll() is None, self.log()
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(WAIT_SECONDS)
            except subprocess.TimeoutExpired:
                self.kill()

    def kill(self, how: signal.Signals = signal.SIGKILL) -> int:
        self.process.send_signal(how)
        return self.process.wait(WAIT_SECONDS)

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def request(self, method: str, route: str, body: object = None) -> tuple[int, Any]:
        """Status and what the answer's body says (None: empty). OSError when no daemon answers."""
        connection = UnixConnection(self.api_path, WAIT_SECONDS)
        try:
            connection.request(method, route, None if body is None else json.dumps(body))
            answer = connection.getresponse()
            data = answer.read()
            return answer.status, json.loads(data) if data else None
        finally:
            connection.close()

    def api_state(self) -> str:
        try:
            return str(self.request("GET", "/api/v1/daemon")[1]["state"])
        except OSError:
            return ""

    def put(self, route: str) -> None:
        status, answer = self.request("PUT", f"/api/v1/daemon/{route}")
        assert status == 204, (route, status, answer)

    def counters(self) -> dict[str, int]:
        counters: dict[str, int] = self.request("GET", "/api/ext/v1/stats")[1]["engine"]
        return counters

    def is_mounted(self) -> bool:
        return find_mount(str(self.mountpoint)) is not None
