"""`build`: one RAFS image from a directory or a tar."""

import argparse
import errno
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from virtiofsd_nydus.arguments import add_build_arguments
from virtiofsd_nydus.builder.options import BuildOptions
from virtiofsd_nydus.errors import Cause, Failure, UsageFailure

if TYPE_CHECKING:
    from rich.progress import Progress

    from virtiofsd_nydus.builder.dictionary import ChunkDictionary


def make_options(args: argparse.Namespace, *, oci_ref: bool = False) -> BuildOptions:
    return BuildOptions(
        fs_version=args.fs_version, compressor=args.compressor, digester=args.digester, chunk_size=args.chunk_size,
        compression_level=args.compression_level, batch_size=args.batch_size, aligned_chunk=args.aligned_chunk,
        encrypt=args.encrypt, oci_ref=oci_ref, prefetch_policy=args.prefetch_policy,
        prefetch_patterns=read_patterns(args), threads=args.threads,
    )  # fmt: skip


def read_patterns(args: argparse.Namespace) -> tuple[str, ...]:
    """The paths to prefetch. As nydus-image does, standard input is read where a policy asks for paths and none is
    given; a terminal is not waited for. Nothing at all stands for the whole tree."""
    if args.prefetch_policy == "none":
        if args.prefetch_files or args.prefetch_pattern:
            raise UsageFailure("paths to prefetch need --prefetch-policy fs or blob")
        return ("/",)
    found = list(args.prefetch_pattern or ())
    lines: list[bytes] = []
    if args.prefetch_files not in (None, "-"):
        try:
            lines = Path(args.prefetch_files).read_bytes().splitlines()
        except OSError as error:
            raise Failure(f"{args.prefetch_files}: {error.strerror}", Cause.IO) from error
    elif args.prefetch_files == "-" or (not found and sys.stdin is not None and not sys.stdin.isatty()):
        lines = sys.stdin.buffer.read().splitlines()
    found += [os.fsdecode(line.strip()) for line in lines if line.strip()]
    return tuple(dict.fromkeys(found)) or ("/",)


def load_chunk_dict(args: argparse.Namespace, options: BuildOptions) -> "ChunkDictionary | None":
    if args.chunk_dict is None:
        return None
    from virtiofsd_nydus.builder.dictionary import load_dictionary

    return load_dictionary(args.chunk_dict, options)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, metavar="SOURCE", help="directory, or tar (plain, gzip or zstd)")
    parser.add_argument("--bootstrap", type=Path, required=True, metavar="FILE", help="bootstrap to write")
    parser.add_argument("--blob-dir", type=Path, required=True, metavar="DIR", help="the blob becomes DIR/<blob id>")
    add_build_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> int:
    options = make_options(args)
    if not args.source.exists():
        raise Failure(f"{args.source}: no such file or directory", Cause.MISSING)
    start = time.monotonic()
    try:
        result = build_image(
            args.source,
            args.bootstrap,
            args.blob_dir,
            options,
            show_progress=not args.json,
            dictionary=load_chunk_dict(args, options),
        )
    except OSError as error:
        cause = Cause.SPACE if error.errno in (errno.ENOSPC, errno.EDQUOT) else Cause.IO
        raise Failure(f"{error.filename or args.blob_dir}: {error.strerror}", cause) from error
    result["seconds"] = round(time.monotonic() - start, 3)
    if args.json:
        print(json.dumps(result))
    else:
        _print_summary(result)
    return 0


def build_image(
    source: Path,
    bootstrap: Path,
    blob_dir: Path,
    options: BuildOptions,
    *,
    show_progress: bool = False,
    dictionary: "ChunkDictionary | None" = None,
) -> dict[str, object]:
    """Writes bootstrap and blob_dir/<blob id>; neither appears under its name before it is whole."""
    from virtiofsd_nydus.builder.image import LayerSource, build_layer, merge_layers
    from virtiofsd_nydus.rafs.spill import copy_pieces

    blob_dir.mkdir(parents=True, exist_ok=True)
    kind: Literal["dir", "tar"] = "dir" if source.is_dir() else "tar"
    with tempfile.NamedTemporaryFile(dir=blob_dir, prefix=".building-", delete=False, buffering=0) as out:
        temporary = Path(out.name)
        try:
            with _Progress(source, enabled=show_progress) as progress:
                layer = build_layer(
                    LayerSource(source, kind, str(source), progress.advance),
                    options=options,
                    out_blob=out,
                    dictionary=dictionary,
                )
            image = merge_layers([layer], options=options, dictionary=dictionary, keep_trees=False)
            if any(info.blob_id == layer.blob_id for info in image.blobs):
                temporary.chmod(0o644)
                temporary.replace(blob_dir / layer.blob_id)
        finally:
            temporary.unlink(missing_ok=True)
    partial = bootstrap.with_name(f".{bootstrap.name}.{os.getpid()}")
    try:
        with partial.open("wb") as file:
            copy_pieces(image.bootstrap, file.write)
        partial.replace(bootstrap)
    finally:
        partial.unlink(missing_ok=True)
    return {
        "bootstrap": str(bootstrap),
        "bootstrap_bytes": len(image.bootstrap),
        "blobs": [info.blob_id for info in image.blobs],
        "blob_bytes": layer.blob_size if layer.blob_info else 0,
        "names": image.stats.names,
        "inodes": image.stats.inodes,
        "files": layer.stats.files,
        "file_bytes": layer.stats.file_bytes,
        "chunks": image.stats.chunks,
        "unique_bytes": layer.stats.unique_bytes,
        "stored_bytes": layer.stats.stored_bytes,
        "deduplicated_bytes": layer.stats.deduplicated_bytes,
        "dictionary_bytes": layer.stats.dictionary_bytes,
        "dropped_xattrs": layer.stats.dropped_xattrs,
        "fs_version": options.fs_version,
        "compressor": options.compressor,
        "digester": options.digester,
    }


def transfer_bars(*, transient: bool = False) -> "Progress":
    """Bars on standard error: bytes of how many, their rate, the time left."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=transient,
    )


class _Progress:
    """A bar on a terminal, nothing elsewhere."""

    def __init__(self, source: Path, *, enabled: bool) -> None:
        self._bar = None
        if enabled and sys.stderr.isatty():
            self._bar = transfer_bars(transient=True)
            total = source.stat().st_size if source.is_file() else None
            self._task = self._bar.add_task(source.name, total=total)

    def advance(self, read_bytes: int) -> None:
        if self._bar is not None:
            self._bar.advance(self._task, read_bytes)

    def __enter__(self) -> "_Progress":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()


def _print_summary(result: dict[str, object]) -> None:
    rows = {key.replace("_", " "): value for key, value in result.items()}
    rows["blobs"] = ", ".join(result["blobs"]) or "none"  # type: ignore[arg-type]
    width = max(map(len, rows))
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table

        table = Table(show_header=False, box=None)
        for key, value in rows.items():
            table.add_row(key, str(value))
        Console().print(table)
        return
    for key, value in rows.items():
        print(f"{key:{width}}  {value}")
