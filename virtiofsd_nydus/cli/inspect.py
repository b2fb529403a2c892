"""`inspect`: what a bootstrap says: superblock, blobs, prefetch table; with options the tree, or one file's chunks."""

import argparse
import json
import os
import stat
import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from virtiofsd_nydus.arguments import IMAGE_HELP, add_reference_options
from virtiofsd_nydus.cli.unpack import read_time
from virtiofsd_nydus.errors import Cause, Failure
from virtiofsd_nydus.oci.locate import locate
from virtiofsd_nydus.rafs.layout import BlobFeature, SuperFlag

if TYPE_CHECKING:
    from virtiofsd_nydus.reader.bootstrap import Bootstrap, Entry

COMPRESSORS = {0: "none", 1: "lz4_block", 2: "gzip", 3: "zstd"}
DIGESTERS = {0: "blake3", 1: "sha256"}
KINDS = {
    stat.S_IFREG: "file", stat.S_IFDIR: "directory", stat.S_IFLNK: "symlink", stat.S_IFCHR: "character device",
    stat.S_IFBLK: "block device", stat.S_IFIFO: "FIFO", stat.S_IFSOCK: "socket",
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bootstrap", metavar="IMAGE", help=f"{IMAGE_HELP}, or a data blob that holds one")
    parser.set_defaults(blob_dir=None, config=None)
    add_reference_options(parser)
    parser.add_argument("--blob-id", metavar="ID", help="id of the blob, if the bootstrap was inlined in it")
    parser.add_argument("--tree", action="store_true", help="list every name")
    parser.add_argument("--file", metavar="PATH", help="tell all of one entry, the chunks of a file among it")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    from virtiofsd_nydus.reader.bootstrap import Bootstrap

    located = locate(args)
    with Bootstrap(located.bootstrap, blob_id=args.blob_id) as image:
        try:
            if args.file is not None:
                found = describe_file(image, args.file)
                print(json.dumps(found, indent=2) if args.json else "\n".join(format_file(found)))
                return 0
            if args.json:
                value = describe_image(image)
                if args.tree:
                    value["tree"] = [describe_entry(image, entry) for entry in image.walk()]
                print(json.dumps(value, indent=2))
                return 0
            if not args.tree:
                print("\n".join(format_image(describe_image(image))))
                return 0
            for entry in image.walk():
                print(format_entry(describe_entry(image, entry)))
        except BrokenPipeError:  # `inspect ... | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        except OSError as error:
            raise Failure(f"{args.bootstrap}: the image is malformed ({error.strerror}); `check` tells where",
                          Cause.FORMAT) from error  # fmt: skip
    return 0


def name_flags(kind: type[SuperFlag] | type[BlobFeature], value: int) -> list[str]:
    """Names of the bits set; a bit without a name in hexadecimal."""
    names = [str(flag.name).lower() for flag in kind if value & flag]
    rest = value & ~sum(kind)
    return [*names, hex(rest)] if rest else names


def describe_image(image: "Bootstrap") -> dict[str, Any]:
    """Superblock, blob table and prefetch table, with paths for inodes."""
    superblock: dict[str, Any] = asdict(image.info)
    superblock["flag_names"] = name_flags(SuperFlag, image.info.flags)
    blobs = [
        {
            "index": blob.index, "id": blob.id, "chunk_count": blob.chunk_count,
            "compressor": COMPRESSORS.get(blob.compressor, str(blob.compressor)),
            "digester": DIGESTERS.get(blob.digester, str(blob.digester)), "chunk_size_bytes": blob.chunk_size_bytes,
            "features": blob.features, "feature_names": name_flags(BlobFeature, blob.features),
            "compressed_size_bytes": blob.compressed_size_bytes,
            "uncompressed_size_bytes": blob.uncompressed_size_bytes, "ci_offset": blob.ci_offset,
            "ci_csize_bytes": blob.ci_csize_bytes, "ci_usize_bytes": blob.ci_usize_bytes,
            "ci_compressor": COMPRESSORS.get(blob.ci_compressor, str(blob.ci_compressor)),
        }
        for blob in image.blobs
    ]  # fmt: skip
    wanted = image.prefetch()
    return {"bootstrap": image.path, "superblock": superblock, "blobs": blobs,
            "prefetch": [{"ino": ino, "path": path} for ino, path in _find_paths(image, wanted)]}  # fmt: skip


def _find_paths(image: "Bootstrap", inos: list[int]) -> Iterator[tuple[int, str | None]]:
    """Each inode with one of its paths; the tree is walked only as far as it takes."""
    missing, paths = set(inos), {}
    if missing:
        for entry in image.walk():
            if entry.attr.ino in missing:
                paths[entry.attr.ino] = entry.path
                missing.discard(entry.attr.ino)
                if not missing:
                    break
    for ino in inos:
        yield ino, paths.get(ino)


def describe_entry(image: "Bootstrap", entry: "Entry") -> dict[str, Any]:
    attr = entry.attr
    value: dict[str, Any] = {
        "path": entry.path, "ino": attr.ino, "kind": KINDS.get(stat.S_IFMT(attr.mode), "unknown"), "mode": attr.mode,
        "uid": attr.uid, "gid": attr.gid, "size_bytes": attr.size_bytes, "nlink": attr.nlink,
        "mtime_ns": read_time(attr),
    }  # fmt: skip
    if stat.S_ISLNK(attr.mode):
        value["target"] = image.readlink(attr.ino)
    if stat.S_ISCHR(attr.mode) or stat.S_ISBLK(attr.mode):
        value["device"] = [os.major(attr.os_device), os.minor(attr.os_device)]
    return value


def describe_file(image: "Bootstrap", path: str) -> dict[str, Any]:
    from virtiofsd_nydus.reader.bootstrap import Entry

    try:
        ino = image.resolve(path)
    except (FileNotFoundError, NotADirectoryError):
        raise Failure(f"{image.path}: no {path} in the image", Cause.MISSING) from None
    attr = image.getattr(ino)
    value = describe_entry(image, Entry(path, attr))
    value["xattrs"] = {name: data.hex() for name, data in image.xattrs(ino).items()}
    if stat.S_ISREG(attr.mode):
        value["chunks"] = [
            {**asdict(chunk), "digest": chunk.digest.hex() if chunk.digest is not None else None}
            for chunk in image.chunks(ino)
        ]
    elif stat.S_ISDIR(attr.mode):
        value["names"] = [entry.name for entry in image.listdir(ino)]
    return value


def show(text: str) -> str:
    """A name on one line of a terminal, whatever bytes it holds."""
    return text if text.isprintable() else ascii(text)[1:-1]


def format_entry(entry: dict[str, Any]) -> str:
    line = (f"{stat.filemode(entry['mode'])} {entry['nlink']:3} {entry['uid']:5} {entry['gid']:5} "
            f"{entry['size_bytes']:10} {show(entry['path'])}")  # fmt: skip
    if "target" in entry:
        line += f" -> {show(entry['target'])}"
    if "device" in entry:
        line += f" ({entry['device'][0]}:{entry['device'][1]})"
    return line


def format_file(entry: dict[str, Any]) -> Iterator[str]:
    yield format_entry(entry)
    for name, value in entry["xattrs"].items():
        yield f"xattr {show(name)} = {value}"
    for name in entry.get("names", ()):
        yield f"name {show(name)}"
    for chunk in entry.get("chunks", ()):
        yield (f"chunk at {chunk['file_off']}: blob {chunk['blob_index']} chunk {chunk['chunk_index']}, "
               f"{chunk['csize_bytes']} bytes at {chunk['coff']} -> {chunk['usize_bytes']} at {chunk['uoff']}, "
               f"{chunk['digest'] or 'no digest'}")  # fmt: skip


def format_image(value: dict[str, Any]) -> Iterator[str]:
    info = value["superblock"]
    yield (f"RAFS v{info['fs_version']}, {info['inode_count']} inodes, chunks of {info['chunk_size_bytes']} bytes, "
           f"{info['blob_count']} blobs")  # fmt: skip
    yield f"flags {info['flags']:#x}: {', '.join(info['flag_names'])}"
    for name in ("blob", "chunk", "prefetch"):
        yield f"{name} table: {info[f'{name}_table_size_bytes']} bytes at {info[f'{name}_table_offset']}"
    for blob in value["blobs"]:
        yield (
            f"blob {blob['index']}: {blob['id']}, {blob['chunk_count']} chunks, {blob['compressor']}, "
            f"{blob['digester']}, {blob['compressed_size_bytes']} bytes -> {blob['uncompressed_size_bytes']}"
        )
        yield f"  features {blob['features']:#x}: {', '.join(blob['feature_names'])}"
        if blob["ci_usize_bytes"]:
            yield (f"  blob.meta: {blob['ci_csize_bytes']} bytes at {blob['ci_offset']} ({blob['ci_compressor']}) -> "
                   f"{blob['ci_usize_bytes']}")  # fmt: skip
    for one in value["prefetch"]:
        yield f"prefetch inode {one['ino']}: {show(one['path']) if one['path'] else 'not in the tree'}"
