"""The job seam from Python: bytes in, BLAKE3 digests back, and C alone deciding what is ready."""

import errno
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from blake3 import blake3
from virtiofsd_nydus._engine import ffi, lib

from tests.store.conftest import CHUNK_BYTES, Image
from virtiofsd_nydus.engine import Engine, Store
from virtiofsd_nydus.errors import Cause
from virtiofsd_nydus.reader.bootstrap import Bootstrap
from virtiofsd_nydus.storage.localfs import LocalfsBackend
from virtiofsd_nydus.storage.pump import FetchPump

WAIT_MS = 10_000


class Reader(threading.Thread):
    """Reads a file in a thread of its own, because a miss blocks it."""

    def __init__(self, image: Bootstrap, name: str) -> None:
        super().__init__(daemon=True)
        self.image, self.ino = image, image.lookup(image.root_ino, name)
        self.data: bytes | None = None
        self.error = 0
        self.start()

    def run(self) -> None:
        try:
            self.data = self.image.read(self.ino)
        except OSError as error:
            self.error = error.errno or 0

    def result(self) -> bytes | None:
        self.join(20)
        assert not self.is_alive()
        return self.data


class Seam:
    """An engine on a work directory with an image opened, and only the test to serve its jobs."""

    def __init__(self, image: Image, work_dir: Path, **settings: int) -> None:
        self.engine = Engine(**settings)  # type: ignore[arg-type]
        self.store = Store(self.engine, str(work_dir))
        self.image = Bootstrap(image.bootstrap, engine=self.engine, store=self.store)
        self.served = image.blob.read_bytes()
        self.job = ffi.new("vnd_job *")
        self.views = ffi.new("vnd_chunk_view[]", 64)

    def close(self) -> None:
        self.engine.shutdown()
        self.image.close()
        self.store.close()
        self.engine.close()

    def next(self, wait_ms: int = WAIT_MS) -> int:
        return int(lib.vnd_job_next(self.engine.handle, self.job, 1, wait_ms))

    def feed(self, data: bytes) -> int:
        return int(lib.vnd_job_feed(self.engine.handle, self.job.id, data, len(data)))

    def chunks(self) -> list[bytes]:
        count = lib.vnd_job_chunks(self.engine.handle, self.job.id, self.views, 64)
        return [bytes(ffi.buffer(self.views[i].data, self.views[i].usize_bytes)) for i in range(count)]

    def commit(self, digests: bytes) -> int:
        return int(lib.vnd_job_commit(self.engine.handle, self.job.id, digests, len(digests) // 32))

    def end(self, error: int = 0, cause: Cause = Cause.NONE, text: str = "") -> None:
        lib.vnd_job_end(self.engine.handle, self.job.id, error, int(cause), text.encode())

    def range(self) -> bytes:
        return self.served[self.job.coff : self.job.coff + self.job.clen]

    def serve(self, data: bytes | None = None) -> int:
        """Feeds the job's range, hashes and commits. The last return code."""
        result = self.feed(self.range() if data is None else data)
        while chunks := self.chunks():
            rc = self.commit(b"".join(blake3(chunk).digest() for chunk in chunks))
            if rc < 0:
                result = rc
        self.end(errno.EIO if result < 0 else 0, Cause.DIGEST)
        return result


@pytest.fixture
def seam(image: Image, work_dir: Path) -> Iterator[Seam]:
    seam = Seam(image, work_dir)
    yield seam
    seam.close()


def test_serves_a_reader(seam: Seam, image: Image) -> None:
    reader = Reader(seam.image, "file-09")
    assert seam.next() == 0
    assert seam.job.kind == lib.VND_JOB_FETCH
    assert seam.job.digester == 0
    assert not seam.job.prefetch
    assert ffi.string(seam.job.blob_id).decode() == image.blob.name
    assert seam.serve() >= 0
    while reader.is_alive() and seam.next(200) == 0:  # the first was taken before the reader had asked for all
        assert seam.serve() >= 0
    assert reader.result() == image.files["file-09"]
    # The second time nothing is asked for
    assert Reader(seam.image, "file-09").result() == image.files["file-09"]
    assert seam.next(0) == -errno.ETIMEDOUT
    ready, total = seam.image.image.ready_chunks(0)
    assert 0 < ready <= total
    assert seam.engine.stats()["fetched_chunks"] == ready


def test_chunk_views_are_the_chunks(seam: Seam, image: Image) -> None:
    Reader(seam.image, "file-11")
    assert seam.next() == 0
    assert seam.feed(seam.range()) == seam.job.chunk_count
    chunks = seam.chunks()
    assert all(len(chunk) <= CHUNK_BYTES for chunk in chunks)
    assert b"".join(chunks) in b"".join(image.files.values()) or len(chunks) > 1
    assert seam.commit(b"".join(blake3(chunk).digest() for chunk in chunks)) == len(chunks)
    seam.end()


def test_wrong_digests_make_nothing_ready(seam: Seam) -> None:
    reader = Reader(seam.image, "file-05")
    for _ in range(2):
        assert seam.next() == 0
        assert seam.feed(seam.range()) > 0
        count = len(seam.chunks())
        assert seam.commit(bytes(32 * count)) == -errno.EBADMSG
        seam.end(errno.EIO, Cause.DIGEST, "wrong")
    assert reader.result() is None
    assert reader.error == errno.EIO
    assert seam.image.image.ready_chunks(0)[0] == 0
    assert seam.engine.stats()["digest_failures"] >= 2


def test_missing_digests_are_refused(seam: Seam) -> None:
    Reader(seam.image, "file-05")
    assert seam.next() == 0
    assert seam.feed(seam.range()) > 0
    count = len(seam.chunks())
    assert lib.vnd_job_commit(seam.engine.handle, seam.job.id, ffi.NULL, count) == -errno.EINVAL
    assert seam.image.image.ready_chunks(0)[0] == 0
    seam.end()


@pytest.mark.parametrize("step", [1, 1000, 65536])
def test_any_size_of_pieces(seam: Seam, image: Image, step: int) -> None:
    reader = Reader(seam.image, "file-03")
    assert seam.next() == 0
    data = seam.range()
    for start in range(0, len(data), step):
        rc = seam.feed(data[start : start + step])
        assert rc >= 0
        if rc:
            chunks = seam.chunks()
            assert seam.commit(b"".join(blake3(chunk).digest() for chunk in chunks)) == len(chunks)
    seam.end()
    assert reader.result() == image.files["file-03"]


def test_flipped_byte_is_asked_for_once_more(seam: Seam, image: Image) -> None:
    reader = Reader(seam.image, "file-07")
    assert seam.next() == 0
    data = bytearray(seam.range())
    data[50] ^= 1
    assert seam.serve(bytes(data)) == -errno.EBADMSG
    while seam.next(200) == 0:
        assert seam.serve() >= 0
    assert reader.result() == image.files["file-07"]


def test_error_reaches_the_reader_and_the_log(seam: Seam) -> None:
    reader = Reader(seam.image, "file-07")
    assert seam.next() == 0
    seam.end(errno.EIO, Cause.AUTH, "the registry refused the login")
    reader.result()
    assert reader.error == errno.EIO
    event = seam.engine.next_event(1000)
    assert event is not None
    assert (event.cause, event.text) == (Cause.AUTH, "the registry refused the login")


def test_prefetch_makes_all_ready(seam: Seam, image: Image) -> None:
    seam.image.image.prefetch_blob(0, tag=5)
    while seam.next(500) == 0:
        assert seam.job.prefetch
        assert seam.serve() >= 0
    ready, total = seam.image.image.ready_chunks(0)
    assert ready == total > 0
    for name, data in image.files.items():
        assert Reader(seam.image, name).result() == data
    assert seam.next(0) == -errno.ETIMEDOUT


def test_nothing_is_fetched_before_it_is_read(seam: Seam, work_dir: Path) -> None:
    assert seam.next(100) == -errno.ETIMEDOUT
    assert [path.name for path in work_dir.iterdir()] == [".virtiofsd-nydus"]


def test_work_dir_has_nydus_names(seam: Seam, image: Image, work_dir: Path) -> None:
    reader = Reader(seam.image, "file-01")
    assert seam.next() == 0
    seam.serve()
    reader.result()
    blob_id = image.blob.name
    assert {path.name for path in work_dir.iterdir()} == {
        ".virtiofsd-nydus",
        f"{blob_id}.blob.data",
        f"{blob_id}.blob.data.chunk_map",
    }
    total = seam.image.image.ready_chunks(0)[1]
    assert (work_dir / f"{blob_id}.blob.data.chunk_map").stat().st_size == 4096 + (total + 7) // 8
    blob = seam.image.blobs[0]
    assert (work_dir / f"{blob_id}.blob.data").stat().st_size == blob.uncompressed_size_bytes


CHILD = """
import sys
from tests.store import test_seam
test_seam.read_in_child(*sys.argv[1:])
"""


def read_in_child(bootstrap: str, blob_dir: str, work_dir: str, repeat: str) -> None:
    """Reads every file through the fetch threads; prints the number of chunks that were fetched."""
    import hashlib

    engine = Engine()
    store = Store(engine, work_dir)
    image = Bootstrap(bootstrap, engine=engine, store=store)
    pump = FetchPump(engine, slots=3)
    for blob in image.blobs:
        pump.add_backend(blob.key, LocalfsBackend(directory=blob_dir))
    pump.start()
    while True:
        digest = hashlib.sha256()
        for name in (f"file-{number:02}" for number in range(12)):
            digest.update(image.read(image.lookup(image.root_ino, name)))
        print(engine.stats()["fetched_chunks"], engine.stats()["verified_chunks"], digest.hexdigest(), flush=True)
        if repeat == "once":
            break
    engine.shutdown()
    assert pump.join(5)
    image.close()
    store.close()
    engine.close()


def start_child(image: Image, work_dir: Path, repeat: str = "once") -> "subprocess.Popen[str]":
    root = Path(__file__).parents[2]
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(image.bootstrap), str(image.blob_dir), str(work_dir), repeat],
        stdout=subprocess.PIPE,
        text=True,
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
    )


