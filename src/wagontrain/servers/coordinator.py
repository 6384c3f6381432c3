"""The coordinator: an event loop that carries out what was decided.

It hears workers and shards on one socket, hands what they say to the pure decisions, and turns
those into messages and events. It never sees a gradient; parameters only when it starts shards
and when it writes a checkpoint.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from torch import Tensor

from wagontrain.errors import LossError, TrainingError, WorkerError
from wagontrain.sentences import OWN_WILL
from wagontrain.servers import commands
from wagontrain.servers.commands import Command
from wagontrain.servers.contents import Contents, room
from wagontrain.servers.deciding import Decisions
from wagontrain.servers.fleet import Fleet
from wagontrain.servers.hosts import Hosts
from wagontrain.servers.messages import (
    PROTOCOL,
    Ask,
    Beat,
    Bye,
    Description,
    Done,
    Hello,
    Look,
    Measured,
    Message,
    Refusal,
    Spoiled,
    Stop,
    Unknown,
    Welcome,
)
from wagontrain.servers.observing import Member, Observer
from wagontrain.servers.orders import Applied, Commit, Fill, Ready, Squares
from wagontrain.servers.rates import Rates
from wagontrain.servers.saving import States
from wagontrain.servers.site import Terms
from wagontrain.servers.wire import BadMessage, Incoming, Listener
from wagontrain.version import __version__

TICK = 0.1
"""Seconds after which the coordinator looks after processes when nobody says anything."""


class Coordinator:
    """One job's coordinator.

    Args:
        listener: where workers and shards speak to it.
        fleet: makes the shards' side, given how to reach a peer.
        decisions: who may do what, and what counts.
        rates: hyperparameters.
        observer: who keeps what happens.
        terms: how long to wait, and what workers are told.
    """

    def __init__(
        self,
        listener: Listener,
        fleet: Callable[[Any], Fleet],
        decisions: Decisions,
        rates: Rates,
        observer: Observer,
        terms: Terms,
    ) -> None:
        self.listener = listener
        self.fleet = fleet(self._send)
        self.decisions = decisions
        self.rates = rates
        self.observer = observer
        self.terms = terms
        self.hosts = Hosts(
            self.fleet.shards, self._send, observer.noted, terms.patience, terms.elsewhere > 0
        )
        self.members: dict[int, Member] = {}
        self.finished = False
        self._hellos: list[tuple[bytes, Hello]] = []
        self._numbers = 0
        self.states = States(self.fleet, observer)
        self._silent_since = time.monotonic()

    # --- the loop -------------------------------------------------------------------------------

    def run(self, look_after: Callable[[], None] = lambda: None) -> None:
        """Until all is done.

        Args:
            look_after: called several times a second: starts processes again, say.

        Raises:
            LossError: a loss or gradient is not finite, whoever computes it.
            WorkerError: no worker or not all shards are there for too long.
        """
        self._silent_since = time.monotonic()
        looked = 0.0
        while not self.finished or self.states:
            now = time.monotonic()
            if now - looked >= TICK:
                looked = now
                look_after()
                self._give_up_the_silent(now)
                self.observer.looked(self.members.values(), self.fleet, now)
            try:
                incoming = self.listener.receive(TICK)
            except BadMessage as error:
                self.observer.noted("refused", {"reason": str(error)})
                self._send(error.peer, Refusal(str(error)))
                continue
            if incoming is not None:
                self.hear(incoming)

    def stop(self, reason: str = "") -> None:
        """Tell everybody that there is nothing more to do."""
        for member in self.members.values():
            self._send(member.peer, Stop(reason))
        for peer, _ in self._hellos:
            self._send(peer, Stop(reason))
        self.hosts.stop(reason)
        for shard in self.fleet.shards:
            if shard.peer:
                self._send(shard.peer, Stop(reason))

    def say_over(self, seconds: float) -> None:
        """For so long, tell whoever still comes that all is over."""
        limit = time.monotonic() + seconds
        while (left := limit - time.monotonic()) > 0:
            try:
                incoming = self.listener.receive(left)
            except BadMessage:
                continue
            if incoming is not None:
                incoming.drop()
                if isinstance(incoming.message, Hello | Ask | Look):
                    self._send(incoming.peer, Stop())

    def hear(self, incoming: Incoming) -> None:
        """Deal with one message; whatever it is, the coordinator goes on."""
        message, peer = incoming.message, incoming.peer
        try:
            handler = self._HANDLERS.get(type(message))
            if handler is None:
                raise WorkerError(f"a {message.kind} message is not for the coordinator")
            handler(self, peer, message, incoming)
        except WorkerError as error:
            self.observer.noted("refused", {"reason": str(error)})
            self._send(peer, Refusal(str(error)))
        finally:
            incoming.drop()

    # --- workers --------------------------------------------------------------------------------

    def _look(self, peer: bytes, message: Look, incoming: Incoming) -> None:
        self._send(peer, Description(self.terms.description))

    def _hello(self, peer: bytes, message: Hello, incoming: Incoming) -> None:
        if message.protocol != PROTOCOL or message.version != __version__:
            raise WorkerError(
                f"{message.host} runs wagontrain {message.version}, this job {__version__}: "
                "install the same version on all hosts"
            )
        if message.role == "host":
            if self.finished:
                self._send(peer, Stop())
            else:
                self.hosts.hello(peer, message, time.monotonic())
            return
        if message.role == "shard":
            known = self.fleet.endpoints
            if self.fleet.hello(peer, message, time.monotonic()):
                self._retake()
            if self.fleet.endpoints != known:
                self._send_round(message.index, message.host)
            return
        if message.fingerprint != self.terms.fingerprint:
            raise WorkerError(
                f"the task on {message.host} is not that of this job: another model, other data "
                "or other options; start it with the same task file"
            )
        if self.finished:
            self._send(peer, Stop())
        elif self.fleet.ready:
            self._welcome(peer, message)
        else:
            self._hellos = [each for each in self._hellos if not _same(each[1], message)]
            self._hellos.append((peer, message))

    def _welcome(self, peer: bytes, message: Hello) -> None:
        for old in [each for each in self.members.values() if _same(each, message)]:
            # What it said or was told may be lost with a connection: nobody else has its work.
            self.remove(old.number, OWN_WILL)
        self._numbers += 1
        now = time.monotonic()
        member = Member(
            self._numbers, peer, message.host, message.process, now, client=message.client
        )
        self.members[member.number] = member
        self._send(peer, Welcome(member.number, self.fleet.endpoints, self.terms.workers))
        self.observer.noted(
            "joined",
            {"worker": member.number, "host": member.host, "process": member.process,
             "device": message.device},
        )  # fmt: skip
        self._obey(self.decisions.joined(member.number))

    def _send_round(self, shard: int, host: str) -> None:
        """A shard is elsewhere now: whoever knew it where it was says hello again."""
        for worker in list(self.members):
            self.remove(worker, f"server shard {shard} is on {host} now, and it begins anew there")

    def _known(self, peer: bytes, worker: int) -> Member | None:
        member = self.members.get(worker)
        if member is None:
            self._send(peer, Stop() if self.finished else Unknown())
            return None
        member.seen = time.monotonic()
        return member

    def _ask(self, peer: bytes, message: Ask, incoming: Incoming) -> None:
        if self._known(peer, message.worker):
            self._obey(self.decisions.asked(message.worker))

    def _done(self, peer: bytes, message: Done, incoming: Incoming) -> None:
        if self._known(peer, message.worker) or not self.finished:
            self.observer.pushed(message)
            self._obey(self.decisions.done(message))

    def _spoiled(self, peer: bytes, message: Spoiled, incoming: Incoming) -> None:
        if self._known(peer, message.worker):
            self._obey(self.decisions.spoiled(message))

    def _measured(self, peer: bytes, message: Measured, incoming: Incoming) -> None:
        if self._known(peer, message.worker):
            self._obey(self.decisions.measured(message))

    def _beat(self, peer: bytes, message: Beat, incoming: Incoming) -> None:
        if message.worker < 0:
            if not self.hosts.beat(peer, time.monotonic()):
                self.fleet.of(peer).seen = time.monotonic()
        elif member := self._known(peer, message.worker):
            member.doing = message.doing
            member.sent, member.memory = message.sent, message.memory
            self.observer.seen(member)

    def _bye(self, peer: bytes, message: Bye, incoming: Incoming) -> None:
        if message.worker in self.members:
            self.remove(message.worker, OWN_WILL)
        self.hosts.bye(peer, time.monotonic())

    def remove(self, worker: int, why: str) -> None:
        """A worker takes part no longer; its unfinished work goes to others."""
        member = self.members.pop(worker)
        self.observer.noted(
            "left",
            {"worker": worker, "host": member.host, "process": member.process, "why": why,
             "doing": member.doing},
        )  # fmt: skip
        self._send(member.peer, Unknown())
        self._obey(self.decisions.left(worker))

    def gone(self, process: int, why: str, host: str) -> None:
        """A process has ended: no need to wait for its silence."""
        for member in list(self.members.values()):
            if member.process == process and member.host == host:
                self.remove(member.number, why)

    def _give_up_the_silent(self, now: float) -> None:
        patience = self.terms.patience
        for member in list(self.members.values()):
            if now - member.seen > patience:
                self.remove(member.number, f"nothing heard for {now - member.seen:.0f} s")
        self.hosts.look(now)
        ready = {number for number, shard in enumerate(self.fleet.shards) if shard.ready}
        missing = sorted({*range(len(self.fleet.shards))} - ready | self.hosts.missing())
        if not missing and (self.members or self.finished):
            self._silent_since = now
        elif now - self._silent_since > self.terms.start:
            waited = f"within {self.terms.start:.0f} s"
            if missing:
                which = f"server shard{'s' * (len(missing) > 1)} {', '.join(map(str, missing))}"
                what = ": start `wagontrain serve` on a host for each" if self.hosts.wanted else ""
                raise WorkerError(f"{which} did not come {waited}{what}")
            raise WorkerError(f"no worker came {waited}: all have gone, and nobody has joined")
        self.states.require(self.terms.start)

    # --- shards ---------------------------------------------------------------------------------

    def _ready(self, peer: bytes, message: Ready, incoming: Incoming) -> None:
        shard = self.fleet.of(peer)
        if not self.fleet.is_ready(message):
            return
        if shard.started > 1:
            fields = {"shard": self.fleet.shards.index(shard), "version": message.version}
            self.observer.noted("shard_restarted", fields)
            if not self.fleet.mirrored:
                self._obey(self.decisions.mislaid())
            self._retake()
        if self.fleet.ready:
            waiting, self._hellos = self._hellos, []
            for waiting_peer, hello in waiting:
                self._welcome(waiting_peer, hello)

    def _retake(self) -> None:
        """Snapshots that a shard may not have, or was not asked for, are made anew."""
        self._obey(self.decisions.retake(self.states.give_up()))

    def _applied(self, peer: bytes, message: Applied, incoming: Incoming) -> None:
        self.fleet.of(peer)
        numbers = self.fleet.applied(message)
        if numbers is not None:
            self._obey(self.decisions.answered(message.version, numbers))

    def _squares(self, peer: bytes, message: Squares, incoming: Incoming) -> None:
        self.fleet.of(peer)
        self.fleet.squares(message)

    def _refusal(self, peer: bytes, message: Refusal, incoming: Incoming) -> None:
        """A shard cannot do what it was told; nobody else has to be answered.

        Raises:
            TrainingError: shards would no longer be of the same state.
        """
        if not self.fleet.knows(peer):
            return
        if message.then == "go on":
            self.observer.noted("shard_trouble", {"shard": message.shard, "why": message.reason})
        elif message.snapshot is not None:
            if self.states.refused(message.snapshot, message.reason):
                self._retake()
        elif self.fleet.of(peer).ready:
            raise TrainingError(f"server {message.reason}")
        else:
            self.fleet.begin_anew(peer, message.reason)

    def _fill(self, peer: bytes, message: Fill, incoming: Incoming) -> None:
        """A shard's part of a snapshot."""
        self.fleet.of(peer)
        values, tensors = self.fleet.room(message.shard), room(message.state)
        incoming.into([*values, *tensors.values()])
        incoming.end()
        part = Contents(message.version, values, tensors, dict(message.state.get("plain", {})))
        self.states.take(message.snapshot, message.shard, part)

    # --- what was decided -----------------------------------------------------------------------

    def _obey(self, decided: Sequence[Command]) -> None:
        for command in decided:
            self._CARRY_OUT[type(command)](self, command)

    def _give(self, command: commands.Give) -> None:
        self._send(self.members[command.worker].peer, command.lease)

    def _apply(self, command: commands.Apply) -> None:
        self.fleet.commit(
            Commit(
                command.version, command.pushes, command.divide, command.staleness,
                self.rates.now(),
            )
        )  # fmt: skip
        self.rates.advance()
        self.observer.committed(command)

    def _operate(self, command: commands.Operate) -> None:
        self.fleet.commit(
            Commit(command.version, command.pushes, command.divide, operations=command.operations)
        )

    def _keep(self, command: commands.Keep) -> None:
        self.fleet.snapshot(command.number)
        self.observer.kept(command)
        if self.observer.wants_state(command):
            self.states.ask(command)

    def _finish(self, command: commands.Finish) -> None:
        self.finished = True

    def _fail(self, command: commands.Fail) -> None:
        raise LossError(command.reason)

    def _send(self, peer: bytes, message: Message, tensors: Sequence[Tensor] = ()) -> None:
        self.listener.send(peer, message, tensors)

    _HANDLERS: ClassVar[dict[type, Callable[[Coordinator, bytes, Any, Incoming], None]]] = {
        Look: _look, Hello: _hello, Ask: _ask, Done: _done, Spoiled: _spoiled, Measured: _measured,
        Beat: _beat, Bye: _bye, Ready: _ready, Applied: _applied, Squares: _squares, Fill: _fill,
        Refusal: _refusal,
    }  # fmt: skip
    _CARRY_OUT: ClassVar[dict[type, Callable[[Coordinator, Any], None]]] = {
        commands.Give: _give,
        commands.Apply: _apply,
        commands.Operate: _operate,
        commands.Stepped: lambda self, each: self.observer.committed(each),
        commands.Forget: lambda self, each: self.fleet.forget(each.worker, each.sequences),
        commands.Keep: _keep,
        commands.Drop: lambda self, each: self.states.drop(each.snapshot),
        commands.Validated: lambda self, each: self.observer.validated(each),
        commands.Note: lambda self, each: self.observer.noted(each.kind, dict(each.fields)),
        commands.Finish: _finish,
        commands.Fail: _fail,
    }


def _same(one: Member | Hello, other: Hello) -> bool:
    """Whether two are the same worker, which has come back."""
    return one.client != "" and one.client == other.client
