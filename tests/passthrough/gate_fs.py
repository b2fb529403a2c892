"""A host file system that answers when it is let: one file "slow" on /dev/fuse, served from this process.

While the gate is closed every WRITE and READ is kept unanswered, as a network file system's are whose server is away.
Its root lists entries whose offsets are any 64 bits, as an NFS server's cookies are; none of them can be looked up.
"""

import os
import stat
import struct
import subprocess
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

from virtiofsd_nydus.fakeguest import fuse_client as fc

REQUEST_BYTES = 1 << 18
NODE = 2
OUT_HEADER = struct.Struct("=IiQ")
ENTRIES = 100
COOKIES = [0] + [(1 << 63) + 0x1000001 * k for k in range(1, ENTRIES + 1)]  # COOKIES[k]: what follows k entries


def attr_bytes(node: int, size: int) -> bytes:
    mode = stat.S_IFREG | 0o644 if node == NODE else stat.S_IFDIR | 0o755
    return fc.ATTR.pack(node, size, 0, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)


def listing(offset: int, size: int) -> bytes:
    """Entries from a cookie on; it must be one of COOKIES."""
    reply = b""
    for k in range(COOKIES.index(offset), ENTRIES):
        name = b"entry_%03d" % k
        entry = struct.pack("=QQII", 1000 + k, COOKIES[k + 1], len(name), stat.S_IFREG >> 12) + name
        entry += bytes(-len(entry) % 8)
        if len(reply) + len(entry) > size:
            break
        reply += entry
    return reply


class GateFs:
    """Mounted at a directory while entered."""

    def __init__(self, mountpoint: Path) -> None:
        self.mountpoint = mountpoint
        self.data = bytearray(b"before")
        self.kept: list[tuple[int, int, bytes]] = []
        self.is_open = True
        self.state = threading.Condition()

    def __enter__(self) -> Self:
        self.fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        os.set_inheritable(self.fd, True)
        subprocess.run(
            [
                "mount",
                "-i",
                "-t",
                "fuse",
                "-o",
                f"fd={self.fd},rootmode=40755,user_id=0,group_id=0,allow_other",
                "gate",
                str(self.mountpoint),
            ],
            check=True,
            pass_fds=[self.fd],
        )
        self.thread = threading.Thread(target=self.serve, daemon=True)
        self.thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.open()
        subprocess.run(["umount", "-l", str(self.mountpoint)], check=False)
        self.thread.join(10)
        os.close(self.fd)

    def close(self) -> None:
        self.is_open = False

    def open(self) -> None:
        with self.state:
            self.is_open = True
            kept, self.kept = self.kept, []
        for request in kept:
            self.answer(*request)

    def wait_kept(self, count: int = 1) -> None:
        with self.state:
            assert self.state.wait_for(lambda: len(self.kept) >= count, 20), "no call came"

    def serve(self) -> None:
        while True:
            try:
                request = os.read(self.fd, REQUEST_BYTES)
            except OSError:  # unmounted
                return
            _, opcode, unique, node, *_ = fc.IN_HEADER.unpack_from(request)
            body = request[fc.IN_HEADER.size :]
            with self.state:
                if not self.is_open and opcode in (fc.READ, fc.WRITE):
                    self.kept.append((opcode, unique, body))
                    self.state.notify_all()
                    continue
            if opcode not in (fc.FORGET, fc.BATCH_FORGET):
                self.answer(opcode, unique, body, node)

    def answer(self, opcode: int, unique: int, body: bytes, node: int = NODE) -> None:
        error, reply = 0, b""
        entry = fc.ENTRY.pack(NODE, 0, 0, 0, 0, 0) + attr_bytes(NODE, len(self.data))
        if opcode == fc.INIT:
            reply = fc.INIT_OUT.pack(7, 31, 0, 0, 0, 0, 65536, 1, 0, 0, 0, 0, 0)
        elif opcode == fc.LOOKUP:
            error, reply = (0, entry) if body == b"slow\0" else (-2, b"")
        elif opcode in (fc.GETATTR, fc.SETATTR):
            reply = struct.pack("=QII", 0, 0, 0) + attr_bytes(node, len(self.data))
        elif opcode in (fc.OPEN, fc.OPENDIR):
            reply = struct.pack("=QII", 1, 1, 0)  # DIRECT_IO: each read and write is asked
        elif opcode == fc.READ:
            _, offset, size, *_ = fc.READ_IN.unpack_from(body)
            reply = bytes(self.data[offset : offset + size])
        elif opcode == fc.READDIR:
            _, offset, size, *_ = fc.READ_IN.unpack_from(body)
            reply = listing(offset, size)
        elif opcode == fc.WRITE:
            _, offset, size, *_ = fc.WRITE_IN.unpack_from(body)
            self.data.extend(bytes(max(0, offset - len(self.data))))
            self.data[offset : offset + size] = body[fc.WRITE_IN.size :]
            reply = struct.pack("=II", size, 0)
        elif opcode == fc.STATFS_OP:
            reply = fc.STATFS.pack(0, 0, 0, 0, 0, 4096, 255, 4096, 0)
        elif opcode not in (fc.RELEASE, fc.RELEASEDIR, fc.FLUSH):
            error = -38
        try:
            os.write(self.fd, OUT_HEADER.pack(OUT_HEADER.size + len(reply), error, unique) + reply)
        except OSError:  # its asker is gone
            pass
