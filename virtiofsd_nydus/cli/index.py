"""`index push IMAGE`: what this node knows of a plain image, put beside it for other nodes. `index pull IMAGE`: fetched
ahead of the first start. The image itself is not touched."""

import argparse
import json
import sys
from pathlib import Path

from virtiofsd_nydus.arguments import add_reference_options
from virtiofsd_nydus.errors import Cause, Failure
from virtiofsd_nydus.oci.serve import access_of, default_cache_dir, resolve_arguments

ACTIONS = {
    "push": "put what this node knows of an OCI image beside it, as an artifact that other nodes find",
    "pull": "get ready to serve an image: by an index that lies beside it, else by reading its layers",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    choices = parser.add_subparsers(dest="action", required=True, metavar="WHAT")
    for name, line in ACTIONS.items():
        sub = choices.add_parser(name, help=line, description=line, allow_abbrev=False)
        sub.add_argument("image", metavar="IMAGE", help="docker://HOST[:PORT]/NAME[:TAG|@DIGEST] or oci:DIR[:TAG]")
        if name == "push":
            sub.add_argument("--sign-key", type=Path, metavar="PEM", help="sign the index by this private key")
        sub.add_argument("--json", action="store_true", help="print JSON")
        add_reference_options(sub)


def run(args: argparse.Namespace) -> int:
    found = resolve_arguments(args.image, args, lambda line: print(line, file=sys.stderr))
    told = {
        "image": args.image,
        "manifest": found.manifest_digest,
        "bootstrap": str(found.bootstrap),
        "fetched_bytes": found.read_bytes,
    }
    if args.action == "push":
        if not found.plain:
            raise Failure(f"{args.image} is a Nydus image: it carries its index itself", Cause.FORMAT)
        told["index"] = _push(args, found)
    if args.json:
        print(json.dumps(told))
    else:
        print("\n".join(f"{name}: {value}" for name, value in told.items()))
    return 0


def _push(args: argparse.Namespace, found: "ServedImage") -> str:
    from virtiofsd_nydus.oci.image import open_store
    from virtiofsd_nydus.oci.index import push_index
    from virtiofsd_nydus.oci.plain import SHELF_DIR
    from virtiofsd_nydus.oci.reference import ARCHIVES
    from virtiofsd_nydus.oci.shelf import Shelf
    from virtiofsd_nydus.oci.signatures import sign_manifest

    if found.reference.transport in ARCHIVES:
        raise Failure(f"{args.image}: an archive can be a source only", Cause.FORMAT)
    assert found.manifest is not None
    store = open_store(found.reference, access_of(args))
    try:
        shelf = Shelf(Path(args.cache_dir or default_cache_dir()) / SHELF_DIR)
        artifact = push_index(store, found.manifest, shelf, found.key)
        if args.sign_key:
            sign_manifest(store, artifact, found.reference.name, args.sign_key)
    finally:
        store.close()
    return artifact.digest


TYPE_CHECKING = False
if TYPE_CHECKING:
    from virtiofsd_nydus.oci.image import ServedImage
