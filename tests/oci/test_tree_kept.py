"""Trees and chunk tables that are kept and read again are the same."""

from pathlib import Path

from tests.builder.layers import make_layer
from tests.oci.conftest import LAYERS
from virtiofsd_nydus.oci.layerbuild import PLACED, make_form, read_layer
from virtiofsd_nydus.oci.shelf import KnownLayer, Shelf
from virtiofsd_nydus.rafs.tree import Tree

TEXT = "d etc mark\nf etc/a text\nl b -> etc/a\nh c = etc/a\nh below = usr/lower\nw etc/gone\no opaque\nc null\np pipe"


class Once:
    def __init__(self, data: bytes) -> None:
        self.data = data

    def read(self, size: int, /) -> bytes:
        out, self.data = self.data[:size], self.data[size:]
        return out


def listed(tree: Tree) -> list[tuple[object, ...]]:
    """Every name with all that is known of its node."""
    out: list[tuple[object, ...]] = []
    for path, node in tree.list_paths():
        attributes = tree.attributes(node)
        kind = tree.kind(node)
        extra: object = None
        if kind == 8:
            extra = (
                tree.size(node),
                list(tree.chunks(node)),
                [tree.table(node).record(one) for one in tree.chunks(node)],
            )
        elif kind in (0, 10):
            extra = tree.target(node)
        elif kind == 4:
            extra = tree.is_implied(node)
        out.append((path, attributes[:3], attributes[4:], tree.xattrs_at(attributes[3]), extra))
    return sorted(out, key=lambda one: str(one[0]))


def test_what_is_kept_is_what_was_read(tmp_path: Path) -> None:
    for number, data in enumerate((make_layer(TEXT), LAYERS[0])):
        digest = f"sha256:{number:064x}"
        made = read_layer(
            Once(data), kind=PLACED, hex_digest=digest[7:], size=len(data), form=make_form(1 << 20), label="a layer"
        )
        shelf = Shelf(tmp_path)
        known = KnownLayer(digest, len(data), made.diff_id, made.kind, 1 << 20, made.tree, made.table, made.info)
        shelf.save(known)
        found = shelf.load(digest)
        assert found is not None and listed(found.tree) == listed(made.tree)
        assert (found.tree.lower_links, found.diff_id, found.kind) == (made.tree.lower_links, made.diff_id, made.kind)
        assert found.tree.find_path(b"etc") == made.tree.find_path(b"etc") != 0
        assert (found.info is None) == (made.info is None)
        if found.info is not None and made.info is not None:
            assert found.info.compressed_size == made.info.compressed_size and len(found.table) == len(made.table)
