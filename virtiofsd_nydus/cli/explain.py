"""`explain trust IMAGE`: why the bytes that a guest reads are those that the signer meant, link by link. Exit 1 where a
link does not hold, which the message names."""

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

from virtiofsd_nydus.arguments import add_reference_options
from virtiofsd_nydus.oci.serve import resolve_arguments

if TYPE_CHECKING:
    from virtiofsd_nydus.oci.image import ServedImage


def add_arguments(parser: argparse.ArgumentParser) -> None:
    choices = parser.add_subparsers(dest="action", required=True, metavar="WHAT")
    line = "the chain from a signature to the bytes that are served"
    sub = choices.add_parser("trust", help=line, description=line, allow_abbrev=False)
    sub.add_argument("image", metavar="IMAGE", help="docker://HOST[:PORT]/NAME[:TAG|@DIGEST], oci:DIR[:TAG], ...")
    sub.add_argument("--json", action="store_true", help="print JSON")
    add_reference_options(sub)


def run(args: argparse.Namespace) -> int:
    found = resolve_arguments(args.image, args, lambda line: print(line, file=sys.stderr))
    links = list(explain(found))
    if args.json:
        print(json.dumps([{"link": name, **more} for name, _, more in links]))
    else:
        for name, line, _ in links:
            print(f"{name + ':':10} {line}")
    return 0


def explain(found: "ServedImage") -> "list[tuple[str, str, dict[str, Any]]]":
    """Name, sentence and facts of each link. All of them were checked when the image was resolved."""
    from virtiofsd_nydus.oci.toc import has_table
    from virtiofsd_nydus.reader.bootstrap import Bootstrap

    links: list[tuple[str, str, dict[str, Any]]] = []
    for one in found.signed:
        links.append(
            (
                "signature",
                f"{one.key} signed {one.digest} (in {one.place}), calling it {one.reference}",
                {"key": one.key, "digest": one.digest, "place": one.place, "reference": one.reference},
            )
        )
    if not found.signed:
        why = "none is asked for: the registry is believed" if not found.reference.digest else "none is asked for"
        links.append(("signature", f"{why} (--verify-key, --policy)", {"digest": ""}))
    by = "named in the reference" if found.reference.digest else "what the tag names"
    for number, digest in enumerate(found.chain):
        name = "manifest" if number + 1 == len(found.chain) else "index"
        links.append((name, f"{digest}, {by}", {"digest": digest}))
        by = "named by the index"
    manifest = found.manifest
    assert manifest is not None
    if found.plain:
        for layer in manifest.layers:
            if has_table(layer):
                how = "its table of contents is the one that the manifest names; chunks are compared with the table"
            else:
                how = "its bytes were compared with the digest when it was read on this node, or an index speaks for it"
            links.append(("layer", f"{layer.digest}: {how}", {"digest": layer.digest}))
        links.append(("bootstrap", f"{found.bootstrap_digest}, made of the layers", {"digest": found.bootstrap_digest}))
    else:
        layer_digest = found.bootstrap_layer_digest
        links.append(("layer", f"{layer_digest}, named by the manifest, holds the bootstrap", {"digest": layer_digest}))
        links.append(
            ("bootstrap", f"{found.bootstrap_digest}, taken out of that layer", {"digest": found.bootstrap_digest})
        )
    with Bootstrap(found.bootstrap) as image:
        chunks = sum(blob.chunk_count for blob in image.blobs)
        kinds = sorted({"blake3" if blob.digester == 0 else "sha256" for blob in image.blobs})
    links.append(
        (
            "chunks",
            f"{chunks} chunks of {len(found.blobs)} blobs, each with its digest ({', '.join(kinds) or 'none'}) in the "
            "bootstrap",
            {"count": chunks, "digesters": kinds},
        )
    )
    links.append(("bytes", "compared with the chunk's digest before they are served", {}))
    return links
