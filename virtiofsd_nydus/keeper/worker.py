"""The worker: engine, fetch threads and API, for front-ends whose sockets the keeper holds.

It begins with what the keeper gives it: options, the mounts of the worker before it, devices with their rings. What it
changes of that it tells the keeper before a client or a guest can know of it. When the keeper is gone it ends.
"""

import argparse
import os
import signal
import socket
import threading
from collections import deque

from virtiofsd_nydus import log as logs
from virtiofsd_nydus.daemon.api import make_server
from virtiofsd_nydus.daemon.migration import Migration
from virtiofsd_nydus.daemon.mounts import Forgetful, ImageMount, MountRecord
from virtiofsd_nydus.daemon.process import open_log, prepare_process, read_image
from virtiofsd_nydus.daemon.service import QUEUES, STOP_DEADLINE_S, Service, set_switch_interval
from virtiofsd_nydus.engine import SESSION_MIXED, SESSION_RAFS, Disk, create_ledger
from virtiofsd_nydus.errors import Failure, UsageFailure
from virtiofsd_nydus.keeper import protocol
from virtiofsd_nydus.keeper.protocol import Channel, Message
from virtiofsd_nydus.storage.config import load_config
from virtiofsd_nydus.vhost.blk import pack_config
from virtiofsd_nydus.vhost.device import DiskDevice, EngineDevice
from virtiofsd_nydus.vhost.messages import close_all
from virtiofsd_nydus.vhost.state import ApplyFailure, DeviceState

TYPE_CHECKING = False
if TYPE_CHECKING:
    from virtiofsd_nydus.keeper.protocol import Body

DEVICE_CALLS = (
    protocol.OPEN,
    protocol.APPLY,
    protocol.RESET,
    protocol.TRANSFER,
    protocol.TRANSFERRED,
    protocol.CLOSE,
)
UPGRADE_WAIT_S = 60.0  # the keeper gives up before
RECORD_WAIT_S = 30.0  # for the keeper to keep a record: it does so in microseconds, or it is gone


class KeptListener:
    """A listening socket of the keeper's: its file is not ours to remove."""

    def __init__(self, fd: int) -> None:
        self.socket = socket.socket(fileno=fd)

    def remove(self) -> None:
        pass

    def close(self) -> None:
        self.socket.close()


class Records:
    """What this worker tells the keeper of its mount table. Any thread."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._changed = threading.Condition()
        self._sent = self._kept = 0
        self.waits = False  # answers are read: from the first message of the main loop on

    def send(self, body: "Body", fds: "list[int]") -> None:
        """Returns when the keeper has it."""
        with self._changed:
            self._sent += 1
            number = self._sent
            self._channel.send(protocol.RECORD, {"record": number, **body}, fds)
            if self.waits and not self._changed.wait_for(lambda: self._kept >= number, RECORD_WAIT_S):
                raise Failure("the keeper does not answer")

    def kept(self, number: int) -> None:
        with self._changed:
            self._kept = number
            self._changed.notify_all()


class Remembered(Forgetful):
    """The keeper is the mount table's memory."""

    def __init__(self, records: Records) -> None:
        self._records = records

    def reserve(self, kind: int, serial: int) -> None:
        self._records.send({"table": {"kind": kind, "next_serial": serial + 1}}, [])

    def put(self, record: MountRecord) -> None:
        self._records.send({"put": record.body}, record.fds)

    def new_ledger(self) -> int:
        return create_ledger()

    def drop(self, path: str) -> None:
        self._records.send({"drop": path}, [])

    def changed_configs(self, changes: "dict[str, dict[str, str]]") -> None:
        self._records.send({"table": {"changes": changes}}, [])


