#!/usr/bin/env python3
"""Builds the test guest: a kernel and modules out of Debian's packages (nothing is installed), and our own init.

    vm-images/build.py [--output build/guest] [--kernel-package linux-image-cloud-amd64] [--update]

Writes vmlinuz, initramfs.cpio, initramfs-busybox.cpio (the same plus a static busybox as /bin/busybox, for tests on
images that hold no programs) and guest.json (what they were made from). Does nothing when its inputs have not
changed; --update asks the archive for a newer kernel first. Standard library only: it runs before the environment
exists.
"""

import argparse
import hashlib
import json
import lzma
import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
# What the guest needs beyond a bare kernel; a kernel that has one built in simply brings no file for it. The control
# port comes first, so that whatever fails later can be told.
MODULES = ("virtio_pci", "virtio_console", "fuse", "virtiofs", "overlay")
KERNEL_PACKAGE = "linux-image-cloud-amd64"
BUSYBOX = Path("/bin/busybox")


class BuildError(Exception):
    """One line for people: what is missing and what to do."""


def run_tool(*words: str, cwd: Path | None = None) -> str:
    try:
        done = subprocess.run(words, cwd=cwd, check=True, capture_output=True, text=True)
    except FileNotFoundError:
        raise BuildError(f"{words[0]} is not installed: run scripts/install-packages as root") from None
    except subprocess.CalledProcessError as failure:
        lines = failure.stderr.strip().splitlines() or ["no message"]
        raise BuildError(f"{' '.join(words[:3])} failed: {lines[-1]}") from None
    return done.stdout


def newest_kernel(package: str) -> str:
    """The package that holds the kernel: the meta package's one dependency."""
    for line in run_tool("apt-cache", "depends", "--important", package).splitlines():
        match = re.match(r"\s*Depends: (linux-image-\S+)", line)
        if match:
            return match.group(1)
    return package


def fetch_kernel(package: str, output: Path, update: bool) -> Path:
    """The kernel's .deb, kept in `output`; downloaded when absent or with `update`."""
    kept = sorted(output.glob("linux-image-*.deb"), key=lambda deb: deb.stat().st_mtime)
    if kept and not update:
        return kept[-1]
    name = newest_kernel(package)
    with tempfile.TemporaryDirectory(prefix="kernel-") as scratch:
        # apt drops to the user _apt for downloads when it can write there
        Path(scratch).chmod(0o755)
        run_tool("apt-get", "-q", "-o", "APT::Sandbox::User=root", "download", name, cwd=Path(scratch))
        debs = list(Path(scratch).glob("*.deb"))
        if not debs:
            raise BuildError(f"apt-get downloaded nothing for {name}: run apt-get update")
        for old in kept:
            old.unlink()
        target = output / debs[0].name
        shutil.move(debs[0], target)
    return target


