"""Logging of the daemon: structlog, but not before it answers RUNNING (its import alone costs 100 ms).

Lines said before activate() are kept and replayed with their own time. After it every line goes out at once, as text
or JSON. The caller keeps secrets out of its line.

The reader of a log that is a pipe may have stopped: lines are then lost and counted, and no thread waits.
"""

import os
import select
import stat
import sys
import threading
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, TextIO

DEBUG, INFO, WARNING, ERROR = 10, 20, 30, 40
LEVELS = {"trace": DEBUG, "debug": DEBUG, "info": INFO, "warn": WARNING, "warning": WARNING, "error": ERROR, "off": 100}
NAMES = {DEBUG: "debug", INFO: "info", WARNING: "warning", ERROR: "error"}
EARLY_MAX = 1000
# Linux gives a pipe out page by page: one that polls as writable takes this much without waiting. It also keeps lines
# shorter than the 64 KiB at which Kata's reader gives up.
PIPE_LINE_BYTES = 4096


def is_pipe(fd: int) -> bool:
    try:
        return stat.S_ISFIFO(os.fstat(fd).st_mode)
    except OSError:
        return False


class PipeLines:
    """A text stream over a pipe's descriptor, for whole lines: a write never waits."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._text = ""
        self._lost = 0
        self._poll = select.poll()
        self._poll.register(fd, select.POLLOUT)

    def write(self, text: str) -> int:
        self._text += text
        return len(text)

    def flush(self) -> None:
        line, self._text = self._text.encode(errors="backslashreplace"), ""
        if line:
            self.put(line)

    def put(self, line: bytes) -> None:
        """A whole line."""
        if self._lost and self._send(f"{self._lost} lines of the log were lost: its pipe was full\n".encode()):
            self._lost = 0
        if not self._send(line):
            self._lost += 1

    def _send(self, line: bytes) -> bool:
        if len(line) > PIPE_LINE_BYTES:
            line = line[: PIPE_LINE_BYTES - 5] + b" ...\n"
        if not self._poll.poll(0):
            return False
        os.write(self._fd, line)
        return True

    def isatty(self) -> bool:
        return False


class Log:
    """The daemon's log. Thread-safe."""

    def __init__(self, level: str = "info", path: str | None = None, form: str = "text") -> None:
        self.level = LEVELS[level.lower()]
        self._form = form
        self._lock = threading.Lock()
        self._early: list[tuple[float, int, str, dict[str, object]]] | None = []
        self._stream: TextIO = sys.stderr
        if path:
            self._stream = open(path, "a", buffering=1, encoding="utf-8")  # noqa: SIM115
        try:
            if is_pipe(self._stream.fileno()):
                self._stream = PipeLines(self._stream.fileno())  # type: ignore[assignment]
        except (AttributeError, ValueError):
            pass  # no descriptor behind it
        self._logger: Any = None

    def set_level(self, level: str) -> None:
        """Raises KeyError for an unknown name."""
        self.level = LEVELS[level.lower()]

    def say(self, level: int, event: str, **fields: object) -> None:
        if level < self.level:
            return
        with self._lock:
            if self._early is not None:
                if len(self._early) < EARLY_MAX:
                    self._early.append((time.time(), level, event, fields))
                return
            self._write(time.time(), level, event, fields)

    def activate(self) -> None:
        """Loads structlog and replays what was said so far. Idempotent."""
        import structlog

        with self._lock:
            if self._early is None:
                return
            tty = self._stream.isatty()
            render: Any = (
                structlog.processors.JSONRenderer()
                if self._form == "json"
                else structlog.dev.ConsoleRenderer(colors=tty)
            )
            self._logger = structlog.wrap_logger(
                structlog.PrintLogger(self._stream),
                processors=[render],
                wrapper_class=structlog.BoundLogger,
                context_class=dict,
            )
            early, self._early = self._early, None
            for at, level, event, fields in early:
                self._write(at, level, event, fields)

    def close(self) -> None:
        """Brings out what was said, even if it was never activated."""
        if self._early:
            self.activate()
        with self._lock:
            try:
                self._stream.flush()
            except (OSError, ValueError):
                pass

    def _write(self, at: float, level: int, event: str, fields: dict[str, object]) -> None:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(at)) + f".{int(at % 1 * 1e6):06d}Z"
        name = NAMES.get(level, "info")
        try:
            getattr(self._logger, name)(event, timestamp=stamp, level=name, **fields)
        except (OSError, ValueError):  # the log's reader is gone: serving goes on
            pass
