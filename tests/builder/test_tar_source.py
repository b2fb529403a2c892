"""Tars of every make, and tars that mean harm."""

import gzip
import io
import os
import shutil
import stat
import struct
import subprocess
import tarfile
from pathlib import Path

import pytest
import zstandard

from tests.builder.layers import make_layer
from tests.rafs.decoder import read_file
from tests.rafs.trees import build_tar, check_tree, decode_image, make_tree, write_tar
from virtiofsd_nydus.builder.image import BuildOptions, LayerSource, build_layer, merge_layers
from virtiofsd_nydus.errors import Cause, Failure

OPTIONS = BuildOptions(chunk_size=4096)
SAMPLES = Path(os.environ.get("NYDUS_SAMPLES", Path(__file__).parents[2].parent / "shared/samples"))


def build_and_decode(data: bytes) -> dict[str, tuple[int, object]]:
    """Path -> mode and content or target."""
    bootstrap, blobs = decode_image([build_tar(data, OPTIONS)], OPTIONS)
    found: dict[str, tuple[int, object]] = {}
    for path, node in bootstrap.walk().items():
        value: object = read_file(node, bootstrap, blobs) if stat.S_ISREG(node.mode) else None
        found[os.fsdecode(path)] = (node.mode, node.target if stat.S_ISLNK(node.mode) else value)
    return found


Member = tuple[tarfile.TarInfo, bytes]


def member(name: str, kind: bytes = tarfile.REGTYPE, data: bytes = b"", **more: object) -> Member:
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, len(data)
    for key, value in more.items():
        setattr(info, key, value)
    return info, data


def make_tar(*members: Member, format: int = tarfile.PAX_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format) as tar:
        for info, data in members:
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def refuse(data: bytes, match: str) -> None:
    with pytest.raises(Failure, match=match) as caught:
        build_tar(data, OPTIONS)
    assert caught.value.cause is Cause.FORMAT
    assert str(caught.value).startswith("layer: ") and "\n" not in str(caught.value)


def skippable(data: bytes) -> bytes:
    return struct.pack("<II", 0x184D2A5E, len(data)) + data


@pytest.mark.parametrize(
    "pack", ["plain", "gzip", "gzip members", "zstd", "zstd frames", "zstd skippable", "zero padded gzip"]
)
def test_compression_is_told_by_the_first_bytes(pack: str) -> None:
    tree = make_tree(9, 4096)
    data = write_tar(tree)
    half = len(data) // 2
    zstd = zstandard.ZstdCompressor()
    packed = {
        "plain": data,
        "gzip": gzip.compress(data, 1),
        "gzip members": gzip.compress(data[:half], 1) + gzip.compress(data[half:], 1) + gzip.compress(b""),
        "zstd": zstd.compress(data),
        "zstd frames": zstd.compress(data[:half]) + zstd.compress(data[half:]),
        # a frame of no data before, between and behind: pzstd, zstd --seekable, zstd:chunked
        "zstd skippable": skippable(b"")
        + zstd.compress(data[:half])
        + skippable(b"x" * 5000)
        + zstd.compress(data[half:])
        + skippable(b"table"),
        "zero padded gzip": gzip.compress(data, 1) + bytes(700),
    }[pack]
    layer = build_tar(packed, OPTIONS)
    assert layer[1] == build_tar(data, OPTIONS)[1]
    check_tree(tree, *decode_image([layer], OPTIONS))


def test_the_source_is_read_to_its_end() -> None:
    source = io.BytesIO(make_layer("f a one") + bytes(1 << 20) + b"trailer")
    build_layer(LayerSource(source, "tar"), options=OPTIONS, out_blob=io.BytesIO())
    assert source.read() == b""


