"""The daemon with a host mount (`fuse`): nydusd's life cycle with start, exit, upgrade and failover.

States: INIT -> READY -> RUNNING. A plain start goes through by itself, mounts first and API socket last. One that waits
for a predecessor's mount stops in INIT: PUT takeover makes it READY (the mount is ours, nobody serves it), PUT start
RUNNING. Guests may be served beside, on --sock, from the same cache and fetch threads.
"""

import os
import socket
import threading

from virtiofsd_nydus import __version__
from virtiofsd_nydus import log as logs
from virtiofsd_nydus.daemon import supervisor as supervisors
from virtiofsd_nydus.daemon.api import ApiServer, not_ready, unexpected, unsupported
from virtiofsd_nydus.daemon.service import QUEUES, SWITCH_INTERVAL_S, Service
from virtiofsd_nydus.engine import SESSION_MIXED, SESSION_RAFS, Vfs
from virtiofsd_nydus.errors import Cause, Failure
from virtiofsd_nydus.fuse import mounts
from virtiofsd_nydus.fuse.host import HostFuse
from virtiofsd_nydus.storage.config import ImageConfig
from virtiofsd_nydus.vhost.device import EngineDevice
from virtiofsd_nydus.vhost.server import VhostServer

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def has_dead_server(apisock: str) -> bool:
    """The API socket of a process that is gone: it is there and refuses."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(apisock)
        except ConnectionRefusedError:
            return True
        except OSError:
            pass
        return False


class HostService(Service):
    """Construct, start_host(), wait(), stop()."""

    def __init__(
        self,
        log: logs.Log,
        fuse: HostFuse,
        *,
        instance_id: str | None = None,
        supervisor: str | None = None,
        read_deadline_ms: int = 0,
        allow_unverified: bool = False,
    ) -> None:
        super().__init__(
            log,
            instance_id=instance_id,
            supervisor=supervisor,
            read_deadline_ms=read_deadline_ms,
            allow_unverified=allow_unverified,
        )
        self._fuse = fuse
        self._keep_mount = False
        self._steps = threading.Lock()  # the API's start, sendfd and takeover, one at a time

    def start_host(
        self,
        *,
        apisock: str | None,
        bootstrap: str | None,
        config: ImageConfig | None,
        mountpoint: str = "/",
        upgrade: bool = False,
        sock: str | None = None,
        prefetch_files: "list[str] | None" = None,
    ) -> None:
        """Returns RUNNING, or in INIT when it waits for takeover. Raises Failure with nothing left behind but what
        stop() removes. Main thread only. mountpoint: where the image lies inside the mount."""
        import sys

        sys.setswitchinterval(SWITCH_INTERVAL_S)
        self.catch_signals()
        if upgrade or self._must_take_over(apisock):
            if not apisock or not self._supervisor:
                raise Failure("taking a mount over needs --apisock and --supervisor")
            self._api = ApiServer(apisock, self)
            self._keep_mount = True
            self._api.start()
            self.log.say(logs.INFO, "waiting to take over", mountpoint=self._fuse.mountpoint, version=__version__)
            self._start_late()
            return
        self._vfs = vfs = Vfs(self.engine, SESSION_RAFS if bootstrap else SESSION_MIXED)
        if bootstrap:
            assert config is not None
            self._mount(mountpoint, bootstrap, config, prefetch_files=prefetch_files)
            # Without it nobody asks for OPEN: version 5 keeps that
            self._fuse.passthrough &= all(mount.image.info()["fs_version"] == 6 for mount in self._mounts.values())
        self._fuse.mount()
        self._fuse.serve(self.engine, vfs, on_end=self._mount_is_gone)
        if sock:
            self._vhost = VhostServer(
                lambda: EngineDevice(self.engine, vfs, QUEUES), path=sock, fd=None, say=self.log.say
            )
        if apisock:
            self._api = ApiServer(apisock, self)
        if self._vhost:
            self._vhost.start()
        self.state = "RUNNING"
        if self._api:
            self._api.start()
        self.log.say(logs.INFO, "running", mountpoint=self._fuse.mountpoint, version=__version__)
        self._start_late()

    def _must_take_over(self, apisock: str | None) -> bool:
        """A predecessor died and left its mount with the supervisor."""
        if not apisock or not self._supervisor or not has_dead_server(apisock):
            return False
        try:
            return mounts.find_mount(mounts.resolve_mountpoint(self._fuse.mountpoint)) is not None
        except OSError:
            return False

    def _mount_is_gone(self) -> None:
        self.log.say(
            logs.WARNING if self.state == "RUNNING" else logs.INFO, f"{self._fuse.mountpoint} was unmounted: ending"
        )
        self.request_exit()

    def _mounts_changed(self) -> None:
        self._fuse.root_changed()

    def _close_host(self) -> None:
        self._fuse.close(keep_mount=self._keep_mount)

    # ---- API

    def exit_by_api(self) -> None:
        self._keep_mount = True
        self.request_exit()

    def send_fd(self) -> None:
        with self._steps:
            if self._supervisor is None:
                raise unsupported()
            if not self._fuse.ready and self.state != "READY":
                raise not_ready()
            if self._shares:
                raise Failure("host directories are mounted: a successor could not go on with files open in them")
            supervisors.send_state(self._supervisor, self._state_to_send(), self._fuse.fd)

    def _state_to_send(self) -> "dict[str, Any]":
        assert self._vfs is not None
        with self._lock:
            return {
                "kind": self._vfs.kind,
                "next_serial": self._vfs.next_serial,
                "mounts": [
                    {
                        "path": mount.path,
                        "source": os.path.abspath(mount.source),  # noqa: PTH100
                        "serial": mount.serial,
                        "config": {name: getattr(mount.config, name) for name in ImageConfig.__slots__},
                    }
                    for mount in sorted(self._mounts.values(), key=lambda mount: mount.serial)
                ],
            }

    def take_over(self) -> None:
        with self._steps:
            if self.state != "INIT" or self._supervisor is None:
                raise unexpected("Takeover")
            state, fd = supervisors.receive_state(self._supervisor)
            self._fuse.adopt(fd)
            try:
                self._vfs = Vfs(self.engine, int(state["kind"]))
                for entry in state["mounts"]:
                    config = ImageConfig("", {}, "")
                    for name in ImageConfig.__slots__:
                        setattr(config, name, entry["config"][name])
                    self._mount(str(entry["path"]), str(entry["source"]), config, int(entry["serial"]))
                self._vfs.next_serial = int(state["next_serial"])
            except (KeyError, TypeError, ValueError) as error:
                self._undo_takeover()
                raise Failure(f"the state of the predecessor is damaged: {error!r}", Cause.FORMAT) from None
            except Failure:
                self._undo_takeover()
                raise
            self.state = "READY"
            self.log.say(logs.INFO, "took over", mountpoint=self._fuse.mountpoint, mounts=len(state["mounts"]))

    def _undo_takeover(self) -> None:
        """As before it, so that it can be tried again."""
        for path in list(self._mounts):
            self.umount(path)
        if self._vfs:
            self._vfs.close()
            self._vfs = None
        self._fuse.forget()

    def start_by_api(self) -> None:
        with self._steps:
            if self.state != "READY":
                raise unexpected("Start")
            assert self._vfs is not None
            self._fuse.serve(self.engine, self._vfs, on_end=self._mount_is_gone, resumed=True)
            self._keep_mount = False
            self.state = "RUNNING"
            self.log.say(logs.INFO, "running", mountpoint=self._fuse.mountpoint, version=__version__)
