"""Layers merge as the OCI image specification says and as umoci unpacks them."""

import os
import random
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from tests.builder.layers import make_layer, write_layout
from tests.rafs.decoder import Blob, Bootstrap, Node, read_file
from tests.rafs.trees import build_tar, decode_image
from virtiofsd_nydus.builder.image import BuildOptions, merge_layers
from virtiofsd_nydus.errors import Cause, Failure

OPTIONS = BuildOptions(chunk_size=4096)

# name, layers, what must be there: path -> content, target, or "/" for a directory, with the layer whose owner it has
CASES = {
    "file replaced": (["f a one", "f a two"], {"a": ("two", 1)}),
    "file removed": (["d d\nf d/a one\nf d/b two", "w d/a"], {"d": ("/", 0), "d/b": ("two", 0)}),
    "directory removed": (["d d\nd d/e\nf d/e/a one", "w d"], {}),
    "removed and added again in one layer": (
        ["d d\nf d/a one", "w d\nd d\nf d/b two"], {"d": ("/", 1), "d/b": ("two", 1)}
    ),
    "whiteout after the new entry speaks of below": (["f a one", "f a two\nw a"], {"a": ("two", 1)}),
    "whiteout of what is not there": (["f a one", "w b"], {"a": ("one", 0)}),
    "opaque": (["d d\nf d/a one\nd d/s\nf d/s/x x", "o d\nf d/b two"], {"d": ("/", 0), "d/b": ("two", 1)}),
    "opaque behind its own content": (["d d\nf d/a one", "d d\nf d/b two\no d"], {"d": ("/", 1), "d/b": ("two", 1)}),
    "opaque root": (["d d\nf d/a one", "o \nf b two"], {"b": ("two", 1)}),
    "opaque does not reach the layer above": (
        ["f a one", "o \nf b two", "f a three"], {"a": ("three", 2), "b": ("two", 1)}
    ),
    "directory over directory keeps children": (["d d\nf d/a one", "d d"], {"d": ("/", 1), "d/a": ("one", 0)}),
    "file over directory": (["d d\nf d/a one", "f d two"], {"d": ("two", 1)}),
    "directory over file": (["f d one", "d d\nf d/a two"], {"d": ("/", 1), "d/a": ("two", 1)}),
    "symlink over directory": (["d d\nf d/a one", "l d -> e"], {"d": ("e", 1)}),
    "directory over symlink": (["d e\nl d -> e", "d d\nf d/a two"], {"e": ("/", 0), "d": ("/", 1), "d/a": ("two", 1)}),
    "implied parents keep the lower attributes": (
        ["d d\nd d/e", "f d/e/a two"], {"d": ("/", 0), "d/e": ("/", 0), "d/e/a": ("two", 1)}
    ),
    "the way leads through a symlink below": (
        ["d usr\nd usr/bin\nl bin -> usr/bin", "f bin/sh two"],
        {"usr": ("/", 0), "usr/bin": ("/", 0), "usr/bin/sh": ("two", 1), "bin": ("usr/bin", 0)},
    ),
    "the way leads through a symlink of the same layer": (
        ["d usr\nl lib -> /usr\nf lib/a one"], {"usr": ("/", 0), "usr/a": ("one", 0), "lib": ("/usr", 0)}
    ),
    "last of two entries wins": (["f a one\nf a two"], {"a": ("two", 0)}),
    "whiteout in the lowest layer": (["f a one\nw b\no "], {"a": ("one", 0)}),
    "device": (["c tty", "p tty"], {"tty": (None, 1)}),
}  # fmt: skip


def build(layers: list[str], options: BuildOptions = OPTIONS) -> tuple[Bootstrap, dict[str, Blob]]:
    made = [build_tar(make_layer(text, number), options) for number, text in enumerate(layers)]
    bootstrap, blobs = decode_image(made, options)
    return bootstrap, blobs


@pytest.mark.parametrize("name", CASES)
def test_merge(name: str) -> None:
    layers, expected = CASES[name]
    bootstrap, blobs = build(layers)
    found = {path[1:].decode(): node for path, node in bootstrap.walk().items() if path != b"/"}
    assert sorted(found) == sorted(expected)
    for path, (value, layer) in expected.items():
        node = found[path]
        assert node.uid == 100 * layer + 1, path
        if stat.S_ISDIR(node.mode):
            assert value == "/", path
        elif stat.S_ISLNK(node.mode):
            assert node.target == value.encode()
        elif stat.S_ISREG(node.mode):
            assert read_file(node, bootstrap, blobs) == value.encode(), path


def test_hard_links_count_the_names_that_survive() -> None:
    first = "d d\nf d/a one\nh d/b = d/a\nh c = d/a"
    bootstrap, _ = build([first])
    assert bootstrap.walk()[b"/c"].nlink == 3
    bootstrap, _ = build([first, "w d/a"])
    found = bootstrap.walk()
    assert found[b"/c"] is found[b"/d/b"] and found[b"/c"].nlink == 2
    bootstrap, blobs = build([first, "w d\nf e new\nh f = e"])
    found = bootstrap.walk()
    assert found[b"/c"].nlink == 1 and found[b"/e"] is found[b"/f"]
    assert read_file(found[b"/c"], bootstrap, blobs) == b"one"


