"""SIGKILL of a daemon at random moments under cold load, again and again on the same cache; every byte that the next
one serves is compared. When the cache is full it begins anew."""

import hashlib
import shutil
import threading
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from tests.peers.faulty_server import FaultyServer
from tests.proofs.sample import Sample
from tests.system.daemon import Daemon, ServedImage
from tests.system.test_kill import Gone, MortalChannel
from virtiofsd_nydus.fakeguest.fakeguest import FakeGuest, GuestFault
from virtiofsd_nydus.fakeguest.frontend import HungUp
from virtiofsd_nydus.fakeguest.fuse_client import FuseClient

KILL_WITHIN_S = 0.3


@dataclass
class Kills:
    """kills: of them under_load while files were still being read. files: read whole and compared."""

    kills: int = 0
    under_load: int = 0
    files: int = 0
    caches: int = 0
    wrong: list[str] = field(default_factory=list)


def kill_daemons(sample: Sample, work: Path, count: int, seed: str, *, slow_s: float = 0.01) -> Kills:
    """slow_s: what each answer of the registry takes, so that there is something to interrupt."""
    random = Random(seed)
    found = Kills()
    cache = work / "cache"
    with FaultyServer({sample.blob.name: sample.blob.read_bytes()}) as server:
        server.inject("delay", seconds=slow_s, match="/blobs/", times=-1)
        image = ServedImage(
            sample.bootstrap,
            "registry",
            {"scheme": "http", "host": server.host, "repo": "a/b"},
            {sample.blob.name: sample.blob.stat().st_size},
        )
        while found.kills < count:
            with Daemon(image, cache) as daemon:
                # Not later than the whole takes, else only the first of each cache would meet cold load
                timer = threading.Timer(random.uniform(0, KILL_WITHIN_S), daemon.process.kill)
                names = sorted(sample.files)
                random.shuffle(names)
                whole = read_until_killed(daemon, names, sample, found, timer)
                timer.join()
                daemon.process.wait(30)
                found.kills += 1
                found.under_load += not whole
            if whole:
                shutil.rmtree(cache)
                found.caches += 1
            server.requests.clear()
    return found


def read_until_killed(daemon: Daemon, names: list[str], sample: Sample, found: Kills, timer: threading.Timer) -> bool:
    """Whether all could be read before the end came."""
    started = False
    at_first_file = found.kills % 2 == 1  # else counted from the guest's first request on
    try:
        with FakeGuest(daemon.socket_path) as guest:
            fuse = FuseClient(MortalChannel(guest.queues[1], daemon))
            fuse.init()
            for name in names:
                if not started and (not at_first_file or name != names[0]):
                    timer.start()
                    started = True
                data = fuse.read_file(name)
                found.files += 1
                if hashlib.sha256(data).hexdigest() != sample.files[name]:
                    found.wrong.append(f"kill {found.kills}: {name}")
    except (OSError, HungUp, Gone, GuestFault):
        return False
    finally:
        if not started:
            timer.start()
    return True
