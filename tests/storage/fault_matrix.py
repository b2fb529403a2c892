"""The fault matrix: each fault of the faulty server, on each way to a blob, for a reader and for prefetch.

A case is an engine with a cache of its own, an image, and a backend whose server (or mirror, or proxy before it) goes
wrong, once or for good. It must end in the right bytes or in an error with a cause within the deadline; and the cache
that it leaves behind, opened by an engine that can fetch nothing, must hold right bytes only.

`scripts/fault-matrix` prints it.
"""

import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from tests.peers.faulty_server import FAULTS, FaultyServer
from virtiofsd_nydus.builder.options import BuildOptions
from virtiofsd_nydus.cli.build import build_image
from virtiofsd_nydus.engine import Engine, Rafs, Store
from virtiofsd_nydus.errors import Cause
from virtiofsd_nydus.reader.bootstrap import Bootstrap
from virtiofsd_nydus.storage.factory import create_backend
from virtiofsd_nydus.storage.localfs import LocalfsBackend
from virtiofsd_nydus.storage.pump import FetchPump

DEADLINE_S = 2.5
# Where the read must succeed: a loaded machine may take its time.
PATIENT_S = 20.0
# Over the deadline before a read counts as hung: a loaded machine is late.
GRACE_S = 2.0
CHUNK_BYTES = 16 << 10
FILES = {"one": 40_000, "two": 200_000, "three": 5}
MODES = ("once", "lasting", "prefetch")

# What each fault is given, and how it may end for a reader where it lasts ("ok" is always allowed).
CASES: dict[str, tuple[dict[str, Any], set[str]]] = {
    "delay": ({"seconds": 30}, {"network", "deadline"}),
    "stall": ({"at_bytes": 3000, "seconds": 30}, {"network", "deadline"}),
    "trickle": ({"at_bytes": 1, "seconds": 0.05}, {"network", "deadline"}),
    "truncate": ({"at_bytes": 3000}, {"network"}),
    "reset": ({"at_bytes": 0}, {"network"}),
    "corrupt": ({"at_bytes": 3000}, {"digest"}),
    "status": ({"status": 503}, {"network"}),
    "status 401": ({"status": 401}, {"auth"}),
    "status 403": ({"status": 403}, {"auth"}),
    "status 404": ({"status": 404}, {"missing"}),
    "status 418": ({"status": 418}, {"io"}),
    "status 429": ({"status": 429}, {"network"}),
    "ignore_range": ({}, {"network"}),
    "shift_range": ({"at_bytes": 512}, {"network"}),
    "mislabel_range": ({"at_bytes": 512}, {"network"}),
    "no_content_range": ({}, {"network"}),
    "short_range": ({"at_bytes": 3000}, {"network"}),
    "long_body": ({"at_bytes": 5}, {"network"}),
    "wrong_total": ({"at_bytes": 5}, {"network"}),
    "multipart": ({}, {"network"}),
    "encode": ({"text": "gzip"}, {"network"}),
    "restatus": ({"status": 206, "headers": {"X-Odd": "1"}}, set()),  # the right status: no fault
    "chunked": ({}, set()),
    "close": ({}, set()),
    "redirect": ({}, {"network"}),  # an object store's redirect is not followed: the signature is for one host
    "redirect_loop": ({}, {"network"}),
    "redirect_bad": ({"text": "ftp://127.0.0.1/x"}, {"network"}),
    "slow_headers": ({"seconds": 0.05}, {"network", "deadline"}),
    "garbage": ({"text": "not http at all\r\n\r\n"}, {"network"}),
}
HARMLESS = frozenset(("chunked", "close", "restatus"))
HTTP_ROUTES = ("registry", "by mirror", "by proxy", "s3", "oss", "http-proxy", "unix socket")
# Behind a mirror or proxy that goes wrong there is the registry: a read never fails for it.
COVERED_ROUTES = frozenset(("by mirror", "by proxy"))
# A status of 401 or 403 from a proxy that does not say it is its own is the registry's, and so is 404 and 418.
PROXY_SPEAKS_FOR_REGISTRY = frozenset(
    ("status 401", "status 403", "status 404", "status 418", "redirect", "redirect_loop", "redirect_bad")
)


# What goes wrong with a local file or disk, and the cause it is told as.
LOCAL_CASES = {"missing": "missing", "truncated": "format", "empty": "format", "corrupt": "digest"}
LOCAL_ROUTES = ("localfs", "localdisk")


