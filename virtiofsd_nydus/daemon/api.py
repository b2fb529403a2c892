"""nydusd's HTTP API, and our own routes under /api/ext/v1/: what each answers.

Nothing here waits for the network but the mount of an image by its reference. Statuses and error texts are those
clients match on."""

import json

from virtiofsd_nydus.daemon.answers import ApiError, quoted
from virtiofsd_nydus.daemon.mounts import read_mount
from virtiofsd_nydus.daemon.prefetch import check_list
from virtiofsd_nydus.daemon.requests import (
    body_fault,
    describe_kind,
    parse_object,
    parse_query,
    require_mountpoint,
    require_no_body,
    require_texts,
)
from virtiofsd_nydus.daemon.server import HttpServer, Request
from virtiofsd_nydus.errors import Failure

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Protocol

    from virtiofsd_nydus.daemon.mounts import Mount, MountTable
    from virtiofsd_nydus.daemon.report import Report
    from virtiofsd_nydus.daemon.server import Listener
    from virtiofsd_nydus.log import Log

    class Daemon(Protocol):
        """What the API drives."""

        table: MountTable
        report: Report
        log: Log

        def exit_by_api(self) -> None:
            """PUT exit."""

        def start_by_api(self) -> None:
            """PUT start."""

        def send_fd(self) -> None:
            """PUT fuse/sendfd."""

        def take_over(self) -> None:
            """PUT fuse/takeover."""

        def upgrade(self, python: str) -> None:
            """PUT upgrade."""

        def note_answer(self) -> None:
            """This thread's answer has been sent."""


def answer_request(daemon: "Daemon", request: Request) -> "tuple[int, bytes]":
    """Status and body. A fault of this program is noted, and must not leave the client without an answer."""
    if not request.method:
        return 400, _error("BadRequest")
    target = request.target
    if target.startswith("http://"):
        target = "/" + target[len("http://") :].partition("/")[2]
    path, _, query_text = target.partition("?")
    methods = ROUTES.get(path)
    if methods is None:
        return 404, _error("NoRoute")
    wrapper = WRAPPERS.get(path, "Configure(DaemonAbnormal({}))")
    try:
        query = parse_query(query_text)
        if path == MOUNT_ROUTE:
            require_mountpoint(query)  # nydusd looks at it before the method
        handler = methods.get(request.method)
        if handler is None:
            return 400, _error("BadRequest")
        answer = handler(daemon, query, request.body)
    except ApiError as error:
        return error.status, _error(wrapper.format(error) if error.wrapped else str(error))
    except Failure as failure:
        return 500, _error(wrapper.format(f"Other({quoted(str(failure))})"))
    except Exception as error:
        daemon.report.note_fault(f"{request.method} {path}: {error!r}")
        return 500, _error(wrapper.format(f"Other({quoted(f'internal error: {type(error).__name__}')})"))
    if answer is None:
        return 204, b""
    return 200, answer.encode() if isinstance(answer, str) else json.dumps(answer).encode()


def make_server(daemon: "Daemon", listener: "Listener") -> HttpServer:
    """The server of a daemon's API."""
    return HttpServer(
        listener,
        lambda request: answer_request(daemon, request),
        daemon.report.note_fault,
        answered=daemon.note_answer,
    )


def _error(message: str) -> bytes:
    return json.dumps({"code": "UNDEFINED", "message": message}).encode()


def get_daemon(daemon: "Daemon", query: "dict[str, str]", body: bytes) -> object:
    require_no_body(body)
    return daemon.report.daemon_info()


def get_daemon_v2(daemon: "Daemon", query: "dict[str, str]", body: bytes) -> object:
    """Without the mounts, as nydusd's second version gives it."""
    require_no_body(body)
    return {**daemon.report.daemon_info(), "backend_collection": None}


def put_daemon(daemon: "Daemon", query: "dict[str, str]", body: bytes) -> object:
    document = parse_object(body, "struct DaemonConf")
    require_texts(document, ("log_level",), body)
    try:
        daemon.log.set_level(str(document["log_level"]))
    except KeyError:
        raise ApiError(500, "Configure(ResponsePayloadType)") from None
    return None


def put_exit(daemon: "Daemon", query: "dict[str, str]", body: bytes) -> object:
    require_no_body(body)
    daemon.exit_by_api()
    return None


def put_start(daemon: "Daemon", query: "dict[str, str]", body: bytes) -> object:
    require_no_body(body)
    daemon.start_by_api()
    return None


def put_sendfd(daemon: "Daemon", query: "dict[str, str]", body: bytes) -> object:
    require_no_body(body)
    daemon.send_fd()
    return None


def put_takeover(daemon: "Daemon", query: "dict[str, str]", body: bytes) -> object:
    require_no_body(body)
    daemon.take_over()
    return None


PASSTHROUGH_TYPES = ("passthrough", "passthroughfs", "passthrough_fs")
MOUNT_KEYS = ("source", "fs_type", "config")


