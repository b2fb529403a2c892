"""Running scripts/kata-launch, as its users do."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from virtiofsd_nydus.vmm.qemu import GuestFiles

ROOT = Path(__file__).resolve().parents[2]
CLI = [sys.executable, "-m", "virtiofsd_nydus.cli.main"]
LAUNCH_SECONDS = 200


@pytest.fixture(scope="session")
def demo_image() -> str:
    """The demo image as an OCI layout: kept in build/, made when it is not there."""
    return subprocess.run(
        [sys.executable, "scripts/make-demo-image.py"], check=True, capture_output=True, text=True, cwd=ROOT
    ).stdout.strip()


def launch(
    image: Path, base: Path, layout: str, keep: Path, script: str, *options: str
) -> subprocess.CompletedProcess[str]:
    """Both containers of scripts/kata-launch run the script. image: a directory with image.boot and its blobs; base:
    where the cache may lie; keep: what the containers wrote, c1/fs and c2/fs."""
    if os.geteuid() != 0:
        pytest.skip("mounts need root")
    GuestFiles.find(busybox=True)
    return subprocess.run(
        [
            sys.executable,
            str(ROOT / "scripts" / "kata-launch"),
            str(image / "image.boot"),
            "--blob-dir",
            str(image),
            "--cache-dir",
            str(base / "cache"),
            "--layout",
            layout,
            "--keep-upper",
            str(keep),
            *options,
            "--",
            "/bin/sh",
            "-ec",
            script,
        ],
        capture_output=True,
        text=True,
        timeout=LAUNCH_SECONDS * 3,
        env={**os.environ, "VENV": sys.prefix},
        check=False,
    )