class Outcome(NamedTuple):
    """How a case ended. verdict: "ok", the name of a cause, or WRONG, HUNG, POISONED (the cache) with what was seen."""

    fault: str
    route: str
    mode: str
    verdict: str
    seconds: float
    line: str

    @property
    def right(self) -> bool:
        if self.route in LOCAL_ROUTES:  # lasting: told as what it is; healed before the reader comes: right bytes
            return self.verdict == ("ok" if self.mode == "prefetch" else LOCAL_CASES[self.fault])
        if self.verdict == "ok":
            return True
        if self.mode != "lasting" or self.fault in HARMLESS:
            # A refusal by name is one the first time too.
            return (
                self.mode == "once"
                and self.fault not in HARMLESS
                and self.verdict in CASES[self.fault][1]
                and not is_retried(self.fault, self.route)
            )
        return may_fail(self.fault, self.route, self.mode) and self.verdict in CASES[self.fault][1]


def may_fail(fault: str, route: str, mode: str) -> bool:
    """Whether a reader may end at its deadline, because the fault lasts and there is no other way to the blob."""
    covered = route == "by mirror" or (route == "by proxy" and fault not in PROXY_SPEAKS_FOR_REGISTRY)
    return mode == "lasting" and fault not in HARMLESS and not covered


def is_retried(fault: str, route: str) -> bool:
    """Whether one occurrence is survived by asking again: all but what another attempt cannot mend, told as what it
    is."""
    return route == "by mirror" or fault not in ("status 401", "status 403", "status 404")


class Image:
    """A small image: its bootstrap, its one blob, and the bytes of its files by inode."""

    def __init__(self, directory: Path) -> None:
        source = directory / "source"
        source.mkdir(parents=True)
        random = Random(5)
        for name, size in FILES.items():
            (source / name).write_bytes(random.randbytes(size))
        self.bootstrap = directory / "image.boot"
        build_image(source, self.bootstrap, directory / "blobs", BuildOptions(chunk_size=CHUNK_BYTES))
        (blob,) = [path for path in (directory / "blobs").iterdir() if not path.name.startswith(".")]
        self.blob_id, self.blob = blob.name, blob.read_bytes()
        with Bootstrap(self.bootstrap) as opened:
            self.files = {opened.lookup(opened.root_ino, name): (source / name).read_bytes() for name in FILES}


@contextmanager
def local_names() -> Iterator[None]:
    """Every name below localhost is this machine (RFC 6761), for buckets that are part of the host name."""
    look_up = socket.getaddrinfo

    def getaddrinfo(host: Any, *rest: Any, **more: Any) -> Any:
        return look_up("127.0.0.1" if str(host).endswith("localhost") else host, *rest, **more)

    socket.getaddrinfo = getaddrinfo  # type: ignore[assignment]
    try:
        yield
    finally:
        socket.getaddrinfo = look_up


@contextmanager
def open_route(route: str, image: Image, directory: Path) -> Iterator[tuple[Any, FaultyServer]]:
    """A backend and the server on its way that is to go wrong."""
    limits = {"timeout": 0.4, "connect_timeout": 0.4}
    blobs = {image.blob_id: image.blob}
    with ExitStack() as stack:
        unix = directory / "s" if route == "unix socket" else None
        faulty = stack.enter_context(FaultyServer(blobs, unix=unix))
        port = "" if unix else faulty.host.rpartition(":")[2]
        registry = {"scheme": "http", "host": faulty.host if not unix else "", "repo": "a/b", **limits}
        if route in COVERED_ROUTES:
            sound = stack.enter_context(FaultyServer(blobs))
            registry["host"] = sound.host
        bucket = {
            "scheme": "http",
            "endpoint": f"localhost:{port}",
            "bucket_name": "images",
            "access_key_id": "id",
            "access_key_secret": "a-secret",
            **limits,
        }
        kind, settings = {
            "registry": ("registry", registry),
            "by mirror": ("registry", {**registry, "mirrors": [{"host": faulty.url}]}),
            "by proxy": ("registry", {**registry, "proxy": {"url": faulty.url}}),
            "s3": ("s3", {**bucket, "region": "r"}),
            "oss": ("oss", bucket),
            "http-proxy": ("http-proxy", {"addr": faulty.url, "path": "blobs", **limits}),
            "unix socket": ("http-proxy", {"addr": str(unix), **limits}),
        }[route]
        backend = create_backend(kind, settings)
        try:
            yield backend, faulty
        finally:
            faulty.stopping.set()
            backend.close()


