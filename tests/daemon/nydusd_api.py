"""What clients may send to a nydusd with a host mount, and how nydusd answered.

`python -m tests.daemon.nydusd_api NYDUSD` asks that nydusd and writes its answers to nydusd_answers.json, against which
test_nydusd_api.py holds ours. An answer is a status, a content type and what its body says: an error's message, or the
names and kinds of a document's values. The image and all directories lie below one directory, {dir} in texts.
"""

import http.client
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.fakeguest.support import build_image
from tests.system.daemon import wait_until
from virtiofsd_nydus.vmm.servers import UnixConnection

ANSWERS = Path(__file__).with_name("nydusd_answers.json")
MOUNT = "/api/v1/mount?mountpoint="


@dataclass(frozen=True)
class Request:
    """One call. body: text, or what becomes JSON; {dir} in either is replaced. said: how much of an error's message
    must be nydusd's: "all", or "kind", what is before the first quote, where the rest is in the daemon's own words."""

    method: str
    target: str
    body: object = None
    said: str = "all"

    def key(self) -> str:
        text = self.body if isinstance(self.body, str) or self.body is None else json.dumps(self.body)
        return f"{self.method} {self.target}" + (f" {text}" if text is not None else "")

    def sent_body(self, directory: Path) -> str | None:
        if self.body is None:
            return None
        text = self.body if isinstance(self.body, str) else json.dumps(self.body)
        return text.replace("{dir}", str(directory))


def rafs(source: str = "{dir}/image/image.boot", **other: object) -> dict[str, object]:
    config = json.dumps(
        {
            "device": {
                "backend": {"type": "localfs", "config": {"dir": "{dir}/image"}},
                "cache": {"type": "blobcache", "config": {"work_dir": "{dir}/cache"}},
            },
            "mode": "direct",
        }
    )
    return {"fs_type": "rafs", "source": source, "config": config, **other}


