"""Running strategies whose workers come and go.

The launching process is the coordinator. Beside it, or on a Ray cluster, are server shards and
workers, each a process of its own that is started again when it dies (see `hands`); other hosts
may add workers at any time.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from wagontrain import checkpoint, hosting, launch
from wagontrain.engines import Engine, Local
from wagontrain.errors import UsageError
from wagontrain.events import Events
from wagontrain.folder import RunFolder
from wagontrain.hands import Crew, LocalCrew
from wagontrain.job import Job, job_folder
from wagontrain.launch import Place, Terms
from wagontrain.launch.network import free_port
from wagontrain.mesh import World
from wagontrain.plan import Plan
from wagontrain.progress import Progress
from wagontrain.registry import make_strategy
from wagontrain.servers import site as sites
from wagontrain.servers.client import Client, OverError
from wagontrain.servers.contract import Crewed, require_leasable
from wagontrain.servers.coordinator import Coordinator
from wagontrain.servers.lines import GivenUpError
from wagontrain.servers.messages import Description, Look
from wagontrain.servers.wire import Network, Secret
from wagontrain.servers.work import fingerprint
from wagontrain.task import Task, TaskSource, load_task, make_task
from wagontrain.transport import Context

CrewOf = Callable[[Path, RunFolder, Secret], Crew]
"""Who starts the processes, of the folder of their job, the run's, and the secret."""


@dataclass(frozen=True)
class Order:
    """What is to be run.

    Args:
        source: the task, or a function that returns it.
        strategy: how.
        overrides: fields of the task to replace.
        task_file: `FILE:NAME` to load it from, where there is one.
        steps: updates after which to stop.
        resume: checkpoint to go on from.
        terms: where to listen, and how long a silence may be.
        first_step: updates to leave out at the beginning.
        dtype: what to compute in, whatever the task says.
        plan: why it is run so, where that was decided before.
    """

    source: TaskSource
    strategy: Crewed
    overrides: Mapping[str, Any]
    task_file: str | None
    steps: int | None
    resume: Path | None
    terms: Terms
    first_step: int = 0
    dtype: str | None = None
    plan: Plan | None = None


def start(
    order: Order,
    task: Task,
    workers: int,
    place: Place | None,
    run_dir: str | Path | None,
    label: str,
    display: Progress | None,
    engine: Engine | None = None,
) -> tuple[dict[str, Any], Path]:
    """Run a job to its end; returns its summary and its folder.

    Under torchrun or Slurm every process comes here: the first coordinates, and starts the server
    shards and its own worker; the others work for it. With shards elsewhere, the last ones hold
    them instead.

    Raises:
        UsageError: the request cannot be honoured.
        TrainingError: training began and could not go on.
    """
    require_leasable(task, order.strategy.name)
    if place is not None and place.size > 1:
        return _among(order, task, place, run_dir, label, display)

    if engine is not None and engine.travels and order.strategy.elsewhere:
        raise UsageError(
            "Ray places server shards on its nodes by itself: leave placement=elsewhere out"
        )

    def crew_of(job: Path, run: RunFolder, secret: Secret) -> Crew:
        return (engine or Local()).crew(job, run, secret, workers, order.terms.interface)

    return _lead(order, task, workers, workers, crew_of, run_dir, label, display)


def _among(
    order: Order,
    task: Task,
    place: Place,
    run_dir: str | Path | None,
    label: str,
    display: Progress | None,
) -> tuple[dict[str, Any], Path]:
    """One of several processes that somebody else has started."""
    held = order.strategy.shards if order.strategy.elsewhere else 0
    workers = place.size - held
    if workers < 1:
        raise UsageError(
            f"{held} of {place.size} processes as hosts of server shards leave none to work: start "
            "more, or give fewer servers"
        )
    order.strategy.check(task, World(size=workers))
    context = launch.join(place, order.terms)
    first = place.rank == 0
    try:
        address = _own_address(place, order.terms.interface) if first else ""
        port = free_port(address) if first else 0
        secret = Secret.new() if first else None
        told = context.gather_text(f"{address} {port} {secret.text}" if secret else "")[0]
    finally:
        launch.leave(context)
    address, given, text = told.split()
    if secret is not None:

        def crew_of(job: Path, run: RunFolder, secret: Secret) -> Crew:
            return LocalCrew(run.logs, secret, address)

        return _lead(order, task, workers, 1, crew_of, run_dir, label, display, int(given), secret)
    at = endpoint(address, int(given))
    if place.rank >= workers:
        hosting.hold(at, Secret(text))
    else:
        take_part(task, order.strategy, at, Secret(text))
    return {}, Path()


