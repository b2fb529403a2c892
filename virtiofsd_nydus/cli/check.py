"""`check`: is this image sound. Structure and bounds always; with --blob-dir or --config, and of a reference, every
chunk of every file is read through the engine, which accepts nothing whose digest is wrong. Exit 1 with one line per
fault."""

import argparse
import json
import stat
import sys
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path

from virtiofsd_nydus.arguments import add_data_arguments
from virtiofsd_nydus.errors import Failure
from virtiofsd_nydus.oci.locate import Located, locate
from virtiofsd_nydus.reader.bootstrap import Bootstrap, Entry
from virtiofsd_nydus.reader.data import Source, opened_with_data
from virtiofsd_nydus.reader.digests import list_wrong_digests

READ_BYTES = 4 << 20
FAULTS_MAX = 1000


@dataclass
class Report:
    """What `check` found. bytes and chunks are those verified by reading, None where nothing was read."""

    bootstrap: str
    fs_version: int
    names: int = 0
    inodes: int = 0
    blobs: int = 0
    chunks: int | None = None
    bytes: int | None = None
    faults: list[str] = field(default_factory=list)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_data_arguments(parser, "read and verify all of it")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(args: argparse.Namespace) -> int:
    image = locate(args)
    report = check_structure(image.bootstrap, args.blob_id)
    report.bootstrap = image.name
    if image.source is not None and not report.faults:
        check_data(report, image, args.blob_id, args.allow_unverified)
    if args.json:
        print(json.dumps(asdict(report)))
    else:
        print_report(report)
    return 1 if report.faults else 0


def print_report(report: Report) -> None:
    for fault in report.faults:
        print(f"{report.bootstrap}: {fault}", file=sys.stderr)
    if report.faults:
        return
    line = f"RAFS v{report.fs_version}: {report.names} names, {report.inodes} inodes, {report.blobs} blobs"
    if report.chunks is not None:
        line += f"; {report.chunks} chunks, {report.bytes} bytes verified"
    print(f"{line}: sound")


def check_structure(path: Path, blob_id: str | None = None) -> Report:
    """The walk by the engine, then the counts."""
    with Bootstrap(path, blob_id=blob_id) as image:
        report = Report(str(path), image.info.fs_version, blobs=image.info.blob_count)
        report.faults = list_faults(image, FAULTS_MAX)
        if not report.faults:
            seen = set()
            for entry in image.walk():
                report.names += 1
                seen.add(entry.attr.ino)
            report.inodes = len(seen)
        return report


def list_faults(image: Bootstrap, max_faults: int) -> list[str]:
    """What the engine's walk finds; of RAFS v5, where the walk finds nothing, the wrong digests of inodes."""
    lines = image.check(max_faults)
    if not lines and image.info.fs_version == 5:
        lines = list(islice(list_wrong_digests(image), max_faults))
    return lines


def check_data(report: Report, located: Located, blob_id: str | None, allow_unverified: bool) -> None:
    """Reads every regular file once; each chunk's digest is checked on the way in. Fills the report."""
    report.chunks, report.bytes = 0, 0
    source = located.source
    assert source is not None
    with opened_with_data(located.bootstrap, source, blob_id, allow_unverified, located.work_dir) as image:
        report.faults += missing_blobs(image, source)
        if report.faults:
            return
        done: set[int] = set()
        chunks: set[tuple[int, int]] = set()
        for entry in image.walk():
            if stat.S_ISREG(entry.attr.mode) and entry.attr.ino not in done:
                done.add(entry.attr.ino)
                report.bytes += read_file(report, image, entry)
                chunks.update((c.blob_index, c.chunk_index) for c in image.chunks(entry.attr.ino))
                if len(report.faults) >= FAULTS_MAX:
                    break
        report.chunks = len(chunks)


def missing_blobs(image: Bootstrap, source: Source) -> list[str]:
    """Said once, not for every file. A blob without chunks need not be there."""
    backend = source.create_backend()
    faults = []
    for blob in image.blobs:
        if blob.chunk_count:
            try:
                backend.blob_size(blob.id)
            except Failure as failure:
                faults.append(str(failure))
    backend.close()
    return faults


def read_file(report: Report, image: Bootstrap, entry: Entry) -> int:
    """Bytes read; a failure is a fault of the report."""
    off, size = 0, entry.attr.size_bytes
    while off < size:
        try:
            got = len(image.read(entry.attr.ino, off, min(READ_BYTES, size - off)))
        except OSError as error:
            report.faults.append(f"{entry.path}: bytes from {off} on cannot be had: {error.strerror}")
            return off
        if not got:
            report.faults.append(f"{entry.path}: ends at {off} of {size} bytes")
            return off
        off += got
    return off