def _mount_command(query: "dict[str, str]", body: bytes) -> "tuple[str, str, str, str, list[object] | None]":
    """(mount point, file system type, source, configuration text, files to prefetch)."""
    command = parse_object(body, "struct ApiMountCmd")
    require_texts({"fs_type": "", **command}, MOUNT_KEYS, body)
    files = command.get("prefetch_files")
    if files is not None and not isinstance(files, list):
        raise body_fault(f"invalid type: {describe_kind(files)}, expected a sequence", 1, len(body))
    kind = str(command.get("fs_type", ""))
    if kind != "rafs" and kind not in PASSTHROUGH_TYPES:
        raise Failure(f"invalid argument `only 'rafs' and 'passthrough_fs' are supported, but {kind} was specified`")
    return require_mountpoint(query), kind, str(command["source"]), str(command["config"]), files


def post_mount(daemon: "Daemon", query: "dict[str, str]", body: bytes) -> object:
    mountpoint, kind, source, config, files = _mount_command(query, body)
    if kind == "rafs":
        daemon.table.mount_image(read_mount(mountpoint, source, config, files))
    else:
        daemon.table.mount_share(mountpoint, source)
    return None


def put_mount(daemon: "Daemon", query: "dict[str, str]", body: bytes) -> object:
    mountpoint, _, source, config, files = _mount_command(query, body)
    daemon.table.remount(read_mount(mountpoint, source, config, files))
    return None


def delete_mount(daemon: "Daemon", query: "dict[str, str]", body: bytes) -> object:
    require_no_body(body)
    daemon.table.umount(require_mountpoint(query))
    return None


def get_stats(daemon: "Daemon", query: "dict[str, str]", body: bytes) -> object:
    require_no_body(body)
    return daemon.report.stats()


# ---- metrics


def _metrics(daemon: "Daemon", query: "dict[str, str]", body: bytes, kind: str, name: str) -> object:
    """kind: of metrics.DOCUMENTS; name: of the error, as nydusd gives it."""
    require_no_body(body)
    try:
        return daemon.report.mount_metrics(kind, query.get("id"))
    except LookupError:
        raise ApiError(404, f"{name}(Metrics(Stats(NoCounter)))") from None


def get_fs_metrics(daemon: "Daemon", query: "dict[str, str]", body: bytes) -> object:
    return _metrics(daemon, query, body, "fs", "GlobalMetrics")


def get_files_metrics(daemon: "Daemon", query: "dict[str, str]", body: bytes) -> object:
    return _metrics(daemon, query, body, "latest" if query.get("latest") == "true" else "files", "FsFilesMetrics")


def get_pattern_metrics(daemon: "Daemon", query: "dict[str, str]", body: bytes) -> object:
    return _metrics(daemon, query, body, "pattern", "Pattern")


def get_backend_metrics(daemon: "Daemon", query: "dict[str, str]", body: bytes) -> object:
    return _metrics(daemon, query, body, "backend", "BackendMetrics")


def get_blobcache_metrics(daemon: "Daemon", query: "dict[str, str]", body: bytes) -> object:
    return _metrics(daemon, query, body, "blobcache", "BlobcacheMetrics")


def get_inflight_metrics(daemon: "Daemon", query: "dict[str, str]", body: bytes) -> object:
    require_no_body(body)
    return daemon.report.inflight_metrics()


def get_prometheus(daemon: "Daemon", query: "dict[str, str]", body: bytes) -> object:
    require_no_body(body)
    return daemon.report.prometheus_text()


# ---- prefetch


def get_prefetch(daemon: "Daemon", query: "dict[str, str]", body: bytes) -> object:
    require_no_body(body)
    return daemon.report.prefetch_progress()


def _prefetched(daemon: "Daemon", query: "dict[str, str]") -> "Mount":
    mount = daemon.table.find(query.get("mountpoint"))
    if mount is None:
        raise ApiError(404, "Prefetch(NoSuchMount)")
    return mount


def put_prefetch(daemon: "Daemon", query: "dict[str, str]", body: bytes) -> object:
    """Fetches {"files": [absolute paths]}, or without a body everything. With ?wait=SECONDS the answer comes when all
    of it is here (200) or cannot be had in that time (503)."""
    files = parse_object(body).get("files") if body else None
    if files is not None and not isinstance(files, list):
        raise ApiError(400, 'ParseBody("files: not a list")')
    try:
        wait_s = float(query.get("wait") or 0)
    except ValueError:
        raise ApiError(400, "QueryString(\"'wait' is a number of seconds\")") from None
    prefetch = _prefetched(daemon, query).prefetch
    prefetch.start(None if files is None else check_list(files, "prefetch"), then_all=files is None)
    if wait_s > 0:
        prefetch.wait(wait_s)
        try:
            prefetch.require_done()
        except Failure as failure:
            raise ApiError(503, str(failure)) from None
    return prefetch.progress()


def delete_prefetch(daemon: "Daemon", query: "dict[str, str]", body: bytes) -> object:
    require_no_body(body)
    _prefetched(daemon, query).prefetch.cancel()
    return None