LOWER_LINKS = {
    "to a file below": ["d d\nf d/a one\nh d/b = d/a", "h e = d/a\nh d/c = d/b\nd n\nh n/x = e"],
    "over two layers": ["f a one", "f b two", "h c = a\nh d = b", "h e = c"],
    "to a link of a link": ["f a one", "h b = a\nh c = b"],
    "beside a new file of the name": ["f a one\nf z old", "h b = a\nf z new", "h c = z"],
    "through a symlink below": ["d usr\nf usr/a one\nl lib -> usr", "h b = lib/a"],
    "to a symlink below": ["l a -> x", "h b = a"],
}


@pytest.mark.parametrize("name", LOWER_LINKS)
def test_hard_links_reach_into_the_layers_below(name: str, tmp_path: Path) -> None:
    layers = LOWER_LINKS[name]
    bootstrap, blobs = build(layers)
    found = bootstrap.walk()
    target = found[b"/d/a" if b"/d/a" in found else b"/usr/a" if b"/usr/a" in found else b"/a"]
    assert found[b"/b" if b"/d/b" not in found else b"/d/b"] is target or name == "over two layers"
    unpack_with_umoci(layers, tmp_path)
    assert describe_image(bootstrap, blobs) == describe_directory(tmp_path / "bundle/rootfs")


def test_hard_links_to_nothing_name_layer_and_target() -> None:
    layers = [build_tar(make_layer(text, number), OPTIONS)[0] for number, text in enumerate(("d d", "h b = d/a"))]
    with pytest.raises(Failure, match=r"^layer: b: hard link to d/a, which is neither in this layer nor below$"):
        merge_layers(layers, options=OPTIONS)
    layers = [build_tar(make_layer(text, number), OPTIONS)[0] for number, text in enumerate(("d d", "h b = d"))]
    with pytest.raises(Failure, match="hard link to d, which is a directory"):
        merge_layers(layers, options=OPTIONS)


def test_upper_xattrs_replace_the_lower() -> None:
    bootstrap, _ = build(["d d below\nd e below", "d d\nf e/x x"])
    found = bootstrap.walk()
    assert found[b"/d"].xattrs == {} and found[b"/e"].xattrs == {b"user.mark": b"below"}


def test_root_attributes_are_of_the_top_layer_that_has_them() -> None:
    bootstrap, _ = build(["d ./", "d ./", "f a x"])
    assert (bootstrap.root.uid, bootstrap.root.mode) == (101, stat.S_IFDIR | 0o754)


def test_equal_chunks_come_from_the_lowest_layer_that_is_used() -> None:
    big = "0123456789" * 2000
    bootstrap, blobs = build([f"f a {big}", f"f b {big}\nf c other"])
    found = bootstrap.walk()
    assert found[b"/a"].chunks == found[b"/b"].chunks
    assert {blob for blob, _, _ in found[b"/b"].chunks} == {0} and found[b"/c"].chunks[0][0] == 1
    assert read_file(found[b"/b"], bootstrap, blobs) == big.encode()


def test_blobs_without_a_file_left_are_dropped() -> None:
    texts = ["f a one", "f b two", "w a\nf c three"]
    layers = [build_tar(make_layer(text, number), OPTIONS) for number, text in enumerate(texts)]
    image = merge_layers([layer for layer, _ in layers], options=OPTIONS)
    assert [info.blob_id for info in image.blobs] == [layers[1][0].blob_id, layers[2][0].blob_id]
    assert image.unused_blob_ids == [layers[0][0].blob_id]
    bootstrap, blobs = decode_image(layers, OPTIONS)
    assert read_file(bootstrap.walk()[b"/c"], bootstrap, blobs) == b"three"


def test_equal_layers_share_one_blob() -> None:
    bootstrap, blobs = build(["f a one"])
    made = [build_tar(make_layer("f a one"), OPTIONS) for _ in range(3)]
    bootstrap, blobs = decode_image(made, OPTIONS)
    assert len(bootstrap.blobs) == 1
    assert read_file(bootstrap.walk()[b"/a"], bootstrap, blobs) == b"one"


def test_layers_can_be_merged_again() -> None:
    made = [build_tar(make_layer(text, n), OPTIONS)[0] for n, text in enumerate(["d d\nf d/a one", "w d/a\nf d/b two"])]
    once = bytes(merge_layers(made, options=OPTIONS).bootstrap)
    alone = merge_layers(made[:1], options=OPTIONS)
    assert b"/d/a" in Bootstrap(alone.bootstrap).walk()
    assert bytes(merge_layers(made, options=OPTIONS).bootstrap) == once


