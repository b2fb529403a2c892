"""Everything a front-end has told us, as one value (csrc/vnd.h, vnd_device_state).

The session fills it in, the engine makes it true; nothing else passes between them. Descriptors in it belong to it.
A generation number is raised whenever a descriptor is replaced, because its number may be the same again.
"""

from virtiofsd_nydus.errors import Failure
from virtiofsd_nydus.vhost.messages import close_fd

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Protocol

    class Migrator(Protocol):
        """Saves and loads what a device's session is beyond its rings, while no ring runs."""

        def save(self) -> bytes:
            """Raises Failure where something could not be found again elsewhere; the session then goes on."""

        def load(self, data: bytes) -> None:
            """Raises Failure; nothing is changed then."""

    class Device(Protocol):
        """What a session drives. One thread at a time. apply and reset are done when what they give is used up; a
        device of this process does them at once, and gives nothing."""

        queue_count: int  # high priority queue and request queues

        def features(self) -> int:
            """virtio feature bits that may be offered."""

        def config(self) -> bytes:
            """The device's configuration space; empty: GET_CONFIG is not offered."""

        def apply(self, state: "DeviceState") -> "Iterable[None]":
            """Makes the device be so. Writes the bases of rings that stopped. Raises ApplyFailure."""

        def own_inflight(self) -> tuple[int, int, int, int, int]:
            """The in-flight region of a front-end that gives none, as set_inflight takes it: -1, 0, 0, 0, 0 where the
            device has one of its own. The descriptor is the caller's."""

        def reset(self) -> "Iterable[None]":
            """Forgets the FUSE session and every request."""

        @property
        def saves(self) -> bool:
            """Whether the next two may be called."""

        def begin_transfer(self, loads: bool, fd: int) -> "Iterable[None]":
            """The session's state is on its way through a pipe, out of this device or (loads) into it, while no ring
            runs. The descriptor stays the caller's. Raises ApplyFailure where it cannot be; the session goes on."""

        def end_transfer(self) -> "Iterable[None]":
            """Waits for it and makes the device so. After an apply. Raises ApplyFailure."""

        def close(self) -> None:
            """Ends all threads; the guest's memory is not touched afterwards."""


class ApplyFailure(Failure):
    """The device cannot be in the wanted state; memory and rings it had stay as they were."""


class Region:
    """Guest memory: size_bytes at guest address gpa = user address of the front-end = offset in the file fd."""

    __slots__ = ("fd", "gpa", "mmap_offset", "size_bytes", "user_addr")

    def __init__(self, gpa: int, size_bytes: int, user_addr: int, mmap_offset: int, fd: int) -> None:
        self.gpa, self.size_bytes, self.user_addr = gpa, size_bytes, user_addr
        self.mmap_offset, self.fd = mmap_offset, fd

    def close(self) -> "OSError | None":
        """Closes its file. Idempotent."""
        fd, self.fd = self.fd, -1
        return close_fd(fd)


class Ring:
    """One virtqueue. num 0: not configured. base: next index of the available ring."""

    __slots__ = (
        "avail_addr",
        "base",
        "call_fd",
        "call_gen",
        "desc_addr",
        "enabled",
        "err_fd",
        "err_gen",
        "flags",
        "kick_fd",
        "kick_gen",
        "log_addr",
        "num",
        "started",
        "used_addr",
    )

    def __init__(self) -> None:
        self.num = self.flags = self.base = 0
        self.desc_addr = self.used_addr = self.avail_addr = self.log_addr = 0
        self.started = self.enabled = False
        self.kick_fd = self.call_fd = self.err_fd = -1
        self.kick_gen = self.call_gen = self.err_gen = 0

    def set_kick(self, fd: int) -> None:
        close_fd(self.kick_fd)
        self.kick_fd = fd
        self.kick_gen += 1

    def set_call(self, fd: int) -> None:
        close_fd(self.call_fd)
        self.call_fd = fd
        self.call_gen += 1

    def set_err(self, fd: int) -> None:
        close_fd(self.err_fd)
        self.err_fd = fd
        self.err_gen += 1

    def close(self) -> "list[OSError | None]":
        """Closes its descriptors. Idempotent."""
        fds = (self.kick_fd, self.call_fd, self.err_fd)
        self.kick_fd = self.call_fd = self.err_fd = -1
        return [close_fd(fd) for fd in fds]


class DeviceState:
    """The whole. features: acknowledged virtio bits. inflight_goes_on: bits of rings that ran with the in-flight region
    until now. inflight_died: the process that served them died. carries_inflight: the front-end takes our state along.
    """

    __slots__ = (
        "carries_inflight",
        "features",
        "inflight_died",
        "inflight_fd",
        "inflight_gen",
        "inflight_goes_on",
        "inflight_offset",
        "inflight_queue_size",
        "inflight_queues",
        "inflight_size_bytes",
        "log_fd",
        "log_gen",
        "log_offset",
        "log_size_bytes",
        "region_gen",
        "regions",
        "rings",
    )

    def __init__(self, queue_count: int) -> None:
        self.features = 0
        self.carries_inflight = False
        self.regions: list[Region] = []
        self.region_gen = 0
        self.rings = [Ring() for _ in range(queue_count)]
        self.inflight_fd = self.log_fd = -1
        self.inflight_offset = self.inflight_size_bytes = self.inflight_queues = self.inflight_queue_size = 0
        self.inflight_gen = self.log_gen = self.inflight_goes_on = 0
        self.inflight_died = False
        self.log_offset = self.log_size_bytes = 0

    def is_running(self) -> bool:
        return any(ring.started for ring in self.rings)

    def set_inflight(self, fd: int, size_bytes: int, offset: int, queues: int, queue_size: int) -> None:
        close_fd(self.inflight_fd)
        self.inflight_fd, self.inflight_size_bytes, self.inflight_offset = fd, size_bytes, offset
        self.inflight_queues, self.inflight_queue_size = queues, queue_size
        self.inflight_goes_on = 0
        self.inflight_gen += 1

    def set_log(self, fd: int, size_bytes: int, offset: int) -> None:
        close_fd(self.log_fd)
        self.log_fd, self.log_size_bytes, self.log_offset = fd, size_bytes, offset
        self.log_gen += 1

    def close(self) -> "list[OSError]":
        """Closes every descriptor, each once; the errors of that. Idempotent."""
        regions, self.regions = self.regions, []
        fds = (self.inflight_fd, self.log_fd)
        self.inflight_fd = self.log_fd = -1
        found = [region.close() for region in regions]
        for ring in self.rings:
            found += ring.close()
        found += [close_fd(fd) for fd in fds]
        return [error for error in found if error is not None]
