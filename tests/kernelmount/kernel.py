"""A `mount --kernel` under test, and its two processes."""

import json
import os
import signal
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.system.conftest import run_verb
from tests.system.daemon import ServedImage, wait_until
from virtiofsd_nydus.fuse.background import BackgroundMount
from virtiofsd_nydus.fuse.mounts import find_mount
from virtiofsd_nydus.kernelmount.record import wait_ended

ROLES = ("worker", "guard")


class KernelMount:
    """Mounted once entered; unmounted by the verb at the end."""

    def __init__(self, image: ServedImage, target: Path, scratch: Path, *options: str) -> None:
        self.image, self.target = image, target
        self.cache = scratch / "cache"
        self.words = self.prepare(image, target, scratch, *options)
        self.place = BackgroundMount(str(target))

    @staticmethod
    def prepare(image: ServedImage, target: Path, scratch: Path, *options: str) -> list[str]:
        """The verb's words; the directories are made."""
        target.mkdir(exist_ok=True)
        (scratch / "cache").mkdir(exist_ok=True)
        config = image.write_config(scratch / "kernel.json", scratch / "cache")
        return ["mount", str(image.bootstrap), str(target), "--config", str(config), "--kernel", *options]

    def __enter__(self) -> Self:
        self.said = run_verb(*self.words).stdout
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if find_mount(str(self.target)):
            run_verb("umount", str(self.target))
        for role in ROLES:
            for pid in self.pids(role):
                os.kill(pid, signal.SIGKILL)

    def pids(self, role: str) -> list[int]:
        """Its processes of that role: those that hold its lock file, which no other mount's do."""
        module = f"virtiofsd_nydus.kernelmount.{role}".encode()
        lock = str(self.place.directory / "lock")
        return [
            int(process.name)
            for process in Path("/proc").iterdir()
            if process.name.isdecimal() and module in read_words(process) and lock in open_files(process)
        ]

    def pid(self, role: str) -> int:
        found: int = wait_until(lambda: next(iter(self.pids(role)), 0), f"a {role}")
        return found

    def kill(self, role: str) -> int:
        """kill -9; the process that has taken its place."""
        old = self.pid(role)
        os.kill(old, signal.SIGKILL)
        found: int = wait_until(lambda: next((pid for pid in self.pids(role) if pid != old), 0), f"another {role}")
        return found

    def is_lazy(self) -> bool:
        return bool(json.loads((self.place.directory / "kernel.json").read_text())["lazy"])

    def log(self) -> str:
        return self.place.log.read_text()

    def is_gone(self, seconds: float = 10.0) -> bool:
        """No process of it lives and no file is left."""
        return wait_ended(self.place.directory, seconds) and not self.place.directory.exists()


def read_words(process: Path) -> list[bytes]:
    try:
        return (process / "cmdline").read_bytes().split(b"\0")
    except OSError:  # it has ended
        return []


def open_files(process: Path) -> set[str]:
    found = set()
    try:
        for fd in (process / "fd").iterdir():
            try:
                found.add(os.readlink(fd).removesuffix(" (deleted)"))  # noqa: PTH115
            except OSError:
                continue
    except OSError:
        pass
    return found