class Opened:
    """An engine on a cache directory with the image and a backend for its blob."""

    def __init__(self, image: Image, work_dir: Path, backend: Any, deadline_s: float = DEADLINE_S) -> None:
        self.deadline_s = deadline_s
        self.engine = Engine(read_deadline_ms=int(deadline_s * 1000), pool_threads=1)
        self.store = Store(self.engine, str(work_dir))
        self.rafs = Rafs(self.engine, str(image.bootstrap), self.store)
        self.pump = FetchPump(self.engine, slots=3)
        (blob,) = self.rafs.blobs()
        self.blob = blob
        self.pump.add_backend(blob.key, backend)
        self.pump.start()

    def close(self) -> None:
        self.engine.shutdown()
        self.pump.join(20)
        self.rafs.close()
        self.store.close()
        self.engine.close()

    def read(self, ino: int, length: int) -> bytes | None:
        """None for an error."""
        try:
            return self.rafs.read(ino, 0, length)
        except OSError:
            return None

    def cause(self) -> tuple[str, str]:
        """The cause that the engine told last, and its line."""
        found = ("none", "")
        while (event := self.engine.next_event(50)) is not None:
            if event.cause:
                found = (Cause(event.cause).name.lower(), event.text)
        return found


def run_local_case(fault: str, route: str, mode: str, image: Image) -> Outcome:
    """The blob's file is damaged; for mode prefetch it is whole again when the reader comes."""
    with tempfile.TemporaryDirectory(prefix="vnd-fault-") as name:
        directory = Path(name)
        file = directory / image.blob_id
        work_dir = directory / "cache"
        work_dir.mkdir()
        damaged = {
            "truncated": image.blob[:3000],
            "empty": b"",
            "corrupt": image.blob[:3000] + bytes(byte ^ 0x40 for byte in image.blob[3000:3001]) + image.blob[3001:],
        }.get(fault)
        if damaged is not None:
            file.write_bytes(damaged)
        backend = create_backend(
            route, {"dir": str(directory)} if route == "localfs" else {"device_path": str(file), "disable_gpt": True}
        )
        opened = Opened(image, work_dir, backend)

        class Healer:
            stopping = threading.Event()

            @staticmethod
            def heal() -> None:
                file.write_bytes(image.blob)  # the same file: backends keep it open

        try:
            verdict, seconds, line = (_prefetch if mode == "prefetch" else _read)(opened, image, Healer)
        finally:
            opened.close()
            backend.close()
        if verdict not in ("WRONG", "HUNG"):
            poisoned = check_cache(image, work_dir)
            if poisoned:
                verdict, line = "POISONED", poisoned
    return Outcome(fault, route, mode, verdict, seconds, line)


def run_case(fault: str, route: str, mode: str, image: Image) -> Outcome:
    with tempfile.TemporaryDirectory(prefix="vnd-fault-") as name:
        directory = Path(name)
        work_dir = directory / "cache"
        work_dir.mkdir()
        with open_route(route, image, directory) as (backend, faulty):
            faulty.inject(fault.partition(" ")[0], times=1 if mode == "once" else -1, **CASES[fault][0])
            opened = Opened(image, work_dir, backend, DEADLINE_S if may_fail(fault, route, mode) else PATIENT_S)
            try:
                verdict, seconds, line = (_prefetch if mode == "prefetch" else _read)(opened, image, faulty)
            finally:
                faulty.stopping.set()
                opened.close()
        if verdict not in ("WRONG", "HUNG"):
            poisoned = check_cache(image, work_dir)
            if poisoned:
                verdict, line = "POISONED", poisoned
    return Outcome(fault, route, mode, verdict, seconds, line)


def _read(opened: Opened, image: Image, faulty: Any) -> tuple[str, float, str]:
    slowest_s = 0.0
    failed = False
    for ino, data in image.files.items():
        began = time.monotonic()
        got = opened.read(ino, len(data))
        slowest_s = max(slowest_s, time.monotonic() - began)
        if got is not None and got != data:
            return "WRONG", slowest_s, f"file {ino}"
        failed = failed or got is None
        if failed:
            break
    if slowest_s > opened.deadline_s + GRACE_S:
        return "HUNG", slowest_s, opened.cause()[1]
    if not failed:
        return "ok", slowest_s, ""
    cause, line = opened.cause()
    return cause, slowest_s, line


