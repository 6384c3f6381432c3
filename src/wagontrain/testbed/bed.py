"""A test bed: several hosts on one machine, their state, and what can be done to them."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wagontrain.errors import TestBedError, UsageError
from wagontrain.testbed import caps, links

STATE = Path("/run/wagontrain/testbed")
_PREFIX = "wagontrain-"
_SECONDS = 10.0


@dataclass(frozen=True)
class Shape:
    """What the hosts of a bed are like.

    Args:
        hosts: how many.
        rate: of every link in each direction, as tc writes it (1gbit); None for no limit.
        cpus: cores of each host; None for no limit.
        memory: of each host (2G); None for no limit.
        slow: hosts with another share of cores than `cpus`.

    Raises:
        UsageError: one of these cannot be.
    """

    hosts: int
    rate: str | None = None
    cpus: float | None = None
    memory: str | None = None
    slow: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 1 <= self.hosts <= links.MAX_HOSTS:
            raise UsageError(f"{self.hosts} hosts: give 1 to {links.MAX_HOSTS}")
        if self.rate is not None:
            links.bits_per_second(self.rate)
        if self.memory is not None:
            caps.memory_bytes(self.memory)
        for host, share in self.slow.items():
            if not 0 <= host < self.hosts:
                raise UsageError(f"slow host {host}: hosts are numbered 0 to {self.hosts - 1}")
            caps.quota(share)
        if self.cpus is not None:
            caps.quota(self.cpus)

    def cpus_of(self, host: int) -> float | None:
        """Cores of a host; None for no limit."""
        return self.slow.get(host, self.cpus)


@dataclass(frozen=True)
class Usage:
    """What a host has used so far, as the kernel counted it."""

    host: str
    bytes_sent: int
    packets_sent: int
    bytes_received: int
    packets_received: int
    cpu_seconds: float
    peak_memory: int | None


class Bed:
    """Hosts that are up. Made by `Bed.up`, found again by `Bed.find`.

    As a context manager it takes everything down at the end.
    """

    def __init__(self, name: str, shape: Shape, owner: tuple[int, str] | None) -> None:
        self.name = name
        self.shape = shape
        self.owner = owner
        self.switch = f"{_PREFIX}{name}-switch"
        self.namespaces = [f"{_PREFIX}{name}-{index}" for index in range(shape.hosts)]
        self.caps = caps.find(name)

    @classmethod
    def up(cls, shape: Shape, name: str | None = None, owned: bool = True) -> Bed:
        """Bring up the hosts.

        Args:
            shape: what they are like.
            name: of the bed; a random one where not given.
            owned: whether the bed ends with this process. One that crashed is taken down by
                the next that looks.

        Raises:
            UsageError: not Linux, not root, a program is missing, or the name is taken.
            TestBedError: the kernel refused something.
        """
        require()
        sweep()
        name = name or secrets.token_hex(2)
        if not name.replace("-", "").isalnum() or len(name) > 32:
            raise UsageError(f"test bed {name!r}: a name has letters, digits and dashes, up to 32")
        bed = cls(name, shape, _identity(os.getpid()) if owned else None)
        try:
            bed.folder.mkdir(parents=True)
        except FileExistsError:
            raise UsageError(
                f"a test bed {name!r} is up: take it down first (wagontrain testbed down {name})"
            ) from None
        try:
            bed._write_state()
            links.connect(bed.switch, bed.namespaces)
            for index in range(shape.hosts):
                bed.caps.make(index)
                if shape.rate is not None:
                    links.shape(bed.switch, bed.namespaces[index], index, shape.rate)
                cpus = shape.cpus_of(index)
                if cpus is not None:
                    bed.caps.set_cpus(index, cpus)
                if shape.memory is not None:
                    bed.caps.set_memory(index, caps.memory_bytes(shape.memory))
        except BaseException:
            bed.down()
            raise
        return bed

    @classmethod
    def find(cls, name: str | None = None) -> Bed:
        """The bed of this name; the only one there is where none is given.

        Raises:
            UsageError: there is none such, or there are several.
        """
        require()
        sweep()
        beds = {bed.name: bed for bed in everything()}
        if name is None and len(beds) == 1:
            return next(iter(beds.values()))
        if name in beds:
            return beds[name]
        if not beds:
            raise UsageError("no test bed is up: bring one up with wagontrain testbed up")
        which = "which of them" if name is None else f"there is no {name!r} among them"
        raise UsageError(f"test beds are up: {', '.join(sorted(beds))}; {which}? Give --bed NAME")

    @property
    def folder(self) -> Path:
        """Where the bed's state is kept."""
        return STATE / self.name

    def host(self, text: str | int) -> int:
        """The number of a host given as 2 or tb2.

        Raises:
            UsageError: there is no such host.
        """
        digits = str(text).removeprefix("tb")
        if not digits.isdigit() or int(digits) >= self.shape.hosts:
            raise UsageError(f"no host {text!r}: there are tb0 to tb{self.shape.hosts - 1}")
        return int(digits)

    def start(
        self,
        host: int,
        command: Sequence[str],
        environment: Mapping[str, str] | None = None,
        **options: Any,
    ) -> subprocess.Popen[Any]:
        """Start a command in a host; it is killed when the thread that started it ends.

        Args:
            host: its number.
            command: program and arguments.
            environment: variables beside those of this process.
            options: passed on to `subprocess.Popen`.
        """
        inside = "echo tb$0 > /proc/sys/kernel/hostname"
        if Path("/etc/hosts").exists():
            inside += f" && mount --bind {shlex.quote(str(self.folder / 'hosts'))} /etc/hosts"
        outside = " && ".join(
            [f"echo $$ > {shlex.quote(str(file))}" for file in self.caps.files(host)]
        )
        given = {"TESTBED_HOST": f"tb{host}"} | dict(environment or {})
        enter = [
            "env", *(f"{name}={value}" for name, value in given.items()),
            "setpriv", "--pdeathsig", "KILL",
            "nsenter", f"--net={links.NAMESPACES / self.namespaces[host]}",
            "unshare", "--uts", "--mount",
            "sh", "-c", f'{inside} && exec "$@"', str(host),
        ]  # fmt: skip
        return subprocess.Popen(
            ["sh", "-c", f'{outside} && exec {shlex.join(enter)} "$@"', "sh", *command],
            **options,
        )

    def set_rate(self, host: int, rate: str | None) -> None:
        """Change the rate of a host's link, in both directions."""
        links.shape(self.switch, self.namespaces[host], host, rate)

    def set_cpus(self, host: int, share: float) -> None:
        """Change how many cores a host has."""
        self.caps.set_cpus(host, share)

    def cut(self, host: int) -> None:
        """Drop all of a host's traffic, silently, as a broken switch would."""
        links.join(self.switch, host, joined=False)

    def heal(self, host: int) -> None:
        """Let a host's traffic pass again."""
        links.join(self.switch, host, joined=True)

    def is_cut(self, host: int) -> bool:
        """Whether a host's traffic is dropped."""
        return not links.joined(self.switch, host)

    def signal(self, host: int, number: signal.Signals) -> int:
        """Send a signal to every process in a host; returns how many there were."""
        found = links.processes(self.namespaces[host])
        for process in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, number)
        return len(found)

    def kill(self, host: int) -> int:
        """End everything in a host at once; returns how many processes there were.

        Raises:
            TestBedError: something outlives SIGKILL.
        """
        killed = 0
        limit = time.monotonic() + _SECONDS
        while found := self.signal(host, signal.SIGKILL):
            killed = max(killed, found)
            if time.monotonic() > limit:
                raise TestBedError(f"{found} processes in host tb{host} cannot be killed")
            time.sleep(0.02)
        return killed

    def usage(self) -> list[Usage]:
        """What each host has used so far, as the kernel counted it."""
        return [
            Usage(
                f"tb{index}",
                *links.traffic(namespace),
                cpu_seconds=self.caps.cpu_seconds(index),
                peak_memory=self.caps.peak_memory(index),
            )
            for index, namespace in enumerate(self.namespaces)
        ]

    def down(self) -> None:
        """End everything in the hosts and remove them. May be called twice."""
        for index in range(self.shape.hosts):
            self.kill(index)
        for namespace in (*self.namespaces, self.switch):
            links.remove(namespace)
        self.caps.remove()
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Bed:
        return self

    def __exit__(self, *details: object) -> None:
        self.down()

    def _write_state(self) -> None:
        names = [f"{links.address(index)} tb{index}" for index in range(self.shape.hosts)]
        # torch's store asks for names of addresses in the form of version 6 as well, and warns.
        names += [f"::ffff:{name}" for name in names]
        (self.folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", *names, ""]))
        state = {"shape": dataclasses.asdict(self.shape), "owner": self.owner}
        file = self.folder / "bed.json"
        file.with_suffix(".new").write_text(json.dumps(state))
        file.with_suffix(".new").rename(file)


def everything() -> Iterator[Bed]:
    """All beds that are up."""
    for file in sorted(STATE.glob("*/bed.json")):
        with contextlib.suppress(FileNotFoundError):  # taken down meanwhile
            state = json.loads(file.read_text())
            shape = state["shape"]
            slow = {int(host): share for host, share in shape.pop("slow").items()}
            owner = tuple(state["owner"]) if state["owner"] else None
            yield Bed(file.parent.name, Shape(**shape, slow=slow), owner)


def sweep() -> list[str]:
    """Take down the beds whose owner is gone; returns their names."""
    gone = []
    for bed in everything():
        if bed.owner is not None and _identity(bed.owner[0]) != bed.owner:
            bed.down()
            gone.append(bed.name)
    return gone


def require() -> None:
    """Check that a test bed can be made here.

    Raises:
        UsageError: why not, and what to do.
    """
    problem = why_not()
    if problem:
        raise UsageError(problem)


def why_not() -> str | None:
    """Why no test bed can be made here; None where one can."""
    if sys.platform != "linux":
        return f"a test bed is made of Linux network namespaces; this is {sys.platform}"
    if os.geteuid() != 0:
        return "a test bed makes network namespaces, which needs root: run it with sudo"
    programs = ("ip", "tc", "bridge", "nsenter", "unshare", "setpriv", "mount")
    missing = [name for name in programs if shutil.which(name) is None]
    if missing:
        return (
            f"a test bed needs the programs {', '.join(missing)}: install the packages iproute2 "
            "and util-linux"
        )
    return None


def threads(cpus: float | None, processes: int, hosts: int) -> int:
    """Threads for each of so many processes on a host; without a limit, hosts share the cores."""
    cores = len(os.sched_getaffinity(0)) // hosts if cpus is None else math.ceil(cpus)
    return max(1, cores // processes)


def _identity(process: int) -> tuple[int, str]:
    """A process number with its start time: numbers come again."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return process, "gone"
    return process, fields[19]
