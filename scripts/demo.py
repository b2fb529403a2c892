#!/usr/bin/env python3
"""The demo: a container image in a real registry, a guest that boots from it without pulling it. `make demo` runs it.

It makes the demo image, starts docker-registry on loopback, converts the image into it, boots a guest on it with an
empty cache and prints what that took. What can be kept is kept under build/demo: a second run does only the boot.
"""

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.peers.registry import LocalRegistry  # noqa: E402

DEMO = ROOT / "build" / "demo"
PYTHON = sys.executable
CLI = [PYTHON, "-m", "virtiofsd_nydus.cli.main"]
COMMAND = [
    "python3",
    "-c",
    "import json, ssl, sqlite3; print(json.dumps({'tls': ssl.OPENSSL_VERSION, "
    "'sqlite': sqlite3.sqlite_version, 'said': open('/demo/hello.txt').read().strip()}))",
]
# What a conversion is a function of, beside the image
CONVERTER = ("build", "rafs", "oci")
NYDUS_NAME, OCI_NAME = "demo:nydus", "demo:oci"


class DemoError(Exception):
    """One line for people."""


@contextmanager
def step(text: str) -> Iterator[None]:
    begun = time.monotonic()
    print(f"{text} ...", end="", file=sys.stderr, flush=True)
    try:
        yield
    except BaseException:
        print(" failed", file=sys.stderr)
        raise
    print(f" {time.monotonic() - begun:.1f} s", file=sys.stderr)


def run_tool(words: list[str]) -> str:
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"{words[0]} failed with status {done.returncode}"]
        raise DemoError(lines[-1])
    return done.stdout.strip()


def conversion_key(layout: Path) -> str:
    """Changes when the image or the converter does."""
    digest = hashlib.sha256((layout / "index.json").read_bytes())
    for part in CONVERTER:
        for path in sorted((ROOT / "virtiofsd_nydus" / part).glob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def make_image() -> str:
    """The demo image's reference; made when it is not there."""
    with step("image: Debian with python3, three OCI layers"):
        return run_tool([PYTHON, str(ROOT / "scripts" / "make-demo-image.py"), "--output", str(DEMO / "image")])


def fill_registry(registry: LocalRegistry, image: str, *, with_oci: bool = False) -> None:
    """Converts the image into the registry; with_oci: also puts the image there as it is. What is there stays."""
    key = conversion_key(DEMO / "image")
    record = DEMO / "registry" / "filled.json"
    done = json.loads(record.read_text()) if record.exists() else {}
    if done.get("nydus") != key:
        with step("convert: OCI to Nydus, into the registry"):
            run_tool([*CLI, "convert", image, f"docker://{registry.host}/{NYDUS_NAME}"])
        done["nydus"] = key
    if with_oci and done.get("oci") != key:
        with step("push: the OCI image itself"):
            run_tool(
                [
                    "skopeo",
                    "--insecure-policy",
                    "copy",
                    "--quiet",
                    "--dest-tls-verify=false",
                    image,
                    f"docker://{registry.host}/{OCI_NAME}",
                ]
            )
        done["oci"] = key
    record.write_text(json.dumps(done))


def boot(registry: LocalRegistry) -> dict[str, Any]:
    cache = DEMO / "cache"
    shutil.rmtree(cache, ignore_errors=True)
    registry.clear_log()
    reference = f"docker://{registry.host}/{NYDUS_NAME}"
    print(f'$ virtiofsd-nydus boot {reference} -- {COMMAND[0]} {COMMAND[1]} "{COMMAND[2]}"', file=sys.stderr)
    done = subprocess.run(
        [*CLI, "boot", reference, "--cache-dir", str(cache), "--json", "--", *COMMAND],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode:
        raise DemoError(f"the boot failed with status {done.returncode}")
    report: dict[str, Any] = json.loads(done.stdout)
    report["registry_bytes"] = registry.blob_bytes()
    return report


def print_table(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    image, fetched = report["image_bytes"], report["fetched_bytes"]
    table = Table(show_header=False)
    table.add_row("image size", f"{image / 1e6:.1f} MB in {report['image_chunks']} chunks")
    table.add_row("bytes fetched", f"{fetched / 1e6:.1f} MB ({fetched / image:.1%})")
    table.add_row("chunks fetched", f"{report['fetched_chunks']} in {report['fetch_requests']} requests")
    table.add_row("sent by the registry", f"{report['registry_bytes'] / 1e6:.1f} MB, the bootstrap included")
    table.add_row("time to guest init", f"{report['init_s']:.2f} s")
    table.add_row("time to root mounted", f"{report['root_s']:.2f} s")
    table.add_row("time to command's end", f"{report['end_s']:.2f} s")
    Console().print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--bench-cold-start",
        nargs=argparse.REMAINDER,
        metavar="OPTION",
        help="instead: bench cold-start on the demo's images, with these options",
    )
    args = parser.parse_args()
    try:
        image = make_image()
        with LocalRegistry(DEMO / "registry") as registry:
            fill_registry(registry, image, with_oci=args.bench_cold_start is not None)
            if args.bench_cold_start is not None:
                host = f"docker://{registry.host}"
                return subprocess.run(
                    [
                        *CLI,
                        "bench",
                        "cold-start",
                        f"{host}/{NYDUS_NAME}",
                        "--full-pull",
                        f"{host}/{OCI_NAME}",
                        *args.bench_cold_start,
                        "--",
                        *COMMAND,
                    ],
                    cwd=ROOT,
                    check=False,
                ).returncode
            print_table(boot(registry))
    except (DemoError, OSError, RuntimeError) as failure:
        print(f"demo: {failure}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