# In this order; each finds what those before it left.
REQUESTS: Sequence[Request] = (
    # Nothing mounted
    Request("GET", "/api/v1/daemon"),
    Request("GET", "/api/v2/daemon"),
    Request("GET", "/api/v1/daemon?colour=red"),
    Request("GET", "/api/v1/daemon", "{}"),
    Request("POST", "/api/v1/daemon", "{}"),
    Request("DELETE", "/api/v1/daemon"),
    Request("PUT", "/api/v1/daemon"),
    Request("PUT", "/api/v1/daemon", {"log_level": "error"}),
    Request("PUT", "/api/v2/daemon", {"log_level": "Error"}),
    Request("PUT", "/api/v1/daemon", {"log_level": "loud"}),
    Request("PUT", "/api/v1/daemon", {"log_level": 5}),
    Request("PUT", "/api/v1/daemon", {}),
    Request("PUT", "/api/v1/daemon", "no json"),
    Request("PUT", "/api/v1/daemon", "loud"),
    Request("PUT", "/api/v1/daemon", "5"),
    Request("PUT", "/api/v1/daemon", '"text"'),
    Request("PUT", "/api/v1/daemon", '{"log_level":'),
    Request("PUT", "/api/v1/daemon", '{"log_level": "info"'),
    Request("PUT", "/api/v1/daemon", '{"log_level": "info'),
    Request("PUT", "/api/v1/daemon", '{"log_level" "info"}'),
    Request("PUT", "/api/v1/daemon", '{"log_level": "error"} x'),
    Request("PUT", "/api/v1/daemon", "{log_level: 1}"),
    Request("GET", "/api/v1/daemon/events"),
    Request("PUT", "/api/v1/daemon/events"),
    Request("GET", "/api/v1/daemon/start"),
    Request("PUT", "/api/v1/daemon/start"),
    Request("PUT", "/api/v1/daemon/start", "{}"),
    Request("POST", "/api/v1/daemon/exit"),
    Request("PUT", "/api/v1/daemon/exit", "{}"),
    Request("GET", "/api/v1/daemon/fuse/sendfd"),
    Request("PUT", "/api/v1/daemon/fuse/takeover"),
    Request("GET", "/api/v1/daemon/fuse/takeover"),
    Request("GET", "/"),
    Request("GET", "/api/v1/"),
    Request("GET", "/api/v1/daemon/"),
    Request("GET", "/api/v3/daemon"),
    Request("PATCH", "/api/v1/daemon", "{}"),
    Request("GET", "/api/v1/mount"),
    Request("GET", MOUNT + "/a"),
    Request("POST", "/api/v1/mount", "{}"),
    Request("POST", "/api/v1/mount?mount=/a", rafs()),
    Request("POST", MOUNT + "/a"),
    Request("POST", MOUNT + "/a", "{}"),
    Request("POST", MOUNT + "/a", {"source": "x"}),
    Request("POST", MOUNT + "/a", {"source": "x", "config": ""}),
    Request("POST", MOUNT + "/a", {"source": 1, "config": ""}),
    Request("POST", MOUNT + "/a", {"source": "x", "config": {}}),
    Request("POST", MOUNT + "/a", {"source": "x", "config": "", "fs_type": "nfs"}),
    Request("POST", MOUNT + "/a", rafs(prefetch_files="/x")),
    Request("POST", MOUNT + "/a", rafs(prefetch_files=["x"]), said="kind"),
    Request("POST", MOUNT + "/a", rafs("{dir}/absent"), said="kind"),
    Request("POST", MOUNT + "/a", {"source": "{dir}/image/image.boot", "config": "{", "fs_type": "rafs"}, said="kind"),
    Request("PUT", MOUNT + "/a", rafs()),
    Request("DELETE", MOUNT + "/a"),
    Request("DELETE", "/api/v1/mount"),
    Request("DELETE", MOUNT + "/a", "{}"),
    Request("GET", "/api/v1/metrics"),
    Request("GET", "/api/v1/metrics?id=/a"),
    Request("GET", "/api/v1/metrics/files"),
    Request("GET", "/api/v1/metrics/pattern?id=poison"),
    Request("GET", "/api/v1/metrics/backend"),
    Request("GET", "/api/v1/metrics/blobcache"),
    Request("GET", "/api/v1/metrics/inflight"),
    Request("POST", "/api/v1/metrics", "{}"),
    Request("GET", "/api/v1/daemon/backend"),
    Request("GET", "/api/v1/daemon/backend?mountpoint=/a"),
    Request("GET", "/api/v1/config"),
    Request("GET", "/api/v1/config?id=/a"),
    Request("PUT", "/api/v1/config?id=/a", {"colour": "red"}),
    Request("PUT", "/api/v1/config?id=/a", {"registry_auth": 5}),
    Request("PUT", "/api/v1/config?id=/a", "[]"),
    Request("PUT", "/api/v1/config?id=/a"),
    Request("PUT", "/api/v2/blobs", "{}"),
    Request("DELETE", "/api/v2/blobs"),
    Request("DELETE", "/api/v2/blobs?domain_id=x"),
    Request("DELETE", "/api/v2/blobs?domain_id=x&blob_id=y"),
    Request("DELETE", "/api/v2/blobs?blob_id=y"),
    Request("GET", "/api/v2/blobs"),
    # One image
    Request("POST", MOUNT + "/a", rafs()),
    Request("POST", MOUNT + "/a", rafs()),
    Request("POST", MOUNT + "%2Fa", rafs()),
    Request("GET", "/api/v1/daemon"),
    Request("GET", "/api/v2/daemon"),
    Request("GET", "/api/v1/daemon/backend?mountpoint=/a"),
    Request("GET", "/api/v1/daemon/backend?mountpoint=/b"),
    Request("GET", "/api/v1/metrics"),
    Request("GET", "/api/v1/metrics?id=/a"),
    Request("GET", "/api/v1/metrics?id=/b"),
    Request("GET", "/api/v1/metrics/files?id=/a"),
    Request("GET", "/api/v1/metrics/files?latest=true"),
    Request("GET", "/api/v1/metrics/files?id=/b"),
    Request("GET", "/api/v1/metrics/pattern?id=/a"),
    Request("GET", "/api/v1/metrics/backend?id=/a"),
    Request("GET", "/api/v1/metrics/backend?id=/b"),
    Request("GET", "/api/v1/metrics/blobcache"),
    Request("GET", "/api/v1/metrics/blobcache?id=/b"),
    Request("PUT", "/api/v1/config?id=/a", {"registry_auth": "dGVzdDp0ZXN0"}),
    Request("GET", "/api/v1/config?id=/a"),
    Request("PUT", MOUNT + "/a", rafs()),
    Request("PUT", MOUNT + "/a", rafs("{dir}/absent"), said="kind"),
    Request("PUT", MOUNT + "/a", rafs(fs_type="nfs")),
    Request("PUT", MOUNT + "/b", rafs()),
    # Two, one below others
    Request("POST", MOUNT + "/x/y/z", rafs()),
    Request("GET", "/api/v1/metrics"),
    Request("DELETE", MOUNT + "/x/y"),
    Request("DELETE", MOUNT + "%2Fx%2Fy%2Fz"),
    Request("DELETE", MOUNT + "/a"),
    Request("DELETE", MOUNT + "/a"),
    Request("GET", "/api/v1/daemon"),
    # Last: the daemon ends
    Request("PUT", "/api/v1/daemon/exit"),
)


