"""An overlay in the guest, its upper on the passthrough and its lower an image: what programs do to it leaves a normal
upper directory on the host. The judge is the host's kernel: that upper over the unpacked image is what the guest saw.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kata.conftest import CLI, ROOT, launch

pytestmark = [pytest.mark.guest, pytest.mark.timeout(600)]
LISTING = ROOT / "tests" / "tree_listing.py"
COPY_UP_MIB = int(os.environ.get("COPY_UP_MIB", "256"))  # docs/kata.md tells of 1024
LISTED = ("etc", "srv", "opt", "var/lib/dpkg")
# What cannot be said of a tree twice: /etc holds the pod's files, whose binds only the guest has
POD_FILES = ("hostname", "hosts", "resolv.conf")
SCRIPT = f"""
test "$(cat /etc/hostname)" = c1 || exit 0      # once is enough
echo more >> /etc/debian_version
rm /etc/issue.net; rm -r /etc/cron.daily
mv /etc/issue /etc/issue.moved; mv /etc/apt /etc/apt.moved; mv /etc/apt.moved/apt.conf.d /etc/apt.again
rm -r /etc/skel; mkdir /etc/skel; touch /etc/skel/new
mknod /srv/null c 1 3; mkfifo /srv/fifo; ln -s ../etc/passwd /srv/link; ln /etc/passwd /srv/hard
chown 1234:4321 /etc/shells; chmod 4750 /etc/shells; touch -d 2001-02-03 /etc/host.conf
python3 -c 'import os; os.setxattr("/etc/shells", "user.kind", b"x"); os.mkdir("/etc/opaque-again")'
dpkg -i /opt/one.deb > /dev/null; test "$(vnd-demo)" = 1
echo changed > /etc/vnd-demo.conf
dpkg -i --force-confold /opt/two.deb > /dev/null 2>&1; test "$(vnd-demo)" = 2; test ! -e /usr/share/vnd-demo/old
test "$(dpkg-query -W vnd-demo)" = "$(printf 'vnd-demo\\t2')"
date +%s%N > /tmp/start; printf X >> /big; sync; date +%s%N > /tmp/end
test "$(stat -c %s /big)" = {(COPY_UP_MIB << 20) + 1}
python3 -c 'print((int(open("/tmp/end").read()) - int(open("/tmp/start").read())) // 1000000)'
for d in {" ".join(LISTED)}; do python3 /opt/tree_listing.py /$d; echo; done
"""


def write_big(path: Path) -> None:
    """A MiB of its own kind after the other: nothing to share, little to store."""
    with path.open("wb") as out:
        for number in range(COPY_UP_MIB):
            out.write(f"{number:08}".encode() * (1 << 17))


def make_package(base: Path, version: str) -> Path:
    """A package with a program, a configuration file and a script that runs after unpacking."""
    top = base / f"package-{version}"
    files = {
        "DEBIAN/control": f"Package: vnd-demo\nVersion: {version}\nArchitecture: all\n"
        "Maintainer: nobody <n@o.invalid>\nDescription: a package for a test\n",
        "DEBIAN/conffiles": "/etc/vnd-demo.conf\n",
        "DEBIAN/postinst": f"#!/bin/sh\nset -e\necho {version} >> /srv/installed\n",
        "usr/bin/vnd-demo": f"#!/bin/sh\necho {version}\n",
        "etc/vnd-demo.conf": f"version {version}\n",
        f"usr/share/vnd-demo/{'old' if version == '1' else 'new'}": "x\n" * 5000,
    }
    for name, text in files.items():
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        (top / name).write_text(text)
        (top / name).chmod(0o755 if name.startswith("usr/bin") or name.endswith("postinst") else 0o644)
    deb = base / f"{version}.deb"
    subprocess.run(["dpkg-deb", "--root-owner-group", "-b", str(top), str(deb)], check=True, capture_output=True)
    return deb


@pytest.fixture(scope="module")
def rootfs(demo_image: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo image's tree, with two packages and a large file."""
    base = tmp_path_factory.mktemp("overlay")
    subprocess.run(
        ["umoci", "unpack", "--image", demo_image.removeprefix("oci:"), str(base / "bundle")],
        check=True,
        capture_output=True,
    )
    tree = base / "bundle" / "rootfs"
    write_big(tree / "big")
    for version, name in (("1", "one.deb"), ("2", "two.deb")):
        make_package(base, version).rename(tree / "opt" / name)
    (tree / "opt" / "tree_listing.py").write_bytes(LISTING.read_bytes())
    return tree


def parse(text: str) -> list[dict[str, dict[str, object]]]:
    """Per directory of LISTED: path -> record."""
    parts = [[json.loads(line) for line in part.splitlines()] for part in text.split("\n\n") if part.strip()]
    return [{record["path"]: record for record in part} for part in parts]


def test_the_hosts_upper_is_a_normal_one(rootfs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    subprocess.run(
        [*CLI, "build", str(rootfs), "--bootstrap", str(out / "image.boot"), "--blob-dir", str(out)],
        check=True,
        capture_output=True,
        cwd=ROOT,
    )
    keep = tmp_path / "uppers"
    done = launch(out, tmp_path, "go", keep, SCRIPT, "--memory", "768M", "--timeout", "500")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    copy_up_ms, _, listing = done.stdout.partition("\n")
    print(f"copy-up of {COPY_UP_MIB} MiB with sync: {copy_up_ms} ms")
    upper = keep / "c1" / "fs"
    assert (upper / "big").stat().st_size == (COPY_UP_MIB << 20) + 1
    same = subprocess.run(["cmp", "-n", str(COPY_UP_MIB << 20), str(upper / "big"), str(rootfs / "big")], check=False)
    assert same.returncode == 0

    # mounts end with the shell's namespace
    script = (
        'mount -t overlay overlay -o "lowerdir=$1,upperdir=$2,workdir=$3,index=off" "$4"; '
        f'for d in {" ".join(LISTED)}; do "$5" "$6" "$4/$d"; echo; done'
    )
    for name in ("work", "merged"):
        (tmp_path / name).mkdir()
    host = subprocess.run(
        [
            "unshare",
            "-m",
            "sh",
            "-ec",
            script,
            "sh",
            str(rootfs),
            str(upper),
            str(tmp_path / "work"),
            str(tmp_path / "merged"),
            sys.executable,
            str(LISTING),
        ],
        check=True,
        capture_output=True,
        text=True,
    )
    for name, seen, expected in zip(LISTED, parse(listing), parse(host.stdout), strict=True):
        if name == "etc":
            for file in POD_FILES:
                seen.pop(file, None)
                expected.pop(file, None)
        assert seen.keys() == expected.keys(), name
        assert seen == expected, [(seen[p], expected[p]) for p in seen if seen[p] != expected[p]][:3]
