"""The demo image holds what an image may hold; the equality test in the guest stands on that."""

import gzip
import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def layers() -> list[dict[str, tarfile.TarInfo]]:
    made = subprocess.run(
        [sys.executable, "scripts/make-demo-image.py"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    layout = Path(made.stdout.strip().removeprefix("oci:").rpartition(":")[0])

    def blob(digest: str) -> Path:
        return layout / "blobs" / Path(*digest.split(":"))

    index = json.loads((layout / "index.json").read_text())
    manifest = json.loads(blob(index["manifests"][0]["digest"]).read_text())
    found = []
    for layer in manifest["layers"]:
        data = gzip.decompress(blob(layer["digest"]).read_bytes())
        # umoci insert leaves its layer without padding and end
        with tarfile.open(fileobj=io.BytesIO(data + bytes(-len(data) % 512 + 1024))) as tar:
            found.append({member.name.removeprefix("./"): member for member in tar})
    return found


def test_three_layers_of_which_the_first_is_a_system(layers: list[dict[str, tarfile.TarInfo]]) -> None:
    assert len(layers) == 3
    assert "usr/bin/python3" in layers[0] and len(layers[0]) > 9000


def test_whiteouts_hide_what_is_there(layers: list[dict[str, tarfile.TarInfo]]) -> None:
    whiteouts = [name for name in layers[1] if "/.wh." in name]
    assert len(whiteouts) == 3
    assert all(name.replace(".wh.", "") in layers[0] for name in whiteouts)
    assert "usr/share/doc/.wh..wh..opq" in layers[2]
    assert len([name for name in layers[0] if name.startswith("usr/share/doc/")]) > 10


def test_kinds_of_entries(layers: list[dict[str, tarfile.TarInfo]]) -> None:
    odd = layers[1]
    assert [odd[name].linkname for name in ("demo/hard-link", "demo/other-hard-link")] == ["demo/original"] * 2
    assert odd["demo/null"].ischr() and (odd["demo/null"].devmajor, odd["demo/null"].devminor) == (1, 3)
    assert len(odd["demo/long-symlink"].linkname) > 3000
    assert {
        name.removeprefix("SCHILY.xattr.")
        for name in odd["demo/attributes"].pax_headers
        if name.startswith("SCHILY.xattr.")
    } == {"user.short", "user.long", "trusted.demo"}
    assert max(len(name.rpartition("/")[2]) for name in odd) == 255


def test_it_is_made_once(layers: list[dict[str, tarfile.TarInfo]]) -> None:
    index = ROOT / "build" / "demo" / "image" / "index.json"
    before = index.stat().st_mtime_ns
    subprocess.run([sys.executable, "scripts/make-demo-image.py"], cwd=ROOT, check=True, capture_output=True)
    assert index.stat().st_mtime_ns == before
