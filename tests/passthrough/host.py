"""A host directory mounted on this host by the `fuse` daemon, through its API."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.system.daemon import WAIT_SECONDS, wait_until
from virtiofsd_nydus.vmm.servers import UnixConnection


class PassthroughMount:
    """source at base/mnt, read-write. wrapper: words before the daemon's own."""

    def __init__(self, source: Path, base: Path, wrapper: Sequence[str] = ()) -> None:
        self.source, self.mountpoint, self.api, self.log_path = source, base / "mnt", base / "api", base / "fuse.log"
        self.wrapper = list(wrapper)
        self.mountpoint.mkdir()

    def __enter__(self) -> Self:
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(
                [
                    *self.wrapper,
                    sys.executable,
                    "-m",
                    "virtiofsd_nydus.cli.main",
                    "fuse",
                    "--mountpoint",
                    str(self.mountpoint),
                    "--apisock",
                    str(self.api),
                    "--writable",
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        try:
            wait_until(self._share, "the daemon's start")
        except BaseException:
            self.process.kill()
            raise
        return self

    def _share(self) -> bool:
        assert self.process.poll() is None, self.log_path.read_text()
        connection = UnixConnection(self.api, WAIT_SECONDS)
        try:
            connection.request(
                "POST",
                "/api/v1/mount?mountpoint=/",
                f'{{"fs_type": "passthrough_fs", "source": "{self.source}", "config": ""}}',
            )
            answer = connection.getresponse()
            assert answer.status == 204, answer.read()
            return True
        except OSError:
            return False
        finally:
            connection.close()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        subprocess.run(["umount", str(self.mountpoint)], check=False, capture_output=True)
        self.process.terminate()
        try:
            self.process.wait(WAIT_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
