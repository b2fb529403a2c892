"""`bench cold-start`: from nothing to the end of a command in a guest, lazily and by full pull.

Each round boots, in turn: lazily with an empty cache; lazily again with what the first left (another guest on the
node); and, with --full-pull, the usual way: skopeo pulls the whole image, umoci unpacks it, the machine's other
virtio-fs server shares the directory. Rounds alternate, so that other load of the machine hits all sides.
"""

import argparse
import json
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from virtiofsd_nydus.arguments import add_machine_arguments, add_registry_arguments
from virtiofsd_nydus.errors import Cause, Failure, UsageFailure

if TYPE_CHECKING:
    from virtiofsd_nydus.vmm.boot import BootOptions, BootReport

COLD, WARM, FULL = "lazy, empty cache", "lazy, second guest", "full pull"
PHASES = ("ready_s", "init_s", "root_s", "end_s")
PHASE_NAMES = {"ready_s": "image at hand", "init_s": "guest init", "root_s": "root mounted", "end_s": "command's end"}


@dataclass
class Round:
    """One boot. Times in seconds from nothing; ready_s: when the server could be started."""

    ready_s: float
    init_s: float
    root_s: float
    end_s: float
    fetched_bytes: int
    requests: int
    status: int


@dataclass
class Side:
    name: str
    measure: "Callable[[], Round]"
    rounds: list[Round] = field(default_factory=list)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "%(prog)s IMAGE [options] -- CMD..."
    parser.add_argument("image", metavar="IMAGE", help="Nydus image: docker://HOST[:PORT]/NAME[:TAG], oci:DIR[:TAG]")
    parser.add_argument("--full-pull", metavar="IMAGE", help="the same as an OCI image, to pull and unpack whole")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="default 5")
    add_registry_arguments(parser)
    add_machine_arguments(parser)
    parser.add_argument("--json", action="store_true")


def run(args: argparse.Namespace) -> int:
    from virtiofsd_nydus.vmm.accel import choose_accel
    from virtiofsd_nydus.vmm.boot import BootOptions
    from virtiofsd_nydus.vmm.qemu import QEMU, GuestFiles, check_memory, find_program

    if not args.command or args.rounds < 1:
        raise UsageFailure("give a command after --, and at least one round")
    check_memory(args.memory)
    find_program(QEMU, "qemu-system-x86")
    files = GuestFiles.find(args.kernel, args.initrd)
    options = BootOptions(
        files, args.command, args.memory, args.cpus, choose_accel(args.accel, files), args.timeout, die_with_parent=True
    )
    with tempfile.TemporaryDirectory(prefix="vnd-bench-") as scratch:
        cache = Path(scratch) / "cache"
        sides = [
            Side(COLD, lambda: boot_lazily(args, options, cache, empty=True)),
            Side(WARM, lambda: boot_lazily(args, options, cache, empty=False)),
        ]
        if args.full_pull:
            sides.append(Side(FULL, lambda: boot_after_pull(args, options, Path(scratch))))
        for number in range(1, args.rounds + 1):
            for side in sides:
                if sys.stderr.isatty():
                    print(f"round {number} of {args.rounds}: {side.name}", file=sys.stderr)
                side.rounds.append(side.measure())
    result = summarise(args, options, sides)
    if args.json:
        print(json.dumps(result))
    else:
        print_result(result)
    failed = [side.name for side in sides if any(one.status for one in side.rounds)]
    if failed:
        raise Failure(f"the command failed in some rounds: {', '.join(failed)}", Cause.GUEST)
    return 0


def boot_lazily(args: argparse.Namespace, options: "BootOptions", cache: Path, *, empty: bool) -> Round:
    from virtiofsd_nydus.vmm.boot import boot_guest
    from virtiofsd_nydus.vmm.image import WantedImage, prepare_image
    from virtiofsd_nydus.vmm.servers import NydusDaemon

    if empty:
        shutil.rmtree(cache, ignore_errors=True)
    started_at = time.monotonic()
    wanted = WantedImage(
        args.image, cache_dir=cache, plain_http=args.plain_http, creds=args.creds, ca_cert_files=tuple(args.ca_cert)
    )
    with prepare_image(wanted) as image:
        ready_s = time.monotonic() - started_at
        with NydusDaemon(image.daemon_options, die_with_parent=True) as daemon:
            report = boot_guest(daemon, options, started_at=started_at, stderr=pass_on)
    # The bootstrap is fetched whole, by one request, once per cache; so is what tells where it is
    more_bytes, more_requests = (image.fetched_bytes, image.fetch_requests)
    return make_round(report, ready_s, report.fetched_bytes + more_bytes, report.fetch_requests + more_requests)


