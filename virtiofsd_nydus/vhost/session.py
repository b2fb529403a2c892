"""One front-end's connection: its requests, in any order that real ones use, added up to a DeviceState.

It knows nothing of the engine, and runs in the process that has it as in the keeper, which has not. There a device
answers later: a request is served by a generator, which yields while it waits for the device.

Three ways out of a bad request. A message that is none ends the connection. A request that cannot be done is refused
when the front-end asked for an acknowledgement, else it ends the connection too, because the front-end believes it
done. A ring that cannot be used costs that ring: said and refused, and the connection goes on.
"""

import socket
import types

from virtiofsd_nydus import log as logs
from virtiofsd_nydus.errors import Cause, Failure
from virtiofsd_nydus.vhost import messages as m
from virtiofsd_nydus.vhost.inflight import create_inflight
from virtiofsd_nydus.vhost.messages import Message
from virtiofsd_nydus.vhost.state import ApplyFailure, DeviceState, Region, Ring

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator

    from virtiofsd_nydus.vhost.state import Device

    Say = Callable[..., None]

ALL_RINGS = 0xFFFF  # bits of DeviceState.inflight_goes_on


class Refusal(Exception):
    """The request cannot be done. ring: only that ring suffers."""

    def __init__(self, text: str, ring: bool = False) -> None:
        super().__init__(text)
        self.ring = ring