class Kernel:
    """vmlinuz and modules of one kernel package, read straight from the .deb."""

    def __init__(self, deb: Path) -> None:
        self.vmlinuz = b""
        self.modules: dict[str, bytes] = {}  # name with underscores -> module file, decompressed
        self.builtin: set[str] = set()
        with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", deb], stdout=subprocess.PIPE) as dpkg:
            assert dpkg.stdout is not None
            with tarfile.open(fileobj=dpkg.stdout, mode="r|") as tar:
                for member in tar:
                    self.take(tar, member)
        if dpkg.returncode or not self.vmlinuz:
            raise BuildError(f"{deb}: no kernel image inside (damaged download? remove it and run again)")

    def take(self, tar: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        name = member.name.removeprefix("./").removeprefix("usr/")
        if not member.isfile():
            return
        if name.startswith("boot/vmlinuz-"):
            self.vmlinuz = read_member(tar, member)
        elif name.endswith("/modules.builtin"):
            words = read_member(tar, member).decode().split()
            self.builtin = {module_name(word) for word in words}
        elif re.search(r"\.ko(\.xz)?$", name) and re.search(r"/(virtio|fuse|overlayfs|char)/", name):
            data = read_member(tar, member)
            self.modules[module_name(name)] = lzma.decompress(data) if name.endswith(".xz") else data

    def load_order(self, wanted: tuple[str, ...]) -> list[str]:
        """Module names, dependencies first. What is built in is left out."""
        order: list[str] = []

        def visit(name: str) -> None:
            if name in order or name in self.builtin:
                return
            if name not in self.modules:
                raise BuildError(f"the kernel package has no module {name}")
            match = re.search(rb"\0depends=([^\0]*)\0", self.modules[name])
            for dependency in match.group(1).decode().split(",") if match else []:
                if dependency:
                    visit(dependency.replace("-", "_"))
            order.append(name)

        for name in wanted:
            visit(name)
        return order


def read_member(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    stream = tar.extractfile(member)
    assert stream is not None
    return stream.read()


def module_name(path: str) -> str:
    return path.rsplit("/", 1)[-1].split(".ko", 1)[0].replace("-", "_")


class Cpio:
    """A newc archive: what the kernel unpacks (its Documentation/driver-api/early-userspace/buffer-format.rst)."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []
        self.inode = 0

    def add(self, name: str, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)) -> None:
        self.inode += 1
        path = name.encode() + b"\0"
        fields = (self.inode, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(path), 0)
        head = b"070701" + b"".join(b"%08X" % field for field in fields) + path
        self.parts += [head, bytes(-len(head) % 4), data, bytes(-len(data) % 4)]

    def finish(self) -> bytes:
        self.add("TRAILER!!!", 0)
        return b"".join(self.parts)


def compile_init(output: Path) -> bytes:
    with tempfile.TemporaryDirectory(prefix="init-", dir=output) as scratch:
        binary = Path(scratch) / "init"
        run_tool(
            *shlex.split(os.environ.get("CC", "cc")),
            "-std=c11",
            "-D_GNU_SOURCE",
            "-Os",
            "-s",
            "-static",
            "-Wall",
            "-Wextra",
            "-Werror",
            "-Wno-unused-result",
            "-o",
            str(binary),
            str(HERE / "init.c"),
        )
        return binary.read_bytes()


def make_initramfs(init: bytes, kernel: Kernel, busybox: bytes | None) -> bytes:
    cpio = Cpio()
    for directory in ("dev", "proc", "sys", "modules", "bin", "rw"):
        cpio.add(directory, stat.S_IFDIR | 0o755)
    cpio.add("dev/console", stat.S_IFCHR | 0o600, device=(5, 1))  # init's stderr before devtmpfs is there
    cpio.add("dev/null", stat.S_IFCHR | 0o666, device=(1, 3))
    cpio.add("init", stat.S_IFREG | 0o755, init)
    for number, name in enumerate(kernel.load_order(MODULES)):
        cpio.add(f"modules/{number:02}-{name}.ko", stat.S_IFREG | 0o644, kernel.modules[name])
    if busybox is not None:
        cpio.add("bin/busybox", stat.S_IFREG | 0o755, busybox)
    return cpio.finish()


def write_file(path: Path, data: bytes) -> None:
    """Whole or not at all: a build that is interrupted leaves the last good product."""
    scratch = path.with_name(path.name + ".new")
    scratch.write_bytes(data)
    scratch.replace(path)


def build(output: Path, package: str, update: bool) -> str:
    output.mkdir(parents=True, exist_ok=True)
    deb = fetch_kernel(package, output, update)
    busybox = BUSYBOX.resolve()
    if not busybox.exists():
        raise BuildError("busybox-static is not installed: run scripts/install-packages as root")
    inputs = {
        "kernel": deb.name,
        "recipe": hashlib.sha256(Path(__file__).read_bytes()).hexdigest(),
        "init": hashlib.sha256((HERE / "init.c").read_bytes()).hexdigest(),
        "busybox": hashlib.sha256(busybox.read_bytes()).hexdigest(),
    }
    record = output / "guest.json"
    products = [output / name for name in ("vmlinuz", "initramfs.cpio", "initramfs-busybox.cpio")]
    if record.exists() and json.loads(record.read_text()) == inputs and all(path.exists() for path in products):
        return f"guest: {deb.name.split('_')[0]} is up to date in {output}"
    record.unlink(missing_ok=True)
    kernel = Kernel(deb)
    init = compile_init(output)
    write_file(products[0], kernel.vmlinuz)
    write_file(products[1], make_initramfs(init, kernel, None))
    write_file(products[2], make_initramfs(init, kernel, busybox.read_bytes()))
    write_file(record, json.dumps(inputs, indent=1).encode())
    sizes = ", ".join(f"{path.name} {path.stat().st_size / 1e6:.1f} MB" for path in products)
    return f"guest: {deb.name.split('_')[0]} built in {output}: {sizes}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=HERE.parent / "build" / "guest")
    parser.add_argument("--kernel-package", default=KERNEL_PACKAGE)
    parser.add_argument("--update", action="store_true", help="ask the archive for a newer kernel")
    args = parser.parse_args()
    try:
        print(build(args.output, args.kernel_package, args.update))
    except (BuildError, OSError) as failure:
        print(f"vm-images/build.py: {failure}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
