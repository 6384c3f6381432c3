"""Messages over ZeroMQ: headers, and tensors as raw frames of 1 MiB received into place.

Who may speak is settled by ZeroMQ before a message reaches anybody: with the job's secret as a
password where all are on one machine's loopback address, and with CURVE (encryption and keys on
both sides, derived from the secret) where the listener can be reached from elsewhere.
"""

from __future__ import annotations

import hashlib
import ipaddress
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

import zmq
import zmq.utils.monitor
import zmq.utils.z85
from torch import Tensor
from zmq.auth.thread import ThreadAuthenticator

from wagontrain.errors import UsageError, WorkerError
from wagontrain.layout import as_bytes
from wagontrain.servers.frames import FRAME, Sent, bytes_of, frames_of, send_frames
from wagontrain.servers.messages import Accepted, Message, Offer, Pull, Push, Values, decode, encode
from wagontrain.servers.shared import NOTHING, Arena, Atlas, copy

_HEADER_LIMIT = 1 << 20
_SEAL = 256  # encrypted frames are a little larger
_USER = "wagontrain"


@dataclass(frozen=True)
class Secret:
    """What all processes of a job know and nobody else: 32 random bytes, as hex."""

    text: str

    @classmethod
    def new(cls) -> Secret:
        """A new one."""
        return cls(secrets.token_hex(32))

    def __post_init__(self) -> None:
        if len(self.text) != 64 or set(self.text) - set("0123456789abcdef"):
            raise UsageError("the job's secret is 64 hexadecimal digits: copy all of them")

    def keys(self, role: str) -> tuple[bytes, bytes]:
        """Public and secret CURVE key of the listening or the connecting side."""
        digest = hashlib.blake2b(
            bytes.fromhex(self.text), digest_size=32, person=role.encode()
        ).digest()
        secret = zmq.utils.z85.encode(digest)
        return zmq.curve_public(secret), secret


def is_loopback(address: str) -> bool:
    """Whether only this machine can reach the address."""
    return ipaddress.ip_address(address).is_loopback


class Network:
    """The sockets of one process, and who may connect to those that listen."""

    def __init__(self, secret: Secret) -> None:
        self.secret = secret
        self.context = zmq.Context()
        self.arena = Arena()
        self.atlas = Atlas()
        self._guard: ThreadAuthenticator | None = None
        self._open: list[zmq.Socket[bytes]] = []

    def listen(self, address: str, port: int = 0) -> Listener:
        """Listen on one address of this machine; port 0 takes a free one.

        Raises:
            UsageError: the address is not this machine's, or the port is taken.
        """
        guard = self._guarding()
        sock = self._socket(zmq.ROUTER, address)
        # A peer that comes back under its name takes its old connection's place.
        sock.setsockopt(zmq.ROUTER_HANDOVER, 1)
        if is_loopback(address):
            sock.plain_server = True
        else:
            public, own = self.secret.keys("listen")
            sock.curve_server = True
            sock.curve_publickey, sock.curve_secretkey = public, own
        try:
            sock.bind(f"tcp://{_written(address)}:{port or '*'}")
        except zmq.ZMQError as error:
            sock.close()
            raise UsageError(f"cannot listen on {address}:{port}: {error}") from None
        return Listener(sock, guard, self.atlas)

    def connect(self, endpoint: str) -> Line:
        """A line to a listener, `tcp://ADDRESS:PORT`. Returns at once; nothing is sent yet."""
        address = endpoint.removeprefix("tcp://").rpartition(":")[0].strip("[]")
        sock = self._socket(zmq.DEALER, address)
        if is_loopback(address):
            sock.plain_username, sock.plain_password = _USER.encode(), self.secret.text.encode()
        else:
            sock.curve_serverkey, _ = self.secret.keys("listen")
            sock.curve_publickey, sock.curve_secretkey = self.secret.keys("connect")
        monitor = sock.get_monitor_socket(
            zmq.EVENT_HANDSHAKE_FAILED_AUTH
            | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
            | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
            | zmq.EVENT_HANDSHAKE_SUCCEEDED
            | zmq.EVENT_DISCONNECTED
        )
        sock.connect(endpoint)
        return Line(sock, endpoint, monitor, self.arena if is_loopback(address) else None)

    def _socket(self, kind: int, address: str) -> zmq.Socket[bytes]:
        self._open = [each for each in self._open if not each.closed]
        sock = self.context.socket(kind)
        self._open.append(sock)
        sock.linger = 0
        sock.setsockopt(zmq.IPV6, int(":" in address))
        sock.setsockopt(zmq.MAXMSGSIZE, max(FRAME, _HEADER_LIMIT) + _SEAL)
        sock.setsockopt(zmq.HANDSHAKE_IVL, 5000)
        sock.setsockopt(zmq.HEARTBEAT_IVL, 2000)
        sock.setsockopt(zmq.HEARTBEAT_TIMEOUT, 20000)
        sock.sndhwm = sock.rcvhwm = 0  # bounded by what is asked for: see Client
        return sock

    def _guarding(self) -> ThreadAuthenticator:
        if self._guard is None:
            self._guard = ThreadAuthenticator(self.context)
            self._guard.start()
            self._guard.configure_plain("*", {_USER: self.secret.text})
            self._guard.configure_curve_callback("*", _OnlyKey(self.secret.keys("connect")[0]))
        return self._guard

    def close(self) -> None:
        """Close everything, also what is still open."""
        if self._guard is not None:
            self._guard.stop()
        self.context.destroy(linger=0)
        self.arena.close()

    def __enter__(self) -> Network:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class _OnlyKey:
    """Whoever knows the job's secret has this key."""

    def __init__(self, public: bytes) -> None:
        self.public = public

    def callback(self, domain: str, key: bytes) -> bool:
        return secrets.compare_digest(key, self.public)


