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
from virtiofsd_nydus.net.answers import PIECE_BYTES
from virtiofsd_nydus.net.failures import DeadlinePassed, RetriableFailure

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from virtiofsd_nydus.net.health import RateLimit
    from virtiofsd_nydus.storage.backend import Backend
    from virtiofsd_nydus.storage.meter import BackendMeter

# As csrc/store/fetcher.h has them (held together by a test). A slot is a job under way, and a thread of this pump.
FETCH_SLOTS = 64  # of all sources: some sick servers leave room for others
SOURCE_SLOTS = 8  # of one source: loopback and WAN links alike are full before that
FIRST_SLOTS = 1  # of it, more: for a reader whose session has no other job there
PREFETCH_SLOTS = 6  # of a source's, open to prefetch: demand always finds a free one
VIEWS_MAX = 256  # chunks hashed and committed in one go
FEED_BYTES = 256 * 1024  # a piece fed at once; short enough that the head of a range commits early
WAIT_MS = 500
IDLE_S = 5.0  # a thread ends after so long without a job, while another waits
# Another attempt does not mend these; readers get EIO at once.
FINAL_CAUSES = frozenset((Cause.AUTH, Cause.SCHEME, Cause.MISSING, Cause.FORMAT, Cause.DIGEST, Cause.SPACE))
LEAD_S = 0.25
# Prefetch is tried again after so many times the pause that a reader's fetch is given.
PREFETCH_PATIENCE = 5.0


class EngineRefusal(Failure):
    """The engine could not take bytes that came. Another attempt does not mend that."""


