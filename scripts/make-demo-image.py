#!/usr/bin/env python3
"""Makes the demo image: Debian's minbase with python3, as an OCI image of three layers.

    scripts/make-demo-image.py [--output build/demo/image] [--suite bookworm]

Layer 1 is the system. Layer 2 holds what an image may hold and a file system must get right: whiteouts, hard links,
extended attributes, long symlinks, a device node, odd names. Layer 3 (umoci insert --opaque) replaces a directory.
Prints the image's reference, oci:DIR:demo. Does nothing when it is there, made by this recipe. Root is needed only
where mmdebstrap needs it.
"""

import argparse
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TAG = "demo"
# All times in the image: the same packages make the same layers
EPOCH = 1_700_000_000
PACKAGES = "python3,ca-certificates"
OPAQUE_DIRECTORY = "usr/share/doc"
DELETED = ("usr/share/common-licenses/GPL-3", "usr/share/pixmaps", "etc/motd")


class MakeError(Exception):
    """One line for people."""


def run_tool(*words: str, env: dict[str, str] | None = None) -> None:
    try:
        subprocess.run(words, check=True, capture_output=True, text=True, env={**os.environ, **(env or {})})
    except FileNotFoundError:
        raise MakeError(f"{words[0]} is not installed: run scripts/install-packages as root") from None
    except subprocess.CalledProcessError as failure:
        lines = [line for line in failure.stderr.splitlines() if line.strip()] or ["no message"]
        named = [line for line in lines if line.startswith(("E:", "error"))] or lines[-1:]
        raise MakeError(f"{words[0]} failed: {named[0]}") from None


class Layer:
    """A layer's tar, all times EPOCH. PAX, so that names and extended attributes of any length fit."""

    def __init__(self, path: Path) -> None:
        self.tar = tarfile.open(path, "w", format=tarfile.PAX_FORMAT)  # noqa: SIM115  close() is ours

    def add(
        self,
        name: str,
        data: bytes = b"",
        *,
        kind: bytes = tarfile.REGTYPE,
        mode: int = 0o644,
        link: str = "",
        owner: tuple[int, int] = (0, 0),
        device: tuple[int, int] = (0, 0),
        mtime: float = EPOCH,
        xattrs: dict[str, str] | None = None,
    ) -> None:
        entry = tarfile.TarInfo(name)
        entry.type, entry.mode, entry.linkname, entry.size, entry.mtime = kind, mode, link, len(data), mtime
        entry.uid, entry.gid = owner
        entry.devmajor, entry.devminor = device
        entry.pax_headers = {f"SCHILY.xattr.{key}": value for key, value in (xattrs or {}).items()}
        self.tar.addfile(entry, io.BytesIO(data) if kind == tarfile.REGTYPE else None)

    def close(self) -> None:
        self.tar.close()


