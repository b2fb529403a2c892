"""A group of processes, directories and mounts that starts and ends as a whole."""

from contextlib import ExitStack
from types import TracebackType
from typing import Self


class Lifetime:
    """A context manager for classes that own processes, directories, mounts. _start() opens them and puts the end of
    each on self._stack, which is unwound when the context is left and when _start() itself fails."""

    def __init__(self) -> None:
        self._stack = ExitStack()

    def _start(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
