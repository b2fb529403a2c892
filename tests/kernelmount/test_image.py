"""An image opened for the kernel, without a mount of it."""

import threading
from pathlib import Path

from tests.fakeguest.support import build_image, make_tree
from virtiofsd_nydus.engine import Event
from virtiofsd_nydus.kernelmount.image import KernelImage
from virtiofsd_nydus.storage.config import localfs_config


def test_lines_are_given_until_the_engine_is_freed(tmp_path: Path) -> None:
    """The thread that gives them is in the engine; it has left before that is freed."""
    make_tree(tmp_path / "tree")
    image = build_image(tmp_path / "tree", tmp_path / "image")
    for blob in set(image.blob_dir.iterdir()) - {image.bootstrap}:
        blob.unlink()
    config = localfs_config(str(image.blob_dir))
    config.work_dir = str(tmp_path / "cache")
    (tmp_path / "cache").mkdir()
    said, shut, closed = threading.Event(), threading.Event(), threading.Event()
    alive: list[bool] = []

    def say(event: Event) -> None:
        said.set()
        shut.wait()
        closed.wait(0.2)  # time to free the engine meanwhile

    with KernelImage(str(image.bootstrap), config) as opened:
        shutdown, close = opened.engine.shutdown, opened.engine.close

        def shutdown_engine() -> None:
            shutdown()
            shut.set()

        def close_engine() -> None:
            alive.append(any(thread.name == "log" for thread in threading.enumerate()))
            closed.set()
            close()

        opened.engine.shutdown, opened.engine.close = shutdown_engine, close_engine  # type: ignore[method-assign]
        opened.give_events(say)
        opened.rafs.prefetch_blob(0)
        assert said.wait(20)
    assert alive == [False]
