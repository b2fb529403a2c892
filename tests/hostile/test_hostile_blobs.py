"""Faults of data blobs: the table of contents and the bootstrap inside, the chunk table of a batched image, the chunks
themselves."""

import errno
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.hostile.images import CHUNK, build, write_source
from virtiofsd_nydus.errors import Cause, Failure
from virtiofsd_nydus.reader.bootstrap import Bootstrap
from virtiofsd_nydus.reader.data import opened_with_data

ENTRY, HEADER, META_HEADER = 128, 512, 4096


@pytest.fixture(scope="module")
def inlined(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data blob with its bootstrap inside."""
    top = tmp_path_factory.mktemp("inlined")
    write_source(top / "source.tar")
    build(top / "source.tar", top / "image")
    (blob,) = (top / "image" / "blobs").iterdir()
    return blob


def toc_entry(content: bytearray, name: bytes) -> int:
    size = int(content[-HEADER + 124 : -HEADER + 135], 8)
    for at in range(len(content) - HEADER - size, len(content) - HEADER, ENTRY):
        if content[at + 8 : at + 24].rstrip(b"\0") == name:
            return at
    raise KeyError(name)


def put(content: bytearray, at: int, form: str, value: int) -> None:
    struct.pack_into(form, content, at, value)


def set_header_size(content: bytearray, text: bytes) -> None:
    """The size field of the last tar header, with a checksum that is right."""
    header = memoryview(content)[-HEADER:]
    header[124:136] = text.ljust(12, b"\0")
    header[148:156] = b" " * 8
    header[148:156] = b"%07o\0" % sum(header)


BOOT = b"image.boot"
TOC_FAULTS: dict[str, tuple[str, Callable[[bytearray], None]]] = {
    "toc-header-checksum": ("nor a data blob", lambda c: put(c, len(c) - HEADER + 150, "<B", ord("7"))),
    "toc-header-type": ("nor a data blob", lambda c: put(c, len(c) - HEADER + 156, "<B", ord("5"))),
    "toc-header-name": ("nor a data blob", lambda c: put(c, len(c) - HEADER, "<B", ord("x"))),
    "toc-size-no-entries": ("bad size", lambda c: set_header_size(c, b"00000000177")),
    "toc-size-beyond-window": ("bad size", lambda c: set_header_size(c, b"00000100000")),
    "toc-size-beyond-blob": ("bad size", lambda c: set_header_size(c, b"77777777600")),
    "toc-size-base-256": ("bad size", lambda c: set_header_size(c, b"\x80\0\0\0\x7f\xff\xff\xff\xff\xff\xff\xff")),
    "boot-outside-blob": ("places its bootstrap badly", lambda c: put(c, toc_entry(c, BOOT) + 56, "<Q", 1 << 40)),
    "boot-offset-overflow": ("places its bootstrap badly", lambda c: put(c, toc_entry(c, BOOT) + 56, "<Q", 2**64 - 1)),
    "boot-stored-size-overflow": (
        "places its bootstrap badly",
        lambda c: put(c, toc_entry(c, BOOT) + 64, "<Q", 2**64 - 1),
    ),
    "boot-bomb": ("places its bootstrap badly", lambda c: put(c, toc_entry(c, BOOT) + 72, "<Q", 1 << 40)),
    "boot-more-than-it-says": ("cannot be unpacked", lambda c: put(c, toc_entry(c, BOOT) + 72, "<Q", 8192)),
    "boot-less-than-it-says": ("cannot be unpacked", lambda c: put(c, toc_entry(c, BOOT) + 72, "<Q", 1 << 20)),
    "boot-codec-unknown": ("places its bootstrap badly", lambda c: put(c, toc_entry(c, BOOT), "<I", 4)),
    "boot-too-short": ("too short", lambda c: put(c, toc_entry(c, BOOT) + 72, "<Q", 100)),
    "boot-digest": ("does not match its digest", lambda c: put(c, toc_entry(c, BOOT) + 24, "<I", 1)),
    "boot-missing": ("without an inlined bootstrap", lambda c: put(c, toc_entry(c, BOOT) + 8, "<B", ord("x"))),
}


def test_inlined_is_good(inlined: Path) -> None:
    with Bootstrap(inlined) as image:
        assert image.check() == []


@pytest.mark.parametrize("name", TOC_FAULTS)
def test_table_of_contents(inlined: Path, tmp_path: Path, name: str) -> None:
    line, change = TOC_FAULTS[name]
    content = bytearray(inlined.read_bytes())
    change(content)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(Failure) as caught:
        Bootstrap(tmp_path / name)
    assert line in str(caught.value)
    assert caught.value.cause in (Cause.FORMAT, Cause.DIGEST)


@pytest.fixture(scope="module")
def batched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image whose small files lie in batches and whose chunk table is stored as it is."""
    top = tmp_path_factory.mktemp("batched")
    write_source(top / "source.tar")
    return build(top / "source.tar", top / "image", compressor="none", batch_size=CHUNK)


META_FAULTS: dict[str, tuple[str, int, str, int]] = {  # line, offset (negative: in the header), form, value
    "header-magic": ("no header", -META_HEADER, "<I", 1),
    "header-magic-at-its-end": ("no header", -4, "<I", 1),
    "header-count": ("differ", -META_HEADER + 12, "<I", 70),
    "header-compressor": ("differ", -META_HEADER + 8, "<I", 3),
    "header-size": ("differ", -META_HEADER + 32, "<Q", 1 << 50),
    "contexts-outside": ("contexts", -META_HEADER + 40, "<Q", 1 << 50),
    "contexts-size-overflow": ("contexts", -META_HEADER + 48, "<Q", 2**64 - 1),
    "contexts-count": ("contexts", -META_HEADER + 56, "<I", 2**32 - 1),
    "no-contexts": ("not there", -META_HEADER + 56, "<I", 0),
    "chunk-of-a-batch-not-there": ("not there", 20, "<I", 99),
    "chunk-beyond-its-batch": ("beyond its batch", 16, "<I", 60_000),
    "chunk-offset-overflow": ("beyond its batch", 16, "<I", 2**32 - 1),
    "chunk-of-a-gzip-layer": ("gzip layer", 7, "<B", 7),
    "chunk-encrypted": ("encrypted", 7, "<B", 13),
    "chunk-beyond-blob": ("beyond the blob", 0, "<I", 2**32 - 1),
}


def batch_member(table: bytes) -> int:
    """Offset of the first entry that is in a batch."""
    return next(at for at in range(0, len(table), 24) if table[at + 7] & 4)


@pytest.mark.parametrize("name", META_FAULTS)
def test_chunk_table(batched: Path, tmp_path: Path, name: str, capfd: pytest.CaptureFixture[str]) -> None:
    """What is in a batch cannot be read; the daemon says why, once it was asked for twice."""
    line, offset, form, value = META_FAULTS[name]
    (blob,) = (batched.parent / "blobs").iterdir()
    content = bytearray(blob.read_bytes())
    with Bootstrap(batched) as image:
        info = image.blobs[0]
    assert info.ci_csize_bytes == info.ci_usize_bytes
    end = info.ci_offset + info.ci_csize_bytes
    table = bytes(content[info.ci_offset : end])
    at = end + META_HEADER + offset if offset < 0 else info.ci_offset + batch_member(table) + offset
    put(content, at, form, value)
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / blob.name).write_bytes(content)
    with opened_with_data(batched, tmp_path / "blobs") as image:
        for path in ("/d/x", "/a"):
            with pytest.raises(OSError, match="Input/output error") as caught:
                image.read(image.resolve(path))
            assert caught.value.errno == errno.EIO
    assert line in capfd.readouterr().err


