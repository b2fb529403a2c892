"""The keeper's own log lines, in the form of the daemon's log and without its imports."""

import json
import os
import time

from virtiofsd_nydus import log as logs

LINE_MAX_BYTES = logs.PIPE_LINE_BYTES


class LightLog:
    """Lines on a descriptor that stays the caller's. A line that its reader does not take is lost. One thread, which
    all guests need: it never waits for a pipe's reader."""

    def __init__(self, fd: int, level: str, form: str) -> None:
        self._fd, self._json = fd, form == "json"
        self._pipe = logs.PipeLines(fd) if logs.is_pipe(fd) else None
        self.level = logs.LEVELS[level.lower()]

    def say(self, level: int, event: str, **fields: object) -> None:
        if level < self.level:
            return
        at = time.time()
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(at)) + f".{int(at % 1 * 1e6):06d}Z"
        name = logs.NAMES.get(level, "info")
        if self._json:
            line = json.dumps({**fields, "event": event, "timestamp": stamp, "level": name}, default=str)
        else:
            said = "".join(f" {key}={value}" for key, value in sorted(fields.items()))
            line = f"{stamp} [{name:<9}] {event:<30}{said}"
        self.write(line.encode(errors="backslashreplace") + b"\n")

    def write(self, line: bytes) -> None:
        """One whole line as it is."""
        if len(line) > LINE_MAX_BYTES:
            line = line[: LINE_MAX_BYTES - 5] + b" ...\n"
        try:
            if self._pipe is not None:
                self._pipe.put(line)
            else:
                os.write(self._fd, line)
        except OSError:  # full, or its reader is gone: serving goes on
            pass