def test_short_reads_change_nothing() -> None:
    class Trickle(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            return super().read(min(size or 1, 1000 + self.tell() % 7))

    data = write_tar(make_tree(9, 4096))
    for packed in (data, gzip.compress(data, 1), zstandard.ZstdCompressor().compress(data)):
        out = io.BytesIO()
        build_layer(LayerSource(Trickle(packed), "tar"), options=OPTIONS, out_blob=out)
        assert out.getvalue() == build_tar(data, OPTIONS)[1]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_and_links(format: int) -> None:
    # ustar splits a name between its prefix and name fields
    name = "/".join(["directory" * 8] * 2) + "/" + "f" * 90
    data = make_tar(member(name, data=b"x"), member("l", tarfile.SYMTYPE, linkname=name[:99]), format=format)
    found = build_and_decode(data)
    assert found["/" + name][1] == b"x" and found["/l"][1] == name[:99].encode()
    if format != tarfile.USTAR_FORMAT:
        long = "/".join(["n" * 255] * 15)
        data = make_tar(member(long, data=b"y"), member("h", tarfile.LNKTYPE, linkname=long),
                        member("l", tarfile.SYMTYPE, linkname="t" * 4095), format=format)  # fmt: skip
        found = build_and_decode(data)
        assert found["/" + long][1] == found["/h"][1] == b"y" and found["/l"][1] == b"t" * 4095


def test_absolute_and_dotted_names_are_normalised() -> None:
    data = make_tar(member("/etc//./a", data=b"1"), member("./b/../c", data=b"2"), member("dir/", tarfile.DIRTYPE))
    found = build_and_decode(data)
    assert sorted(found) == ["/", "/c", "/dir", "/etc", "/etc/a"]


@pytest.mark.parametrize("name", ["../a", "a/../../b", "/..", "./../../../etc/passwd"])
def test_names_that_leave_the_root_are_refused(name: str) -> None:
    refuse(make_tar(member(name, data=b"x")), "leaves the root")
    refuse(make_tar(member("a", data=b"x"), member("h", tarfile.LNKTYPE, linkname=name)), "leaves the root")


def test_links_that_point_out_of_the_tree_stay_links() -> None:
    found = build_and_decode(make_tar(
        member("up", tarfile.SYMTYPE, linkname="../../.."), member("up/a", data=b"inside"),
        member("abs", tarfile.SYMTYPE, linkname="/etc"), member("etc", tarfile.DIRTYPE, mode=0o755),
        member("abs/b", data=b"b"),
    ))  # fmt: skip
    assert sorted(found) == ["/", "/a", "/abs", "/etc", "/etc/b", "/up"]
    assert found["/a"][1] == b"inside"


def test_symlink_loops_and_files_as_parents_are_refused() -> None:
    refuse(make_tar(member("x", tarfile.SYMTYPE, linkname="y"), member("y", tarfile.SYMTYPE, linkname="x"),
                    member("x/a", data=b"1")), r"x/a: a parent of it is not a directory")  # fmt: skip
    refuse(make_tar(member("f", data=b"1"), member("f/a", data=b"1")), r"f/a: a parent of it is not a directory")


def test_last_of_several_entries_wins() -> None:
    data = make_tar(
        member("a", data=b"one"), member("a", data=b"two"), member("d", tarfile.DIRTYPE), member("d/x", data=b"x"),
        member("d", data=b"file now"), member("s", tarfile.SYMTYPE, linkname="a"), member("s", tarfile.DIRTYPE),
        member("s/y", data=b"y"),
    )  # fmt: skip
    found = build_and_decode(data)
    assert sorted(found) == ["/", "/a", "/d", "/s", "/s/y"]
    assert found["/a"][1] == b"two" and found["/d"][1] == b"file now"


def test_a_replaced_file_keeps_its_other_names() -> None:
    data = make_tar(member("a", data=b"old"), member("b", tarfile.LNKTYPE, linkname="a"), member("a", data=b"new"),
                    member("b", tarfile.LNKTYPE, linkname="b"))  # fmt: skip
    found = build_and_decode(data)
    assert found["/a"][1] == b"new" and found["/b"][1] == b"old"


def test_hard_links_need_a_target_that_can_have_them() -> None:
    layer, _ = build_tar(make_tar(member("b", tarfile.LNKTYPE, linkname="a")), OPTIONS)
    with pytest.raises(Failure, match=r"^layer: b: hard link to a, which is neither in this layer nor below$"):
        merge_layers([layer], options=OPTIONS)
    refuse(make_tar(member("b", tarfile.LNKTYPE, linkname="/")), "hard link to the root")
    directory = member("d", tarfile.DIRTYPE)
    refuse(make_tar(directory, member("b", tarfile.LNKTYPE, linkname="d")), "hard link to the directory")
    link = member("l", tarfile.SYMTYPE, linkname="x")
    found = build_and_decode(make_tar(link, member("m", tarfile.LNKTYPE, linkname="l")))
    assert found["/l"] == found["/m"]


def test_sizes_of_members_without_data_are_ignored() -> None:
    for kind in (b"3", b"5", b"6"):
        odd = forge_header(name=b"x", type=kind, size=b"00000007777\0")
        found = build_and_decode(forge_header(name=b"a") + odd + forge_header(name=b"b"))
        assert sorted(found) == ["/", "/a", "/b", "/x"]


def test_estargz_index_files_are_left_out() -> None:
    names = ("stargz.index.json", ".prefetch.landmark", ".no.prefetch.landmark", "d/stargz.index.json")
    found = build_and_decode(make_tar(*(member(name, data=b"x") for name in names)))
    assert sorted(found) == ["/", "/d", "/d/stargz.index.json"]


# ---- damaged and absurd


def forge_header(**fields: bytes) -> bytes:
    """A header with fields as given and a correct checksum."""
    places = {
        "name": (0, 100), "mode": (100, 8), "uid": (108, 8), "size": (124, 12), "mtime": (136, 12), "type": (156, 1)
    }  # fmt: skip
    header = bytearray(512)
    values = {"name": b"f", "mode": b"0000644\0", "size": b"00000000000\0", "mtime": b"00000000000\0", "type": b"0"}
    for key, value in {**values, **fields}.items():
        start, size = places[key]
        header[start : start + size] = value.ljust(size, b"\0")
    header[257:265] = b"ustar\00000"
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def base256(value: int) -> bytes:
    return b"\x80" + value.to_bytes(11, "big")


def pax(text: bytes) -> bytes:
    return forge_header(type=b"x", size=b"%011o\0" % len(text)) + text + bytes(-len(text) % 512)


def record(key: bytes, value: bytes) -> bytes:
    length = len(key) + len(value) + 3
    while len(b"%d" % length) + len(key) + len(value) + 3 != length:
        length = len(b"%d" % length) + len(key) + len(value) + 3
    return b"%d %s=%s\n" % (length, key, value)


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"not a tar at all" * 64, "neither a tar nor a gzip or zstd stream of one"),
        (forge_header() + forge_header().replace(b"f", b"g"), "header at byte 512 of the tar is damaged"),
        (forge_header()[:300], "ends in the middle of a header"),
        (forge_header(size=b"00000010000\0") + b"short", "ends in the middle of an entry"),
        (forge_header(size=base256(9 << 30)), "ends in the middle of an entry"),
        (forge_header(size=base256(1 << 62)), "a size of 4611686018427387904 bytes"),
        (forge_header(size=b"\xff" * 12), "a size of -1 bytes"),
        (forge_header(size=b"0000000x000\0"), "a size is not a number"),
        (forge_header(uid=b"\x80\0\0\xff\xff\xff\xff\xff"), "owner 1099511627775:0 out of range"),
        (forge_header(type=b"Z"), "members of type b'Z' are not supported"),
        (forge_header(type=b"2"), "a symbolic link to 0 bytes"),
        (forge_header(name=b"."), "the root is not a directory"),
        (forge_header(type=b"x", size=base256(1 << 40)), "an extended header of 1099511627776 bytes"),
        (forge_header(type=b"L", size=b"00000001000\0") + b"x", "in the middle of an extended header"),
        (pax(b"99 path=a\n"), "pax header is malformed"),
        (pax(b"9 path=\n"), "pax header is malformed"),
        (pax(b"nonsense"), "pax header is malformed"),
        (pax(record(b"size", b"many")) + forge_header(), "pax header is malformed"),
        (pax(record(b"path", b"a\0b")) + forge_header(), "a NUL in the name"),
        (pax(record(b"path", b"n" * 256)) + forge_header(), "more than 255 bytes"),
        (pax(record(b"path", b"n/" * 2100)) + forge_header(), "a name of 4200 bytes"),
        (pax(record(b"path", b"n/" * 1500)) + forge_header(type=b"5") + pax(record(b"linkpath", b"n/" * 1500))
         + forge_header(name=b"s", type=b"2") + pax(record(b"path", b"s/" + b"n/" * 600)) + forge_header(),
         "more than 2048 directories deep"),
        (pax(record(b"mtime", b"9" * 30)) + forge_header(), "malformed"),
        (pax(b"".join(record(b"SCHILY.xattr.user.%d" % n, bytes(65000)) for n in range(5))) + forge_header(),
         "f: the extended attributes of one inode take"),
        (pax(record(b"GNU.sparse.map", b"0,5,3,5") + record(b"GNU.sparse.size", b"9")) + forge_header(), "of order"),
        (pax(record(b"GNU.sparse.map", b"0,5") + record(b"GNU.sparse.size", b"9")) + forge_header(), "do not fit"),
        (pax(record(b"GNU.sparse.map", b"0,5,3") + record(b"GNU.sparse.size", b"9")) + forge_header(), "malformed"),
        (pax(record(b"GNU.sparse.map", b"") + record(b"GNU.sparse.size", b"9" * 17)) + forge_header(), "do not fit"),
        (pax(record(b"GNU.sparse.major", b"1") + record(b"GNU.sparse.realsize", b"5"))
         + forge_header(size=b"%011o\0" % 512) + b"x\n".ljust(512, b"\0"), "malformed sparse map"),
        (gzip.compress(make_layer("f a " + "x" * 9000), 1)[:-20], "gzip stream ends too early"),
        (gzip.compress(make_layer("f a b"), 1)[:40] + b"damage" * 9, "gzip stream is damaged"),
        (zstandard.ZstdCompressor().compress(make_layer("f a b"))[:30] + b"damage" * 9, "zstd stream is damaged"),
        (zstandard.ZstdCompressor().compress(os.urandom(300_000))[:200_000], "zstd stream|neither a tar"),
    ],
)  # fmt: skip
def test_bad_tars_are_refused_in_one_line(data: bytes, match: str) -> None:
    refuse(data, match)


