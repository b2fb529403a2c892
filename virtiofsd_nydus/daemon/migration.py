"""What a front-end's session is beyond its rings: saved for another host or a file, and loaded there.

The state that is loaded comes from a network. It decides nothing about this host: what it may lead to is mounted here
already, or is an image whose bootstrap has the digest that the state tells, read under this daemon's own configuration.
"""

import os

from virtiofsd_nydus import log as logs
from virtiofsd_nydus.daemon.mounts import ImageMount, Mount, MountTable
from virtiofsd_nydus.engine import SESSION_RAFS
from virtiofsd_nydus.errors import Cause, Failure
from virtiofsd_nydus.storage.config import ImageConfig, hide_secrets
from virtiofsd_nydus.vhost import sessionstate as states
from virtiofsd_nydus.vhost.device import EngineDevice

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

KINDS = ("images alone", "images and host directories")


class Migration:
    """Saves and loads the session of one device.

    config reads that of images that only the state names; None: such are refused. front_ends: how many are connected.
    """

    def __init__(
        self,
        device: EngineDevice,
        table: MountTable,
        log: logs.Log,
        config: "Callable[[], ImageConfig] | None",
        front_ends: "Callable[[], int]",
    ) -> None:
        self._device, self._table, self._log = device, table, log
        self._config, self._front_ends = config, front_ends

    # ---- saving

    def save(self) -> bytes:
        """The session's state. Raises Failure where something could not be found again; nothing has changed then."""
        vfs = self._table.vfs
        assert vfs is not None
        with self._table.held() as (mounts, shares):
            if shares:
                raise Failure("host directories are mounted: what the guest knows of them cannot be taken along")
            state = states.SessionState(vfs.kind, vfs.next_serial, self._device.init_result())
            state.pseudo = [states.PseudoNode(*directory) for directory in vfs.directories()]
            state.mounts = [_save_mount(mount) for mount in sorted(mounts, key=lambda mount: mount.serial)]
            state.chunks = [one for mount in mounts for one in _save_chunks(mount)]
        for ring in range(self._device.queue_count):
            heads = self._device.inflight(ring)
            if heads:
                state.rings.append(states.RingState(ring, heads))
        return states.encode(state)

    # ---- loading

    def load(self, data: bytes) -> None:
        """Makes mount table and session be as they were. Raises Failure; what was mounted for it is unmounted then."""
        state = states.decode(data)
        vfs = self._table.vfs
        assert vfs is not None
        if state.kind != vfs.kind:
            raise Failure(
                f"it is of a session with {KINDS[state.kind]}, this daemon has {KINDS[vfs.kind]}: start it with the "
                f"words of the other one ({'--bootstrap' if state.kind == SESSION_RAFS else 'without --bootstrap'})"
            )
        added: list[str] = []
        try:
            self._mount_all(state, added)
            for ring in state.rings:
                if ring.index >= self._device.queue_count:
                    raise Failure(
                        f"it has requests of ring {ring.index}, there are {self._device.queue_count}", Cause.FORMAT
                    )
                self._device.set_inflight(ring.index, ring.heads)
            if state.init is not None:
                self._device.resume(state.init)
        except (Failure, OSError) as error:
            for path in added:
                self._table.umount(path)
            if isinstance(error, Failure):
                raise
            raise Failure(f"mounting: {error.strerror}", Cause.IO) from error
        self._prefetch(state)

    def _mount_all(self, state: states.SessionState, added: "list[str]") -> None:
        vfs = self._table.vfs
        assert vfs is not None
        with self._table.held() as (mounts, _):
            here = {mount.path: mount for mount in mounts}
            same = {
                wanted.path
                for wanted in state.mounts
                if wanted.path in here and here[wanted.path].digest() == wanted.digest
            }
        for wanted in state.mounts:
            if wanted.path not in same:
                if wanted.path in here:
                    raise Failure(f"another image is mounted at {wanted.path}")
                self._mount_named(wanted)
                added.append(wanted.path)
        serials = {wanted.path: wanted.serial for wanted in state.mounts}
        directories = [(node.ino, node.parent, node.name) for node in state.pseudo]
        if self._table.has_numbers(serials, directories):
            return
        if self._front_ends() > 1:
            raise Failure("its mounts have other numbers here, and other guests use them: give it a daemon of its own")
        self._table.renumber(serials, directories, state.next_serial)

    def _mount_named(self, wanted: states.MountState) -> None:
        """Mounts an image that is not mounted here. Its place comes from the state, its configuration never does."""
        if wanted.fs_type != states.FS_RAFS:
            raise Failure(f"no host directory is mounted at {wanted.path}: mount it first")
        if self._config is None:
            raise Failure(f"no image is mounted at {wanted.path}: mount it first, or start the daemon with --config")
        self._table.mount_image(ImageMount(wanted.path, wanted.source, self._config()))
        mount = self._table.require_image(wanted.path)
        if mount.digest() != wanted.digest:
            self._table.umount(wanted.path)
            raise Failure(f"bootstrap {wanted.source} is not the one that was mounted at {wanted.path}", Cause.DIGEST)

    def _prefetch(self, state: states.SessionState) -> None:
        """Asks for the chunks that the source had and this host has not."""
        by_serial = {mount.serial: mount for mount in self._table.images()}
        for one in state.chunks:
            mount = by_serial.get(one.serial)
            if mount is not None:
                mount.prefetch.fetch_map(one.blob, one.bits)


def _save_mount(mount: Mount) -> states.MountState:
    config: dict[str, Any] = hide_secrets({name: getattr(mount.config, name) for name in ImageConfig.__slots__})
    config["backend_config"].pop("headers", None)
    return states.MountState(
        mount.serial,
        mount.path,
        states.FS_RAFS,
        os.path.abspath(mount.source),  # noqa: PTH100
        digest=mount.digest(),
        config=config,
    )


def _save_chunks(mount: Mount) -> "list[states.BlobChunks]":
    found = []
    for blob in mount.image.blobs():
        count, bits = mount.image.ready_map(blob.index)
        if any(bits):
            found.append(states.BlobChunks(mount.serial, blob.index, count, bits))
    return found