def _written(address: str) -> str:
    return f"[{address}]" if ":" in address else address


class Incoming:
    """A message of which the header was read; its frames are still in the socket.

    They have to be taken with `into`, or dropped.
    """

    def __init__(
        self,
        sock: zmq.Socket[bytes],
        message: Message,
        peer: bytes = b"",
        atlas: Atlas | None = None,
    ) -> None:
        self._socket = sock
        self._atlas = atlas
        self.message = message
        self.peer = peer

    def places(self) -> list[Tensor]:
        """Memory of the sender that the next frames are references to, as bytes.

        Raises:
            WorkerError: it cannot be reached from here.
        """
        count = self.message.shared if isinstance(self.message, Push | Pull) else 0
        found = []
        for _ in range(count if self._atlas is not None else 0):
            assert self._atlas is not None
            if not self._socket.getsockopt(zmq.RCVMORE):
                self._refuse("it ends too soon")
            try:
                found.append(self._atlas.find(self._socket.recv()))
            except WorkerError as error:
                self._refuse(str(error))
        return found

    def into(self, tensors: Sequence[Tensor]) -> None:
        """Fill contiguous CPU tensors with the next frames, or what they are references to.

        Raises:
            WorkerError: there are fewer frames, or of other sizes.
        """
        if isinstance(self.message, Values) and self.message.placed:
            return  # they were written to before this was sent
        places = self.places()
        for place, tensor in zip(places, tensors, strict=False):
            if len(place) != tensor.nbytes:
                self._refuse(f"it refers to {len(place)} bytes, {tensor.nbytes} were expected")
            copy(as_bytes(tensor), place)
        for tensor in tensors[len(places) :]:
            memory = bytes_of(tensor)
            for at in range(0, max(1, len(memory)), FRAME):
                part = memory[at : at + FRAME]
                if not self._socket.getsockopt(zmq.RCVMORE):
                    self._refuse("it ends too soon")
                size = self._socket.recv_into(part) if len(part) else len(self._socket.recv())
                if size != len(part):
                    self._refuse(f"a frame has {size} bytes, {len(part)} were expected")

    def end(self) -> None:
        """Make sure that nothing follows.

        Raises:
            WorkerError: something does.
        """
        if self._socket.getsockopt(zmq.RCVMORE):
            self._refuse("more follows than was announced")

    def drop(self) -> None:
        """Throw away what is left of it."""
        while self._socket.getsockopt(zmq.RCVMORE):
            self._socket.recv_into(bytearray())

    def _refuse(self, why: str) -> None:
        self.drop()
        raise WorkerError(f"a {self.message.kind} message was refused: {why}")


class Listener:
    """A socket that many peers talk to; each is known by a name that ZeroMQ gave it."""

    def __init__(self, sock: zmq.Socket[bytes], guard: Any, atlas: Atlas) -> None:
        self.socket = sock
        self._guard = guard
        self._atlas = atlas
        self.endpoint = sock.getsockopt_string(zmq.LAST_ENDPOINT)

    def receive(self, seconds: float) -> Incoming | None:
        """The next message; None if none came in time.

        Raises:
            BadMessage: something came that is no message; it was thrown away.
        """
        if not self.socket.poll(int(seconds * 1000)):
            return None
        incoming = _read(self.socket, self.socket.recv(), self._atlas)
        if isinstance(incoming.message, Offer):
            self._consider(incoming, incoming.message)
            return None
        return incoming

    def _consider(self, incoming: Incoming, offer: Offer) -> None:
        """Say whether memory of a peer can be reached from here."""
        incoming.drop()
        try:
            self._atlas.find(bytes.fromhex(offer.reference))
        except (WorkerError, ValueError):
            self.send(incoming.peer, Accepted(False))
        else:
            self.send(incoming.peer, Accepted(True))

    def send(self, peer: bytes, message: Message, tensors: Sequence[Tensor] = ()) -> Sent:
        """Send to one peer; nothing happens if it is gone.

        The tensors must not change until the returned function says that they are sent.
        """
        return send_frames(self.socket, [peer, encode(message), *frames_of(tensors)])

    def close(self) -> None:
        """Stop listening."""
        self.socket.close()


