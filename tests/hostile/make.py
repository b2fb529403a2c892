"""Writes one file for each fault, named for it, beside a good image of either version.

python -m tests.hostile.make DIRECTORY
"""

import sys
from pathlib import Path

from tests.hostile.faults import FAULTS, Fault
from tests.hostile.images import ImageV5, ImageV6, build, write_source


def good_images(folder: Path) -> dict[int, Path]:
    """Bootstraps by RAFS version; their blobs are in blobs/ beside each."""
    folder.mkdir(parents=True)
    source = folder / "source.tar"
    write_source(source)
    return {version: build(source, folder / f"v{version}", fs_version=version) for version in (5, 6)}


def make_file(one: Fault, good: Path, to: Path) -> Path:
    image = (ImageV5 if one.version == 5 else ImageV6)(good)
    one.change(image)
    path = to / one.name
    path.write_bytes(image.bytes)
    return path


def main() -> int:
    folder = Path(sys.argv[1])
    good = good_images(folder / "good")
    for one in FAULTS:
        print(f"{make_file(one, good[one.version], folder)}: {one.kind}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