class Session:
    """Owns the device and the descriptors of its state, not the socket.

    say(level, text) writes one log line.
    """

    def __init__(self, sock: socket.socket, device: "Device", say: "Say") -> None:
        self._offered = m.PROTOCOL_FEATURES | (m.P_DEVICE_STATE if device.saves else 0)
        self._offered |= m.P_CONFIG if device.config() else 0
        self._sock = sock
        self._device = device
        self._say = say
        self._protocol = 0
        self._backend_fd = -1
        self.state = DeviceState(device.queue_count)
        self.state.set_inflight(*device.own_inflight())

    def run(self) -> None:
        """Serves requests of a socket that blocks, with a device that does; returns when the front-end has hung up,
        raises Failure when it broke the protocol."""
        reader = m.MessageReader()
        try:
            while True:
                message = reader.read(self._sock)
                if message is not None:
                    for _ in self.serve(message):
                        raise AssertionError("a device of this process does not wait")
        except EOFError:
            pass
        except OSError as error:
            raise Failure(f"vhost-user: the connection failed: {error.strerror}", Cause.IO) from error
        finally:
            reader.close()

    def serve(self, message: Message) -> "Iterator[None]":
        """Serves one request, which becomes the session's. Raises Failure where that ends the connection."""
        try:
            yield from self._serve(message)
        finally:
            message.close()

    def close(self) -> None:
        """Frees the device, then closes what the front-end gave."""
        self._device.close()
        backend_fd, self._backend_fd = self._backend_fd, -1
        errors = [*self.state.close(), m.close_fd(backend_fd)]
        for error in errors:
            if error is not None:
                self._say(logs.WARNING, f"closing a descriptor of the front-end: {error.strerror}", cause="io")
                break  # one line is enough

    # ---- replies

    def _serve(self, message: Message) -> "Iterator[None]":
        request = message.request
        wants_ack = bool(message.flags & m.NEED_REPLY and self._protocol & m.P_REPLY_ACK)
        handler = _HANDLERS.get(request)
        try:
            if handler is None:
                raise Refusal(f"request {request} is not known here")
            function, size, fds = handler
            if len(message.payload) not in size:
                raise m.malformed(
                    f"request {request} has {len(message.payload)} bytes, not {' or '.join(map(str, size))}"
                )
            if len(message.fds) not in fds:
                raise m.malformed(f"request {request} came with {len(message.fds)} descriptors")
            reply = function(self, message)
            if isinstance(reply, types.GeneratorType):
                reply = yield from reply
        except (Refusal, ApplyFailure) as error:
            ring = isinstance(error, Refusal) and error.ring
            if request in _ANSWERED or not (wants_ack or ring):
                raise m.malformed(f"request {request}: {error}") from error
            self._say(logs.WARNING, f"vhost-user: request {request} refused: {error}", cause="guest")
            if wants_ack:
                m.send_reply(self._sock, request, m.U64.pack(1))
            return
        if reply is not None:
            m.send_reply(self._sock, request, *reply)
        elif wants_ack:
            m.send_reply(self._sock, request, m.U64.pack(0))

    def _apply(self) -> "Steps":
        yield from self._device.apply(self.state)

    def _apply_ring(self) -> "Steps":
        """For changes that only touch rings."""
        try:
            yield from self._apply()
        except ApplyFailure as error:
            raise Refusal(str(error), ring=True) from error

    # ---- negotiation

    def _get_features(self, message: Message) -> "Reply":
        return (m.U64.pack(self._device.features()),)

    def _set_features(self, message: Message) -> "Steps":
        features = _u64(message)
        unknown = features & ~self._device.features()
        if unknown:
            raise Refusal(f"features {unknown:#x} were never offered")
        self.state.features = features
        if not features & m.F_PROTOCOL_FEATURES:
            for ring in self.state.rings:  # without the protocol bit there is no ENABLE: a kick is enough
                ring.enabled = True
        if self.state.is_running():
            yield from self._apply()

    def _get_protocol_features(self, message: Message) -> "Reply":
        return (m.U64.pack(self._offered),)

    def _set_protocol_features(self, message: Message) -> None:
        features = _u64(message)
        unknown = features & ~self._offered
        if unknown:
            raise Refusal(f"protocol features {unknown:#x} were never offered")
        self._protocol = features
        self.state.carries_inflight = bool(features & m.P_DEVICE_STATE)

    def _get_queue_num(self, message: Message) -> "Reply":
        return (m.U64.pack(self._device.queue_count),)

    def _get_max_mem_slots(self, message: Message) -> "Reply":
        return (m.U64.pack(m.MEMORY_SLOTS),)

    def _get_config(self, message: Message) -> "Reply":
        self._check_config(message)
        config = self._device.config()
        offset, size, flags = m.CONFIG_HEAD.unpack_from(message.payload)
        if size > len(message.payload) - m.CONFIG_HEAD.size or offset > len(config) or size > len(config) - offset:
            return (b"",)  # how an error is told here
        return (m.CONFIG_HEAD.pack(offset, size, flags) + config[offset : offset + size],)

    def _check_config(self, message: Message) -> None:
        if not self._offered & m.P_CONFIG or len(message.payload) < m.CONFIG_HEAD.size:
            raise m.malformed(f"request {message.request} has {len(message.payload)} bytes, or was never offered")

    def _set_config(self, message: Message) -> None:
        self._check_config(message)
        raise Refusal("the configuration space cannot be written to")

    def _set_owner(self, message: Message) -> None:
        pass

    def _set_backend_req_fd(self, message: Message) -> None:
        m.close_fd(self._backend_fd)
        self._backend_fd = message.take_fd()  # kept, so that the front-end does not see it closed

    # ---- memory

    def _set_regions(self, regions: "list[Region]", added: "list[Region]", dropped: "list[Region]") -> "Steps":
        """Makes regions the guest's memory; added are new in it, dropped no longer in it."""
        before = self.state.regions
        self.state.regions = regions
        self.state.region_gen += 1
        try:
            yield from self._apply()
        except ApplyFailure:
            self.state.regions = before
            self.state.region_gen += 1  # never the number of what failed
            for region in added:
                region.close()
            raise
        for region in dropped:
            region.close()

    def _set_mem_table(self, message: Message) -> "Steps":
        if len(message.payload) < m.MEMORY_HEAD.size:
            raise m.malformed(f"a memory table of {len(message.payload)} bytes")
        count, _ = m.MEMORY_HEAD.unpack_from(message.payload)
        body = message.payload[m.MEMORY_HEAD.size :]
        # QEMU pads the table to its own maximum of regions.
        if count * m.REGION.size > len(body) or len(body) % m.REGION.size:
            raise m.malformed(f"a memory table of {len(body)} bytes for {count} regions")
        if count != len(message.fds):
            raise m.malformed(f"a memory table of {count} regions with {len(message.fds)} descriptors")
        new = []
        for i in range(count):
            gpa, size, user_addr, offset = m.REGION.unpack_from(body, i * m.REGION.size)
            new.append(Region(gpa, size, user_addr, offset, message.take_fd()))
        yield from self._set_regions(new, new, self.state.regions)

    def _add_mem_reg(self, message: Message) -> "Steps":
        if len(self.state.regions) >= m.MEMORY_SLOTS:
            raise Refusal(f"more than {m.MEMORY_SLOTS} memory regions")
        _, gpa, size, user_addr, offset = m.SINGLE_REGION.unpack(message.payload)
        region = Region(gpa, size, user_addr, offset, message.take_fd())
        yield from self._set_regions([*self.state.regions, region], [region], [])

    def _rem_mem_reg(self, message: Message) -> "Steps":
        _, *wanted, _ = m.SINGLE_REGION.unpack(message.payload)  # the offset does not count
        for region in self.state.regions:
            if [region.gpa, region.size_bytes, region.user_addr] == wanted:
                yield from self._set_regions([r for r in self.state.regions if r is not region], [], [region])
                return
        raise Refusal(f"no memory region of {wanted[1]:#x} bytes at {wanted[0]:#x} to remove")

    # ---- migration and recovery

    def _set_log_base(self, message: Message) -> "Generator[None, None, Reply]":
        size, offset = m.LOG.unpack(message.payload)
        self.state.set_log(message.take_fd(), size, offset)
        try:
            yield from self._apply()
        except ApplyFailure:
            self.state.set_log(-1, 0, 0)
            raise
        return (m.U64.pack(0),)  # QEMU waits for an answer and does not look at it

    def _get_inflight_fd(self, message: Message) -> "Reply":
        _, _, queues, entries = m.INFLIGHT.unpack_from(message.payload)
        fd, size = create_inflight(queues, entries)
        body = m.INFLIGHT.pack(size, 0, queues, entries).ljust(len(message.payload), b"\0")
        message.fds.append(fd)  # closed with the message, after the reply has carried a copy
        return body, fd

    def _set_inflight_fd(self, message: Message) -> "Steps":
        size, offset, queues, entries = m.INFLIGHT.unpack_from(message.payload)
        if self.state.is_running():
            raise Refusal("an in-flight region cannot be replaced while rings run")
        self.state.set_inflight(message.take_fd(), size, offset, queues, entries)
        self.state.inflight_goes_on = ALL_RINGS  # where a ring stood is what the region says, whatever base comes
        self.state.inflight_died = True
        try:
            yield from self._apply()
        except ApplyFailure:
            self.state.set_inflight(*self._device.own_inflight())
            raise
        finally:
            self.state.inflight_died = False

    # ---- the session's state

    def _set_device_state_fd(self, message: Message) -> "Generator[None, None, Reply]":
        """The front-end gives its end of a pipe. What cannot be done is answered with an error, and all goes on."""
        direction, phase = m.DEVICE_STATE.unpack(message.payload)
        try:
            if not self._protocol & m.P_DEVICE_STATE:
                raise ApplyFailure("it was not negotiated", Cause.GUEST)
            if direction not in (m.STATE_SAVE, m.STATE_LOAD) or phase != m.STATE_STOPPED:
                raise ApplyFailure(f"direction {direction}, phase {phase} are not known", Cause.GUEST)
            if self.state.is_running():
                raise ApplyFailure("rings run", Cause.GUEST)
            yield from self._device.begin_transfer(direction == m.STATE_LOAD, message.fds[0])
        except ApplyFailure as failure:
            self._say(logs.ERROR, f"the session cannot be taken along: {failure}", cause=failure.cause.name.lower())
            return (m.U64.pack(m.STATE_REFUSED),)
        return (m.U64.pack(m.STATE_NO_FD),)

    def _check_device_state(self, message: Message) -> "Generator[None, None, Reply]":
        try:
            if not self._protocol & m.P_DEVICE_STATE or self.state.is_running():
                raise ApplyFailure("it was not negotiated, or rings run", Cause.GUEST)
            yield from self._apply()  # so that the device has the in-flight region
            yield from self._device.end_transfer()
        except ApplyFailure as failure:
            self._say(logs.ERROR, f"the session's state: {failure}", cause=failure.cause.name.lower())
            return (m.U64.pack(m.STATE_REFUSED),)
        return (m.U64.pack(0),)

    # ---- rings

    def _ring(self, index: int) -> Ring:
        if index >= len(self.state.rings):
            raise Refusal(f"ring {index}, there are {len(self.state.rings)}")
        return self.state.rings[index]

    def _set_vring_num(self, message: Message) -> None:
        index, entries = m.VRING_STATE.unpack(message.payload)
        self._ring(index).num = entries  # the engine says what it thinks of it when the ring starts

    def _set_vring_addr(self, message: Message) -> "Steps":
        index, flags, desc, used, avail, log = m.VRING_ADDR.unpack(message.payload)
        ring = self._ring(index)
        ring.flags, ring.desc_addr, ring.used_addr, ring.avail_addr, ring.log_addr = flags, desc, used, avail, log
        if ring.started:
            yield from self._apply_ring()

    def _set_vring_base(self, message: Message) -> None:
        index, base = m.VRING_STATE.unpack(message.payload)
        ring = self._ring(index)
        if base > 0xFFFF:
            raise Refusal(f"ring {index}: base {base} is not a 16-bit index", ring=True)
        if ring.started:
            raise Refusal(f"ring {index}: its base cannot be set while it runs", ring=True)
        ring.base = base

    def _get_vring_base(self, message: Message) -> "Generator[None, None, Reply]":
        index, _ = m.VRING_STATE.unpack(message.payload)
        ring = self._ring(index)
        ring.started = False
        ring.set_kick(-1)  # the call fd stays: some front-ends start again without a new one
        yield from self._apply()
        return (m.VRING_STATE.pack(index, ring.base),)

    def _ring_fd(self, message: Message) -> "tuple[Ring, int]":
        value = _u64(message)
        ring = self._ring(value & m.VRING_INDEX_MASK)
        if value & m.VRING_NO_FD:
            return ring, -1  # one that came all the same is closed with the message
        if not message.fds:
            raise m.malformed(f"request {message.request} without its descriptor")
        return ring, message.take_fd()

    def _set_vring_kick(self, message: Message) -> "Steps":
        ring, fd = self._ring_fd(message)
        ring.set_kick(fd)
        ring.started = True
        yield from self._apply_ring()

    def _set_vring_call(self, message: Message) -> "Steps":
        ring, fd = self._ring_fd(message)
        ring.set_call(fd)
        if ring.started:
            yield from self._apply_ring()

    def _set_vring_err(self, message: Message) -> "Steps":
        ring, fd = self._ring_fd(message)
        ring.set_err(fd)
        if ring.started:
            yield from self._apply_ring()

    def _set_vring_enable(self, message: Message) -> "Steps":
        index, enable = m.VRING_STATE.unpack(message.payload)
        if enable > 1:
            raise Refusal(f"ring {index}: enable {enable}", ring=True)
        self._ring(index).enabled = bool(enable)
        yield from self._apply_ring()

    def _reset_owner(self, message: Message) -> "Steps":
        for ring in self.state.rings:
            ring.enabled = False
        yield from self._apply_ring()

    def _reset_device(self, message: Message) -> "Steps":
        yield from self._reset_owner(message)
        yield from self._device.reset()
        for ring in self.state.rings:
            ring.started = False
            ring.base = 0
            ring.set_kick(-1)
        yield from self._apply_ring()
        for ring in self.state.rings:
            ring.base = 0  # where it stood does not matter: the driver begins anew


