"""`check`: is this image sound. Structure and bounds always; with --blob-dir every chunk of every blob's files is read
through the engine, which accepts nothing whose digest is wrong. Exit 1 with one line per fault."""

import argparse
import json
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from virtiofsd_nydus.errors import Cause, Failure, UsageFailure
from virtiofsd_nydus.rafs.reader import Bootstrap, Entry

TYPE_CHECKING = False
if TYPE_CHECKING:
    from virtiofsd_nydus.engine import Engine

READ_BYTES = 4 << 20
FAULTS_MAX = 1000
ERROR_LEVEL = 40


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
    parser.add_argument("bootstrap", type=Path, metavar="BOOTSTRAP", help="bootstrap, or a data blob that holds one")
    parser.add_argument("--blob-dir", type=Path, metavar="DIR", help="directory of the data blobs: read and verify all")
    parser.add_argument("--blob-id", metavar="ID", help="id of the blob, if the bootstrap was inlined in it")
    parser.add_argument("--allow-unverified", action="store_true",
                        help="read an image without chunk digests too: says only that its data can be decoded")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(args: argparse.Namespace) -> int:
    if args.blob_dir is not None and not args.blob_dir.is_dir():
        raise UsageFailure(f"--blob-dir {args.blob_dir}: no such directory")
    report = check_structure(args.bootstrap, args.blob_id)
    if args.blob_dir is not None and not report.faults:
        check_data(report, args.bootstrap, args.blob_dir, args.blob_id, args.allow_unverified)
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
        report.faults = image.check(FAULTS_MAX)
        if not report.faults:
            seen = set()
            for entry in image.walk():
                report.names += 1
                seen.add(entry.attr.ino)
            report.inodes = len(seen)
        return report


def check_data(report: Report, path: Path, blob_dir: Path, blob_id: str | None, allow_unverified: bool) -> None:
    """Reads every regular file once; each chunk's digest is checked on the way in. Fills the report."""
    report.chunks, report.bytes = 0, 0
    with opened_with_data(path, blob_dir, blob_id, allow_unverified) as image:
        report.faults += missing_blobs(image, blob_dir)
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


def missing_blobs(image: Bootstrap, blob_dir: Path) -> list[str]:
    """Said once, not for every file. A blob without chunks need not be there."""
    from virtiofsd_nydus.storage.localfs import LocalfsBackend

    backend = LocalfsBackend(str(blob_dir))
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


@contextmanager
def opened_with_data(path: Path, blob_dir: Path | None, blob_id: str | None = None, allow_unverified: bool = False, *,
                     backend: tuple[str, dict[str, Any]] | None = None) -> Iterator[Bootstrap]:
    """The image with its data, from blobs in a directory or a backend (type and settings), over a cache that is thrown
    away: nothing that an earlier run found good is taken for granted. What the engine has to say (a wrong digest, a
    missing blob) goes to stderr."""
    from virtiofsd_nydus.engine import Engine, Store
    from virtiofsd_nydus.storage.factory import create_backend
    from virtiofsd_nydus.storage.pump import FetchPump

    with tempfile.TemporaryDirectory(prefix="virtiofsd-nydus-check-") as work:
        engine = Engine(allow_unverified=allow_unverified)
        pump = FetchPump(engine)
        store: Store | None = None
        image: Bootstrap | None = None
        try:
            store = Store(engine, work)
            image = Bootstrap(path, blob_id=blob_id, engine=engine, store=store)
            kind, settings = backend or ("localfs", {"dir": str(blob_dir)})
            source = create_backend(kind, settings)
            for blob in image.blobs:
                pump.add_backend(blob.key, source)
            pump.start()
            yield image
        finally:
            say_events(engine)
            engine.shutdown()
            if not pump.join(10):
                raise Failure("a fetch thread does not end", Cause.IO)
            if image is not None:
                image.close()
            if store is not None:
                store.close()
            engine.close()


def say_events(engine: "Engine") -> None:
    """What is waiting in the engine's event queue, if it tells why something could not be read."""
    while (event := engine.next_event(0)) is not None:
        if event.level >= ERROR_LEVEL:
            print(event.text, file=sys.stderr)