def test_a_layer_that_comes_twice() -> None:
    texts = ["d d\nf d/a one", "w d/a\nf d/b two"]
    one, two = (build_tar(make_layer(text, n), OPTIONS)[0] for n, text in enumerate(texts))
    want = bytes(merge_layers([one, two, one], options=OPTIONS).bootstrap)
    assert Bootstrap(want).walk().keys() == {b"/", b"/d", b"/d/a", b"/d/b"}
    assert bytes(merge_layers([one, two, one], options=OPTIONS, keep_trees=False).bootstrap) == want


def test_too_many_blobs_are_refused_in_one_line() -> None:
    made = [build_tar(make_layer(f"f a{n} {n}"), OPTIONS)[0] for n in range(255)]
    with pytest.raises(Failure, match="needs 255 blobs, RAFS v6 holds 254") as caught:
        merge_layers(made, options=OPTIONS)
    assert caught.value.cause is Cause.FORMAT
    assert len(Bootstrap(merge_layers(made[:254], options=OPTIONS).bootstrap).blobs) == 254


# ---- umoci


def make_random_layers(seed: int) -> list[str]:
    """Three layers that add, replace, remove and hide."""
    rng = random.Random(seed)
    names = ["a", "b", "c", "dir", "-x", "Z"]

    def path() -> str:
        return "/".join(rng.choice(names) for _ in range(rng.choice([1, 1, 2, 2, 3])))

    layers = []
    for number in range(3):
        kinds: dict[str, str] = {}
        lines: list[str] = []
        for _ in range(14):
            name = path()
            parents = [name[:at] for at, letter in enumerate(name) if letter == "/"]
            if any(kinds.get(parent, "d") != "d" for parent in parents) or name in kinds:
                continue
            if any(other.startswith(name + "/") for other in kinds):
                continue
            for parent in parents:
                if parent not in kinds:
                    kinds[parent] = "d"
                    lines.append(f"d {parent}")
            kind = rng.choice("ddffflhwo") if number else rng.choice("ddffflh")
            if kind == "o":
                kinds[name] = "d"
                lines += [f"d {name}", f"o {name}"]
                continue
            if kind == "h":
                files = [other for other, its in kinds.items() if its == "f"]
                if not files:
                    continue
                lines.append(f"h {name} = {rng.choice(files)}")
                kinds[name] = "h"
                continue
            kinds[name] = kind
            lines.append({"d": f"d {name}", "f": f"f {name} {name}-{number}", "l": f"l {name} -> {rng.choice(names)}",
                          "w": f"w {name}"}[kind])  # fmt: skip
        layers.append("\n".join(lines))
    return layers


def describe_directory(root: Path) -> dict[str, tuple[object, ...]]:
    found: dict[str, tuple[object, ...]] = {}
    for folder, dirs, files in os.walk(root):
        for name in dirs + files:
            full = Path(folder) / name
            status = full.lstat()
            path = str(full.relative_to(root))
            form = stat.S_IFMT(status.st_mode)
            value: object = None
            if form == stat.S_IFREG:
                value = full.read_bytes()
            elif form == stat.S_IFLNK:
                value = os.fsencode(full.readlink())
            links = status.st_nlink if form != stat.S_IFDIR else 0
            found[path] = (status.st_mode, status.st_uid, status.st_gid, status.st_mtime_ns, links, value)
    return found


def describe_image(bootstrap: Bootstrap, blobs: dict[str, Blob]) -> dict[str, tuple[object, ...]]:
    def describe(node: Node) -> tuple[object, ...]:
        form = stat.S_IFMT(node.mode)
        value: object = None
        if form == stat.S_IFREG:
            value = read_file(node, bootstrap, blobs)
        elif form == stat.S_IFLNK:
            value = node.target
        links = node.nlink if form != stat.S_IFDIR else 0
        return (node.mode, node.uid, node.gid, node.mtime_ns, links, value)

    return {path[1:].decode(): describe(node) for path, node in bootstrap.walk().items() if path != b"/"}


def unpack_with_umoci(layers: list[str], folder: Path) -> None:
    if shutil.which("umoci") is None or os.geteuid() != 0:
        pytest.skip("needs umoci and root")
    write_layout(folder / "layout", [make_layer(text, number) for number, text in enumerate(layers)])
    command = ["umoci", "unpack", "--image", f"{folder}/layout:test", str(folder / "bundle")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("seed", range(12))
def test_merge_equals_umoci(seed: int, tmp_path: Path) -> None:
    layers = make_random_layers(seed)
    unpack_with_umoci(layers, tmp_path)
    bootstrap, blobs = build(layers)
    assert describe_image(bootstrap, blobs) == describe_directory(tmp_path / "bundle/rootfs"), layers


def test_links_of_whiteouts_are_whiteouts() -> None:
    """AUFS made its whiteouts hard links of one file."""
    bootstrap, _ = build(["f a one\nf b two", "h .wh.a = .wh..wh.aufs"])
    assert sorted(bootstrap.walk()) == [b"/", b"/b"]