def _lead(
    order: Order,
    task: Task,
    workers: int,
    here: int,
    crew_of: CrewOf,
    run_dir: str | Path | None,
    label: str,
    display: Progress | None,
    port: int = 0,
    secret: Secret | None = None,
) -> tuple[dict[str, Any], Path]:
    """Coordinate a job of so many workers, of which some are started here."""
    strategy, secret = order.strategy, secret or Secret.new()
    folder = RunFolder.create(run_dir, label)
    if display is not None:
        display.folder = folder.path
    keep_secret(secret, folder.path / "secret")
    try:
        with (
            job_folder() as job,
            contextlib.closing(crew_of(job, folder, secret)) as crew,
            Network(secret) as network,
        ):
            listener = network.listen(crew.address, port)
            description = {
                "strategy": strategy.name, "settings": strategy.settings,
                "overrides": dict(order.overrides), "task_file": order.task_file,
            }  # fmt: skip
            Job(
                "work", strategy.name, strategy.settings, dict(order.overrides), order.task_file,
                str(folder.path), {"coordinator": listener.endpoint, "dtype": order.dtype},
            ).write(job, order.source, strategy, crew.travels)  # fmt: skip
            events = Events([*folder.sinks(), *([display] if display is not None else [])])
            terms = sites.Terms(
                fingerprint(task, torch.device("cpu")),
                description,
                workers,
                order.terms.patience,
                elsewhere=strategy.shards if strategy.elsewhere else 0,
            )
            source = None
            if order.resume is not None:
                source = checkpoint.Restored(Context(), checkpoint.Checkpoint(order.resume))
            site = sites.Site(
                listener, folder, events, terms, workers, order.steps, source, order.first_step,
                order.plan,
            )  # fmt: skip
            with _closed_if_refused(events):
                coordinator, record = strategy.coordinator(task, site)
            record.begin(workers)
            with record.failing(), ended(crew, coordinator):
                crew.begin(job, listener.endpoint, strategy.shards - terms.elsewhere, here)
                coordinator.run(lambda: crew.look_after(coordinator))
            summary = record.end(workers)
    except UsageError:
        (folder.path / "secret").unlink(missing_ok=True)
        folder.discard()
        raise
    return summary, folder.path


@contextlib.contextmanager
def _closed_if_refused(events: Events) -> Iterator[None]:
    try:
        yield
    except UsageError:
        events.close()
        raise


def _own_address(place: Place, interface: str | None) -> str:
    found = launch.named(interface) if interface else launch.reaching(place.address, place.port)
    return found.address


def work_job(job: Job, folder: Path, prepare: Callable[[Task], Task]) -> None:
    """The worker's side of a job of the kind "work"."""
    secret = Secret(sys.stdin.readline().strip())
    task, strategy = job.load(folder)
    assert isinstance(strategy, Crewed)
    take_part(prepare(task), strategy, job.options["coordinator"], secret)


def endpoint(address: str, port: int) -> str:
    """How ZeroMQ writes it."""
    return f"tcp://[{address}]:{port}" if ":" in address else f"tcp://{address}:{port}"


def take_part(task: Task, strategy: Crewed, coordinator: str, secret: Secret) -> None:
    """Work for a coordinator until there is nothing more to do.

    Raises:
        UsageError: it does not take this worker.
        TrainingError: the task failed here, or the job elsewhere.
    """
    context = launch.join(None)
    device = context.world.device
    own, name = fingerprint(task, device), secrets.token_hex(8)
    while True:
        with Network(secret) as network:
            client = None
            try:
                client = Client(network, coordinator, own, device=str(device), client=name)
                strategy.worker(task, client, device).run()
            except OverError:
                return
            except GivenUpError:
                continue
            finally:
                if client is not None:
                    client.close(leave=sys.exc_info()[0] is not None)