def _u64(message: Message) -> int:
    value: int = m.U64.unpack(message.payload)[0]
    return value


if TYPE_CHECKING:
    Reply = tuple[bytes] | tuple[bytes, int]
    Steps = Generator[None, None, None]
    Function = Callable[[Session, Message], Reply | Generator[None, None, Reply] | Steps | None]
    Handler = tuple[Function, tuple[int, ...] | range, tuple[int, ...] | range]

_NO_FD = (0,)
_ONE_FD = (1,)
_FD_MAYBE = (0, 1)
_STATE = (m.VRING_STATE.size,)
_U64 = (m.U64.size,)
_EMPTY = (0,)
_ANY_SIZE = range(m.PAYLOAD_MAX + 1)

# Requests with an answer of their own cannot be refused by an acknowledgement.
_ANSWERED = (
    m.GET_FEATURES,
    m.SET_LOG_BASE,
    m.GET_VRING_BASE,
    m.GET_PROTOCOL_FEATURES,
    m.GET_QUEUE_NUM,
    m.GET_CONFIG,
    m.GET_INFLIGHT_FD,
    m.GET_MAX_MEM_SLOTS,
    m.SET_DEVICE_STATE_FD,
    m.CHECK_DEVICE_STATE,
)

# request: function, payload sizes, numbers of descriptors
_HANDLERS: "dict[int, Handler]" = {
    # QEMU leaves bytes of a union in requests that have no payload.
    m.GET_FEATURES: (Session._get_features, _ANY_SIZE, _NO_FD),
    m.SET_FEATURES: (Session._set_features, _U64, _NO_FD),
    m.SET_OWNER: (Session._set_owner, _ANY_SIZE, _NO_FD),
    m.RESET_OWNER: (Session._reset_owner, _ANY_SIZE, _NO_FD),
    m.SET_MEM_TABLE: (Session._set_mem_table, _ANY_SIZE, range(m.FDS_MAX + 1)),
    m.SET_LOG_BASE: (Session._set_log_base, (m.LOG.size,), _ONE_FD),
    m.SET_VRING_NUM: (Session._set_vring_num, _STATE, _NO_FD),
    m.SET_VRING_ADDR: (Session._set_vring_addr, (m.VRING_ADDR.size,), _NO_FD),
    m.SET_VRING_BASE: (Session._set_vring_base, _STATE, _NO_FD),
    m.GET_VRING_BASE: (Session._get_vring_base, _STATE, _NO_FD),
    m.SET_VRING_KICK: (Session._set_vring_kick, _U64, _FD_MAYBE),
    m.SET_VRING_CALL: (Session._set_vring_call, _U64, _FD_MAYBE),
    m.SET_VRING_ERR: (Session._set_vring_err, _U64, _FD_MAYBE),
    m.GET_PROTOCOL_FEATURES: (Session._get_protocol_features, _ANY_SIZE, _NO_FD),
    m.SET_PROTOCOL_FEATURES: (Session._set_protocol_features, _U64, _NO_FD),
    m.GET_QUEUE_NUM: (Session._get_queue_num, _ANY_SIZE, _NO_FD),
    m.SET_VRING_ENABLE: (Session._set_vring_enable, _STATE, _NO_FD),
    m.SET_BACKEND_REQ_FD: (Session._set_backend_req_fd, _ANY_SIZE, _ONE_FD),
    m.GET_CONFIG: (Session._get_config, _ANY_SIZE, _NO_FD),
    m.SET_CONFIG: (Session._set_config, _ANY_SIZE, _NO_FD),
    m.GET_INFLIGHT_FD: (Session._get_inflight_fd, (m.INFLIGHT.size, 24), _NO_FD),
    m.SET_INFLIGHT_FD: (Session._set_inflight_fd, (m.INFLIGHT.size, 24), _ONE_FD),
    m.RESET_DEVICE: (Session._reset_device, _ANY_SIZE, _NO_FD),
    m.GET_MAX_MEM_SLOTS: (Session._get_max_mem_slots, _ANY_SIZE, _NO_FD),
    m.ADD_MEM_REG: (Session._add_mem_reg, (m.SINGLE_REGION.size,), _ONE_FD),
    m.SET_DEVICE_STATE_FD: (Session._set_device_state_fd, (m.DEVICE_STATE.size,), _ONE_FD),
    m.CHECK_DEVICE_STATE: (Session._check_device_state, _ANY_SIZE, _NO_FD),
    m.REM_MEM_REG: (Session._rem_mem_reg, (m.SINGLE_REGION.size,), _FD_MAYBE),
}