def shape(value: Any) -> Any:
    """The names and kinds of a document: null is null, lists are by their first entry."""
    if isinstance(value, dict):
        return {name: shape(below) for name, below in value.items()}
    if isinstance(value, list):
        return [shape(one) for one in value[:1]]
    if value is None or isinstance(value, bool):
        return value if value is None else "flag"
    return "number" if isinstance(value, (int, float)) else "text"


def ask(api: Path, request: Request, directory: Path) -> dict[str, Any]:
    connection = UnixConnection(api, 30)
    try:
        body = request.sent_body(directory)
        connection.request(
            request.method, request.target, body, {"Content-Type": "application/json"} if body is not None else {}
        )
        answer = connection.getresponse()
        raw = answer.read()
    finally:
        connection.close()
    found: dict[str, Any] = {"status": answer.status, "type": answer.headers.get("Content-Type")}
    if answer.status >= 400:
        try:
            error = json.loads(raw)
            found["message"] = error["message"].replace(str(directory), "{dir}")
            assert error["code"] == "UNDEFINED"
        except (ValueError, KeyError):
            found["message"] = None  # not the API's own: what comes before it could not make sense of the request
    elif raw:
        found["document"] = shape(json.loads(raw))
    return found


def prepare(directory: Path) -> None:
    """The image, its cache and the mount point."""
    tree = directory / "tree"
    (tree / "sub").mkdir(parents=True)
    (tree / "sub" / "file").write_text("text")
    build_image(tree, directory / "image")
    (directory / "cache").mkdir()
    (directory / "mnt").mkdir()


def ask_all(words: Sequence[str], directory: Path) -> list[tuple[Request, dict[str, Any]]]:
    """Starts `words --mountpoint ... --apisock ...` below a directory made ready, asks everything; the daemon ends."""
    api, mountpoint = directory / "api.sock", directory / "mnt"
    with (directory / "log").open("wb") as log:
        daemon = subprocess.Popen(
            [
                *words,
                "--mountpoint",
                str(mountpoint),
                "--apisock",
                str(api),
                "--log-level",
                "error",
                "--rlimit-nofile",
                "0",
            ],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )

    def runs() -> bool:
        assert daemon.poll() is None, (directory / "log").read_text()
        try:
            return bool(ask(api, REQUESTS[0], directory)["status"] == 200)
        except (OSError, http.client.HTTPException):
            return False

    try:
        wait_until(runs, "the API answers")
        answers = [(request, ask(api, request, directory)) for request in REQUESTS]
        daemon.wait(10)
        return answers
    finally:
        daemon.kill()
        daemon.wait()
        subprocess.run(["umount", "-l", str(mountpoint)], check=False, capture_output=True)


def record(nydusd: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        prepare(Path(name))
        answers = ask_all([nydusd, "fuse"], Path(name))
        version = subprocess.run([nydusd, "--version"], capture_output=True, text=True, check=True).stdout.split()
    return {"nydusd": " ".join(version), "answers": [{"request": request.key(), **found} for request, found in answers]}


if __name__ == "__main__":
    ANSWERS.write_text(json.dumps(record(sys.argv[1]), indent=1) + "\n")
