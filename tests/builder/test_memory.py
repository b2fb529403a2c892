"""Memory stays flat whatever the bytes of a layer, and bounded by its names."""

import json
import subprocess
import sys

import pytest

LIMIT_MIB = 300
BUILD = """
import json, os, sys, tarfile, threading
from virtiofsd_nydus.builder.image import BuildOptions, LayerSource, build_layer, merge_layers
from virtiofsd_nydus.rafs import spill

def feed(fd, files, size):
    noise = os.urandom(1 << 20)
    class Body:
        def __init__(self): self.turn = 0
        def read(self, count):
            self.turn += 1
            return (b"%016d" % self.turn + noise)[:count]
    with os.fdopen(fd, "wb") as out, tarfile.open(fileobj=out, mode="w|") as tar:
        for number in range(files):
            entry = tarfile.TarInfo(f"d{number // 1000}/file-{number}")
            entry.size = size
            tar.addfile(entry, Body())
            tar.members.clear()  # tarfile keeps every entry; the memory would count as the builder's

read_end, write_end = os.pipe()
files, size, options = int(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])
if len(sys.argv) > 4:  # as if the image were so large already
    spill.RESIDENT_BYTES = 0
threading.Thread(target=feed, args=(write_end, files, size), daemon=True).start()
with os.fdopen(read_end, "rb") as source, open("/dev/null", "wb", buffering=0) as out:
    options = BuildOptions(**options)
    layer = build_layer(LayerSource(source, "tar", "layer"), options=options, out_blob=out)
    merged = merge_layers([layer], options=options, keep_trees=False)
# Not getrusage's ru_maxrss: a child inherits that of the process that began it, so that pytest's own size would count.
with open("/proc/self/status") as status:
    peak_kib = next(int(line.split()[1]) for line in status if line.startswith("VmHWM:"))
print(json.dumps({"bytes": layer.stats.file_bytes, "peak_kib": peak_kib}))
"""


@pytest.mark.parametrize(("files", "size", "options"), [
    (2, 180 << 20, {"compressor": "none"}), (2, 180 << 20, {"compressor": "lz4_block", "chunk_size": 16 << 20}),
    (60_000, 9, {"batch_size": 65536}),
], ids=["large", "large chunks", "many"])  # fmt: skip
def test_memory_is_bounded(files: int, size: int, options: dict[str, object]) -> None:
    assert measure_peak_kib(files, size, options) < LIMIT_MIB << 10


@pytest.mark.parametrize("fs_version", [5, 6])
def test_an_inode_takes_little_memory(fs_version: int) -> None:
    """What is known of it lies in files (rafs/spill.py): 100 bytes each are 100 MB for a million, above the 45 MB of an
    empty image. In memory alone it would be 700."""
    options: dict[str, object] = {"fs_version": fs_version}
    few, many = (measure_peak_kib(files, 9, options, "spill") for files in (1_000, 80_000))
    assert (many - few) * 1024 / 79_000 < 150


def measure_peak_kib(files: int, size: int, options: dict[str, object], *words: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", BUILD, str(files), str(size), json.dumps(options), *words], capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["bytes"] == files * size
    return int(told["peak_kib"])