def test_processes_share_a_work_dir(image: Image, work_dir: Path) -> None:
    import hashlib

    children = [start_child(image, work_dir) for _ in range(3)]
    answers = [child.communicate(timeout=60)[0].split() for child in children]
    assert [child.returncode for child in children] == [0, 0, 0]
    right = hashlib.sha256(b"".join(image.files.values())).hexdigest()
    assert {answer[2] for answer in answers} == {right}
    with Bootstrap(image.bootstrap) as bootstrap:
        chunks = bootstrap.blobs[0].chunk_count
    assert sum(int(answer[0]) for answer in answers) == chunks
    assert sum(int(answer[1]) for answer in answers) == 0


def test_killed_process_leaves_a_cache_that_is_used(image: Image, work_dir: Path) -> None:
    import hashlib

    child = start_child(image, work_dir, "forever")
    assert child.stdout is not None
    first = child.stdout.readline().split()
    child.send_signal(signal.SIGKILL)
    child.wait(20)
    child.stdout.close()
    again = start_child(image, work_dir).communicate(timeout=60)[0].split()
    assert again == ["0", "0", hashlib.sha256(b"".join(image.files.values())).hexdigest()]
    assert int(first[0]) > 0


def test_image_of_the_real_tools(samples: Path, work_dir: Path) -> None:
    """RAFS v6, zstd, BLAKE3, as Nydus 2.2 wrote it: two Rust sources come out."""
    engine = Engine()
    store = Store(engine, str(work_dir))
    image = Bootstrap(samples / "v6/rafs-v6-2.2.boot", engine=engine, store=store)
    pump = FetchPump(engine, slots=1)
    for blob in image.blobs:
        pump.add_backend(blob.key, LocalfsBackend(directory=str(samples / "v6/blobs")))
    pump.start()
    try:
        data = [image.read(image.lookup(image.root_ino, name)) for name in ("lib.rs", "sync_io.rs")]
        assert [len(part) for part in data] == [13400, 16931] or [len(part) for part in data] == [16931, 13400]
        assert all(b"fn " in part for part in data)
        assert engine.stats()["digest_failures"] == 0
    finally:
        engine.shutdown()
        assert pump.join(5)
        image.close()
        store.close()
        engine.close()
