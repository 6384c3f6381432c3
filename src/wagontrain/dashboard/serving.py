"""The server: where it listens, what it says of that, and its end."""

from __future__ import annotations

import asyncio
import ipaddress
import secrets
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import uvicorn

from wagontrain.dashboard.app import LOOPBACK, Access, make_app
from wagontrain.dashboard.feed import PERIOD, Feed
from wagontrain.errors import UsageError

PORT = 8420
"""Where it listens if no port is asked for and this one is free."""

_TOKEN_BYTES = 24
_GRACE = 2


@dataclass(frozen=True)
class Place:
    """Where to listen.

    Args:
        host: address or name; on loopback no token is asked for.
        port: 0 for any that is free; None for `PORT`, or any where that is taken.
        token: whether to ask for one on loopback, too.
    """

    host: str = "127.0.0.1"
    port: int | None = None
    token: bool = False


class Server:
    """A server that listens already, and answers once it is run.

    Args:
        folder: of the run.
        place: where to listen.

    Raises:
        UsageError: it cannot listen there.
    """

    def __init__(self, folder: Path, place: Place) -> None:
        if folder.is_file():
            raise UsageError(f"{str(folder)!r} is a file: give the directory of a run")
        self.folder = folder
        self.socket = _listen(place)
        address = str(self.socket.getsockname()[0])
        loopback = ipaddress.ip_address(address.partition("%")[0]).is_loopback
        self.token = secrets.token_urlsafe(_TOKEN_BYTES) if place.token or not loopback else None
        # A port that was asked for by its address is as good a name as the usual ones.
        hosts = LOOPBACK | {_bracketed(place.host).lower()} if loopback else None
        self.feed = Feed(folder)
        app = make_app(self.feed, Access(self.token, hosts))
        self._server = uvicorn.Server(
            uvicorn.Config(
                app, log_config=None, access_log=False, server_header=False, ws="none",
                timeout_graceful_shutdown=_GRACE, lifespan="on",
            )
        )  # fmt: skip

    @property
    def port(self) -> int:
        """At which it listens."""
        return int(self.socket.getsockname()[1])

    @property
    def url(self) -> str:
        """To open it with."""
        address = str(self.socket.getsockname()[0])
        anywhere = ipaddress.ip_address(address.partition("%")[0]).is_unspecified
        host = socket.gethostname() if anywhere else _bracketed(address)
        token = f"?token={self.token}" if self.token else ""
        return f"http://{host}:{self.port}/{token}"

    def run(self, until: Callable[[], Awaitable[None]] | None = None) -> None:
        """Answer until stopped by Ctrl-C or SIGTERM, or until `until` returns."""
        try:
            asyncio.run(self._serve(until))
        except KeyboardInterrupt:
            pass  # that is how it is ended
        finally:
            self.socket.close()

    async def _serve(self, until: Callable[[], Awaitable[None]] | None) -> None:
        ending = asyncio.create_task(self._end_after(until)) if until else None
        watching = asyncio.create_task(self._let_go())
        try:
            await self._server.serve(sockets=[self.socket])
        finally:
            for task in filter(None, (ending, watching)):
                task.cancel()

    async def _end_after(self, until: Callable[[], Awaitable[None]]) -> None:
        """Show the last of it to whoever looks, and end."""
        await until()
        while True:
            await self.feed.look()
            if not self.feed.left:
                break
        self.feed.closing = True
        await asyncio.sleep(2 * PERIOD)
        self._server.should_exit = True

    async def _let_go(self) -> None:
        """Streams have no end: tell them when the server has one."""
        while not self._server.should_exit:
            await asyncio.sleep(PERIOD / 2)
        self.feed.closing = True

    def stop(self) -> None:
        """End it, from any thread."""
        self._server.should_exit = True


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _listen(place: Place) -> socket.socket:
    ports = [place.port] if place.port is not None else [PORT, 0]
    if not 0 <= ports[0] <= 65535:
        raise UsageError(f"port {ports[0]} does not exist: give one from 0 to 65535")
    try:
        found = socket.getaddrinfo(place.host, None, type=socket.SOCK_STREAM)
    except OSError as error:
        raise UsageError(
            f"host {place.host!r} is unknown here ({error.strerror}): give an address of this "
            "machine"
        ) from None
    family, _, _, _, address = found[0]
    for port in ports:
        try:
            return socket.create_server((address[0], port), family=family)
        except OSError as error:
            if port == ports[-1]:
                raise UsageError(
                    f"the page cannot listen at {place.host} port {port} ({error.strerror}): give "
                    "another --port, or --host with an address of this machine"
                ) from None
    raise AssertionError("there is a port to try")