def test_truncated_zstd_at_the_end_of_the_tar_is_noticed() -> None:
    refuse(zstandard.ZstdCompressor().compress(make_layer("f a " + "x" * 9000))[:-8], "zstd stream ends too early")


def test_bad_names_do_not_break_the_line() -> None:
    refuse(pax(record(b"path", b"../a\nb\x1b[31m\xff")) + forge_header(), "leaves the root")


def test_sizes_beyond_the_octal_field() -> None:
    # 9 GiB of zeroes as a sparse file: no data, 2304 chunks of 4 MiB, all the same
    options = BuildOptions(chunk_size=4 << 20)
    size = 9 << 30
    head = pax(record(b"GNU.sparse.map", b"%d,0" % size) + record(b"GNU.sparse.size", b"%d" % size))
    layer = build_tar(head + forge_header(), options)
    bootstrap, _ = decode_image([layer], options)
    node = bootstrap.walk()[b"/f"]
    assert node.size == size and len(node.chunks) == 2304 and layer[0].stats.chunks == 1
    # and the size field itself, in base 256
    refuse(forge_header(size=base256(size)) + bytes(1 << 20), "ends in the middle of an entry")


def test_signed_checksums_are_accepted() -> None:
    header = bytearray(forge_header(name=b"\xe4\xf6"))
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(byte - 256 if byte > 127 else byte for byte in header)
    assert "/" + os.fsdecode(b"\xe4\xf6") in build_and_decode(bytes(header))