def boot_after_pull(args: argparse.Namespace, options: "BootOptions", scratch: Path) -> Round:
    from virtiofsd_nydus.oci.reference import DOCKER, default_scheme, parse_reference
    from virtiofsd_nydus.vmm.boot import boot_guest
    from virtiofsd_nydus.vmm.qemu import find_program
    from virtiofsd_nydus.vmm.servers import PeerVirtiofsd

    reference = parse_reference(args.full_pull)
    layout, bundle = scratch / "layout", scratch / "bundle"
    try:
        started_at = time.monotonic()
        words = [find_program("skopeo", "skopeo"), "--insecure-policy", "copy", "--quiet"]
        if reference.transport == DOCKER and default_scheme(reference.host, args.plain_http) == "http":
            words.append("--src-tls-verify=false")
        if args.creds:
            words += ["--src-creds", args.creds]
        run_tool([*words, args.full_pull, f"oci:{layout}:image"])
        run_tool([find_program("umoci", "umoci"), "unpack", "--image", f"{layout}:image", str(bundle)])
        ready_s = time.monotonic() - started_at
        with PeerVirtiofsd(bundle / "rootfs", die_with_parent=True) as server:
            report = boot_guest(server, options, started_at=started_at, stderr=pass_on)
        blobs = list((layout / "blobs" / "sha256").iterdir())
        return make_round(report, ready_s, sum(path.stat().st_size for path in blobs), len(blobs))
    finally:
        shutil.rmtree(layout, ignore_errors=True)
        shutil.rmtree(bundle, ignore_errors=True)


def make_round(report: "BootReport", ready_s: float, fetched_bytes: int, requests: int) -> Round:
    return Round(ready_s, report.init_s, report.root_s, report.end_s, fetched_bytes, requests, report.status)


def run_tool(words: Sequence[str]) -> None:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
        raise Failure(f"{Path(words[0]).name} failed: {lines[-1]}", Cause.IO)


def pass_on(data: bytes) -> None:
    sys.stderr.buffer.write(data)
    sys.stderr.buffer.flush()


def summarise(args: argparse.Namespace, options: "BootOptions", sides: Sequence[Side]) -> dict[str, Any]:
    """The result as plain values. Each ratio names both its sides: full pull over lazy, medians, seconds."""
    from virtiofsd_nydus.bench.io import describe_machine
    from virtiofsd_nydus.vmm.servers import C_VIRTIOFSD

    rows = []
    for side in sides:
        row: dict[str, Any] = {"side": side.name, "rounds": len(side.rounds)}
        for name in (*PHASES, "fetched_bytes", "requests"):
            values = [getattr(one, name) for one in side.rounds]
            row[name] = {"median": statistics.median(values), "min": min(values), "max": max(values)}
        rows.append(row)
    ratios = []
    for name in (COLD, WARM):
        ours = next(row for row in rows if row["side"] == name)
        other = next((row for row in rows if row["side"] == FULL), None)
        if other:
            ratios.append(
                {
                    "of": "time to the command's end",
                    "ours": name,
                    "ours_s": ours["end_s"]["median"],
                    "peer": FULL,
                    "peer_s": other["end_s"]["median"],
                    "ratio": other["end_s"]["median"] / ours["end_s"]["median"],
                }
            )
    return {
        "machine": f"{describe_machine()}; {describe_qemu(options.accel)}",
        "command": ["virtiofsd-nydus", *sys.argv[1:]],
        "image": args.image,
        "full_pull": args.full_pull,
        "peer": "C virtiofsd of QEMU" if C_VIRTIOFSD.exists() else "Rust virtiofsd",
        "rows": rows,
        "ratios": ratios,
    }


def describe_qemu(accel: str) -> str:
    from virtiofsd_nydus.vmm.qemu import QEMU

    done = subprocess.run([QEMU, "--version"], capture_output=True, text=True, check=False)
    return f"{done.stdout.splitlines()[0] if done.stdout else QEMU}, accelerator {accel}"


def print_result(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    console.print(f"machine: {result['machine']}\ncommand: {shlex.join(result['command'])}", markup=False)
    if result["full_pull"]:
        console.print(f"full pull: skopeo, umoci unpack, {result['peer']} on the directory")
    table = Table("median (min-max)", *(f"{row['side']}, {row['rounds']} rounds" for row in result["rows"]))
    for name in PHASES:
        table.add_row(f"{PHASE_NAMES[name]}, s", *(show(row[name], "{:.2f}") for row in result["rows"]))
    table.add_row(
        "fetched, MB",
        *(show({k: v / 1e6 for k, v in row["fetched_bytes"].items()}, "{:.2f}") for row in result["rows"]),
    )
    table.add_row("requests", *(show(row["requests"], "{:.0f}") for row in result["rows"]))
    console.print(table)
    for ratio in result["ratios"]:
        console.print(
            f"{ratio['of']}: {ratio['peer']} {ratio['peer_s']:.2f} s / {ratio['ours']} "
            f"{ratio['ours_s']:.2f} s = {ratio['ratio']:.2f}"
        )


def show(values: dict[str, float], form: str) -> str:
    return f"{form.format(values['median'])} ({form.format(values['min'])}-{form.format(values['max'])})"
