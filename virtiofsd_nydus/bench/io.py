"""`bench io`: warm reads and look-ups through the fake guest, ours and other virtio-fs servers.

All servers run all the time on the same tree, ours on the image of it; rounds alternate, so that other load of
the machine hits all of them. Every reply is checked. CPU time is that of all threads of the server, from the scheduler.
"""

import argparse
import contextlib
import json
import os
import platform
import re
import shlex
import statistics
import struct
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from virtiofsd_nydus import __version__
from virtiofsd_nydus.errors import Cause, Failure
from virtiofsd_nydus.fakeguest.fakeguest import FakeGuest, GuestFault, NoAnswer, Queue, ffi, lib
from virtiofsd_nydus.vmm.servers import C_VIRTIOFSD, RUST_VIRTIOFSD, CommandServer, NydusDaemon, PeerVirtiofsd, Server

DATA_SEED = 42
DIRECTORIES = 100
TREE_MAX = 15_000  # entries; the other servers hold a descriptor per inode
STALL_MS = 10_000
LOAD_BATCH_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Workload:
    name: str
    kind: int
    block_bytes: int
    depth: int
    # At least this much of the other's operations per second
    floor: float


DEPTHS = (1, 4, 16, 64)
WORKLOADS = [
    Workload(name, kind, block, depth, 1.0 if depth > 1 and block <= 4096 else 0.95)
    for name, kind, block in (
        ("4 KiB random read", lib.FG_LOAD_READ_RANDOM, 4096),
        ("1 MiB sequential read", lib.FG_LOAD_READ_SEQUENTIAL, 1 << 20),
        ("look-up", lib.FG_LOAD_LOOKUP, 0),
    )
    for depth in DEPTHS
    if depth <= 16 or block == 4096
]


@dataclass(slots=True)
class Series:
    """One workload on one server: per round."""

    ops_per_s: list[float] = field(default_factory=list)
    cpu_us_per_op: list[float] = field(default_factory=list)
    calls_per_op: list[float] = field(default_factory=list)


class Subject:
    """A server under load, with its guest and what to ask for."""

    def __init__(self, server: Server, label: str, args: argparse.Namespace) -> None:
        self.server, self.label = server, label
        self.guest = FakeGuest(
            server.socket_path,
            queue_size=1024,
            slot_count=max(DEPTHS),
            slot_data_bytes=1 << 20,
            poll=args.wait == "poll",
            scatter=args.scatter,
        )
        self.series: dict[Workload, Series] = {workload: Series() for workload in WORKLOADS}

    @property
    def queue(self) -> Queue:
        return self.guest.queues[1]

    def prepare(self, names: int) -> None:
        """Connects, finds the nodes, and touches everything once, so that all of it is warm."""
        guest = self.guest
        guest.connect()
        for queue in guest.queues:
            queue.header_len = isinstance(self.server, CommandServer)
        guest.start()
        guest.fuse.init()
        data = guest.fuse.walk("data")
        self.files = ffi.new("fg_file[]", [(data.nodeid, guest.fuse.open(data.nodeid), data.attr.size, DATA_SEED)])
        parents = [guest.fuse.lookup(1, directory_name(i)).nodeid for i in range(DIRECTORIES)]
        rows = []
        for i in range(names):
            parent, name = parents[i % DIRECTORIES], small_name(i)
            rows.append((parent, guest.fuse.lookup(parent, name).nodeid, name))
        self.names = ffi.new("fg_name[]", rows)
        blocks = data.attr.size // LOAD_BATCH_BYTES
        self.run(Workload("warm-up", lib.FG_LOAD_READ_SEQUENTIAL, LOAD_BATCH_BYTES, 4, 0), ops=2 * blocks, check=1)

    def run(
        self, workload: Workload, ops: int = 0, milliseconds: int = 0, seed: int = 1, check: int = 0
    ) -> tuple[float, float, float]:
        """Operations per second, server CPU microseconds per operation, interrupts per operation."""
        load = ffi.new(
            "fg_load *",
            {
                "kind": workload.kind,
                "depth": workload.depth,
                "block_bytes": workload.block_bytes,
                "check": check,
                "max_ops": ops,
                "duration_ms": milliseconds,
                "timeout_ms": STALL_MS,
                "random_seed": seed,
                "files": self.files,
                "file_count": 1,
                "names": self.names,
                "name_count": len(self.names),
            },
        )
        before = sum(map(cpu_ns, self.server.family))
        result = self.queue.load(load)
        spent_ns = sum(map(cpu_ns, self.server.family)) - before
        return result.ops / result.elapsed_ns * 1e9, spent_ns / 1e3 / result.ops, result.calls / result.ops

    def measure(self, workload: Workload, seconds: float, seed: int) -> None:
        ops, cpu, calls = self.run(workload, milliseconds=int(seconds * 1000), seed=seed)
        series = self.series[workload]
        series.ops_per_s.append(ops)
        series.cpu_us_per_op.append(cpu)
        series.calls_per_op.append(calls)


