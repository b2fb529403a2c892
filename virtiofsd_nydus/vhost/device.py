"""A C device (csrc/vnd.h, vnd_device_*) as the session wants it."""

import os

from virtiofsd_nydus.engine import ERR_MAX, Disk, Engine, Rafs, Vfs, ffi, lib, require, text_of
from virtiofsd_nydus.errors import Cause, Failure
from virtiofsd_nydus.vhost.blk import pack_config
from virtiofsd_nydus.vhost.sessionstate import InitResult
from virtiofsd_nydus.vhost.state import ApplyFailure, DeviceState
from virtiofsd_nydus.vhost.transfer import Transfer, receiving, sending

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from virtiofsd_nydus.vhost.state import Migrator

DISK_ID = b"nydus"  # what a guest finds as the disk's serial number
# A ring that stops waits this long for reads that have missed; QEMU's main loop stands still meanwhile.
DRAIN_MS = 200
RING_MAX: int = lib.VND_RING_MAX

_RING_FIELDS = (
    "num",
    "flags",
    "desc_addr",
    "used_addr",
    "avail_addr",
    "log_addr",
    "base",
    "started",
    "enabled",
    "kick_fd",
    "call_fd",
    "err_fd",
)
_PLAIN_FIELDS = (
    "carries_inflight",
    "features",
    "region_gen",
    "inflight_fd",
    "inflight_offset",
    "inflight_size_bytes",
    "inflight_gen",
    "inflight_queues",
    "inflight_queue_size",
    "inflight_goes_on",
    "inflight_died",
    "log_fd",
    "log_offset",
    "log_size_bytes",
    "log_gen",
)


