"""mount(2) for the host's own mounts, and what the kernel's table says of them. Light: the daemon imports it."""

import errno
import os
import threading

from virtiofsd_nydus.engine import lib
from virtiofsd_nydus.errors import Cause, Failure

DEVICE = "/dev/fuse"
FSTYPE, SOURCE = "fuse.nydus", "virtiofsd-nydus"
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOATIME = 1, 2, 4, 1024
MNT_DETACH = 2
MAX_READ_BYTES = 1 << 20
FUSERMOUNT = "fusermount3"
ANSWER_S = 2.0


class MountEntry:
    """One line of mountinfo: device is MAJOR:MINOR."""

    __slots__ = ("device", "fstype", "source")

    def __init__(self, device: str, fstype: str, source: str) -> None:
        self.device, self.fstype, self.source = device, fstype, source


def _unescape(word: str) -> str:
    """mountinfo writes blanks and the like as three octal digits."""
    first, *rest = word.split("\\")
    return first + "".join(chr(int(piece[:3], 8)) + piece[3:] for piece in rest)


def find_mount(path: str) -> MountEntry | None:
    """What is mounted on exactly this (real) path, the last one where several are; None: nothing."""
    found = None
    with open("/proc/self/mountinfo", errors="surrogateescape") as table:
        for line in table:
            words = line.split()
            if _unescape(words[4]) == path:
                at = words.index("-", 6)
                found = MountEntry(words[2], words[at + 1], _unescape(words[at + 2]))
    return found


def resolve_mountpoint(path: str) -> str:
    """The real path, without asking the file system that may be mounted there: its server may be gone. Raises
    OSError."""
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        return os.readlink(f"/proc/self/fd/{fd}")  # noqa: PTH115
    finally:
        os.close(fd)


def check_mountpoint(path: str) -> str:
    """The real path of a directory that nothing is mounted on. Raises Failure with what to do."""
    try:
        real = resolve_mountpoint(path)
    except OSError as error:
        raise Failure(f"no mountpoint {path}: {error.strerror}; make the directory first", Cause.MISSING) from None
    there = find_mount(real)
    if there and there.fstype == FSTYPE and is_dead(real):
        raise Failure(
            f"{path} still holds the mount of a daemon that is gone: run umount -l {path}, then try again", Cause.IO
        )
    if there:
        raise Failure(
            f"mountpoint {path} is busy: {there.source} ({there.fstype}) is mounted there; umount it or choose another",
            Cause.IO,
        )
    if not os.path.isdir(real):  # noqa: PTH112
        raise Failure(f"mountpoint {path} is not a directory", Cause.IO)
    return real


def is_dead(path: str) -> bool:
    """A FUSE mount whose connection is over. One that a supervisor holds only does not answer."""
    outcome: list[int] = []

    def ask() -> None:
        try:
            os.statvfs(path)  # attributes would come from the kernel's memory
        except OSError as error:
            outcome.append(error.errno or 0)

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(ANSWER_S)
    return bool(outcome) and outcome[0] in (errno.ENOTCONN, errno.ECONNABORTED)


def mount(source: str, target: str, fstype: str, flags: int, options: str) -> None:
    """mount(2). Raises OSError."""
    rc: int = lib.vnd_mount(os.fsencode(source), os.fsencode(target), fstype.encode(), flags, os.fsencode(options))
    if rc:
        raise OSError(-rc, os.strerror(-rc), target)


def knows_filesystem(name: str) -> bool:
    """Whether the kernel has that type of file system, loaded."""
    with open("/proc/filesystems") as table:
        return any(line.split()[-1] == name for line in table)


def can_pass_through() -> bool:
    """Whether this process can give the kernel files of an EROFS of its own to read (csrc/rafs/backing.c). Whether the
    kernel takes them, INIT tells."""
    return os.geteuid() == 0 and os.access("/dev/loop-control", os.R_OK | os.W_OK) and knows_filesystem("erofs")


def umount(target: str, *, lazy: bool) -> None:
    """Unmounts target. While a process uses the mount: lazy, it goes when that has ended; else OSError (EBUSY). No
    error when nothing is mounted. Raises OSError."""
    for flags in (0, MNT_DETACH) if lazy else (0,):
        rc: int = lib.vnd_umount(os.fsencode(target), flags)
        if rc in (0, -errno.EINVAL):
            return
        if rc != -errno.EBUSY:
            break
    if rc == -errno.EPERM:
        import subprocess

        words = [FUSERMOUNT, "-u", *(("-z",) if lazy else ()), "--", target]
        done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"})
        if done.returncode == 0 or not find_mount(target):
            return
        if "busy" in done.stderr:
            rc = -errno.EBUSY
    raise OSError(-rc, os.strerror(-rc), target)


def mount_fuse(target: str, *, read_only: bool = True) -> int:
    """Mounts on a checked directory: the descriptor to serve, the caller's. Without the right to mount(2), through
    fusermount3; then the mount is its user's alone."""
    uid, gid = os.geteuid(), os.getegid()
    try:
        fd = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except PermissionError:
        return _mount_by_helper(target, read_only)
    except OSError as error:
        raise Failure(
            f"cannot open {DEVICE}: {error.strerror}; this kernel has no FUSE or its module is not loaded: "
            "run modprobe fuse, and in a container pass the device in",
            Cause.IO,
        ) from None
    options = (
        f"fd={fd},rootmode=40000,user_id={uid},group_id={gid},allow_other,default_permissions,max_read={MAX_READ_BYTES}"
    )
    flags = MS_NOSUID | MS_NODEV | MS_NOATIME | (MS_RDONLY if read_only else 0)
    try:
        mount(SOURCE, target, FSTYPE, flags, options)
    except PermissionError:
        os.close(fd)
        return _mount_by_helper(target, read_only)
    except OSError as error:
        os.close(fd)
        raise Failure(f"cannot mount on {target}: {error.strerror}", Cause.IO) from None
    return fd


def _mount_by_helper(target: str, read_only: bool) -> int:
    import shutil
    import socket
    import subprocess

    helper = shutil.which(FUSERMOUNT)
    if helper is None:
        raise Failure(f"mounting on {target} needs root or {FUSERMOUNT}: install the package fuse3", Cause.MISSING)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        options = f"{'ro' if read_only else 'rw'},nosuid,nodev,default_permissions,fsname={SOURCE},subtype=nydus"
        done = subprocess.run(
            [helper, "-o", options, "--", target],
            pass_fds=[theirs.fileno()],
            text=True,
            env={**os.environ, "_FUSE_COMMFD": str(theirs.fileno())},
            capture_output=True,
        )
        theirs.close()
        if done.returncode == 0:
            _, fds, _, _ = socket.recv_fds(ours, 1, 1)
            if fds:
                os.set_inheritable(fds[0], False)
                return fds[0]
    said = done.stderr.strip().splitlines() or [f"{FUSERMOUNT} gave no descriptor"]
    raise Failure(f"cannot mount on {target}: {said[-1].removeprefix(f'{FUSERMOUNT}: ')}", Cause.IO)