class FetchPump:
    """Serves the engine's jobs until the engine shuts down.

    Threads come when they are needed: one waits for a job at any time, up to slots of them; one that had none for
    IDLE_S ends."""

    def __init__(self, engine: Engine, slots: int = FETCH_SLOTS, patience_s: float = 0.0) -> None:
        """patience_s: how long fetches may go on failing, none of them succeeding, before their readers are told; 0:
        until the readers' deadlines."""
        self.engine = engine
        self._slots = slots
        self._patience_s = patience_s
        self._failing_since_s = 0.0  # when the first of the fetches began that have failed since the last success
        self._backends: dict[int, list[Backend]] = {}
        self._limits: dict[int, list[RateLimit]] = {}  # blob key -> limits of its mounts' prefetch
        self._lock = threading.Lock()
        self._unprepared: list[Backend] = []
        self._threads: set[threading.Thread] = set()
        self._waiting = 0  # threads that wait for a job, or are about to
        self._started = 0
        self._sources: dict[str, int] = {}  # Backend.source of backends in use -> its number, for the engine
        self._last_source = 0

    def start(self) -> None:
        with self._lock:
            self._start_thread()

    def join(self, timeout_s: float) -> bool:
        """Waits for the threads after Engine.shutdown. False: one is still stuck in its backend."""
        until = time.monotonic() + timeout_s
        while time.monotonic() < until:
            with self._lock:
                thread = next(iter(self._threads), None)
            if thread is None:
                return True
            thread.join(max(0.0, until - time.monotonic()))
        with self._lock:
            return not self._threads

    @property
    def thread_count(self) -> int:
        with self._lock:
            return len(self._threads)

    def add_backend(self, blob_key: int, backend: "Backend", prefetch_limit: "RateLimit | None" = None) -> None:
        """The blob may be had from backend; the newest registered is asked first. prefetch_limit: bytes a second that
        prefetch of this blob may use, shared by the blobs of a mount."""
        with self._lock:
            if all(backend not in known for known in self._backends.values()):
                self._unprepared.append(backend)
            source = self._sources.get(backend.source)
            if source is None:
                self._last_source += 1
                source = self._sources[backend.source] = self._last_source
            lib.vnd_blob_set_source(ffi.cast("vnd_blob *", blob_key), source)
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
            if all(backend.source != one.source for known in self._backends.values() for one in known):
                self._sources.pop(backend.source, None)

    # ---- one thread

    def _start_thread(self) -> None:
        """Under the lock. Where the system gives no thread, those there are go on."""
        thread = threading.Thread(target=self._run, name=f"fetch-{self._started}", daemon=True)
        self._started += 1
        self._threads.add(thread)
        self._waiting += 1
        try:
            thread.start()
        except RuntimeError:
            self._threads.discard(thread)
            self._waiting -= 1
            if not self._threads:
                raise

    def _run(self) -> None:
        try:
            self._serve_jobs()
        finally:
            with self._lock:
                self._threads.discard(threading.current_thread())

    def _serve_jobs(self) -> None:
        import blake3

        digest_of = blake3.blake3
        worker = _Worker(self.engine, lambda data: digest_of(data).digest())
        idle_since_s = time.monotonic()
        while True:
            debt_s = self._prefetch_debt_s()
            rc = lib.vnd_job_next(
                self.engine.handle,
                worker.job,
                not debt_s,
                min(WAIT_MS, int(debt_s * 1000) + 1) if debt_s else WAIT_MS,
            )
            if rc == -errno.ESHUTDOWN:
                return
            if rc == 0:
                with self._lock:
                    self._waiting -= 1
                    if not self._waiting and len(self._threads) < self._slots:
                        self._start_thread()
                self._serve(worker)
                with self._lock:
                    self._waiting += 1
                idle_since_s = time.monotonic()
                continue
            self._prepare_backends()
            with self._lock:
                if self._waiting > 1 and time.monotonic() - idle_since_s >= IDLE_S:
                    self._waiting -= 1
                    return

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
        job, handle = worker.job, self.engine.handle
        error, cause, text = 0, Cause.NONE, ""
        again: _Again | None = None
        worker.wrong, worker.meter = False, None
        began_s = time.monotonic()
        try:
            if job.kind == lib.VND_JOB_VERIFY:
                worker.flush()
                for backend in self._backends_of(job)[:1]:
                    backend.meter.verify(worker.right)
            else:
                again = self._fetch(worker)
                self._note_outcome(began_s, again)
            if worker.wrong:  # C asks for such chunks once more, then fails their readers
                error, cause, text = errno.EIO, Cause.DIGEST, f"{worker.where()}: wrong bytes"
        except Failure as failure:
            error, cause, text = errno.EIO, failure.cause, str(failure)
        except Exception as unexpected:  # a bug must not cost a thread nor leave waiters hanging
            error, cause, text = errno.EIO, Cause.IO, f"fetching failed: {type(unexpected).__name__}: {unexpected}"
        if worker.wrong and job.kind != lib.VND_JOB_VERIFY:  # bytes of the cache say nothing about the ways to the blob
            self._distrust(worker)
        if again is not None and not error:
            wasted = lib.vnd_job_retry(
                handle,
                job.id,
                _to_us(again.at_s),
                _to_us(again.source_at_s),
                int(again.failure.cause),
                str(again.failure).encode(),
            )
        else:
            wasted = lib.vnd_job_end(handle, job.id, error, int(cause), text.encode())
        if worker.meter is not None:
            worker.meter.waste(wasted)
            if job.prefetch:
                worker.meter.record_prefetch(began_s, job.clen, job.chunk_count)

    def _note_outcome(self, began_s: float, again: "_Again | None") -> None:
        """Raises what an attempt failed by, once nothing has succeeded for as long as this pump has patience."""
        with self._lock:
            if again is None:
                self._failing_since_s = 0.0
                return
            since_s = self._failing_since_s = self._failing_since_s or began_s
        if self._patience_s and time.monotonic() - since_s > self._patience_s:
            raise again.failure

    def _backends_of(self, job: "Any") -> "tuple[Backend, ...]":
        with self._lock:
            return tuple(self._backends.get(int(ffi.cast("uintptr_t", job.blob)), ()))

    def _distrust(self, worker: "_Worker") -> None:
        """The next attempt is not to come by the way that gave wrong bytes."""
        for backend in self._backends_of(worker.job):
            backend.distrust(ffi.string(worker.job.blob_id).decode())

    def _fetch(self, worker: "_Worker") -> "_Again | None":
        """Gets the job's range and commits it. Raises what no other attempt can mend; returns when to make one."""
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
        again: _Again | None = None
        final: Failure | None = None
        fed = 0
        for backend in backends:
            backoff = backend.backoff
            until_s = backoff.until_s(blob_id)
            if until_s > time.monotonic():
                again = again or _Again(until_s, 0.0, backoff.last)
                continue
            try:
                came = 0
                deadline = job.deadline_us / 1e6 if job.deadline_us else None
                if (
                    deadline is not None
                ):  # an attempt ends a little before its reader gives up, so that its cause is told
                    deadline -= min(LEAD_S, max(0.0, deadline - time.monotonic()) / 10)
                for piece in backend.read_range(
                    blob_id, job.coff + fed, job.clen - fed, prefetch=bool(job.prefetch), deadline=deadline
                ):
                    came += len(piece)
                    if came >= PIECE_BYTES:
                        backoff.succeeded(blob_id)
                    for start in range(0, len(piece), FEED_BYTES):
                        part = piece[start : start + FEED_BYTES]
                        if not worker.feed(part, backend.meter):
                            backend.meter.waste(len(piece) - start)
                            return None
                        fed += len(part)
                if fed != job.clen:
                    raise Failure(f"blob {blob_id}: {fed} of {job.clen} bytes came", Cause.NETWORK)
                backoff.succeeded(blob_id)
                return None
            except EngineRefusal:
                raise
            except DeadlinePassed as failure:  # it says nothing about the server, and later readers have time left
                return again or _Again(time.monotonic(), 0.0, failure)
            except Failure as failure:
                if failure.cause is Cause.FORMAT:
                    raise
                if failure.cause in FINAL_CAUSES:
                    final = final or failure
                    continue
                until_s = backoff.failed(blob_id, failure)
                whole = isinstance(failure, RetriableFailure) and failure.whole
                again = again or _Again(until_s, until_s if whole else 0.0, failure)
        if again is None:
            raise final or Failure(f"blob {blob_id} cannot be had", Cause.MISSING)
        if job.prefetch:
            now_s = time.monotonic()
            again.at_s = now_s + (again.at_s - now_s) * PREFETCH_PATIENCE
        return again


