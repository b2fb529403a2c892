"""Makes in-flight regions, for front-ends and for the keeper (csrc/vhost/inflight.h has the layout)."""

import fcntl
import os

from virtiofsd_nydus.errors import Cause
from virtiofsd_nydus.vhost.state import ApplyFailure

QUEUES_MAX, ENTRIES_MAX = 16, 1024  # csrc/vnd.h VND_QUEUE_MAX, VND_RING_MAX
HEAD_BYTES = ENTRY_BYTES = 16
ALIGN_BYTES = 64
# Behind the rings: what a session must not lose with its process (csrc/fuse/kept.h). A front-end that keeps the region
# keeps that too.
TAIL_BYTES = 256


def create_inflight(queues: int, entries: int) -> tuple[int, int]:
    """A blank region for rings of so many entries: its descriptor, which is the caller's, and its bytes. Raises
    ApplyFailure."""
    if not (0 < queues <= QUEUES_MAX and 0 < entries <= ENTRIES_MAX):
        raise ApplyFailure(f"in-flight region of {queues} queues of {entries} entries: not possible", Cause.GUEST)
    stride = (HEAD_BYTES + entries * ENTRY_BYTES + ALIGN_BYTES - 1) // ALIGN_BYTES * ALIGN_BYTES
    size = queues * stride + TAIL_BYTES
    try:
        fd = os.memfd_create("vhost-inflight", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, size)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
    except OSError as error:
        raise ApplyFailure(f"in-flight region of {queues} queues: {error.strerror}", Cause.IO) from error
    return fd, size
