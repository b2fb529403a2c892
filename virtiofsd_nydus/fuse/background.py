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
END_S = 10.0
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
        self.api, self.log = self.directory / "api.sock", self.directory / "log"

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

    def wait_ended(self) -> None:
        """Waits for the daemon's end, which comes once its mount is gone."""
        end = time.monotonic() + END_S
        while self.is_running():
            if time.monotonic() > end:
                raise Failure(f"the daemon at {self.api} goes on without its mount", Cause.DEADLINE)
            time.sleep(POLL_S)  # between two looks; the deadline decides

    def remove(self) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)
