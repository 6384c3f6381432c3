"""Who may ask, and for what: the page, its script and style, and the stream of news.

All of it is read, nothing written: there is no other method than GET. What is served is a table
of a few names, so that no path leads to a file.

On loopback the page is for whoever is on this machine, and a page elsewhere on the web must not
read it through a browser here: a name that it has made lead to 127.0.0.1 is refused by the Host
header. Elsewhere a token is asked for, in the address once and in a cookie from then on.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qs

from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from wagontrain.dashboard.feed import MOST_STREAMS, Feed

_STATIC = Path(__file__).parent / "static"
_FILES = {
    "/": ("page.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
    "/chart.js": ("chart.js", "text/javascript"),
    "/workers.js": ("workers.js", "text/javascript"),
    "/words.js": ("words.js", "text/javascript"),
}
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}
LOOPBACK = frozenset({"localhost", "127.0.0.1", "[::1]"})


@dataclass(frozen=True)
class Access:
    """Who may ask.

    Args:
        token: that has to be shown; None for none.
        hosts: names by which the server may be called; None for any, where there is a token.
    """

    token: str | None = None
    hosts: frozenset[str] | None = LOOPBACK

    def allows_host(self, header: str) -> bool:
        """Whether a Host header names this server; its port may be that of a tunnel."""
        if self.hosts is None:
            return True
        name, colon, port = header.rpartition(":")
        bare = name if colon and port.isdigit() else header
        return bare.lower() in self.hosts

    def shown(self, given: str | None) -> bool:
        """Whether this is the token."""
        if self.token is None:
            return True
        return hmac.compare_digest((given or "").encode(), self.token.encode())


def make_app(feed: Feed, access: Access) -> Starlette:
    """The server's whole surface."""

    @contextlib.asynccontextmanager
    async def following(app: Starlette) -> AsyncIterator[None]:
        task = asyncio.create_task(feed.follow())
        try:
            yield
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def events(request: Request) -> Response:
        if feed.streams >= MOST_STREAMS:
            return PlainTextResponse("too many pages of this run are open\n", 503)
        return StreamingResponse(feed.messages(), media_type="text/event-stream")

    routes = [Route(path, _file(*found), methods=["GET"]) for path, found in _FILES.items()]
    routes.append(Route("/events", events, methods=["GET"]))
    app = Starlette(routes=routes, lifespan=following)
    app.add_middleware(Guard, access=access)
    return app


class _file:  # noqa: N801  an endpoint, read once
    """Serves one file of the page."""

    def __init__(self, name: str, kind: str) -> None:
        self._content, self._kind = (_STATIC / name).read_bytes(), kind

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await Response(self._content, media_type=self._kind)(scope, receive, send)


class Guard:
    """Refuses whoever may not ask, and says to browsers what the page may do."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app = app
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        refused = self._answer(scope)
        await (refused or self._app)(scope, receive, with_headers)

    def _answer(self, scope: Scope) -> Response | None:
        """What to say instead of what was asked for; None to let it pass."""
        headers = Headers(scope=scope)
        if not self._access.allows_host(headers.get("host", "")):
            return PlainTextResponse(
                "this page is for this machine only: open it as localhost or 127.0.0.1\n", 421
            )
        if self._access.token is None:
            return None
        # Cookies do not know ports: two runs on one host must not take each other's.
        cookie = f"wagontrain-{(scope.get('server') or ('', 0))[1]}"
        query = parse_qs(scope.get("query_string", b"").decode("latin-1"))
        given = query.get("token", [None])[0]
        if given is not None and self._access.shown(given):
            if scope["path"] != "/":
                return None
            # Out of the address bar, and so out of the history and of screenshots.
            answer = RedirectResponse("/", 303)
            answer.set_cookie(cookie, given, httponly=True, samesite="lax")
            return answer
        if self._access.shown(Request(scope).cookies.get(cookie)):
            return None
        return PlainTextResponse(
            "this page asks for a token: open the address that was printed when it was started\n",
            401,
        )