def _prefetch(opened: Opened, image: Image, faulty: Any) -> tuple[str, float, str]:
    """Prefetch under the fault; then the server is healed and a reader must get everything."""
    opened.rafs.prefetch_blob(0)
    until = time.monotonic() + 2.0
    while time.monotonic() < until:
        ready, total = opened.rafs.ready_chunks(0)
        if total and ready == total:
            break
        event = opened.engine.next_event(20)
        if event is not None and event.level >= 30:
            break
    faulty.heal()
    faulty.stopping.set()  # what hangs is let go
    for ino, data in image.files.items():
        for _ in range(20):  # the circuit breaker may be shut for a second
            began = time.monotonic()
            got = opened.read(ino, len(data))
            seconds = time.monotonic() - began
            if got is not None or seconds > opened.deadline_s + GRACE_S:
                break
            time.sleep(0.1)  # between two tries; their number decides
        if seconds > opened.deadline_s + GRACE_S:
            return "HUNG", seconds, opened.cause()[1]
        if got is None:
            cause, line = opened.cause()
            return cause, seconds, line
        if got != data:
            return "WRONG", seconds, f"file {ino}"
    return "ok", seconds, ""


def check_cache(image: Image, work_dir: Path) -> str:
    """Reads everything from the cache alone: what is wrong in it, "" for nothing."""
    opened = Opened(image, work_dir, LocalfsBackend(directory=str(work_dir / "nowhere")))
    try:
        for ino, data in image.files.items():
            for offset in range(0, len(data), CHUNK_BYTES):
                wanted = data[offset : offset + CHUNK_BYTES]
                try:
                    got = opened.rafs.read(ino, offset, len(wanted))
                except OSError:
                    continue
                if got != wanted:
                    return f"cache: file {ino} at {offset}"
    finally:
        opened.close()
    return ""


def run_matrix(
    directory: Path, *, modes: tuple[str, ...] = MODES, workers: int = 8, tell: Callable[[Outcome], None] | None = None
) -> list[Outcome]:
    """All cases, several at once: most of their time is waiting."""
    image = Image(directory)
    assert {fault.partition(" ")[0] for fault in CASES} == set(FAULTS)
    cases: list[tuple[Any, ...]] = [
        (run_case, fault, route, mode) for fault in CASES for route in HTTP_ROUTES for mode in modes
    ]
    cases += [
        (run_local_case, fault, route, mode)
        for fault in LOCAL_CASES
        for route in LOCAL_ROUTES
        for mode in modes
        if mode != "once"
    ]
    with local_names(), ThreadPoolExecutor(workers) as pool:
        outcomes = []
        for outcome in pool.map(lambda case: case[0](*case[1:], image), cases):
            outcomes.append(outcome)
            if tell is not None:
                tell(outcome)
    return outcomes


def format_matrix(outcomes: list[Outcome]) -> str:
    """One line a fault, one column a way; in each cell how it ended, by mode."""
    by_case = {(one.fault, one.route, one.mode): one for one in outcomes}
    modes = [mode for mode in MODES if any(one.mode == mode for one in outcomes)]

    def table(faults: Iterable[str], routes: tuple[str, ...]) -> list[str]:
        rows = [["fault", *routes]]
        for fault in faults:
            cells = []
            for route in routes:
                found = [by_case[fault, route, mode] for mode in modes if (fault, route, mode) in by_case]
                cells.append(" ".join(one.verdict + ("" if one.right else "!") for one in found))
            rows.append([fault, *cells])
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]

    lines = [*table(CASES, HTTP_ROUTES), "", "local files (lasting, prefetch):", *table(LOCAL_CASES, LOCAL_ROUTES)]
    wrong = [one for one in outcomes if not one.right]
    slowest = max(outcomes, key=lambda one: one.seconds)
    return "\n".join(
        [
            f"each cell: {', '.join(modes)} (prefetch: what a reader gets afterwards); ! = not as it must be",
            *lines,
            f"{len(outcomes)} cases, {len(wrong)} not as they must be; slowest read {slowest.seconds:.1f} s "
            f"({slowest.fault}, {slowest.route}, {slowest.mode}), deadline {DEADLINE_S:g} s",
            *(
                f"! {one.fault}, {one.route}, {one.mode}: {one.verdict} after {one.seconds:.1f} s: {one.line}"
                for one in wrong
            ),
        ]
    )