def test_pax_sizes_and_times_go_before_the_header() -> None:
    data = pax(record(b"size", b"5") + record(b"mtime", b"-1.25") + record(b"uid", b"3000000000")) + forge_header()
    bootstrap, blobs = decode_image([build_tar(data + b"hello".ljust(512, b"\0"), OPTIONS)], OPTIONS)
    node = bootstrap.walk()[b"/f"]
    assert read_file(node, bootstrap, blobs) == b"hello"
    assert (node.mtime_ns, node.uid) == (-1_250_000_000, 3_000_000_000)


def test_global_pax_headers_apply_to_nothing() -> None:
    """As containerd and umoci have it: git archive writes one, and a crafted one would give all members one name."""
    out = io.BytesIO()
    crafted = {"mtime": "7.5", "path": "all", "uid": "5", "linkpath": "x", "size": "0", "SCHILY.xattr.user.a": "1"}
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT, pax_headers=crafted) as tar:
        tar.addfile(member("a", data=b"1")[0], io.BytesIO(b"1"))
        info = member("b")[0]
        info.pax_headers["mtime"] = "8.5"
        tar.addfile(info)
    bootstrap, blobs = decode_image([build_tar(out.getvalue(), OPTIONS)], OPTIONS)
    found = bootstrap.walk()
    assert [name for name in sorted(found) if name.strip(b"/")] == [b"/a", b"/b"]
    assert found[b"/a"].mtime_ns != 7_500_000_000 and found[b"/b"].mtime_ns == 8_500_000_000
    assert found[b"/a"].uid != 5 and found[b"/a"].xattrs == {}
    assert read_file(found[b"/a"], bootstrap, blobs) == b"1"