def join(coordinator: str, task_file: str | None, secret_file: Path | None) -> None:
    """Take part in a run on this or another host, as one more worker.

    Args:
        coordinator: `HOST:PORT` at which the run listens.
        task_file: `FILE:NAME` of the task; where not given the path that the run has it at.
        secret_file: the run's secret; where not given it is in the environment.

    Raises:
        UsageError: nobody answers, the secret is wrong, or the task is another one.
    """
    at, secret = _found(coordinator, secret_file)
    job = described(at, secret)
    file = task_file or job["task_file"]
    if file is None:
        raise UsageError("the run has no task file, for it was started from a script: give one")
    if not Path(file.partition(":")[0]).exists():
        raise UsageError(f"the run's task file {file!r} is not on this host: give its path here")
    strategy = make_strategy(job["strategy"], job["settings"])
    if not isinstance(strategy, Crewed):
        raise UsageError(f"{strategy.name} has no workers that come and go")
    take_part(make_task(load_task(file), job["overrides"]), strategy, at, secret)


def serve(coordinator: str, secret_file: Path | None, say: Callable[[str], None]) -> None:
    """Hold a server shard of a run whose shards are elsewhere, until it has ended.

    Args:
        coordinator: `HOST:PORT` at which the run listens.
        secret_file: the run's secret; where not given it is in the environment.
        say: who is told what this host does.

    Raises:
        UsageError: nobody answers, the secret is wrong, or the run's shards are not elsewhere.
        WorkerError: the run has failed, or cannot be reached any longer.
    """
    at, secret = _found(coordinator, secret_file)
    described(at, secret)
    hosting.hold(at, secret, say)


def _found(coordinator: str, secret_file: Path | None) -> tuple[str, Secret]:
    """Where a run listens, as ZeroMQ writes it, and its secret."""
    host, colon, port = coordinator.removeprefix("tcp://").rpartition(":")
    if not colon or not port.isdigit():
        raise UsageError(f"{coordinator!r} is not HOST:PORT: give what the run printed")
    secret = secret_from(secret_file, launch.secret_of_job())
    return endpoint(_address(host.strip("[]")), int(port)), secret


def _address(host: str) -> str:
    try:
        return str(socket.getaddrinfo(host, None)[0][4][0])
    except socket.gaierror as error:
        raise UsageError(f"host {host!r} is unknown here ({error.strerror})") from None


def described(coordinator: str, secret: Secret, seconds: float = 20.0) -> dict[str, Any]:
    """What is trained there, and how.

    Raises:
        UsageError: nobody answers, or not with a description.
    """
    with Network(secret) as network:
        line = network.connect(coordinator)
        line.send(Look())
        incoming = line.receive(seconds)
        if incoming is None or not isinstance(incoming.message, Description):
            raise UsageError(
                f"nobody answers at {coordinator} within {seconds:.0f} s: is the run still going "
                "on, and does this host reach that address?"
            )
        return incoming.message.job


def secret_from(file: Path | None, environment: str | None) -> Secret:
    """The job's secret, out of a file or the environment.

    Raises:
        UsageError: neither is there.
    """
    if file is not None:
        try:
            return Secret(file.read_text().strip())
        except OSError as error:
            raise UsageError(f"{str(file)!r} cannot be read: {error.strerror}") from None
    if environment:
        return Secret(environment)
    raise UsageError(
        f"the job's secret is needed: give --secret-file RUN_DIR/secret, or set {launch.SECRET}"
    )


def keep_secret(secret: Secret, file: Path) -> None:
    """Write the secret where only this user can read it."""
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as out:
        out.write(secret.text + "\n")


@contextlib.contextmanager
def ended(crew: Crew, coordinator: Coordinator) -> Iterator[None]:
    """Within, the job runs; afterwards all its processes have been told so, and have ended."""
    reason = ""
    try:
        yield
    except BaseException as error:
        reason = str(error) or type(error).__name__
        raise
    finally:
        coordinator.stop(reason)
        crew.end(coordinator)