class EngineDevice:
    """One front-end's device over a mount table that others share. Not for several threads at once."""

    def __init__(self, engine: Engine, vfs: Vfs, queue_count: int) -> None:
        self.queue_count = queue_count
        self.migrator: Migrator | None = None
        self._transfer: Transfer | None = None
        self._handle = self._make(engine, vfs)
        self._raw = ffi.new("vnd_device_state *")

    def _make(self, engine: Engine, vfs: Vfs, disk: Disk | None = None) -> "Any":
        """disk: it is a device of kind blk."""
        err = ffi.new("char[]", ERR_MAX)
        name = ffi.new("char[]", DISK_ID)
        cfg = ffi.new("vnd_device_cfg *")
        cfg.engine, cfg.vfs, cfg.blk_id, cfg.queue_count = engine.handle, vfs.handle, name, self.queue_count
        if disk is not None:
            cfg.kind, cfg.disk = lib.VND_DEVICE_BLK, disk.handle
        handle = lib.vnd_device_new(cfg, err, ERR_MAX)
        require(handle != ffi.NULL, err)
        return handle

    def set_number(self, number: int) -> None:
        """How log lines name its front-end. Before the first apply()."""
        lib.vnd_device_set_number(self._handle, number)

    @staticmethod
    def features() -> int:
        """virtio feature bits that may be offered."""
        bits: int = lib.vnd_device_features(lib.VND_DEVICE_FS)
        return bits

    def config(self) -> bytes:
        """Its configuration space; empty: the front-end makes it."""
        return b""

    def apply(self, state: DeviceState) -> "tuple[()]":
        """Makes the device be so; bases of stopped rings are written into state. Raises ApplyFailure."""
        raw = self._raw
        raw.region_count = len(state.regions)
        for slot, region in zip(raw.regions, state.regions, strict=False):
            slot.gpa, slot.size_bytes, slot.user_addr = region.gpa, region.size_bytes, region.user_addr
            slot.mmap_offset, slot.fd = region.mmap_offset, region.fd
        for name in _PLAIN_FIELDS:
            setattr(raw, name, getattr(state, name))
        raw.ring_count = len(state.rings)
        for index, ring in enumerate(state.rings):
            slot = raw.rings[index]
            for name in _RING_FIELDS:
                setattr(slot, name, getattr(ring, name))
            raw.kick_gen[index], raw.call_gen[index] = ring.kick_gen, ring.call_gen
            raw.err_gen[index] = ring.err_gen
        err = ffi.new("char[]", ERR_MAX)
        rc: int = lib.vnd_device_apply(self._handle, raw, DRAIN_MS, err, ERR_MAX)
        for index, ring in enumerate(state.rings):
            ring.base = raw.rings[index].base
        if rc:
            raise ApplyFailure(text_of(err) or os.strerror(-rc), Cause.GUEST)
        return ()

    def own_inflight(self) -> tuple[int, int, int, int, int]:
        """None: the engine has its own."""
        return -1, 0, 0, 0, 0

    def init_result(self) -> "InitResult | None":
        """What INIT was answered; None: no INIT is in force."""
        raw = ffi.new("vnd_init_result *")
        if not lib.vnd_device_init_get(self._handle, raw):
            return None
        return InitResult(raw.minor, raw.flags, raw.max_write, raw.max_pages)

    def resume(self, init: "InitResult") -> None:
        """Goes on with a session that another process negotiated. Raises Failure."""
        raw = ffi.new("vnd_init_result *", {name: getattr(init, name) for name in InitResult.__slots__})
        if lib.vnd_device_resume(self._handle, raw):
            raise Failure(
                f"FUSE 7.{init.minor} with flags {init.flags:#x} is not what this version answers", Cause.FORMAT
            )

    def inflight(self, ring: int) -> list[int]:
        """Heads of a stopped ring that were fetched and not answered, oldest first."""
        heads = ffi.new("uint16_t[]", RING_MAX)
        count: int = lib.vnd_device_inflight(self._handle, ring, heads, RING_MAX)
        if count < 0:
            raise Failure(f"ring {ring}: what it has in flight cannot be told: {os.strerror(-count)}", Cause.GUEST)
        return list(heads[0:count])

    def set_inflight(self, ring: int, heads: list[int]) -> None:
        """Before the ring is started: heads that it serves first. Raises Failure."""
        if lib.vnd_device_set_inflight(self._handle, ring, heads, len(heads)):
            raise Failure(f"ring {ring} cannot take {len(heads)} requests in flight", Cause.FORMAT)

    @property
    def saves(self) -> bool:
        return self.migrator is not None

    def begin_transfer(self, loads: bool, fd: int) -> "tuple[()]":
        """The session's state is on its way, out of this device or (loads) into it. Raises ApplyFailure."""
        self._drop_transfer()
        try:
            if self.migrator is None:
                raise Failure("this daemon cannot", Cause.GUEST)
            data = b"" if loads else self.migrator.save()
            own = os.dup(fd)
            self._transfer = receiving(own) if loads else sending(own, data)
        except Failure as failure:
            raise ApplyFailure(str(failure), failure.cause) from failure
        except OSError as error:
            raise ApplyFailure(f"its pipe: {error.strerror}", Cause.IO) from error
        return ()

    def end_transfer(self) -> "tuple[()]":
        """Waits for it and makes the device so. Raises ApplyFailure."""
        transfer, self._transfer = self._transfer, None
        try:
            if transfer is None or self.migrator is None:
                raise Failure("no state was on its way", Cause.GUEST)
            try:
                data = transfer.wait()
            finally:
                transfer.close()
            if data is not None:
                self.migrator.load(data)
        except Failure as failure:
            raise ApplyFailure(str(failure), failure.cause) from failure
        return ()

    def _drop_transfer(self) -> None:
        transfer, self._transfer = self._transfer, None
        if transfer is not None:
            transfer.close()

    def reset(self) -> "tuple[()]":
        """Forgets the FUSE session and every request."""
        lib.vnd_device_reset(self._handle)
        return ()

    def close(self) -> None:
        """Ends its threads; the guest's memory is not touched afterwards. Idempotent."""
        self._drop_transfer()
        handle, self._handle = self._handle, None
        if handle is not None:
            lib.vnd_device_free(handle)


class DiskDevice(EngineDevice):
    """One front-end's virtio-blk device. The image must outlive it. Raises Failure for one that is no disk."""

    def __init__(self, engine: Engine, vfs: Vfs, queue_count: int, image: Rafs) -> None:
        self._disk = Disk(image)
        self._config = pack_config(self._disk.size_bytes, queue_count)
        super().__init__(engine, vfs, queue_count)

    def _make(self, engine: Engine, vfs: Vfs, disk: Disk | None = None) -> "Any":
        try:
            return super()._make(engine, vfs, self._disk)
        except BaseException:
            self._disk.close()
            raise

    @staticmethod
    def features() -> int:
        bits: int = lib.vnd_device_features(lib.VND_DEVICE_BLK)
        return bits

    def config(self) -> bytes:
        return self._config

    @property
    def saves(self) -> bool:
        """There is no session; what a ring has in flight is in its region."""
        return False

    def close(self) -> None:
        super().close()
        self._disk.close()