def test_attributes_that_overlayfs_keeps_for_itself_are_left_out() -> None:
    info = member("a")[0]
    names = ["trusted.overlay.redirect", "trusted.overlay.opaque", "user.overlay.origin", "user.overlayer", "user.keep"]
    info.pax_headers = {f"SCHILY.xattr.{name}": "1" for name in names}
    layer = build_tar(make_tar((info, b"")), OPTIONS)
    assert layer[0].stats.dropped_xattrs == 3
    assert decode_image([layer], OPTIONS)[0].walk()[b"/a"].xattrs == {b"user.keep": b"1", b"user.overlayer": b"1"}


def test_xattrs_the_format_cannot_hold_are_counted_and_left_out() -> None:
    info = member("a")[0]
    xattrs = {"user.keep": "1", "com.apple.quarantine": "2", "user.": "3"}
    info.pax_headers = {f"SCHILY.xattr.{key}": value for key, value in xattrs.items()}
    layer = build_tar(make_tar((info, b"")), OPTIONS)
    assert layer[0].stats.dropped_xattrs == 2
    assert decode_image([layer], OPTIONS)[0].walk()[b"/a"].xattrs == {b"user.keep": b"1"}


def test_an_empty_xattr_is_one_and_an_empty_field_is_none() -> None:
    info = member("a")[0]
    info.pax_headers = {"SCHILY.xattr.user.empty": "", "SCHILY.xattr.user.full": "v", "mtime": ""}
    layer = build_tar(make_tar((info, b"")), OPTIONS)
    node = decode_image([layer], OPTIONS)[0].walk()[b"/a"]
    assert node.xattrs == {b"user.empty": b"", b"user.full": b"v"}


# ---- GNU tar's own sparse files


@pytest.mark.skipif(shutil.which("tar") is None, reason="no tar")
@pytest.mark.parametrize("flags", [["--format=gnu"], ["--format=posix", "--sparse-version=0.0"],
                                   ["--format=posix", "--sparse-version=0.1"],
                                   ["--format=posix", "--sparse-version=1.0"]])  # fmt: skip
@pytest.mark.parametrize("pieces", [0, 1, 3, 30])
def test_sparse_files_of_gnu_tar(flags: list[str], pieces: int, tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    with path.open("wb") as out:
        for number in range(pieces):
            out.seek(number * 50_000 + 8192)
            out.write(b"%d" % number * 4096)
        out.truncate(pieces * 50_000 + 200_000)
    (tmp_path / "plain").write_bytes(b"behind")
    data = subprocess.run(["tar", "-C", str(tmp_path), "-c", "--sparse", *flags, "sparse", "plain"],
                          check=True, capture_output=True).stdout  # fmt: skip
    assert len(data) < path.stat().st_size
    found = build_and_decode(data)
    assert found["/sparse"][1] == path.read_bytes() and found["/plain"][1] == b"behind"


# ---- tars of other makers


@pytest.mark.skipif(not (SAMPLES / "tar").is_dir(), reason="no samples: set NYDUS_SAMPLES")
@pytest.mark.parametrize("name", ["tar/all-entry-type.tar", "tar/all-entry-type-macos.tar", "tar/empty.tar"])
def test_sample_tars(name: str) -> None:
    path = SAMPLES / name
    found = build_and_decode(path.read_bytes())
    with tarfile.open(fileobj=io.BytesIO(path.read_bytes() or bytes(1024))) as tar:
        expected = {"/" + info.name.strip("/").removeprefix("./"): info for info in tar}
    assert set(expected) <= set(found)
    for path_name, info in expected.items():
        if info.issym():
            assert found[path_name][1] == os.fsencode(info.linkname)
