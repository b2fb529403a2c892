"""A C device (csrc/vnd.h, vnd_device_*) as the session wants it."""

import os

from virtiofsd_nydus.engine import ERR_MAX, Engine, Vfs, ffi, lib, require, text_of
from virtiofsd_nydus.errors import Cause
from virtiofsd_nydus.vhost.state import ApplyFailure, DeviceState

# A ring that stops waits this long for reads that have missed; QEMU's main loop stands still meanwhile.
DRAIN_MS = 200

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
        err = ffi.new("char[]", ERR_MAX)
        self.queue_count = queue_count
        self._handle = lib.vnd_device_new(engine.handle, vfs.handle, queue_count, err, ERR_MAX)
        require(self._handle != ffi.NULL, err)
        self._raw = ffi.new("vnd_device_state *")

    def set_number(self, number: int) -> None:
        """How log lines name its front-end. Before the first apply()."""
        lib.vnd_device_set_number(self._handle, number)

    @staticmethod
    def features() -> int:
        """virtio feature bits that may be offered."""
        bits: int = lib.vnd_device_features()
        return bits

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

    def reset(self) -> "tuple[()]":
        """Forgets the FUSE session and every request."""
        lib.vnd_device_reset(self._handle)
        return ()

    def close(self) -> None:
        """Ends its threads; the guest's memory is not touched afterwards. Idempotent."""
        handle, self._handle = self._handle, None
        if handle is not None:
            lib.vnd_device_free(handle)