def test_flipped_chunk_costs_its_readers_only(batched: Path, tmp_path: Path) -> None:
    (blob,) = (batched.parent / "blobs").iterdir()
    content = bytearray(blob.read_bytes())
    at = content.index(b"y" * 1000)
    content[at] ^= 1
    (tmp_path / blob.name).write_bytes(content)
    with opened_with_data(batched, tmp_path) as image:
        with pytest.raises(OSError, match="Input/output error"):
            image.read(image.resolve("/d/y"))
        assert image.read(image.resolve("/d/x")) == b"x" * 9000
        assert image.read(image.resolve("/a")).startswith(b"000000000\n")


@pytest.mark.parametrize("damaged", [False, True])
def test_table_beside_the_bootstrap(batched: Path, tmp_path: Path, damaged: bool) -> None:
    """It is used, so a blob whose own table is damaged can be read; unless it is damaged itself: then the blob's is
    asked for."""
    (blob,) = (batched.parent / "blobs").iterdir()
    with Bootstrap(batched) as image:
        info = image.blobs[0]
    content = bytearray(blob.read_bytes())
    end = info.ci_offset + info.ci_csize_bytes
    table, header = content[info.ci_offset : end], bytes(content[end : end + META_HEADER])
    content[info.ci_offset : end] = bytes(len(table))
    if damaged:
        put(table, batch_member(table) + 20, "<I", 99)
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / blob.name).write_bytes(content)
    (tmp_path / "boot").write_bytes(batched.read_bytes())
    (tmp_path / f"{info.id}.blob.meta").write_bytes(bytes(table).ljust(-(-len(table) // 4096) * 4096, b"\0") + header)
    with opened_with_data(tmp_path / "boot", tmp_path / "blobs") as image:
        ino = image.resolve("/d/x")
        if damaged:
            with pytest.raises(OSError, match="Input/output error"):
                image.read(ino)
        else:
            assert image.read(ino) == b"x" * 9000
