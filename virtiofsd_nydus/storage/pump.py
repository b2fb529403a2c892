"""The fetch threads: they wait in C for a job, get its range from the blob's backend, feed the bytes, hash what C
decoded and commit it. C alone decides what is verified (docs/architecture.md, the seam).

Imports nothing heavy at load; each thread imports blake3 when it starts, after the daemon answers RUNNING.
"""

import contextlib
import errno
import threading
import time

from virtiofsd_nydus.engine import Engine, ffi, lib
from virtiofsd_nydus.errors import Cause, Failure

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from virtiofsd_nydus.net.health import RateLimit
    from virtiofsd_nydus.storage.backend import Backend
    from virtiofsd_nydus.storage.meter import BackendMeter

# As csrc/store/fetcher.h has them (held together by a test): a slot is a job under way, and a thread of this pump.
FETCH_SLOTS = 8  # loopback and WAN links alike are full before that
PREFETCH_SLOTS = 6  # of them open to prefetch: demand always finds a free one
VIEWS_MAX = 256  # chunks hashed and committed in one go
FEED_BYTES = 256 * 1024  # a piece fed at once; short enough that the head of a range commits early
WAIT_MS = 500


class FetchPump:
    """Serves the engine's jobs until the engine shuts down."""

    def __init__(self, engine: Engine, slots: int = FETCH_SLOTS) -> None:
        self.engine = engine
        self._backends: dict[int, list[Backend]] = {}
        self._limits: dict[int, list[RateLimit]] = {}  # blob key -> limits of its mounts' prefetch
        self._lock = threading.Lock()
        self._unprepared: list[Backend] = []
        self._threads = [
            threading.Thread(target=self._run, args=(slot < PREFETCH_SLOTS,), name=f"fetch-{slot}", daemon=True)
            for slot in range(slots)
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def join(self, timeout_s: float) -> bool:
        """Waits for the threads after Engine.shutdown. False: one is still stuck in its backend."""
        until = time.monotonic() + timeout_s
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(max(0.0, until - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def add_backend(self, blob_key: int, backend: "Backend", prefetch_limit: "RateLimit | None" = None) -> None:
        """The blob may be had from backend; the newest registered is asked first. prefetch_limit: bytes a second that
        prefetch of this blob may use, shared by the blobs of a mount."""
        with self._lock:
            if all(backend not in known for known in self._backends.values()):
                self._unprepared.append(backend)
            self._backends.setdefault(blob_key, []).insert(0, backend)
            if prefetch_limit is not None:
                self._limits.setdefault(blob_key, []).insert(0, prefetch_limit)

    def remove_backend(self, blob_key: int, backend: "Backend", prefetch_limit: "RateLimit | None" = None) -> None:
        with self._lock:
            limits = [one for one in self._limits.get(blob_key, ()) if one is not prefetch_limit]
            if limits:
                self._limits[blob_key] = limits
            else:
                self._limits.pop(blob_key, None)
            left = [one for one in self._backends.get(blob_key, ()) if one is not backend]
            if left:
                self._backends[blob_key] = left
            else:
                self._backends.pop(blob_key, None)

    # ---- one thread

    def _run(self, take_prefetch: bool) -> None:
        import blake3

        digest_of = blake3.blake3
        worker = _Worker(self.engine, lambda data: digest_of(data).digest())
        while True:
            debt_s = self._prefetch_debt_s() if take_prefetch else 0.0
            rc = lib.vnd_job_next(
                self.engine.handle,
                worker.job,
                take_prefetch and not debt_s,
                min(WAIT_MS, int(debt_s * 1000) + 1) if debt_s else WAIT_MS,
            )
            if rc == -errno.ESHUTDOWN:
                return
            if rc == 0:
                self._serve(worker)
            else:
                self._prepare_backends()

    def _prepare_backends(self) -> None:
        """What a thread does that found no job, lest the first reader wait for imports."""
        while True:
            with self._lock:
                if not self._unprepared:
                    return
                backend = self._unprepared.pop()
            with contextlib.suppress(Exception):  # the first request meets it again, and tells
                backend.prepare()

    def _prefetch_debt_s(self) -> float:
        """Seconds for which no prefetch is taken: a limit has been used up. Demand is never held back, and no thread
        sleeps with a job in its hands; a limited mount may delay the prefetch of others."""
        with self._lock:
            return max((limits[0].debt_s() for limits in self._limits.values()), default=0.0)

    def _serve(self, worker: "_Worker") -> None:
        job = worker.job
        error, cause, text = 0, Cause.NONE, ""
        worker.wrong, worker.meter = False, None
        began_s = time.monotonic()
        try:
            if job.kind == lib.VND_JOB_VERIFY:
                worker.settle()
                for backend in self._backends_of(job)[:1]:
                    backend.meter.verify(worker.right)
            else:
                self._fetch(worker)
            if worker.wrong:  # C asks for such chunks once more, then fails their readers
                error, cause, text = errno.EIO, Cause.DIGEST, f"{worker.where()}: wrong bytes"
                self._distrust(worker)
        except Failure as failure:
            error, cause, text = errno.EIO, failure.cause, str(failure)
            if worker.wrong:
                self._distrust(worker)
        except Exception as unexpected:  # a bug must not cost a thread nor leave waiters hanging
            error, cause, text = errno.EIO, Cause.IO, f"fetching failed: {type(unexpected).__name__}: {unexpected}"
        wasted = lib.vnd_job_end(self.engine.handle, job.id, error, int(cause), text.encode())
        if worker.meter is not None:
            worker.meter.waste(wasted)
            if job.prefetch:
                worker.meter.record_prefetch(began_s, job.clen, job.chunk_count)

    def _backends_of(self, job: "Any") -> "tuple[Backend, ...]":
        with self._lock:
            return tuple(self._backends.get(int(ffi.cast("uintptr_t", job.blob)), ()))

    def _distrust(self, worker: "_Worker") -> None:
        """The next attempt is not to come by the way that gave wrong bytes."""
        for backend in self._backends_of(worker.job):
            backend.distrust(ffi.string(worker.job.blob_id).decode())

    def _fetch(self, worker: "_Worker") -> None:
        job = worker.job
        key = int(ffi.cast("uintptr_t", job.blob))
        with self._lock:
            backends = tuple(self._backends.get(key, ()))
            limits = self._limits.get(key)
            if limits and job.prefetch:
                limits[0].take(job.clen)
        blob_id = ffi.string(job.blob_id).decode()
        if not backends:
            raise Failure(f"blob {blob_id} has no backend any more", Cause.MISSING)
        deadline = job.deadline_us / 1e6 if job.deadline_us else None
        fed = 0
        for position, backend in enumerate(backends):
            try:
                pieces = backend.read_range(
                    blob_id, job.coff + fed, job.clen - fed, prefetch=bool(job.prefetch), deadline=deadline
                )
                for piece in pieces:
                    for start in range(0, len(piece), FEED_BYTES):
                        part = piece[start : start + FEED_BYTES]
                        if not worker.feed(part, backend.meter):
                            backend.meter.waste(len(piece) - start)
                            return
                        fed += len(part)
                if fed != job.clen:
                    raise Failure(f"blob {blob_id}: {fed} of {job.clen} bytes came", Cause.NETWORK)
                return
            except Failure as failure:
                if failure.cause == Cause.FORMAT or position == len(backends) - 1:
                    raise


class _Worker:
    """What a fetch thread reuses from job to job."""

    def __init__(self, engine: Engine, digest_of: "Any") -> None:
        self.engine = engine
        self.digest_of = digest_of
        self.job = ffi.new("vnd_job *")
        self.views = ffi.new("vnd_chunk_view[]", VIEWS_MAX)
        self.wrong = False  # some bytes of the job were not the image's
        self.right = 0  # chunks that the last settle() made ready
        self.meter: BackendMeter | None = None  # of the backend that gave the job's last bytes

    def feed(self, part: memoryview, meter: "BackendMeter") -> bool:
        """Feeds bytes that a backend gave and settles what they completed. False: the rest is not wanted any more."""
        self.meter = meter
        meter.buffer(len(part), bool(self.job.prefetch))
        try:
            return self._feed(part)
        finally:
            meter.settle(len(part))

    def _feed(self, part: memoryview) -> bool:
        with ffi.from_buffer(part) as raw:
            rc = lib.vnd_job_feed(self.engine.handle, self.job.id, raw, len(part))
        if rc == -errno.ECANCELED:
            return False
        if rc == -errno.EBADMSG:
            self.wrong = True
        elif rc < 0:
            raise Failure(f"{self.where()}: the engine refused the bytes (errno {-rc})", Cause.FORMAT)
        if rc:
            self.settle()
        return True

    def settle(self) -> None:
        """Hashes and commits all that waits for it."""
        handle, job_id = self.engine.handle, self.job.id
        self.right = 0
        while True:
            count = lib.vnd_job_chunks(handle, job_id, self.views, VIEWS_MAX)
            if count == -errno.EBADMSG:  # one does not decode; the next call goes on behind it
                self.wrong = True
                continue
            if count <= 0:
                return
            digests = ffi.NULL
            if self.job.digester == 0:
                digests = b"".join(
                    [self.digest_of(ffi.buffer(self.views[i].data, self.views[i].usize_bytes)) for i in range(count)]
                )
            rc = lib.vnd_job_commit(handle, job_id, digests, count)
            if rc == -errno.EBADMSG:
                self.wrong = True
            elif rc < 0 and rc != -errno.ENOSPC:
                raise Failure(f"{self.where()}: cannot keep a chunk (errno {-rc})", Cause.IO)
            self.right += max(0, rc)

    def where(self) -> str:
        job = self.job
        return f"blob {ffi.string(job.blob_id).decode()} [{job.coff}, +{job.clen})"