# ---- upgrade


def put_upgrade(daemon: "Daemon", query: "dict[str, str]", body: bytes) -> object:
    """Goes on with the version that {"python": PATH} runs, an interpreter with virtiofsd-nydus installed; without a
    body with what is installed in our own place now. Answered when that is ready; a refusal leaves all as it is."""
    document = parse_object(body) if body else {}
    python = document.get("python", "")
    if not isinstance(python, str) or (python and not python.startswith("/")):
        raise ApiError(400, 'ParseBody("python: not an absolute path")')
    daemon.upgrade(python)
    return None


# ---- hot changes of configuration


def get_config(daemon: "Daemon", query: "dict[str, str]", body: bytes) -> object:
    """Gives what was changed since start, values and all, as nydusd does: a client that may ask may also change it."""
    require_no_body(body)
    return daemon.table.changed_config(query.get("id"))


def put_config(daemon: "Daemon", query: "dict[str, str]", body: bytes) -> object:
    changes = parse_object(body)
    require_texts(changes, tuple(changes), body)
    daemon.table.change_config(query.get("id"), {key: str(value) for key, value in changes.items()})
    return None


# ---- what else nydusd has


def get_events(daemon: "Daemon", query: "dict[str, str]", body: bytes) -> object:
    require_no_body(body)
    return daemon.report.events()


def get_backend_info(daemon: "Daemon", query: "dict[str, str]", body: bytes) -> object:
    require_no_body(body)
    return daemon.report.superblock(require_mountpoint(query))


# nydusd's singleton mode, the kernel's on-demand cache, alone has these


def put_blobs(daemon: "Daemon", query: "dict[str, str]", body: bytes) -> object:
    require_texts(parse_object(body, "struct BlobCacheEntry"), ("type", "id"), body)
    raise ApiError(501, "CreateBlobObject(DaemonAbnormal(Unsupported))")


def delete_blobs(daemon: "Daemon", query: "dict[str, str]", body: bytes) -> object:
    require_no_body(body)
    if "domain_id" in query:
        raise ApiError(501, "DeleteBlobObject(DaemonAbnormal(Unsupported))")
    if "blob_id" in query:
        return None  # in all domains, of which there is none
    raise ApiError(400, "BadRequest")


def get_blobs(daemon: "Daemon", query: "dict[str, str]", body: bytes) -> object:
    require_no_body(body)
    if "domain_id" not in query:
        raise ApiError(400, "BadRequest")
    raise ApiError(501, "GetBlobObjects(DaemonAbnormal(Unsupported))")  # of which nydusd dies


MOUNT_ROUTE = "/api/v1/mount"
# How nydusd wraps a route's failures
WRAPPERS = {
    MOUNT_ROUTE: "Mount(MountFilesystem({}))",
    "/api/v1/daemon/fuse/sendfd": "Upgrade(DaemonAbnormal({}))",
    "/api/v1/daemon/fuse/takeover": "Upgrade(DaemonAbnormal({}))",
    "/api/v1/daemon/backend": "FsBackendInfo(Metrics(Daemon({})))",
}
ROUTES: "dict[str, dict[str, Callable[[Daemon, dict[str, str], bytes], object]]]" = {
    "/api/v1/daemon": {"GET": get_daemon, "PUT": put_daemon},
    "/api/v2/daemon": {"GET": get_daemon_v2, "PUT": put_daemon},
    "/api/v1/daemon/exit": {"PUT": put_exit},
    "/api/v1/daemon/start": {"PUT": put_start},
    "/api/v1/daemon/fuse/sendfd": {"PUT": put_sendfd},
    "/api/v1/daemon/fuse/takeover": {"PUT": put_takeover},
    "/api/v1/daemon/events": {"GET": get_events},
    "/api/v1/daemon/backend": {"GET": get_backend_info},
    "/api/v2/blobs": {"GET": get_blobs, "PUT": put_blobs, "DELETE": delete_blobs},
    MOUNT_ROUTE: {"POST": post_mount, "PUT": put_mount, "DELETE": delete_mount},
    "/api/v1/config": {"GET": get_config, "PUT": put_config},
    "/api/v1/metrics": {"GET": get_fs_metrics},
    "/api/v1/metrics/files": {"GET": get_files_metrics},
    "/api/v1/metrics/pattern": {"GET": get_pattern_metrics},
    "/api/v1/metrics/backend": {"GET": get_backend_metrics},
    "/api/v1/metrics/blobcache": {"GET": get_blobcache_metrics},
    "/api/v1/metrics/inflight": {"GET": get_inflight_metrics},
    "/api/ext/v1/stats": {"GET": get_stats},
    "/api/ext/v1/prefetch": {"GET": get_prefetch, "PUT": put_prefetch, "DELETE": delete_prefetch},
    "/api/ext/v1/metrics": {"GET": get_prometheus},
    "/api/ext/v1/upgrade": {"PUT": put_upgrade},
}
