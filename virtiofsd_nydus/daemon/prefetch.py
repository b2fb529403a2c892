"""Fetching before it is asked for: what the image's own table or a list names, or the whole image; behind all demand.

One thread a mount works out the chunks, hands them to the engine and looks again until all are here, because a range
that failed or that another daemon was fetching is not told. Light at load; the thread imports the image reader.
"""

import threading
import time

from virtiofsd_nydus.errors import Cause, Failure, UsageFailure

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import Any

    from virtiofsd_nydus.engine import Engine, Rafs
    from virtiofsd_nydus.reader.bootstrap import Bootstrap

    Ranges = list[tuple[int, int, int]]  # blob index, first chunk, number of chunks

LIST_MAX_BYTES = 16 << 20
LOOK_S = 0.05  # between two looks at what is here
TABLE_LIMIT_S = 5.0  # a blob's chunk table that has not come by then is asked for again
ROUNDS_WITHOUT_GAIN = 4  # then the rest is given up: backends have their own retries within each
PAUSE_S = 1.0  # before the next round
WAIT_MAX_S = 86400.0
MAX_CHUNKS = 0xFFFFFFFF
RUNNING, DONE, CANCELLED, INCOMPLETE, FAILED = "running", "done", "cancelled", "incomplete", "failed"


def read_list(path: str) -> list[str]:
    """--prefetch-files: absolute paths, one a line; empty lines are passed over."""
    try:
        with open(path, "rb") as stream:
            raw = stream.read(LIST_MAX_BYTES + 1)
    except OSError as error:
        raise UsageFailure(f"cannot read the prefetch list {path}: {error.strerror}") from error
    if len(raw) > LIST_MAX_BYTES:
        raise UsageFailure(f"the prefetch list {path} is larger than {LIST_MAX_BYTES} bytes")
    return check_list((line for line in raw.decode("utf-8", "surrogateescape").split("\n") if line.strip()), path)


def check_list(paths: "Iterable[object]", where: str) -> list[str]:
    """Absolute paths, or UsageFailure."""
    checked = []
    for one in paths:
        if not isinstance(one, str) or not one.startswith("/"):
            raise UsageFailure(f"{where}: prefetch path {str(one)[:80]!r} is not absolute")
        checked.append(one.rstrip("\r"))
    return checked


