"""What belongs to a mount whose daemon runs in the background: its API socket and log, found by the mountpoint."""

import hashlib
import os
import shutil
import socket
import tempfile
import time
from pathlib import Path

from virtiofsd_nydus.errors import Cause, Failure

SYSTEM_RUN_DIR = Path("/run/virtiofsd-nydus")
API_NAME = "api.sock"
END_S = 2.0
POLL_S = 0.01


class BackgroundMount:
    """The directory of one mount. target: the real path of the mountpoint."""

    def __init__(self, target: str) -> None:
        if os.geteuid() == 0:
            parent = SYSTEM_RUN_DIR
        else:
            runtime = os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()
            parent = Path(runtime) / f"virtiofsd-nydus-{os.geteuid()}"
        self.directory = parent / hashlib.sha256(os.fsencode(target)).hexdigest()[:16]
        self.api, self.log = self.directory / API_NAME, self.directory / "log"

    def make(self) -> None:
        try:
            self.directory.parent.mkdir(mode=0o700, exist_ok=True)
            if self.directory.parent.stat().st_uid != os.geteuid():
                raise Failure(f"{self.directory.parent} belongs to another user", Cause.IO)
            self.directory.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise Failure(f"cannot make {self.directory}: {error.strerror}", Cause.IO) from None

    def is_running(self) -> bool:
        """Whether the daemon answers, which it does once the mount is there."""
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(str(self.api))
            except OSError:
                return False
            return True

    def wait_ended(self) -> bool:
        """Waits for the daemon's end, which comes once its mount is used no more. False: not within END_S."""
        end = time.monotonic() + END_S
        while self.is_running():
            if time.monotonic() > end:
                return False
            time.sleep(POLL_S)  # between two looks; the deadline decides
        return True

    def remove(self) -> None:
        """Removes the directory, also under a daemon that goes on with a mount that was detached."""
        shutil.rmtree(self.directory, ignore_errors=True)


def remove_run_dir(directory: str) -> None:
    """Removes the directory of a background mount, as its daemon's last step: the system's umount does not. One in
    which another daemon listens by now belongs to that daemon."""
    path = Path(directory)
    if not (path / API_NAME).exists():
        shutil.rmtree(path, ignore_errors=True)