class _Again:
    """When a fetch is to be tried again (time.monotonic()): it, and (0: any time) whatever else its source has."""

    __slots__ = ("at_s", "failure", "source_at_s")

    def __init__(self, at_s: float, source_at_s: float, failure: Failure) -> None:
        self.at_s, self.source_at_s, self.failure = at_s, source_at_s, failure


def _to_us(at_s: float) -> int:
    """For the engine, whose clock is the same; never before at_s."""
    return int(at_s * 1e6) + 1 if at_s else 0


class _Worker:
    """What a fetch thread reuses from job to job."""

    def __init__(self, engine: Engine, digest_of: "Any") -> None:
        self.engine = engine
        self.digest_of = digest_of
        self.job = ffi.new("vnd_job *")
        self.views = ffi.new("vnd_chunk_view[]", VIEWS_MAX)
        self.wrong = False  # some bytes of the job were not the image's
        self.right = 0  # chunks that the last flush() made ready
        self.meter: BackendMeter | None = None  # of the backend that gave the job's last bytes

    def feed(self, part: memoryview, meter: "BackendMeter") -> bool:
        """Feeds bytes that a backend gave and flushes what they completed. False: the rest is not wanted any more."""
        self.meter = meter
        meter.buffer(len(part), bool(self.job.prefetch))
        try:
            return self._feed(part)
        finally:
            meter.unbuffer(len(part))

    def _feed(self, part: memoryview) -> bool:
        with ffi.from_buffer(part) as raw:
            rc = lib.vnd_job_feed(self.engine.handle, self.job.id, raw, len(part))
        if rc == -errno.ECANCELED:
            return False
        if rc == -errno.EBADMSG:
            self.wrong = True
        elif rc < 0:
            raise EngineRefusal(f"{self.where()}: the engine refused the bytes (errno {-rc})", Cause.FORMAT)
        if rc:
            self.flush()
        return True

    def flush(self) -> None:
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
                raise EngineRefusal(f"{self.where()}: cannot keep a chunk (errno {-rc})", Cause.IO)
            self.right += max(0, rc)

    def where(self) -> str:
        job = self.job
        return f"blob {ffi.string(job.blob_id).decode()} [{job.coff}, +{job.clen})"
