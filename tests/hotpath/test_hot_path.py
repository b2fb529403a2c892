"""What a warm request costs: no allocation, one data syscall a contiguous run, one eventfd write a batch."""

import mmap
import os
import shlex
import shutil
import signal
import struct
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from virtiofsd_nydus._fakeguest import lib

from tests.fakeguest.support import Image, Load
from tests.system.daemon import wait_until
from virtiofsd_nydus.fakeguest.fakeguest import FakeGuest
from virtiofsd_nydus.vmm.servers import NydusDaemon

OPS = 10_000
DEPTH = 16
ROWS = 511
DATA_CALLS = (
    "preadv2",
    "preadv",
    "pread64",
    "pwrite64",
    "pwritev",
    "openat",
    "statx",
    "newfstatat",
    "fstat",
    "lseek",
    "mmap",
    "munmap",
    "madvise",
    "process_vm_readv",
)
# Per request, by the load that names it: block, kind, data syscalls
LOADS = {
    "4 KiB": (4096, lib.FG_LOAD_READ_RANDOM, 1),
    "128 KiB": (131072, lib.FG_LOAD_READ_RANDOM, 1),
    "look-up": (4096, lib.FG_LOAD_LOOKUP, 0),
}


@pytest.fixture
def counted(image: Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[NydusDaemon, mmap.mmap]]:
    """Our daemon with the counting allocator in it, and the table of counts."""
    library, table = tmp_path / "count_malloc.so", tmp_path / "counts"
    subprocess.run(
        [
            *shlex.split(os.environ.get("CC", "cc")),
            "-std=gnu11",
            "-D_GNU_SOURCE",
            "-O2",
            "-Wall",
            "-Wextra",
            "-Werror",
            "-fPIC",
            "-shared",
            "-o",
            str(library),
            str(Path(__file__).with_name("count_malloc.c")),
        ],
        check=True,
    )
    table.write_bytes(bytes(16 * (ROWS + 1)))
    with table.open("r+b") as stream:
        counts = mmap.mmap(stream.fileno(), 0)
    monkeypatch.setenv("LD_PRELOAD", str(library))
    monkeypatch.setenv("COUNT_MALLOC_FILE", str(table))
    daemon = NydusDaemon(["--bootstrap", str(image.bootstrap), "--localfs-dir", str(image.blob_dir)])
    with daemon:
        monkeypatch.undo()
        yield daemon, counts


def engine_threads(daemon: NydusDaemon) -> dict[int, str]:
    """Threads of the C engine that serve: id -> name. Queues are vnd-q, readers of what left the page cache vnd-pool.
    Not vnd-upkeep, which looks after the cache's files once a second, whatever is read."""
    tasks = Path(f"/proc/{daemon.serving_pid}/task")
    names = {int(task.name): (task / "comm").read_text().strip() for task in tasks.iterdir()}
    return {thread: name for thread, name in names.items() if name.startswith("vnd-") and name != "vnd-upkeep"}


def is_at_rest(daemon: NydusDaemon) -> bool:
    """No thread runs or waits to: none has its start, or what the read before needed, still to free."""
    stats = Path(f"/proc/{daemon.serving_pid}/task").glob("*/stat")
    try:
        return all(stat.read_text().rpartition(") ")[2].startswith("S") for stat in stats)
    except (FileNotFoundError, ProcessLookupError):  # one has just ended
        return False


def read_counts(counts: mmap.mmap) -> dict[int, tuple[int, int]]:
    """Thread id -> allocations, frees."""
    rows = (struct.unpack_from("=III", counts, 16 * (i + 1)) for i in range(ROWS))
    return {thread: (allocations, frees) for thread, allocations, frees in rows if thread}


def run_load(guest: FakeGuest, name: str, ops: int) -> None:
    block, kind, _ = LOADS[name]
    load = Load(guest, kind=kind, block_bytes=block, depth=DEPTH, max_ops=ops, check=0)
    assert load.run(guest.queues[1]).ops == ops


@pytest.mark.parametrize("name", LOADS)
def test_no_allocation(counted: tuple[NydusDaemon, mmap.mmap], name: str) -> None:
    daemon, counts = counted
    with FakeGuest(daemon.socket_path, slot_count=DEPTH, queue_size=1024) as guest:
        guest.fuse.init()
        guest.fuse.read_file("data")
        run_load(guest, name, 200)
        wait_until(lambda: is_at_rest(daemon), "the daemon's rest")
        struct.pack_into("=I", counts, 0, 1)
        try:
            run_load(guest, name, OPS)
        finally:
            struct.pack_into("=I", counts, 0, 0)
        threads, seen = engine_threads(daemon), read_counts(counts)
    assert sum(name.startswith("vnd-q") for name in threads.values()) >= 2, threads
    assert {name: seen[thread] for thread, name in threads.items() if thread in seen} == {}


def test_counter_counts(counted: tuple[NydusDaemon, mmap.mmap]) -> None:
    """The counting itself works: a connection that comes and goes allocates."""
    daemon, counts = counted
    struct.pack_into("=I", counts, 0, 1)
    with FakeGuest(daemon.socket_path) as guest:
        guest.fuse.init()
    struct.pack_into("=I", counts, 0, 0)
    assert sum(allocations for allocations, _ in read_counts(counts).values()) > 10


class Strace:
    """Counts the syscalls of these threads while the context lasts: calls, by name."""

    def __init__(self, threads: Iterable[int], output: Path) -> None:
        program = shutil.which("strace")
        assert program, "strace is missing: apt-get install strace"
        self.output = output
        self.calls: dict[str, int] = {}
        self.threads = list(threads)
        which = [word for thread in self.threads for word in ("-p", str(thread))]
        self.process = subprocess.Popen(
            [program, "-c", "-U", "name,calls", "-o", str(output), *which], stderr=subprocess.PIPE, text=True
        )

    def __enter__(self) -> "Strace":
        assert self.process.stderr is not None
        for _ in self.threads:
            line = self.process.stderr.readline()
            assert "attached" in line, line
        return self

    def __exit__(self, *_: object) -> None:
        self.process.send_signal(signal.SIGINT)
        self.process.communicate(timeout=20)
        for line in self.output.read_text().splitlines():
            words = line.split()
            if len(words) == 2 and words[1].isdecimal() and words[0] != "total":
                self.calls[words[0]] = int(words[1])


@pytest.mark.parametrize("scatter", [False, True], ids=["pages in a row", "pages scattered"])
@pytest.mark.parametrize("name", LOADS)
def test_syscalls(daemon: NydusDaemon, tmp_path: Path, name: str, scatter: bool) -> None:
    per_request = LOADS[name][2]
    with FakeGuest(daemon.socket_path, slot_count=DEPTH, queue_size=1024, scatter=scatter) as guest:
        guest.fuse.init()
        guest.fuse.read_file("data")
        run_load(guest, name, 200)
        with Strace(engine_threads(daemon), tmp_path / "strace") as strace:
            run_load(guest, name, OPS)
    data = {call: count for call, count in strace.calls.items() if call in DATA_CALLS}
    assert sum(data.values()) <= per_request * OPS, strace.calls
    assert data.get("preadv2", 0) == per_request * OPS
    # No lock is ever waited for; a thread that sleeps in one when strace comes is counted once
    assert strace.calls.get("futex", 0) <= len(strace.threads)
    for call in ("write", "read", "epoll_wait", "epoll_pwait"):  # a batch is up to DEPTH requests
        assert strace.calls.get(call, 0) <= OPS / DEPTH * 3, (call, strace.calls)
