"""`bootstrap get IMAGE FILE`: the file that serves an image, for what wants one: another program, an older script."""

import argparse
import shutil
from pathlib import Path

from virtiofsd_nydus.arguments import add_reference_options
from virtiofsd_nydus.errors import Cause, Failure
from virtiofsd_nydus.oci.serve import resolve_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    choices = parser.add_subparsers(dest="action", required=True, metavar="WHAT")
    line = "write the bootstrap of an image"
    sub = choices.add_parser("get", help=line, description=line, allow_abbrev=False)
    sub.add_argument("image", metavar="IMAGE", help="docker://HOST[:PORT]/NAME[:TAG|@DIGEST], oci:DIR[:TAG], ...")
    sub.add_argument("file", type=Path, metavar="FILE", help="where to")
    add_reference_options(sub)


def run(args: argparse.Namespace) -> int:
    found = resolve_arguments(args.image, args)
    partial = args.file.with_name(f".{args.file.name}.new")
    try:
        shutil.copyfile(found.bootstrap, partial)
        for beside in found.bootstrap.parent.glob("*.blob.meta") if found.plain else ():
            if beside.name.partition(".")[0] in found.blobs:
                shutil.copyfile(beside, args.file.parent / beside.name)
        partial.replace(args.file)
    except OSError as error:
        raise Failure(f"cannot write {args.file}: {error.strerror}", Cause.IO) from error
    finally:
        partial.unlink(missing_ok=True)
    print(f"{args.file}: bootstrap {found.bootstrap_digest} of {args.image}")
    return 0
