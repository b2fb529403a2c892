"""What is started as a whole and ended as a whole, whatever happens in between."""

from contextlib import ExitStack
from types import TracebackType
from typing import Self


class Lifetime:
    """A context manager for whoever owns processes, directories, mounts. _start() opens them and puts the end of each
    on self._stack, which is unwound when the context is left and when _start() itself fails."""

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
