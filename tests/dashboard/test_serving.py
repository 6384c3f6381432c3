"""The server, asked as a browser asks it."""

from __future__ import annotations

import http.client
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from tests.dashboard import recorded
from tests.dashboard.serving import messages, serving
from wagontrain.dashboard import feed
from wagontrain.dashboard.app import Access
from wagontrain.dashboard.serving import Place, Server
from wagontrain.errors import UsageError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("page") / "run"
    recorded.write(made, *recorded.synchronous(2, 50))
    (made / "secret").write_text("hidden")
    return made


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    with serving(folder) as made:
        yield made


@pytest.fixture(scope="module")
def guarded(folder: Path) -> Iterator[Server]:
    with serving(folder, Place(port=0, token=True)) as made:
        yield made


def raw(server: Server, method: str, path: str, **headers: str) -> tuple[int, bytes]:
    """An answer to a request with that very path and those headers."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    try:
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.read(2000)
    finally:
        connection.close()


# --- what is served -----------------------------------------------------------------------------


def test_the_page_and_all_that_it_is_made_of(server: Server) -> None:
    page = httpx.get(server.url)
    assert page.status_code == 200
    assert "http://" not in page.text
    assert "https://" not in page.text
    for path in ("page.css", "page.js", "chart.js", "workers.js", "words.js"):
        part = httpx.get(f"{server.url}{path}")
        assert part.status_code == 200
        assert "innerHTML" not in part.text
        assert "eval(" not in part.text
    assert "script-src 'self'" in page.headers["content-security-policy"]
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "access-control-allow-origin" not in page.headers
    assert page.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"])
@pytest.mark.parametrize("path", ["/", "/events", "/page.js"])
def test_there_is_nothing_but_reading(server: Server, method: str, path: str) -> None:
    assert raw(server, method, path)[0] == 405


@pytest.mark.parametrize(
    "path",
    ["/secret", "/../secret", "/%2e%2e/secret", "/..%2fsecret", "//secret", "/page.js/../secret",
     "/static/page.js", "/events.jsonl", "/app.py", "/%00", "/page.js%00"],
)  # fmt: skip
def test_no_path_leads_to_a_file(server: Server, path: str) -> None:
    status, body = raw(server, "GET", path)
    assert status == 404
    assert b"hidden" not in body


# --- who may ask --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "status"),
    [("localhost:9", 200), ("127.0.0.1", 200), ("[::1]:9", 200), ("LOCALHOST", 200),
     ("evil.example", 421), ("evil.example:8420", 421), ("127.0.0.1.evil.example", 421),
     ("localhost@evil.example", 421), ("", 421)],
)  # fmt: skip
def test_a_name_that_was_made_to_lead_here_is_refused(
    server: Server, host: str, status: int
) -> None:
    for path in ("/", "/page.js"):
        assert raw(server, "GET", path, Host=host)[0] == status


def test_a_token_is_asked_for_and_goes_into_a_cookie(guarded: Server) -> None:
    token = guarded.token
    assert token is not None
    assert len(token) >= 32
    bare = guarded.url.partition("?")[0]
    for path in ("", "page.js", "events", "nowhere"):
        assert httpx.get(bare + path).status_code == 401
        assert httpx.get(f"{bare}{path}?token={token[:-1]}").status_code == 401
        assert httpx.get(bare + path, headers={"Cookie": "wagontrain=x"}).status_code == 401
    first = httpx.get(guarded.url)
    assert (first.status_code, first.headers["location"]) == (303, "/")
    cookie = first.headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=lax" in cookie
    with httpx.Client() as browser:
        assert browser.get(guarded.url, follow_redirects=True).status_code == 200
        assert browser.get(bare + "page.js").status_code == 200
    assert httpx.get(f"{bare}page.js?token={token}").status_code == 200


def test_beyond_loopback_a_token_is_asked_for(folder: Path) -> None:
    server = Server(folder, Place("0.0.0.0", 0))
    url = server.url
    server.socket.close()
    assert server.token is not None
    assert server.token in url
    assert urlsplit(url).hostname == socket.gethostname().lower()
    other = Server(folder, Place("0.0.0.0", 0))
    other.socket.close()
    assert other.token != server.token
    local = Server(folder, Place("localhost", 0))
    local.socket.close()
    assert local.token is None


def test_a_token_of_any_text_is_compared() -> None:
    access = Access("ü-token", None)
    assert access.shown("ü-token")
    assert not access.shown("ü-tokem")
    assert not access.shown("")
    assert not access.shown(None)


def test_where_it_cannot_listen_it_says_so(folder: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=f"port {port} .*give another --port"):
            Server(folder, Place(port=port))
    with pytest.raises(UsageError, match="give one from 0 to 65535"):
        Server(folder, Place(port=70_000))
    with pytest.raises(UsageError, match="unknown here"):
        Server(folder, Place("no.such.host.invalid"))
    with pytest.raises(UsageError, match="is a file"):
        Server(folder / "events.jsonl", Place(port=0))


# --- news ---------------------------------------------------------------------------------------


def test_first_the_whole_and_then_what_is_new(tmp_path: Path) -> None:
    run = tmp_path / "later"
    with serving(run) as server, httpx.stream("GET", f"{server.url}events", timeout=10) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        news = messages(answer)
        first = next(news)
        assert first["whole"]
        assert first["status"]["status"] == "waiting"
        recorded.write(run, *recorded.synchronous(2, 30))
        second = next(news)
        assert second["now"]["step"] == 29
        assert len(second["tiles"]) == 2
        recorded.write(run, recorded.step(30, time.time()))
        third = next(news)
        assert third["now"]["step"] == 30
        assert "run" not in third
        assert "lineup" not in third
        assert len(third["curves"]["loss"]["points"]) <= 2
        with httpx.stream("GET", f"{server.url}events", timeout=10) as another:
            anew = next(messages(another))
        assert anew["whole"]
        assert len(anew["curves"]["loss"]["points"]) == 31


def test_many_events_are_few_messages(tmp_path: Path) -> None:
    run = tmp_path / "run"
    recorded.write(run, recorded.start(1, time.time()))
    with serving(run) as server, httpx.stream("GET", f"{server.url}events", timeout=10) as answer:
        news = messages(answer)
        next(news)
        began = time.monotonic()
        for number in range(300):
            recorded.write(run, recorded.step(number, time.time()))
            time.sleep(0.005)
        seen = []
        while not seen or seen[-1].get("now", {}).get("step") != 299:
            seen.append(next(news))
        assert len(seen) <= (time.monotonic() - began) / feed.PERIOD + 2


def test_a_beat_where_nothing_happens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed, "HEARTBEAT", 0.5)
    with (
        serving(tmp_path / "none") as server,
        httpx.stream("GET", f"{server.url}events", timeout=5) as answer,
    ):
        news = messages(answer)
        next(news)
        assert set(next(news)) == {"clock"}


def test_too_many_open_pages_are_refused_and_closed_ones_do_not_count(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wagontrain.dashboard.app.MOST_STREAMS", 1)
    with serving(folder) as server:
        with httpx.stream("GET", f"{server.url}events", timeout=5) as first:
            news = messages(first)
            next(news)
            assert httpx.get(f"{server.url}events").status_code == 503
        limit = time.monotonic() + 5
        while server.feed.streams and time.monotonic() < limit:
            time.sleep(0.05)
        with httpx.stream("GET", f"{server.url}events", timeout=5) as again:
            news = messages(again)
            assert next(news)["whole"]


def test_open_pages_are_told_when_the_server_ends(folder: Path) -> None:
    with serving(folder) as server, httpx.stream("GET", f"{server.url}events", timeout=5) as answer:
        news = messages(answer)
        assert next(news)["over"] is False
        server.stop()
        assert list(news)[-1]["over"] is True


def test_a_file_that_may_not_be_read_is_said(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "events.jsonl").mkdir(parents=True)
    with serving(run) as server, httpx.stream("GET", f"{server.url}events", timeout=5) as answer:
        news = messages(answer)
        while not (told := next(news)).get("problem"):
            pass
        assert "cannot be read" in told["problem"]
