"""Where the image of a verb that reads images is: a bootstrap file with its blobs, or what a reference leads to."""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from virtiofsd_nydus.errors import UsageFailure
from virtiofsd_nydus.oci.serve import is_reference, resolve_arguments
from virtiofsd_nydus.reader.data import Source, choose_source


@dataclass(frozen=True)
class Located:
    """source: of the blobs; None: not told. work_dir: the cache that a plain image's first reading has filled, "": the
    verb makes one of its own. name: as the person wrote it."""

    bootstrap: Path
    source: Source | None
    work_dir: str = ""
    name: str = ""


def locate(args: argparse.Namespace) -> Located:
    """Of the flags of arguments.add_data_arguments. Raises Failure."""
    if not is_reference(args.bootstrap):
        return Located(Path(args.bootstrap), choose_source(args.blob_dir, args.config), name=args.bootstrap)
    if args.blob_dir or args.config or args.blob_id:
        raise UsageFailure("--blob-dir, --config and --blob-id go with a bootstrap file, not with a reference")
    found = resolve_arguments(args.bootstrap, args, lambda line: print(line, file=sys.stderr))
    place = found.backend_config()
    source = Source(place["type"], place["config"])
    work_dir = str(found.bootstrap.parent.parent.parent) if found.plain else ""
    return Located(found.bootstrap, source, work_dir, args.bootstrap)