class KeptDevice:
    """One device with its calls in order. A thread serves them while there are any."""

    def __init__(self, worker: "Worker", number: int) -> None:
        self._worker, self.number = worker, number
        self._lock = threading.Lock()
        self._calls: deque[Message] = deque()
        self._busy = False
        self.device: EngineDevice | None = None
        self._state = DeviceState(QUEUES)
        self.closed = threading.Event()

    def take(self, message: Message) -> None:
        """Has it served. The message becomes the device's."""
        with self._lock:
            self._calls.append(message)
            if self._busy:
                return
            self._busy = True
        threading.Thread(target=self._serve_all, name="device", daemon=True).start()

    def _serve_all(self) -> None:
        while True:
            with self._lock:
                if not self._calls:
                    self._busy = False
                    return
                message = self._calls.popleft()
            error: str | None = None
            try:
                self._serve(message)
            except Failure as failure:
                error = str(failure)
            except Exception as fault:
                error = f"a fault of this program: {fault!r}"
            finally:
                message.close()
            bases = [ring.base for ring in self._state.rings]
            self._worker.answer({"device": self.number, "error": error, "bases": bases})

    def _serve(self, message: Message) -> None:
        if message.kind == protocol.OPEN:
            self.device = self._worker.make_device(message.text("kind"))
            self.device.set_number(message.number("number"))
            self._state = DeviceState(self.device.queue_count)
        elif self.device is None:
            raise ApplyFailure("the device could not be made")
        elif message.kind == protocol.APPLY:
            try:
                protocol.unpack_state(message, self._state)
                self.device.apply(self._state)
            finally:
                self._drop_fds()
        elif message.kind == protocol.RESET:
            self.device.reset()
        elif message.kind == protocol.TRANSFER:
            fd = message.take_fd()
            try:
                self.device.begin_transfer(bool(message.body.get("loads")), fd)
            finally:
                os.close(fd)
        elif message.kind == protocol.TRANSFERRED:
            self.device.end_transfer()
        else:
            self._close()

    def _drop_fds(self) -> None:
        """The device has its own. Regions stay listed, without descriptors."""
        regions = self._state.regions
        self._state.close()
        self._state.regions = regions

    def _close(self) -> None:
        if self.device is not None:
            self.device.close()
        self.device = None
        self._worker.forget(self)
        self.closed.set()


