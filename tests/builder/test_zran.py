"""Images that refer to gzip layers: every chunk can be decoded from its context alone."""

import ctypes
import gzip
import io
import os
import random
import stat
import struct
from itertools import pairwise
from pathlib import Path

import pytest
import zstandard

from tests.rafs.test_readback import check_tar
from tests.rafs.trees import Entry, Tree, make_tree, write_tar
from virtiofsd_nydus.builder.image import BuildOptions, Layer, LayerSource, build_layer, merge_layers
from virtiofsd_nydus.cli.main import main
from virtiofsd_nydus.errors import Cause, Failure

CHUNK = 64 << 10
SAMPLES = Path(os.environ.get("NYDUS_SAMPLES", Path(__file__).parents[2].parent / "shared/samples"))
OPTIONS = BuildOptions(oci_ref=True, chunk_size=CHUNK)


def make_text(seed: int, size: int) -> bytes:
    rng = random.Random(seed)
    words = [rng.randbytes(rng.randrange(3, 12)) for _ in range(300)]
    return b" ".join(rng.choices(words, k=size // 5))[:size]


def make_large_tree() -> Tree:
    """Several MiB, so that there are many contexts."""
    tree: Tree = {b"/": Entry(stat.S_IFDIR | 0o755)}
    for number in range(40):
        tree[b"/%02d" % number] = Entry(stat.S_IFREG | 0o644, content=make_text(number, 2_000 * number**2 // 10 + 3))
    tree[b"/random"] = Entry(stat.S_IFREG | 0o644, content=random.Random(1).randbytes(3 << 20))
    return tree


def pack_members(data: bytes, level: int = 6) -> bytes:
    """Three members and padding."""
    cuts = [0, len(data) // 3 + 11, 2 * len(data) // 3 + 5, len(data)]
    parts = [gzip.compress(data[a:b], level, mtime=0) for a, b in pairwise(cuts)]
    return b"".join(parts) + bytes(100)


def refer(packed: bytes, options: BuildOptions = OPTIONS) -> tuple[Layer, bytes]:
    out = io.BytesIO()
    layer = build_layer(LayerSource(io.BytesIO(packed), "tar", "layer"), options=options, out_blob=out)
    return layer, out.getvalue()


class ZStream(ctypes.Structure):
    _fields_ = (
        ("next_in", ctypes.c_void_p), ("avail_in", ctypes.c_uint), ("total_in", ctypes.c_ulong),
        ("next_out", ctypes.c_void_p), ("avail_out", ctypes.c_uint), ("total_out", ctypes.c_ulong),
        ("msg", ctypes.c_char_p), ("state", ctypes.c_void_p), ("zalloc", ctypes.c_void_p), ("zfree", ctypes.c_void_p),
        ("opaque", ctypes.c_void_p), ("data_type", ctypes.c_int), ("adler", ctypes.c_ulong),
        ("reserved", ctypes.c_ulong),
    )  # fmt: skip


def decode_context(packed: bytes, context: tuple[int, ...], dictionary: bytes) -> bytes:
    """What a context gives, by zlib itself: the standard library's face of it cannot begin within a byte."""
    in_off, _, dict_off, in_len, out_len, dict_len, byte, bits = context
    libz = ctypes.CDLL("libz.so.1")
    stream = ZStream()
    out = ctypes.create_string_buffer(out_len)
    stream.next_out, stream.avail_out = ctypes.addressof(out), out_len
    data = packed[in_off : in_off + in_len]
    assert libz.inflateInit2_(ctypes.byref(stream), -15, b"1.2.11", ctypes.sizeof(stream)) == 0
    if bits:
        assert libz.inflatePrime(ctypes.byref(stream), bits, byte >> (8 - bits)) == 0
    if dict_len:
        window = dictionary[dict_off : dict_off + dict_len]
        assert libz.inflateSetDictionary(ctypes.byref(stream), window, dict_len) == 0
    while stream.avail_out:
        buffer = ctypes.create_string_buffer(data, len(data))
        stream.next_in, stream.avail_in = ctypes.addressof(buffer), len(data)
        rc = libz.inflate(ctypes.byref(stream), 0)
        if rc == 1:  # a member's end: its trailer and the next one's header
            data = data[len(data) - stream.avail_in + 8 + 10 :]
            assert libz.inflateReset(ctypes.byref(stream)) == 0
            continue
        assert rc in (0, -5) and stream.avail_out == 0, rc
    libz.inflateEnd(ctypes.byref(stream))
    return out.raw


@pytest.mark.parametrize(("level", "members"), [(1, 1), (6, 1), (9, 3)])
def test_every_chunk_decodes_from_its_context(level: int, members: int) -> None:
    tree = make_large_tree()
    data = write_tar(tree)
    packed = pack_members(data, level) if members == 3 else gzip.compress(data, level, mtime=0)
    layer, meta = refer(packed)
    info = layer.blob_info
    assert info is not None and info.compressed_size == len(packed)
    table = zstandard.ZstdDecompressor().decompress(meta[: info.ci_csize])
    count, offset = len(info.table), 24 * len(info.table)
    contexts_count = struct.unpack_from("<I", meta, info.ci_csize + 56)[0]
    assert contexts_count > 4 and len(meta) == info.ci_csize + 4096
    dictionary = table[offset + 40 * contexts_count :]
    contexts = [struct.unpack_from("<QQQIIIBB", table, offset + 40 * at) for at in range(contexts_count)]
    assert any(context[-1] for context in contexts)  # some begin within a byte
    decoded = [decode_context(packed, context, dictionary) for context in contexts]
    words = [struct.unpack_from("<QQQ", table, 24 * at) for at in range(count)]
    for path, entry in tree.items():
        node = layer.tree.find_path(path)
        if not stat.S_ISREG(layer.tree.mode(node)):
            continue
        content = b""
        for chunk in layer.tree.chunks(node):
            first, second, third = words[chunk]
            size, at = (first >> 32 & 0xFFFFFF) + 1, third & 0xFFFFFFFF
            assert first >> 56 == 3 and (second & (1 << 40) - 1) + (second >> 40) <= len(packed)
            content += decoded[third >> 32][at : at + size]
        assert content == entry.content, path


@pytest.mark.parametrize("members", [1, 3])
@pytest.mark.parametrize("small", [True, False])
def test_unpack_reads_the_layer_in_place(
    members: int, small: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = make_tree(31, CHUNK) if small else make_large_tree()
    packed = pack_members(write_tar(tree)) if members == 3 else gzip.compress(write_tar(tree), mtime=0)
    layer, meta = refer(packed)
    assert layer.blob_info is not None
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    (blobs / layer.blob_id).write_bytes(packed)
    (blobs / layer.blob_info.meta_digest.hex()).write_bytes(meta)
    merge_layers([layer], options=OPTIONS, out_bootstrap=tmp_path / "boot")
    words = ["unpack", str(tmp_path / "boot"), "--blob-dir", str(blobs), "--output", str(tmp_path / "tar")]
    status = main(words)
    said = capsys.readouterr().err
    assert status == 0, said
    check_tar(tmp_path / "tar", tree)


def test_what_cannot_be_referred_to_is_named() -> None:
    data = write_tar(make_tree(32, CHUNK))
    for packed in (data, zstandard.ZstdCompressor().compress(data)):
        with pytest.raises(Failure, match=r"^layer: not a gzip layer, which --oci-ref needs") as caught:
            refer(packed)
        assert caught.value.cause is Cause.FORMAT
    packed = gzip.compress(data)
    with pytest.raises(Failure, match="ends too early"):
        refer(packed[: len(packed) // 2])
    damaged = bytearray(packed)
    damaged[len(packed) // 2] ^= 0x55
    with pytest.raises(Failure, match=r"damaged|header|tar"):
        refer(bytes(damaged))


def test_layers_without_files_have_no_index() -> None:
    tree: Tree = {b"/": Entry(stat.S_IFDIR | 0o755), b"/d": Entry(stat.S_IFDIR | 0o755)}
    layer, meta = refer(gzip.compress(write_tar(tree)))
    assert layer.blob_info is None and meta == b""


def test_pieces_of_any_size_give_the_same_index() -> None:
    packed = pack_members(write_tar(make_large_tree()))

    class Dribble(io.RawIOBase):
        def __init__(self) -> None:
            self.data = io.BytesIO(packed)
            self.rng = random.Random(5)

        def read(self, size: int = -1, /) -> bytes:
            return self.data.read(min(size, self.rng.randrange(1, 5000)))

    out = io.BytesIO()
    layer = build_layer(LayerSource(Dribble(), "tar", "layer"), options=OPTIONS, out_blob=out)
    whole, meta = refer(packed)
    assert out.getvalue() == meta and layer.blob_id == whole.blob_id


@pytest.mark.skipif(not (SAMPLES / "zran").is_dir(), reason="no samples: set NYDUS_SAMPLES")
@pytest.mark.parametrize("name", ["bgzip", "zran-single-stream", "zran-two-streams", "zran-zero-file"])
def test_samples_can_be_referred_to(name: str) -> None:
    packed = (SAMPLES / f"zran/{name}.tar.gz").read_bytes()
    layer, _ = refer(packed)
    assert layer.stats.names > 1


# ---- tables that readers take


def write_image(folder: Path, packed: bytes, options: BuildOptions = OPTIONS) -> tuple[Path, Layer]:
    """A bootstrap and, in folder/blobs, the layer and the blob of its chunk table."""
    import hashlib

    layer, meta = refer(packed, options)
    (folder / "blobs").mkdir()
    for data in (packed, meta):
        (folder / "blobs" / hashlib.sha256(data).hexdigest()).write_bytes(data)
    merge_layers([layer], options=options, out_bootstrap=folder / "boot")
    return folder / "boot", layer


@pytest.mark.parametrize("repeated", [bytes(CHUNK), make_text(5, CHUNK)], ids=["zeroes", "text"])
def test_chunks_that_repeat_cost_no_contexts(tmp_path: Path, repeated: bytes) -> None:
    """A preallocated file is the same chunk again and again: readers take no table with more contexts than chunks."""
    tree: Tree = {b"/": Entry(stat.S_IFDIR | 0o755)}
    tree[b"/a"] = Entry(stat.S_IFREG | 0o644, content=b"first")
    tree[b"/large"] = Entry(stat.S_IFREG | 0o644, content=repeated * 400)
    tree[b"/z"] = Entry(stat.S_IFREG | 0o644, content=b"last")
    bootstrap, layer = write_image(tmp_path, gzip.compress(write_tar(tree), 6, mtime=0))
    assert layer.blob_info is not None
    window_and_context = 40 + 32768
    assert layer.blob_info.ci_usize <= len(layer.blob_info.table) * (24 + window_and_context)
    assert main(["check", str(bootstrap)]) == 0
    assert main(["check", str(bootstrap), "--blob-dir", str(tmp_path / "blobs")]) == 0  # as a daemon reads it


def test_a_table_that_no_reader_takes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the image is made; and `check` tells it of an image that another program made."""
    from virtiofsd_nydus.rafs import layout

    packed = gzip.compress(write_tar(make_large_tree()), 6, mtime=0)
    bootstrap, layer = write_image(tmp_path, packed)
    assert layer.blob_info is not None
    size = layer.blob_info.ci_usize
    data = bootstrap.read_bytes()
    assert data.count(struct.pack("<Q", size)) == 1
    for told in (layout.TABLE_BYTES_MAX + 1, 24 * len(layer.blob_info.table) - 1):
        bootstrap.write_bytes(data.replace(struct.pack("<Q", size), struct.pack("<Q", told)))
        assert main(["check", str(bootstrap)]) == 1
    monkeypatch.setattr(layout, "TABLE_BYTES_MAX", size - 1)
    with pytest.raises(Failure, match="without --oci-ref") as caught:
        refer(packed)
    assert caught.value.cause is Cause.FORMAT