def make_odd_layer(path: Path) -> None:
    layer = Layer(path)
    for name in DELETED:
        directory, _, base = name.rpartition("/")
        layer.add(f"{directory}/.wh.{base}")
    layer.add("demo", kind=tarfile.DIRTYPE, mode=0o755)
    layer.add("demo/hello.txt", b"read from an image that stays in the registry\n")
    layer.add("demo/original", b"one inode, three names\n" * 100, mode=0o640, owner=(1000, 1000))
    layer.add("demo/hard-link", kind=tarfile.LNKTYPE, link="demo/original")
    layer.add("demo/other-hard-link", kind=tarfile.LNKTYPE, link="demo/original")
    layer.add(
        "demo/attributes", b"x", xattrs={"user.short": "value", "user.long": "v" * 2000, "trusted.demo": "root's"}
    )
    # a file capability, as `setcap cap_net_raw+ep` writes it: bytes below 0x80, so PAX's text carries it whole
    layer.add(
        "demo/capable",
        b"#!/bin/sh\n",
        mode=0o755,
        xattrs={"security.capability": "\x01\x00\x00\x02\x00\x20" + "\x00" * 14},
    )
    layer.add("demo/setuid", b"#!/bin/sh\n", mode=0o4755)
    layer.add("demo/sticky", kind=tarfile.DIRTYPE, mode=0o1777)
    layer.add("demo/long-symlink", kind=tarfile.SYMTYPE, mode=0o777, link="target/" * 500 + "end")
    layer.add("demo/symlink", kind=tarfile.SYMTYPE, mode=0o777, link="hello.txt")
    layer.add("demo/null", kind=tarfile.CHRTYPE, mode=0o666, device=(1, 3))
    layer.add("demo/fifo", kind=tarfile.FIFOTYPE, mode=0o600)
    layer.add("demo/" + "n" * 255, b"the longest name\n")
    layer.add("demo/ünïcode ☃", b"a name beyond ASCII\n")
    layer.add("demo/empty")
    layer.add("demo/nanoseconds", b"x", mtime=EPOCH + 0.123456)
    layer.add("demo/before-1970", b"x", mtime=-86400)
    # compressible and not, over several chunks of 1 MiB, with an odd tail
    layer.add("demo/zeros", bytes(3 * 1024 * 1024 + 1))
    noise = b"".join(hashlib.sha256(number.to_bytes(8, "little")).digest() for number in range(80_000))
    layer.add("demo/noise", noise + b"tail")
    layer.add("demo/many", kind=tarfile.DIRTYPE, mode=0o755)
    for number in range(300):
        layer.add(f"demo/many/{number:03}", f"{number}\n".encode())
    layer.close()


def make_image(output: Path, suite: str) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="image-", dir=output.parent) as scratch_name:
        scratch = Path(scratch_name)
        layout = scratch / "oci"
        image = f"{layout}:{TAG}"
        system = scratch / "system.tar"
        run_tool(
            "mmdebstrap",
            "--quiet",
            "--variant=minbase",
            f"--include={PACKAGES}",
            "--format=tar",
            suite,
            str(system),
            env={"SOURCE_DATE_EPOCH": str(EPOCH)},
        )
        run_tool("umoci", "init", "--layout", str(layout))
        run_tool("umoci", "new", "--image", image)
        run_tool("umoci", "raw", "add-layer", "--image", image, str(system))
        make_odd_layer(scratch / "odd.tar")
        run_tool("umoci", "raw", "add-layer", "--image", image, str(scratch / "odd.tar"))
        replaced = scratch / "doc"
        replaced.mkdir(mode=0o755)
        (replaced / "README").write_text("This directory is opaque: nothing of the layers below shows.\n")
        for path in (replaced / "README", replaced):
            os.utime(path, (EPOCH, EPOCH))
        rootless = [] if os.geteuid() == 0 else ["--rootless"]
        run_tool("umoci", "insert", *rootless, "--opaque", "--image", image, str(replaced), f"/{OPAQUE_DIRECTORY}")
        run_tool(
            "umoci",
            "config",
            "--image",
            image,
            "--config.cmd",
            "python3",
            "--config.env",
            "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "--no-history",
        )
        run_tool("umoci", "gc", "--layout", str(layout))
        shutil.rmtree(output, ignore_errors=True)
        layout.rename(output)


def host_suite() -> str:
    for line in Path("/etc/os-release").read_text().splitlines():
        if line.startswith("VERSION_CODENAME="):
            return line.partition("=")[2].strip('"')
    return "bookworm"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "demo" / "image")
    parser.add_argument("--suite", default=host_suite(), help="Debian release in the image; default: the host's")
    args = parser.parse_args()
    output: Path = args.output.absolute()
    inputs = {"recipe": hashlib.sha256(Path(__file__).read_bytes()).hexdigest(), "suite": args.suite}
    record = output.with_suffix(".json")
    try:
        if not (record.exists() and (output / "index.json").exists() and json.loads(record.read_text()) == inputs):
            record.unlink(missing_ok=True)
            make_image(output, args.suite)
            record.write_text(json.dumps(inputs))
    except (MakeError, OSError) as failure:
        print(f"make-demo-image: {failure}", file=sys.stderr)
        return 1
    print(f"oci:{output}:{TAG}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
