"""What the processes of a lazy mount share: descriptors under the same numbers in each, and in a memfd what a fresh one
must know. Light: the guard should need little memory.
"""

import json
import os
import signal
import sys

from virtiofsd_nydus.storage.config import ImageConfig

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, Literal

HELD = (signal.SIGTERM, signal.SIGINT)
MODULES = {"worker": "virtiofsd_nydus.kernelmount.worker", "guard": "virtiofsd_nydus.kernelmount.guard"}


class Settings:
    """group, state, log, lock: descriptors. files: of the blobs' data; clones: of their mounts, -1 if none. The
    file behind lock is locked for as long as any process of the mount lives. The memfd may hold a login and is
    nowhere on a disk."""

    __slots__ = (
        "bootstrap",
        "clones",
        "config",
        "directory",
        "fd",
        "files",
        "group",
        "lock",
        "log",
        "mount_id",
        "state",
        "target",
    )

    def __init__(
        self, *, target: str, directory: str, bootstrap: str, config: "dict[str, Any]", log: int, lock: int
    ) -> None:
        self.target, self.directory, self.bootstrap, self.config = target, directory, bootstrap, config
        self.log, self.lock, self.group, self.state, self.mount_id = log, lock, -1, -1, 0
        self.clones: list[int] = []
        self.files: list[int] = []
        self.fd = os.memfd_create("vnd-settings", os.MFD_CLOEXEC)

    @classmethod
    def load(cls, fd: int) -> "Settings":
        found = cls.__new__(cls)
        for name, value in json.loads(os.pread(fd, os.fstat(fd).st_size, 0)).items():
            setattr(found, name, value)
        found.fd = fd
        return found

    def save(self) -> None:
        raw = json.dumps({name: getattr(self, name) for name in self.__slots__ if name != "fd"}).encode()
        os.ftruncate(self.fd, 0)
        os.pwrite(self.fd, raw, 0)

    def image_config(self) -> ImageConfig:
        config = ImageConfig("", {}, "")
        for name in ImageConfig.__slots__:
            setattr(config, name, self.config[name])
        return config

    def start(self, role: "Literal['worker', 'guard']", *others: int) -> int:
        """Starts a process in a session of its own: its id. others: descriptors more, its words after the settings'."""
        for fd in (self.fd, self.group, self.state, self.log, self.lock, *self.clones, *self.files, *others):
            if fd >= 0:
                os.set_inheritable(fd, True)
        actions = [
            (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
            (os.POSIX_SPAWN_DUP2, self.log, 1),
            (os.POSIX_SPAWN_DUP2, self.log, 2),
        ]
        words = [sys.executable, "-m", MODULES[role], str(self.fd), *map(str, others)]
        return os.posix_spawn(sys.executable, words, os.environ, file_actions=actions, setsid=True, setsigmask=HELD)


def catch_signals(end: "Callable[[], None]") -> None:
    """Makes SIGTERM call end, also one that came before: start() holds it back. SIGINT is a terminal's."""
    signal.signal(signal.SIGTERM, lambda *_: end())
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD)


def reap(pid: int) -> None:
    """Collects a child that has ended. A process that is no child of ours is left alone."""
    try:
        os.waitpid(pid, os.WNOHANG)
    except ChildProcessError:
        pass
