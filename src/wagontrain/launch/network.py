"""Which of this host's addresses the other hosts can reach.

Gloo takes the address that the host's own name resolves to, which on many machines is loopback
or nothing at all. The address that a packet to the master would leave from is the right one.
"""

from __future__ import annotations

import ipaddress
import socket
from dataclasses import dataclass

import psutil

from wagontrain.errors import UsageError, nearest


@dataclass(frozen=True)
class Interface:
    """A network interface of this host, with one of its addresses."""

    name: str
    address: str

    @property
    def is_loopback(self) -> bool:
        """Whether only this host can reach it."""
        return ipaddress.ip_address(self.address).is_loopback


def interfaces() -> list[Interface]:
    """This host's interfaces, one entry for each IPv4 or IPv6 address."""
    return [
        Interface(name, entry.address.partition("%")[0])
        for name, entries in psutil.net_if_addrs().items()
        for entry in entries
        if entry.family in (socket.AF_INET, socket.AF_INET6)
    ]


def reaching(master: str, port: int) -> Interface:
    """The interface that packets to the master leave by. Sends none.

    Raises:
        UsageError: the master's name is unknown here, or no route leads there.
    """
    try:
        family, kind, _, _, target = socket.getaddrinfo(master, port, type=socket.SOCK_DGRAM)[0]
    except socket.gaierror as error:
        raise UsageError(
            f"the master's name {master!r} is unknown on {socket.gethostname()} "
            f"({error.strerror}): give its address as MASTER_ADDR"
        ) from error
    try:
        with socket.socket(family, kind) as probe:
            probe.connect(target)
            own = probe.getsockname()[0].partition("%")[0]
    except OSError as error:
        raise UsageError(
            f"{socket.gethostname()} has no route to the master {master} ({error.strerror}): "
            "check that both are in one network, or give another MASTER_ADDR"
        ) from error
    return next((found for found in interfaces() if found.address == own), Interface("", own))


def named(name: str) -> Interface:
    """The interface of this name, with its IPv4 address if it has one.

    Raises:
        UsageError: there is none such, or it has no address.
    """
    known = {interface.name for interface in interfaces()}
    if name not in known:
        where = socket.gethostname()
        raise UsageError(f"no network interface {name!r} on {where}; {nearest(name, known)}")
    own = [interface for interface in interfaces() if interface.name == name]
    return min(own, key=lambda interface: ":" in interface.address)


def free_port(address: str) -> int:
    """A port that nothing listens on now."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family) as probe:
        probe.bind((address, 0))
        return int(probe.getsockname()[1])
