"""`cache`: what lies in a cache directory, what of it is left over, and whether its bytes are right. Safe while daemons
use the directory. Exit 1 when `verify` finds a fault."""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from virtiofsd_nydus.arguments import add_reference_options
from virtiofsd_nydus.oci.serve import default_cache_dir, is_reference, resolve_arguments
from virtiofsd_nydus.storage.cachedir import BlobUse, CacheDir

OR_IMAGE = dict.fromkeys(("ls", "stat", "verify"), ", or an image: its blobs in --cache-dir alone")
ACTIONS = {
    "ls": "one line a blob: how much of it is here",
    "stat": "the whole directory's figures, or one blob's",
    "gc": "remove what is left over of blobs that are gone",
    "verify": "read all chunks that are here and check their digests",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    choices = parser.add_subparsers(dest="action", required=True, metavar="WHAT")
    for name, line in ACTIONS.items():
        sub = choices.add_parser(name, help=line, description=line, allow_abbrev=False)
        sub.add_argument("directory", metavar="DIR", help="cache directory (work_dir)" + OR_IMAGE.get(name, ""))
        if name in ("stat", "verify"):
            sub.add_argument("blob", nargs="?", metavar="ID", help="this blob alone; the first letters of its id do")
        if name == "gc":
            sub.add_argument("--dry-run", action="store_true", help="only tell what would be removed")
        sub.add_argument("--json", action="store_true", help="print JSON")
        if name in OR_IMAGE:
            add_reference_options(sub)


def run(args: argparse.Namespace) -> int:
    wanted: set[str] | None = None
    if args.action in OR_IMAGE and is_reference(args.directory):
        wanted, args.directory = (
            set(resolve_arguments(args.directory, args).blobs),
            args.cache_dir or default_cache_dir(),
        )
    cache = CacheDir(Path(args.directory), wanted)
    if args.action == "gc":
        return show_collected(cache, args)
    if args.action == "verify":
        return show_verdicts(cache, args)
    if args.action == "stat" and args.blob:
        uses_of = map(cache.use, cache.find(args.blob))
        found: list[dict[str, Any]] = [asdict(use) for use in uses_of if use is not None]
        if args.json:
            print(json.dumps(found[0] if len(found) == 1 else found))
        else:
            print("\n".join(f"{name}: {show(value)}" for one in found for name, value in one.items()))
        return 0
    uses = cache.uses()
    if args.action == "ls":
        print(json.dumps([asdict(one) for one in uses]) if args.json else "\n".join(map(format_use, uses)))
        return 0
    total = total_of(uses)
    print(json.dumps(total) if args.json else "\n".join(f"{name}: {show(value)}" for name, value in total.items()))
    return 0


def total_of(uses: list[BlobUse]) -> dict[str, int]:
    return {
        "blobs": len(uses),
        "size_bytes": sum(one.size_bytes for one in uses),
        "disk_bytes": sum(one.disk_bytes for one in uses),
        "chunks": sum(one.chunks or 0 for one in uses),
        "trusted": sum(one.trusted or 0 for one in uses),
        "durable": sum(one.durable or 0 for one in uses),
        "marked": sum(one.marked or 0 for one in uses),
    }


def show(value: object) -> str:
    return "unknown" if value is None else str(value)


def format_use(use: BlobUse) -> str:
    kind = " compressed" if use.compressed else ""
    return (
        f"{use.id}  {use.disk_bytes} bytes here of {use.size_bytes}{kind}, chunks {show(use.trusted)} trusted "
        f"{show(use.marked)} marked of {show(use.chunks)}"
    )


def show_collected(cache: CacheDir, args: argparse.Namespace) -> int:
    gone = [str(one) for one in cache.collect(dry_run=args.dry_run)]
    if args.json:
        print(json.dumps({"removed": gone, "dry_run": args.dry_run}))
    elif gone:
        print("\n".join(gone))
    return 0


def show_verdicts(cache: CacheDir, args: argparse.Namespace) -> int:
    verdicts = [cache.verify(one) for one in (cache.find(args.blob) if args.blob else cache.kept())]
    if args.json:
        print(json.dumps([asdict(one) for one in verdicts]))
    for one in verdicts:
        for fault in one.faults:
            print(f"blob {one.id}: {fault}; remove its files, they are fetched again", file=sys.stderr)
        if not args.json:
            unknown = f", {one.unknown} without a known digest" if one.unknown else ""
            print(f"{one.id}  {one.right} chunks, {one.bytes} bytes verified{unknown}, {len(one.faults)} wrong")
    return 1 if any(one.faults for one in verdicts) else 0
