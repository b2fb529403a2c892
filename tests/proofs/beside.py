"""Two daemons, a real nydusd and a kernel mount on one cache directory, with images of the same and of different
tables, killed at random moments; every byte that any of them gives is compared.

A cache directory is used for a few rounds and then begun anew. Its first user is one of the first image, so that the
files with the blob's own name are that image's: a nydusd trusts the files of that name, whatever they hold, so it is
not asked to come second to another table. In a round each party reads its image's files in an order of its own, and
some are killed meanwhile and started again.

Needs root, /dev/fuse, EROFS, and a nydusd; the cache must lie on ext4, xfs or btrfs.
"""

import contextlib
import gzip
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import tarfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from tests.kernelmount.kernel import KernelMount
from tests.peers.faulty_server import FaultyServer
from tests.system.daemon import Daemon, ServedImage
from tests.system.test_kill import Gone, MortalChannel
from virtiofsd_nydus.builder.image import LayerSource, build_layer, merge_layers
from virtiofsd_nydus.builder.options import BuildOptions
from virtiofsd_nydus.cli.build import build_image
from virtiofsd_nydus.fakeguest.fakeguest import FakeGuest, GuestFault
from virtiofsd_nydus.fakeguest.frontend import HungUp
from virtiofsd_nydus.fakeguest.fuse_client import FuseClient
from virtiofsd_nydus.fuse.mounts import find_mount

FILES = 24
FILE_BYTES = 160_000
CHUNK_BYTES = 64 << 10
ROUNDS_A_CACHE = 4
ROUND_MAX_S = 1.2
READ_BYTES = 128 << 10
START_S = 30.0


@dataclass
class Party:
    """One image as a user of the cache has it: where it comes from, and what its files hold."""

    served: ServedImage
    files: dict[str, bytes]


@dataclass
class Found:
    """kills: by what was killed. files: compared, by who gave them. errors: reads that failed, likewise."""

    kills: Counter[str] = field(default_factory=Counter)
    files: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    caches: int = 0
    wrong: list[str] = field(default_factory=list)

    @property
    def kill_count(self) -> int:
        return self.kills.total()


def make_files(random: Random, mark: bytes = b"") -> dict[str, bytes]:
    return {f"{number:02}": mark + random.randbytes(FILE_BYTES + number * 1000 - len(mark)) for number in range(FILES)}


def make_party(directory: Path, files: dict[str, bytes]) -> tuple[Path, Path]:
    """An image of a directory: bootstrap, blob."""
    source = directory / "source"
    source.mkdir(parents=True)
    for name, data in files.items():
        (source / name).write_bytes(data)
    build_image(source, directory / "image.boot", directory / "blobs", BuildOptions(chunk_size=CHUNK_BYTES))
    (blob,) = [path for path in (directory / "blobs").iterdir() if not path.name.startswith(".")]
    return directory / "image.boot", blob


def make_borrowed(directory: Path, random: Random) -> tuple[tuple[Path, dict[str, bytes], dict[str, bytes]], ...]:
    """Two images of the same sizes and number of chunks; the second calls its blob by the first's id. Each: bootstrap,
    blobs by id, files."""
    first, second = make_files(random), make_files(random, b"another's")
    boot, blob = make_party(directory / "first", first)
    other, its_blob = make_party(directory / "second", second)
    raw = other.read_bytes()
    assert its_blob.name.encode() in raw
    other.write_bytes(raw.replace(its_blob.name.encode(), blob.name.encode()))
    return (
        (boot, {blob.name: blob.read_bytes()}, first),
        (other, {blob.name: its_blob.read_bytes()}, second),
    )


def make_layers(directory: Path, random: Random) -> tuple[tuple[Path, dict[str, bytes], dict[str, bytes]], ...]:
    """One gzip layer, referred to by two images with chunks of different size."""
    directory.mkdir()
    files = make_files(random)
    layer = directory / "layer"
    with gzip.open(layer, "wb", 1) as packed, tarfile.open(fileobj=packed, mode="w|") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    made = []
    for size in (CHUNK_BYTES, 1 << 20):
        options = BuildOptions(oci_ref=True, chunk_size=size)
        reference, boot = directory / f"ref-{size}", directory / f"boot-{size}"
        built = build_layer(LayerSource(layer, "tar"), options=options, out_blob=reference)
        merge_layers([built], options=options, out_bootstrap=boot)
        raw = reference.read_bytes()
        blobs = {built.blob_info.blob_id: layer.read_bytes(), hashlib.sha256(raw).hexdigest(): raw}
        made.append((boot, blobs, files))
    return tuple(made)


