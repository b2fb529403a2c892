"""Where the chunk table of a blob has to be fetched too (batches), eight cold daemons on one node fetch it once."""

import threading
from contextlib import ExitStack
from pathlib import Path

from tests.peers.faulty_server import FaultyServer
from tests.system.daemon import Daemon, ServedImage
from virtiofsd_nydus.builder.options import BuildOptions
from virtiofsd_nydus.cli.build import build_image
from virtiofsd_nydus.fakeguest.fakeguest import FakeGuest
from virtiofsd_nydus.reader.bootstrap import Bootstrap

DAEMONS = 8
FILES = 40


def test_eight_cold_daemons_fetch_the_table_once(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for number in range(FILES):
        (source / f"{number:02}").write_bytes(bytes([number]) * (1000 + number))
    build_image(
        source, tmp_path / "image.boot", tmp_path / "blobs", BuildOptions(chunk_size=1 << 17, batch_size=1 << 16)
    )
    (blob,) = [path for path in (tmp_path / "blobs").iterdir() if not path.name.startswith(".")]
    with Bootstrap(tmp_path / "image.boot") as image:
        table_at = image.blobs[0].ci_offset
    with FaultyServer({blob.name: blob.read_bytes()}) as server, ExitStack() as stack:
        server.inject("delay", seconds=0.2, match="/blobs/", times=-1)  # so that all come while one fetches
        served = ServedImage(
            tmp_path / "image.boot", "registry", {"scheme": "http", "host": server.host, "repo": "a/b"}, {}
        )
        daemons = [stack.enter_context(Daemon(served, tmp_path / "cache")) for _ in range(DAEMONS)]
        wrong: list[str] = []

        def read(daemon: Daemon) -> None:
            with FakeGuest(daemon.socket_path) as guest:
                guest.fuse.init()
                for number in range(FILES):
                    if guest.fuse.read_file(f"{number:02}") != bytes([number]) * (1000 + number):
                        wrong.append(f"{number:02}")

        threads = [threading.Thread(target=read, args=(daemon,)) for daemon in daemons]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        asked = server.ranges(blob.name)
    assert wrong == []
    assert sum(first == table_at for first, _ in asked) == 1, (table_at, asked)