class Prefetch:
    """The prefetch of one mount.

    start() replaces what was under way. state: running, done (all that was asked for is here), incomplete (the rest
    cannot be had for now), failed (the image does not say where the files are) or cancelled.
    """

    def __init__(self, engine: "Engine", image: "Rafs", bootstrap: str, tag: int) -> None:
        self._engine, self._image, self._bootstrap, self._tag = engine, image, bootstrap, tag
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._state, self._error = "", ""
        self._ranges: Ranges = []
        self._unknown: list[str] = []
        self.began_at = 0.0  # seconds since 1970 when it was first started
        self._known: set[int] = set()  # blobs whose chunk table is here

    def fetch_map(self, blob: int, bits: bytes) -> None:
        """Asks once for the chunks whose bits are set: chunk i is bit i % 8 of byte i // 8."""
        if all(one.index != blob for one in self._image.blobs()):
            return
        first = count = 0
        for chunk in range(len(bits) * 8 + 1):
            if chunk < len(bits) * 8 and bits[chunk // 8] >> chunk % 8 & 1:
                first, count = (first, count + 1) if count else (chunk, 1)
            elif count:
                self._image.prefetch_chunks(blob, first, count, self._tag)
                count = 0

    def start(self, paths: "Sequence[str] | None", *, then_all: bool) -> None:
        """paths None: what the image's table names; a "/" among them is the whole image. then_all: afterwards the
        rest."""
        with self._lock:
            self._end()
            self._stop, self._ended = threading.Event(), threading.Event()
            self.began_at = self.began_at or time.time()
            self._state, self._error, self._ranges, self._unknown = RUNNING, "", [], []
            self._thread = threading.Thread(
                target=self._run, args=(paths, then_all, self._stop, self._ended), name="prefetch", daemon=True
            )
            self._thread.start()

    def cancel(self) -> None:
        """Ends it; what is being fetched at this moment may still come. Nothing to do is no error."""
        with self._lock:
            self._end()

    def wait(self, timeout_s: float) -> bool:
        """Whether it has ended, however, within that time."""
        return self._ended.wait(min(timeout_s, WAIT_MAX_S)) if self._state else True

    def progress(self) -> "dict[str, Any]":
        """What was asked for and how much of it is here. chunks 0: not known yet."""
        ready, total = self._count(list(self._ranges)) if self._state else (0, 0)
        found: dict[str, Any] = {"state": self._state or "none", "chunks": total, "ready_chunks": ready}
        if self._error:
            found["error"] = self._error
        if self._unknown:
            found["unknown_paths"] = self._unknown[:100]
        return found

    def require_done(self) -> None:
        """Raises Failure unless all that was asked for is here."""
        found = self.progress()
        if found["state"] != DONE:
            raise Failure(
                f"prefetch {found['state']}: {found['ready_chunks']} of {found['chunks'] or '?'} chunks are "
                f"here{': ' + self._error if self._error else ''}",
                Cause.NETWORK,
            )

    def _end(self) -> None:
        if self._thread is not None:
            self._stop.set()
            self._engine.cancel_prefetch(self._tag)
            self._thread.join()
            self._thread = None

    # ---- the thread

    def _run(
        self, paths: "Sequence[str] | None", then_all: bool, stop: threading.Event, ended: threading.Event
    ) -> None:
        state = FAILED
        try:
            state = self._fetch(paths, then_all, stop)
        except (Failure, OSError) as error:
            self._error = str(error)
        except Exception as unexpected:  # a bug is told, not lost with its thread
            self._error = f"{type(unexpected).__name__}: {unexpected}"
        finally:
            self._engine.cancel_prefetch(self._tag)
            self._state = CANCELLED if stop.is_set() and state != DONE else state
            ended.set()

    def _fetch(self, paths: "Sequence[str] | None", then_all: bool, stop: threading.Event) -> str:
        from virtiofsd_nydus.reader.bootstrap import Bootstrap

        whole = [(blob.index, 0, MAX_CHUNKS) for blob in self._image.blobs() if blob.chunk_count]
        chosen: Ranges | None = None
        if paths is None or "/" not in paths:
            with Bootstrap(self._bootstrap, engine=self._engine) as metadata:
                chosen = self._choose(metadata, paths, stop)
        regions = self._find_regions(stop) if paths is None else []
        if chosen is None:
            chosen, then_all = [], True
        chosen = regions + chosen
        self._ranges = whole if then_all else chosen
        before, rounds = -1, 0
        while not stop.is_set():
            for index, first, count in [*chosen, *(whole if then_all else ())]:
                self._image.prefetch_chunks(index, first, count, self._tag)
            self._wait_idle(stop)
            ready, total = self._count(self._ranges)
            if ready == total and self._tables_known():
                return DONE
            rounds = rounds + 1 if ready <= before else 0
            if rounds >= ROUNDS_WITHOUT_GAIN:
                return INCOMPLETE
            before = max(before, ready)
            stop.wait(PAUSE_S)
        return CANCELLED

    def _find_regions(self, stop: threading.Event) -> "Ranges":
        """The beginnings of blobs that the image wants fetched: where its builder put what is needed first."""
        found: Ranges = []
        for blob in self._image.blobs():
            until = time.monotonic() + TABLE_LIMIT_S
            if not blob.prefetch_end:
                continue
            self._image.prefetch_chunks(blob.index, 0, 1, self._tag)
            while (
                not (count := self._image.chunks_before(blob.index, blob.prefetch_end))
                and not stop.is_set()
                and time.monotonic() < until
            ):
                stop.wait(LOOK_S)
            found.append((blob.index, 0, count or MAX_CHUNKS))
        return found

    def _wait_idle(self, stop: threading.Event) -> None:
        """Returns once the engine has nothing left to do of what it was given."""
        table_until = time.monotonic() + TABLE_LIMIT_S
        while self._engine.prefetch_pending(self._tag) and not stop.is_set():
            stop.wait(LOOK_S)
            if time.monotonic() > table_until and not self._tables_known():
                self._engine.cancel_prefetch(self._tag)

    def _tables_known(self) -> bool:
        self._known.update(
            index
            for index in {index for index, _, _ in self._ranges} - self._known
            if self._image.ready_chunks(index)[1]
        )
        return all(index in self._known for index, _, _ in self._ranges)

    def _count(self, ranges: "Ranges") -> tuple[int, int]:
        ready = total = 0
        for index, first, count in ranges:
            here, known = self._image.ready_range(index, first, count)
            ready, total = ready + here, total + known
        return ready, total

    def _choose(self, metadata: "Bootstrap", paths: "Sequence[str] | None", stop: threading.Event) -> "Ranges | None":
        """Chunks of the named files, and of all files below named directories, in that order; None: the table names
        the root, which is everything."""
        if paths is None:
            inos = metadata.prefetch()
            if metadata.root_ino in inos:
                return None
        else:
            inos = []
            for path in paths:
                try:
                    inos.append(metadata.resolve(path))
                except OSError:
                    self._unknown.append(path)
        taken: set[tuple[int, int]] = set()
        ranges: Ranges = []
        for ino in self._files(metadata, inos, stop):
            for chunk in metadata.chunks(ino):
                if (chunk.blob_index, chunk.chunk_index) not in taken:
                    taken.add((chunk.blob_index, chunk.chunk_index))
                    add_chunk(ranges, chunk.blob_index, chunk.chunk_index)
        return ranges

    @staticmethod
    def _files(metadata: "Bootstrap", inos: "list[int]", stop: threading.Event) -> "Iterable[int]":
        import stat

        seen: set[int] = set()
        todo = list(reversed(inos))
        while todo and not stop.is_set():
            ino = todo.pop()
            if ino in seen:
                continue
            seen.add(ino)
            mode = metadata.getattr(ino).mode
            if stat.S_ISDIR(mode):
                todo.extend(reversed([one.ino for one in metadata.listdir(ino)]))
            elif stat.S_ISREG(mode):
                yield ino


def add_chunk(ranges: "Ranges", blob_index: int, chunk_index: int) -> None:
    """Joins it to the last range where it follows."""
    if ranges:
        blob, first, count = ranges[-1]
        if blob == blob_index and first + count == chunk_index:
            ranges[-1] = (blob, first, count + 1)
            return
    ranges.append((blob_index, chunk_index, 1))