class Worker(Service):
    """The service behind a keeper."""

    def __init__(self, channel: Channel, log: logs.Log, args: argparse.Namespace) -> None:
        super().__init__(
            log,
            instance_id=args.id,
            supervisor=args.supervisor,
            read_deadline_ms=args.read_deadline_ms,
            poll_us=args.poll_us,
            allow_unverified=args.allow_unverified,
            seccomp=args.seccomp,
            device=args.device,
        )
        if args.config and not args.bootstrap:
            self.migration_config = lambda: load_config(args.config)  # mounts by the API bring theirs
        self._channel, self._args = channel, args
        self._records = Records(channel)
        self._devices: dict[int, KeptDevice] = {}
        self._devices_lock = threading.Lock()
        self._upgrading = threading.Condition()
        self._upgrader = 0  # the thread whose client asked for an upgrade
        self._upgrade_answer: Body | None = None

    # ---- start

    def begin(self, start: Message, image: ImageMount | None) -> None:
        """Mounts what the keeper remembers, else what the options say, and tells that it is ready."""
        set_switch_interval()
        self.table.memory = Remembered(self._records)
        listener = KeptListener(start.take_fd()) if start.body.get("api") else None
        kept = start.body.get("table")
        if kept:
            self.table.open(int(kept["kind"]))
            self._restore(start, int(kept["next_serial"]), kept.get("changes") or {})
        else:
            self._open_first(image)
        if listener is not None:
            self._api = make_server(self, listener)
        self._channel.send(protocol.READY, self._facts())
        if not start.body.get("waits"):
            self.go()

    def _facts(self) -> "Body":
        """Of the kind of device that is served."""
        kind = self.device_kind
        if kind == "fs":
            return {"features": {kind: EngineDevice.features()}, "queues": {kind: QUEUES}, "saves": True}
        disk = Disk(self.table.pinned_image())
        config = pack_config(disk.size_bytes, QUEUES)
        disk.close()
        return {"features": {kind: DiskDevice.features()}, "queues": {kind: QUEUES}, "config": {kind: config.hex()}}

    def _open_first(self, image: ImageMount | None) -> None:
        args = self._args
        self.table.open(SESSION_RAFS if image else SESSION_MIXED)
        if image:
            self.table.mount_image(image)
        if args.shared_dir:
            self.table.mount_share(args.virtual_mountpoint, args.shared_dir)

    def _restore(self, start: Message, next_serial: int, changes: "dict[str, dict[str, str]]") -> None:
        records = [(body, [start.take_fd() for _ in range(int(body["fds"]))]) for body in start.body["mounts"]]
        try:
            self.table.restore(records, next_serial, changes, list(map(int, start.body["front_ends"])))
        finally:
            for _, fds in records:
                close_all(fds)

    def go(self) -> None:
        """Answers clients of the API from here on."""
        self._run(workers=int(self._args.deaths) + 1) if self._args.deaths else self._run()

    # ---- the keeper's wishes

    def serve(self) -> None:
        """Until the keeper says stop, or is gone."""
        self._records.waits = True
        while True:
            try:
                message = self._channel.receive()
            except EOFError:
                os._exit(0)
            if message is not None and not self._take(message):
                return

    def _take(self, message: Message) -> bool:
        if message.kind in DEVICE_CALLS:
            self._device(message.number("device")).take(message)
            return True
        if message.kind == protocol.KEPT:
            self._records.kept(message.number("record"))
        elif message.kind == protocol.GO:
            self.go()
        elif message.kind == protocol.UPGRADED:
            with self._upgrading:
                self._upgrade_answer = message.body
                self._upgrading.notify_all()
        message.close()
        return message.kind != protocol.STOP

    def _device(self, number: int) -> KeptDevice:
        with self._devices_lock:
            found = self._devices.get(number)
            if found is None:
                found = self._devices[number] = KeptDevice(self, number)
            return found

    def forget(self, device: KeptDevice) -> None:
        with self._devices_lock:
            self._devices.pop(device.number, None)

    def make_device(self, kind: str) -> EngineDevice:
        device = super().make_device(kind)
        device.migrator = Migration(device, self.table, self.log, self.migration_config, self._count_devices)
        return device

    def _count_devices(self) -> int:
        with self._devices_lock:
            return len(self._devices)

    # ---- upgrade

    def upgrade(self, python: str) -> None:
        """Has the keeper start another version. When its answer is sent, this worker ends."""
        with self._upgrading:
            if self._upgrader:
                raise Failure("an upgrade is under way")
            self._upgrader, self._upgrade_answer = threading.get_ident(), None
        self._channel.send(protocol.UPGRADE, {"python": python})
        with self._upgrading:
            if not self._upgrading.wait_for(lambda: self._upgrade_answer is not None, UPGRADE_WAIT_S):
                self._upgrader = 0
                raise Failure("the keeper does not answer")
            answer: Body = self._upgrade_answer or {}
            error = answer.get("error")
            if error is not None:
                self._upgrader = 0
                raise Failure(f"the upgrade is refused: {error}")

    def note_answer(self) -> None:
        if self._upgrader == threading.get_ident():
            self._upgrader = 0
            self._channel.send(protocol.ANSWERED)

    def answer(self, body: "Body") -> None:
        try:
            self._channel.send(protocol.DONE, body)
        except OSError:  # the keeper is gone, which the main loop notices
            pass

    def exit_by_api(self) -> None:
        self._channel.send(protocol.EXIT)

    def _close_host(self) -> None:
        with self._devices_lock:
            devices, self._devices = list(self._devices.values()), {}
        for device in devices:
            device.take(Message(protocol.CLOSE, {}, []))
        for device in devices:
            device.closed.wait()


def _start(channel: Channel, start: Message) -> Worker:
    args = argparse.Namespace(**start.body["args"])
    args.deaths = start.body.get("deaths", 0)
    first = not start.body.get("table")
    if first and args.prefetch_files and not args.bootstrap:
        raise UsageFailure("--prefetch-files needs --bootstrap; for mounts by the API the list is in the request")
    image = read_image(args) if first else None
    log = open_log(args)
    prepare_process(args, log)
    worker = Worker(channel, log, args)
    try:
        worker.begin(start, image)
    except Failure:
        log.close()
        raise
    return worker


def run(sock: socket.socket) -> int:
    """Serves a keeper. The exit status."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    channel = Channel(sock, blocking=True)
    try:
        start = channel.receive()
        while start is None:
            start = channel.receive()
        worker = _start(channel, start)
    except EOFError:
        return 0
    except Failure as failure:
        channel.send(protocol.FAILED, {"text": str(failure), "usage": isinstance(failure, UsageFailure)})
        return 1
    worker.serve()
    worker.stop(STOP_DEADLINE_S)
    return 0