def directory_name(index: int) -> bytes:
    return b"dir%02d" % index


def small_name(index: int) -> bytes:
    return b"file%05d.conf" % index


def make_tree(root: Path, files: int, data_bytes: int) -> None:
    """One large file of pattern, and small files in DIRECTORIES directories."""
    root.mkdir(parents=True)
    buffer = ffi.new("uint8_t[]", LOAD_BATCH_BYTES)
    with (root / "data").open("wb") as stream:
        for offset in range(0, data_bytes, LOAD_BATCH_BYTES):
            lib.fg_pattern_fill(buffer, LOAD_BATCH_BYTES, offset, DATA_SEED)
            stream.write(ffi.buffer(buffer))
    for i in range(DIRECTORIES):
        (root / directory_name(i).decode()).mkdir()
    for i in range(files):
        place = root / directory_name(i % DIRECTORIES).decode() / small_name(i).decode()
        place.write_bytes(struct.pack("<Q", i) * 16)


def build_image(source: Path, output: Path) -> Path:
    """Builds source into output/image.boot, its blob beside it: the bootstrap."""
    output.mkdir()
    bootstrap = output / "image.boot"
    words = ["build", str(source), "--bootstrap", str(bootstrap), "--blob-dir", str(output)]
    done = subprocess.run(
        [sys.executable, "-m", "virtiofsd_nydus.cli.main", *words], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise Failure(f"build of {source} failed: {done.stderr.strip() or done.stdout.strip()}", Cause.FORMAT)
    return bootstrap


def threads(pid: int) -> list[int]:
    return [int(entry.name) for entry in Path(f"/proc/{pid}/task").iterdir()]


def cpu_ns(pid: int) -> int:
    """Time on a CPU of all threads so far, nanoseconds (first field of schedstat)."""
    total = 0
    for thread in threads(pid):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            total += int(Path(f"/proc/{pid}/task/{thread}/schedstat").read_text().split()[0])
    return total


def pin(pid: int, cpus: set[int]) -> None:
    for thread in threads(pid):
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(thread, cpus)


def describe_peer(server: PeerVirtiofsd) -> str:
    """Name and version of the other server."""
    done = subprocess.run([server.program, "--version"], capture_output=True, text=True, timeout=10, check=False)
    match = re.search(r"\d+\.\d+(\.\d+)*", done.stdout + done.stderr)
    maker = "QEMU's " if server.program == C_VIRTIOFSD else ""
    return f"{maker}{server.name} {match.group() if match else '(unknown version)'}"


def place(subjects: Sequence[Subject], placement: str) -> None:
    """split: the guest on the first CPU, servers on the second; shared: all on the first."""
    cpus = sorted(os.sched_getaffinity(0))
    if placement == "free":
        return
    if placement == "split" and len(cpus) < 2:
        raise Failure("--placement split needs two CPUs; use shared")
    os.sched_setaffinity(0, {cpus[0]})
    for subject in subjects:
        for pid in subject.server.family:
            pin(pid, {cpus[0] if placement == "shared" else cpus[1]})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=41, metavar="N", help="rounds of each workload on each server")
    parser.add_argument("--seconds", type=float, default=0.05, metavar="S", help="length of a round")
    parser.add_argument("--files", type=int, default=10_000, metavar="N", help=f"small files, at most {TREE_MAX}")
    parser.add_argument("--data-mib", type=int, default=128, metavar="N", help="size of the file that is read")
    parser.add_argument(
        "--wait",
        choices=["block", "poll"],
        default="block",
        help="how the guest waits for completions: interrupts (as guests do), or spinning",
    )
    parser.add_argument(
        "--placement",
        choices=["split", "shared", "free"],
        default="shared",
        help="guest and server on a CPU each, on one CPU, or as the kernel likes; same for both",
    )
    parser.add_argument("--scatter", action="store_true", help="the guest's pages in a shuffled order")
    parser.add_argument(
        "--no-peer",
        action="store_true",
        help=f"measure only ours; the other is QEMU's C virtiofsd ({C_VIRTIOFSD}) or the Rust one ({RUST_VIRTIOFSD})",
    )
    parser.add_argument(
        "--peer",
        action="append",
        default=[],
        type=parse_peer,
        metavar="NAME=COMMAND",
        help="another server, may be given again; {sock} is the socket it listens on, {tree} the directory, "
        "{bootstrap} and {blob_dir} the image of it, {directory} a scratch directory",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def parse_peer(text: str) -> tuple[str, list[str]]:
    """NAME=COMMAND, the command in words as a shell splits them."""
    name, _, command = text.partition("=")
    words = shlex.split(command)
    if not name or not words or not any("{sock}" in word for word in words):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=COMMAND with {{sock}} in the command")
    return name, words


def describe_machine() -> str:
    model = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    return f"{os.cpu_count()} x {model}, Linux {platform.release()}"


def summarise(series: Series) -> dict[str, float]:
    result = {"calls_per_op": statistics.median(series.calls_per_op)}
    for name, values in (("ops_per_s", series.ops_per_s), ("cpu_us_per_op", series.cpu_us_per_op)):
        low, _, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
        result |= {
            name: statistics.median(values),
            f"{name}_q1": low,
            f"{name}_q3": high,
            f"{name}_min": min(values),
            f"{name}_max": max(values),
        }
    return result


def report(subjects: Sequence[Subject], args: argparse.Namespace) -> dict[str, object]:
    """The whole result as plain values: per workload both sides, and the medians of the rounds' ratios."""
    rows: list[dict[str, object]] = []
    for workload in WORKLOADS:
        own = subjects[0].series[workload]
        peers: dict[str, object] = {}
        for subject in subjects[1:]:
            other = subject.series[workload]
            ops = statistics.median(a / b for a, b in zip(own.ops_per_s, other.ops_per_s, strict=True))
            cpu = statistics.median(a / b for a, b in zip(own.cpu_us_per_op, other.cpu_us_per_op, strict=True))
            peers[subject.label] = summarise(other) | {
                "ops_ratio": ops,
                "cpu_ratio": cpu,
                "met": ops >= workload.floor and cpu < 1.0,
            }
        rows.append(
            {
                "workload": workload.name,
                "depth": workload.depth,
                "ours": summarise(own),
                "ops_ratio_wanted": workload.floor,
                "peers": peers,
            }
        )
    return {
        "machine": describe_machine(),
        "command": " ".join(["virtiofsd-nydus", *sys.argv[1:]]),
        "ours": subjects[0].label,
        "peers": [subject.label for subject in subjects[1:]],
        "rounds": args.rounds,
        "seconds": args.seconds,
        "files": args.files,
        "data_mib": args.data_mib,
        "wait": args.wait,
        "placement": args.placement,
        "scatter": args.scatter,
        "rows": rows,
    }


def print_table(result: dict[str, object]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 170)
    console.print(
        f"machine: {result['machine']}\ncommand: {result['command']}\nours: {result['ours']}\n"
        f"{result['rounds']} rounds of {result['seconds']} s each, "
        f"median (quartiles), guest waits: {result['wait']}, CPUs: {result['placement']}",
        highlight=False,
    )
    table = Table("workload", "depth", "server", "kop/s", "ours/its", "CPU us/op", "ours/its", "wanted")
    rows: list[dict[str, object]] = result["rows"]  # type: ignore[assignment]
    for row in rows:
        own: dict[str, float] = row["ours"]  # type: ignore[assignment]
        peers: dict[str, dict[str, float]] = row["peers"]  # type: ignore[assignment]
        table.add_row(str(row["workload"]), str(row["depth"]), "ours", format_ops(own), "", format_cpu(own), "", "")
        for label, other in peers.items():
            table.add_row(
                "",
                "",
                label,
                format_ops(other),
                f"{other['ops_ratio']:.2f}",
                format_cpu(other),
                f"{other['cpu_ratio']:.2f}",
                f"{'met' if other['met'] else 'MISSED'}: >= {row['ops_ratio_wanted']}, < 1",
            )
    console.print(table)


def format_ops(side: dict[str, float]) -> str:
    median, low, high = (side[f"ops_per_s{part}"] / 1000 for part in ("", "_q1", "_q3"))
    return f"{median:,.1f} ({low:,.1f}-{high:,.1f})"


def format_cpu(side: dict[str, float]) -> str:
    return f"{side['cpu_us_per_op']:.2f} ({side['cpu_us_per_op_q1']:.2f}-{side['cpu_us_per_op_q3']:.2f})"


def run(args: argparse.Namespace) -> int:
    if not 1 <= args.files <= TREE_MAX - DIRECTORIES - 2 or args.data_mib < 2 or args.rounds < 1:
        raise Failure(f"--files must be 1 to {TREE_MAX - DIRECTORIES - 2}, --data-mib 2 or more, --rounds 1 or more")
    affinity = os.sched_getaffinity(0)
    try:
        with ExitStack() as stack:
            base = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-io-")))
            tree = base / "tree"
            make_tree(tree, args.files, args.data_mib << 20)
            bootstrap = build_image(tree, base / "image")
            own = NydusDaemon(
                ["--bootstrap", str(bootstrap), "--localfs-dir", str(base / "image")], die_with_parent=True
            )
            subjects = [Subject(stack.enter_context(own), f"{own.name} {__version__}", args)]
            if not args.no_peer:
                peer = PeerVirtiofsd(tree, die_with_parent=True)
                subjects.append(Subject(stack.enter_context(peer), describe_peer(peer), args))
            values = {"tree": tree, "bootstrap": bootstrap, "blob_dir": base / "image", "directory": base}
            for label, words in args.peer:
                command = CommandServer(label, words, {name: str(value) for name, value in values.items()})
                subjects.append(Subject(stack.enter_context(command), label, args))
            for subject in subjects:
                stack.callback(subject.guest.close)
                subject.prepare(args.files)
            place(subjects, args.placement)
            measure_rounds(subjects, args)
            result = report(subjects, args)
    except (GuestFault, NoAnswer, ConnectionError) as error:
        raise Failure(f"measurement failed: {error}") from error
    finally:
        os.sched_setaffinity(0, affinity)
    if args.json:
        print(json.dumps(result))
    else:
        print_table(result)
    return 0


def measure_rounds(subjects: Sequence[Subject], args: argparse.Namespace) -> None:
    """One discarded round, then rounds in alternating order."""
    for number in range(args.rounds + 1):
        for workload in WORKLOADS:
            order = subjects if number % 2 else list(reversed(subjects))
            for subject in order:
                if number == 0:
                    subject.run(workload, milliseconds=50)
                else:
                    subject.measure(workload, args.seconds, number)