class OursInGuest:
    """A daemon of ours and a guest that reads from it."""

    name = "daemon"

    def __init__(self, party: Party, work: Path, cache: Path) -> None:
        self.party, self.cache = party, cache
        self.daemon: Daemon | None = None

    def start(self) -> None:
        self.daemon = Daemon(self.party.served, self.cache, deadline_ms=20_000)
        self.daemon.__enter__()

    def read(self, names: list[str], found: Found, compare: Callable[[str, bytes], None]) -> None:
        daemon = self.daemon
        assert daemon is not None
        try:
            with FakeGuest(daemon.socket_path) as guest:
                fuse = FuseClient(MortalChannel(guest.queues[1], daemon))
                fuse.init()
                for name in names:
                    try:
                        compare(name, fuse.read_file(name))
                    except OSError:
                        if daemon.process.poll() is not None:
                            return
                        found.errors[self.name] += 1
        except (OSError, HungUp, Gone, GuestFault):
            return

    def kill(self) -> None:
        assert self.daemon is not None
        self.daemon.process.kill()

    def revive(self) -> None:
        self.stop()
        self.start()

    def stop(self) -> None:
        if self.daemon is not None:
            self.daemon.__exit__(None, None, None)
            self.daemon = None


def read_mounted(root: Path, name: str) -> bytes:
    """From the file system, not from the page cache, as far as that can be asked for."""
    fd = os.open(root / name, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        return b"".join(iter(lambda: os.read(fd, READ_BYTES), b""))
    finally:
        os.close(fd)


class Nydusd:
    """The real one, with a FUSE mount."""

    name = "nydusd"

    def __init__(self, party: Party, work: Path, cache: Path, program: str) -> None:
        self.party, self.cache, self.program = party, cache, program
        self.mount, self.config, self.log = work / "mnt-nydusd", work / "nydusd.json", work / "nydusd.log"
        self.mount.mkdir(exist_ok=True)
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        served = self.party.served
        self.config.write_text(
            json.dumps(
                {
                    "device": {
                        "backend": {"type": served.backend_type, "config": served.backend_config},
                        "cache": {"type": "blobcache", "config": {"work_dir": str(self.cache)}},
                    },
                    "mode": "direct",
                    "digest_validate": False,
                    "fs_prefetch": {"enable": False},
                }
            )
        )
        words = [self.program, "fuse", "--rlimit-nofile", "0", "--config", str(self.config), "--bootstrap"]
        words += [str(served.bootstrap), "--mountpoint", str(self.mount), "--log-level", "error"]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        until = time.monotonic() + START_S
        while not os.path.ismount(self.mount):
            if self.process.poll() is not None or time.monotonic() > until:
                raise AssertionError(f"nydusd does not start: {self.log.read_text(errors='replace')[-500:]}")
            time.sleep(0.02)

    def read(self, names: list[str], found: Found, compare: Callable[[str, bytes], None]) -> None:
        for name in names:
            try:
                compare(name, read_mounted(self.mount, name))
            except OSError:
                if self.process is None or self.process.poll() is not None:
                    return
                found.errors[self.name] += 1

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()

    def revive(self) -> None:
        self.stop()
        self.start()

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait(START_S)
            self.process = None
        while find_mount(str(self.mount)):
            subprocess.run(["umount", "-l", str(self.mount)], check=True)


class OursInKernel:
    """`mount --kernel`; its worker or its guard is killed, and the other makes a new one."""

    name = "kernel mount"

    def __init__(self, party: Party, work: Path, cache: Path, random: Random) -> None:
        self.party, self.work, self.random = party, work, random
        self.target = work / "mnt-kernel"
        self.mount: KernelMount | None = None
        self.killed = ""

    def start(self) -> None:
        self.mount = KernelMount(self.party.served, self.target, self.work)
        self.mount.__enter__()

    def read(self, names: list[str], found: Found, compare: Callable[[str, bytes], None]) -> None:
        for name in names:
            try:
                compare(name, read_mounted(self.target, name))
            except OSError:
                found.errors[self.name] += 1

    def kill(self) -> None:
        assert self.mount is not None
        self.killed = ""
        role = self.random.choice(("worker", "guard"))
        for pid in self.mount.pids(role):  # none once all is here
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                self.killed = role

    def revive(self) -> None:
        """The other one does it."""

    def stop(self) -> None:
        if self.mount is not None:
            self.mount.__exit__(None, None, None)
            self.mount = None


User = OursInGuest | Nydusd | OursInKernel


def run(
    work: Path,
    kills: int,
    seed: str,
    nydusd: str,
    *,
    slow_s: float = 0.02,
    say: Callable[[str], None] = lambda line: None,
) -> Found:
    """Kills so many times. work: on a file system with pre-content events. slow_s: what each answer of a registry
    takes."""
    random = Random(seed)
    found = Found()
    pairs = {
        "borrowed id": make_borrowed(work / "borrowed", random),
        "two chunk sizes": make_layers(work / "layers", random),
    }
    with contextlib.ExitStack() as stack:
        parties: dict[str, tuple[Party, ...]] = {}
        for kind, images in pairs.items():
            made = []
            for boot, blobs, files in images:
                server = stack.enter_context(FaultyServer(blobs))
                server.inject("delay", seconds=slow_s, match="/blobs/", times=-1)
                config = {"scheme": "http", "host": server.host, "repo": "a/b"}
                sizes = {name: len(raw) for name, raw in blobs.items()}
                made.append(Party(ServedImage(boot, "registry", config, sizes), files))
            parties[kind] = tuple(made)
        while found.kill_count < kills:
            kind = random.choice(list(parties))
            use_cache(work, parties[kind], random, found, nydusd, kills, kind)
            say(
                f"{found.kill_count} kills {dict(found.kills)}, {found.caches} caches, {dict(found.files)} files "
                f"compared, errors {dict(found.errors)}, {len(found.wrong)} wrong"
            )
    return found


def use_cache(
    work: Path, pair: tuple[Party, ...], random: Random, found: Found, nydusd: str, kills: int, kind: str
) -> None:
    """The rounds of one cache directory."""
    first, second = pair
    cache = work / "cache"
    shutil.rmtree(cache, ignore_errors=True)
    cache.mkdir()
    same = random.random() < 0.25  # all have the same image
    firsts = [
        OursInGuest(first, work, cache),
        Nydusd(first, work, cache, nydusd),
        OursInKernel(first if same or random.random() < 0.5 else second, work, cache, random),
    ]
    starters = [one for one in firsts if one.party is first]
    opener = random.choice(starters)
    rest = [one for one in firsts if one is not opener]
    rest.append(OursInGuest(first if same else second, work, cache))
    random.shuffle(rest)
    users = [opener, *rest]
    found.caches += 1
    where = f"cache {found.caches} ({kind}{', all alike' if same else ''}, first {opener.name})"
    try:
        for one in users:
            one.start()
            if one is opener:  # one file, so that the blob's files are there and are its
                one.read([next(iter(one.party.files))], found, comparing(one, 0, found, where))
        for number in range(ROUNDS_A_CACHE):
            play_round(users, random, found, where, number)
            if found.kill_count >= kills:
                return
    finally:
        for one in users:
            one.stop()


def comparing(user: User, number: int, found: Found, where: str) -> Callable[[str, bytes], None]:
    def compare(name: str, data: bytes) -> None:
        found.files[user.name] += 1
        if data != user.party.files[name]:
            pairs = enumerate(zip(data, user.party.files[name], strict=False))
            at = next((at for at, (got, wanted) in pairs if got != wanted), len(data))
            found.wrong.append(f"{where}, round {number}: {user.name} gives {name} wrong from byte {at} on")

    return compare


def play_round(users: list[User], random: Random, found: Found, where: str, number: int) -> None:
    """All read; some die."""
    readers = []
    for one in users:
        names = sorted(one.party.files)
        random.shuffle(names)
        compare = comparing(one, number, found, where)
        reader = threading.Thread(target=one.read, args=(names, found, compare), daemon=True)
        reader.start()
        readers.append(reader)
    victims = random.sample(users, random.randint(1, len(users)))
    moments = sorted(random.uniform(0, ROUND_MAX_S) for _ in victims)
    began = time.monotonic()
    for victim, moment in zip(victims, moments, strict=True):
        time.sleep(max(0.0, began + moment - time.monotonic()))  # the moments are the experiment
        victim.kill()
        what = victim.killed if isinstance(victim, OursInKernel) else victim.name
        if what:
            found.kills[what] += 1
    for victim in victims:
        victim.revive()
    for reader in readers:
        reader.join(120)
        assert not reader.is_alive(), f"{where}: a reader hangs"
