"""Images with their data, for tools: an engine, a temporary cache, and the source of blobs."""

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from virtiofsd_nydus import log as logs
from virtiofsd_nydus.engine import Engine
from virtiofsd_nydus.errors import UsageFailure
from virtiofsd_nydus.reader.bootstrap import Bootstrap

if TYPE_CHECKING:
    from virtiofsd_nydus.storage.backend import Backend

PATIENCE_S = 5.0  # a person waits: a source that gives nothing for so long is told of


class Source:
    """Where blobs are: a backend's type and its settings, as a configuration has them."""

    def __init__(self, kind: str, settings: dict[str, Any]) -> None:
        self.kind, self.settings = kind, settings

    def create_backend(self) -> "Backend":
        from virtiofsd_nydus.storage.factory import create_backend

        return create_backend(self.kind, self.settings)


def directory_source(directory: Path) -> Source:
    return Source("localfs", {"dir": str(directory)})


def choose_source(blob_dir: Path | None, config_file: Path | None) -> Source | None:
    """Where the blobs are by the verbs' two flags; None: neither flag was given."""
    if blob_dir is not None:
        if not blob_dir.is_dir():
            raise UsageFailure(f"--blob-dir {blob_dir}: no such directory")
        return directory_source(blob_dir)
    if config_file is not None:
        from virtiofsd_nydus.storage.config import load_config

        config = load_config(str(config_file))
        return Source(config.backend_type, config.backend_config)
    return None


@contextmanager
def opened_with_data(
    path: Path,
    source: Source | Path,
    blob_id: str | None = None,
    allow_unverified: bool = False,
    work_dir: str = "",
) -> Iterator[Bootstrap]:
    """The image with its data over a temporary cache, so that nothing which an earlier run trusted is used; work_dir:
    over this one instead. source: a path is a directory of blobs. What the engine has to say (a wrong digest, a
    missing blob) goes to stderr."""
    from virtiofsd_nydus.storage.opened import Origin, open_with_engine

    origin = source if isinstance(source, Source) else directory_source(source)
    with (
        tempfile.TemporaryDirectory(prefix="virtiofsd-nydus-") as work,
        open_with_engine(
            str(path),
            lambda: Origin(origin.create_backend()),
            work_dir=work_dir or work,
            blob_id=blob_id,
            allow_unverified=allow_unverified,
            at_end=say_events,
            patience_s=PATIENCE_S,
        ) as opened,
        Bootstrap(path, engine=opened.engine, image=opened.rafs) as image,
    ):
        yield image


def say_events(engine: Engine) -> None:
    """Prints what waits in the engine's event queue, if it tells why something could not be read."""
    for event in engine.waiting_events():
        if event.level >= logs.ERROR:
            print(event.text, file=sys.stderr)
