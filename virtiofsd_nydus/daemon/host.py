"""The daemon with a host mount (`fuse`): nydusd's life cycle with start, exit, upgrade and failover.

States: INIT -> READY -> RUNNING. A plain start goes through by itself, mounts first and API socket last. One that waits
for a predecessor's mount stops in INIT. PUT takeover makes it READY: we hold the mount and do not serve it yet. PUT
start makes it RUNNING. Guests may be served beside, on --sock, from the same cache and fetch threads.
"""

import os
import socket
import threading

from virtiofsd_nydus import __version__
from virtiofsd_nydus import log as logs
from virtiofsd_nydus.daemon import supervisor as supervisors
from virtiofsd_nydus.daemon.answers import not_ready, unexpected, unsupported
from virtiofsd_nydus.daemon.api import make_server
from virtiofsd_nydus.daemon.mounts import ImageMount, read_config
from virtiofsd_nydus.daemon.server import listen_api
from virtiofsd_nydus.daemon.service import Service, Sockets, set_switch_interval
from virtiofsd_nydus.errors import Cause, Failure
from virtiofsd_nydus.fuse import mounts
from virtiofsd_nydus.fuse.host import HostFuse
from virtiofsd_nydus.storage.config import ImageConfig

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
        seccomp: str | None = None,
    ) -> None:
        super().__init__(
            log,
            instance_id=instance_id,
            supervisor=supervisor,
            read_deadline_ms=read_deadline_ms,
            allow_unverified=allow_unverified,
            seccomp=seccomp,
        )
        self._fuse = fuse
        self._keep_mount = False
        self._steps = threading.Lock()  # the API's start, sendfd and takeover, one at a time

    def start_host(self, sockets: Sockets, image: ImageMount | None = None, *, upgrade: bool = False) -> None:
        """Returns RUNNING, or in INIT when it waits for takeover. Raises Failure with nothing left behind but what
        stop() removes. Main thread only. image.path: where the image lies inside the mount."""
        self.catch_signals()
        if upgrade or self._must_take_over(sockets.apisock):
            self._wait_takeover(sockets.apisock)
            return
        vfs = self._open_table(image)
        # Passthrough needs OPEN requests, which version 5 does without: it stays so
        self._fuse.passthrough &= all(mount.image.info()["fs_version"] == 6 for mount in self.table.images())
        self._fuse.mount()
        self._fuse.serve(self.engine, vfs, on_end=self._mount_is_gone)
        if sockets.sock:
            self._open_vhost(vfs, sockets, None)
        if sockets.apisock:
            self._api = make_server(self, listen_api(sockets.apisock))
        self._run(mountpoint=self._fuse.mountpoint)

    def _wait_takeover(self, apisock: str | None) -> None:
        if not apisock or not self._supervisor:
            raise Failure("taking a mount over needs --apisock and --supervisor")
        set_switch_interval()
        self._api = make_server(self, listen_api(apisock))
        self._keep_mount = True
        self._api.start()
        self.log.say(logs.INFO, "waiting to take over", mountpoint=self._fuse.mountpoint, version=__version__)
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
            if self.table.shares():
                raise Failure("host directories are mounted: a successor could not go on with files open in them")
            supervisors.send_state(self._supervisor, self._state_to_send(), self._fuse.fd)

    def _state_to_send(self) -> "dict[str, Any]":
        vfs = self.table.vfs
        assert vfs is not None
        with self.table.held() as (mounts, _):
            return {
                "kind": vfs.kind,
                "next_serial": vfs.next_serial,
                "mounts": [
                    {
                        "path": mount.path,
                        "source": os.path.abspath(mount.source),  # noqa: PTH100
                        "serial": mount.serial,
                        "config": {name: getattr(mount.config, name) for name in ImageConfig.__slots__},
                    }
                    for mount in sorted(mounts, key=lambda mount: mount.serial)
                ],
            }

    def take_over(self) -> None:
        with self._steps:
            if self.state != "INIT" or self._supervisor is None:
                raise unexpected("Takeover")
            state, fd = supervisors.receive_state(self._supervisor)
            self._fuse.adopt(fd)
            try:
                vfs = self.table.open(int(state["kind"]))
                for entry in state["mounts"]:
                    wanted = ImageMount(str(entry["path"]), str(entry["source"]), read_config(entry))
                    self.table.mount_image(wanted, int(entry["serial"]))
                vfs.next_serial = int(state["next_serial"])
            except (KeyError, TypeError, ValueError) as error:
                self._undo_takeover()
                raise Failure(f"the state of the predecessor is damaged: {error!r}", Cause.FORMAT) from None
            except Failure:
                self._undo_takeover()
                raise
            self.report.state = "READY"
            self.log.say(logs.INFO, "took over", mountpoint=self._fuse.mountpoint, mounts=len(state["mounts"]))

    def _undo_takeover(self) -> None:
        """Undoes a takeover that failed, so that it can be tried again."""
        self.table.umount_all()
        self._fuse.forget()

    def start_by_api(self) -> None:
        with self._steps:
            if self.state != "READY":
                raise unexpected("Start")
            assert self.table.vfs is not None
            self._fuse.serve(self.engine, self.table.vfs, on_end=self._mount_is_gone, resumed=True)
            self._keep_mount = False
            self.report.state = "RUNNING"
            self.log.say(logs.INFO, "running", mountpoint=self._fuse.mountpoint, version=__version__)