class BadMessage(WorkerError):  # noqa: N818  it is the message that is bad
    """Something was received that is no message; `peer` sent it."""

    def __init__(self, text: str, peer: bytes) -> None:
        super().__init__(text)
        self.peer = peer


def _read(sock: zmq.Socket[bytes], peer: bytes = b"", atlas: Atlas | None = None) -> Incoming:
    if peer and not sock.getsockopt(zmq.RCVMORE):
        raise BadMessage("a message without a header was refused", peer)
    header = sock.recv()
    try:
        return Incoming(sock, decode(header), peer, atlas)
    except WorkerError as error:
        while sock.getsockopt(zmq.RCVMORE):
            sock.recv_into(bytearray())
        raise BadMessage(str(error), peer) from None


class Line:
    """A socket that talks to one listener."""

    def __init__(
        self, sock: zmq.Socket[bytes], endpoint: str, monitor: Any, arena: Arena | None
    ) -> None:
        self.socket = sock
        self._arena = arena
        self._offered = 0
        self._accepted = False
        self.endpoint = endpoint
        self._monitor = monitor
        self._lost: float | None = time.monotonic()
        self._connections = 0

    def connections(self) -> int:
        """How often a connection was made so far.

        Raises:
            UsageError: the listener does not know this job's secret.
        """
        self._require_welcome()
        return self._connections

    def apart(self) -> float:
        """Seconds since there was a connection; 0 while there is one."""
        self._require_welcome()
        return 0.0 if self._lost is None else time.monotonic() - self._lost

    def send(self, message: Message, tensors: Sequence[Tensor] = ()) -> Sent:
        """Send; kept until there is a connection.

        Of tensors in the network's arena only references are sent, where the listener can use
        them. With a Pull, tensors are where its answer goes; it is written there, or has frames.

        The tensors must not change until the returned function says that they are sent, or what
        they are references to is answered.
        """
        references: list[bytes] = []
        if isinstance(message, Push | Pull):
            references = self._references(tensors)
            message = replace(message, shared=len(references))
        sent = () if isinstance(message, Pull) else tensors[len(references) :]
        frames: list[bytes | memoryview] = [encode(message), *references, *frames_of(sent)]
        return send_frames(self.socket, frames, self._require_welcome)

    def _references(self, tensors: Sequence[Tensor]) -> list[bytes]:
        """To the first tensors, as many as are in the arena."""
        found: list[bytes] = []
        for tensor in tensors if self._arena is not None else ():
            assert self._arena is not None
            reference = self._arena.reference(tensor)
            if reference is None:
                break
            found.append(reference)
        telling = [reference for reference in found if reference != NOTHING]
        if telling and not self._accepted:
            if self._offered < self.connections():  # to this process it was not offered yet
                self._offered = self.connections()
                offer = encode(Offer(telling[0].hex()))
                send_frames(self.socket, [offer], self._require_welcome)
            return []
        return found if telling else []

    def receive(self, seconds: float) -> Incoming | None:
        """The next message; None if none came in time.

        Raises:
            UsageError: the listener does not know this job's secret.
        """
        limit = time.monotonic() + seconds
        while not self.socket.poll(max(0, min(250, int((limit - time.monotonic()) * 1000)))):
            self._require_welcome()
            if time.monotonic() >= limit:
                return None
        incoming = _read(self.socket)
        if isinstance(incoming.message, Accepted):
            self._accepted = incoming.message.yes
            return self.receive(max(0.0, limit - time.monotonic()))
        return incoming

    def _require_welcome(self) -> None:
        while self._monitor.poll(0):
            event = zmq.utils.monitor.parse_monitor_message(self._monitor.recv_multipart())
            if event["event"] == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self._lost = None
                self._connections += 1
            elif self._lost is None:
                self._lost = time.monotonic()
            if event["event"] == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
                raise UsageError(
                    f"{self.endpoint} refused the secret: it is that of another job; give the one "
                    "in the run's folder"
                )

    def close(self, seconds: float = 0.0) -> None:
        """Close the line; what was not sent by then, within so many seconds, is dropped.

        It is the network's own closing that waits.
        """
        self.socket.disable_monitor()
        self._monitor.close()
        self.socket.close(linger=round(seconds * 1000))
