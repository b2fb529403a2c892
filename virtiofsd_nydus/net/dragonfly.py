"""What Dragonfly's peer daemon (dfdaemon) is told with a request, and what it tells with an answer. Light.

It is spoken to as a forward proxy (net/proxy.py) or as a registry's mirror (X-Dragonfly-Registry names the registry).
"""

import threading

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

REGISTRY_HEADER = "X-Dragonfly-Registry"
ERROR_TYPE_HEADER = "X-Dragonfly-Error-Type"
TASK_HEADER, FINISHED_HEADER = "X-Dragonfly-Task-ID", "X-Dragonfly-Task-Download-Finished"
PRIORITY_PREFETCH, PRIORITY_DEMAND = "3", "6"
# dfdaemon fetches whole pieces, of this many bytes at least: a smaller range costs as much.
PIECE_BYTES = 4 << 20


def make_headers(prefetch: bool) -> dict[str, str]:
    """What goes with a request for a blob. One task a blob, by its digest, whatever registry or token it comes with."""
    headers = {
        "X-Dragonfly-Use-P2P": "true",
        "X-Dragonfly-Priority": PRIORITY_PREFETCH if prefetch else PRIORITY_DEMAND,
        "X-Dragonfly-Enable-Task-ID-Based-Blob-Digest": "true",
    }
    if prefetch:
        headers["X-Dragonfly-Prefetch"] = "true"
    return headers


def is_peers_own(headers: "Mapping[str, str]") -> bool:
    """Whether an error is the peer's: its proxy refused (`proxy`), or it has no scheduler or lost its stream
    (`dfdaemon`). `backend` is the registry's own error, passed on."""
    return headers.get(ERROR_TYPE_HEADER, "").strip().lower() in ("proxy", "dfdaemon")


def is_backends(headers: "Mapping[str, str]") -> bool:
    return headers.get(ERROR_TYPE_HEADER, "").strip().lower() == "backend"


class PeerCount:
    """Answers that a peer gave of a task, and those of them that it had whole before it was asked. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.answers = self.hits = 0

    def note(self, headers: "Mapping[str, str]") -> None:
        finished = headers.get(FINISHED_HEADER, "").strip().lower()
        if not finished and not headers.get(TASK_HEADER):
            return
        with self._lock:
            self.answers += 1
            self.hits += finished == "true"

    def status(self) -> dict[str, int]:
        with self._lock:
            return {"answers": self.answers, "hits": self.hits}
