"""The page in headless Chromium: what it shows is what is in events.jsonl."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import chromium
from tests.commands import SCRIPTS, Running, clean_environment
from tests.dashboard import recorded
from tests.dashboard.serving import serving
from tests.forks import Fork

KILLED = "worker rank 2 on anna was killed by SIGKILL; the other workers were stopped"
SECONDS = 5.0

pytestmark = chromium.needed


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with chromium.opened(tmp_path_factory.mktemp("profile")) as context:
        yield context


class View:
    """A page that is open.

    Args:
        page: playwright's.
    """

    def __init__(self, page: Any) -> None:
        self.page = page
        self.complaints: list[str] = []
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("console", self._note)

    def _note(self, said: Any) -> None:
        # A server that has ended is looked for again, and Chromium tells.
        if said.type == "error" and "ERR_" not in said.text:
            self.complaints.append(said.text)

    def open(self, url: str, width: int = 1280, theme: str = "light") -> None:
        self.page.set_viewport_size({"width": width, "height": 900})
        self.page.emulate_media(color_scheme=theme)
        self.page.goto(url)

    def figure(self, name: str) -> float:
        place = self.page.locator(f'[data-figure="{name}"]')
        return float(place.get_attribute("data-value"))

    def value(self, script: str) -> Any:
        return self.page.evaluate(script)

    def status(self) -> str:
        return str(self.page.locator("#status").get_attribute("data-status"))

    def tile(self, number: int) -> Any:
        return self.page.locator(f'.tile[data-number="{number}"]')

    def condition(self, number: int) -> str:
        return str(self.tile(number).get_attribute("data-condition"))

    def colour(self, number: int) -> str:
        return str(self.tile(number).evaluate("node => getComputedStyle(node).backgroundColor"))

    def until(self, done: Callable[[], object], seconds: float = SECONDS) -> None:
        limit = time.monotonic() + seconds
        while not done():
            assert time.monotonic() < limit, self.page.locator("body").inner_text()
            self.page.wait_for_timeout(50)


@pytest.fixture
def view(browser: Any) -> Iterator[View]:
    page = browser.new_page()
    made = View(page)
    yield made
    page.close()
    assert made.complaints == []


def events_of(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = (folder / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["kind"] == kind]


def compare(view: View, folder: Path) -> None:
    """What the page shows is what the file says."""
    steps, validations = events_of(folder, "step"), events_of(folder, "validation")
    view.until(lambda: view.figure("step") == steps[-1]["step"] + 1)
    assert view.figure("samples seen") == sum(step["samples"] for step in steps)
    losses = [step for step in steps if step["loss"] is not None]
    assert view.figure("loss") == losses[-1]["loss"]
    for name, value in validations[-1]["values"].items():
        assert view.figure(f"validation {name}") == value
    rows = view.value('wagontrain.curves.get("loss").rows.map((row) => [row[0], row[2]])')
    assert [step for step, _ in rows] == [step["step"] for step in losses]
    assert [loss for _, loss in rows] == [pytest.approx(e["loss"], rel=1e-5) for e in losses]


def is_red(colour: str) -> bool:
    red, green, blue = map(float, re.findall(r"[\d.]+", colour)[:3])
    return red > 1.5 * max(green, blue)


# --- what it shows ------------------------------------------------------------------------------


def test_figures_are_those_of_the_file_and_follow_it(view: View, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with serving(run) as server:
        view.open(server.url)
        view.until(lambda: view.page.locator("#nothing").is_visible())
        recorded.write(run, *recorded.synchronous(4, 450))
        compare(view, run)
        assert view.status() == "running"
        assert view.page.locator(".tile").count() == 4
        assert "in step 450" in view.tile(3).inner_text()
        assert "bert · cpu" in view.tile(3).inner_text()
        recorded.write(run, recorded.step(450, time.time()), recorded.end(451, time.time()))
        compare(view, run)
        view.until(lambda: view.status() == "ended")
        view.page.reload()  # the whole history is there again
        compare(view, run)
        for canvas in view.page.locator("canvas").all():
            drawn = canvas.evaluate(
                "node => node.getContext('2d').getImageData(0, 0, node.width, node.height)"
                ".data.some((value) => value)"
            )
            assert drawn


def test_a_killed_rank_turns_red_within_seconds(view: View, tmp_path: Path) -> None:
    recorded.write(tmp_path, *recorded.synchronous(4, 100))
    with serving(tmp_path) as server:
        view.open(server.url)
        view.until(lambda: view.condition(2) == "working")
        assert not is_red(view.colour(2))
        recorded.write(tmp_path, recorded.failed(KILLED))
        view.until(lambda: view.condition(2) == "dead")
        assert is_red(view.colour(2))
        assert "✕" in view.tile(2).inner_text()  # not by its colour alone
        assert "dead" in view.tile(2).inner_text()
        assert not is_red(view.colour(1))
        assert view.page.locator("#alert").inner_text() == KILLED
        assert (
            "rank 2 on anna: was killed by SIGKILL" in view.page.locator("#troubles").inner_text()
        )


def test_workers_that_come_and_go_and_their_servers(view: View, tmp_path: Path) -> None:
    events = recorded.crewed(4, 300)
    killed = next(at for at, event in enumerate(events) if event["kind"] == "left")
    recorded.write(tmp_path, *events[:killed])
    with serving(tmp_path) as server:
        view.open(server.url)
        view.until(lambda: view.page.locator(".tile").count() == 4)
        recorded.write(tmp_path, events[killed])
        view.until(lambda: is_red(view.colour(2)))
        recorded.write(tmp_path, *events[killed + 1 :])
        view.until(lambda: view.page.locator(".tile").count() == 5)
        view.until(lambda: view.figure("step") == 300)
        shards = events_of(tmp_path, "workers")[-1]["shards"]
        rows = view.page.locator("#shards tbody tr")
        queues = [int(row.get_attribute("data-behind")) for row in rows.all()]
        assert queues == [shard["behind"] for shard in shards]
        stale = [event["staleness"] for event in events_of(tmp_path, "step")]
        bars = view.page.locator("#staleness .column")
        counts = [int(bar.get_attribute("data-count")) for bar in bars.all()]
        assert counts == [stale.count(each) for each in range(max(stale) + 1)]
        assert "was killed by SIGKILL" in view.page.locator("#log").inner_text()


def test_another_run_in_the_same_place_is_shown_alone(view: View, tmp_path: Path) -> None:
    recorded.write(tmp_path, *recorded.crewed(2, 300))
    with serving(tmp_path) as server:
        view.open(server.url)
        view.until(lambda: view.page.locator("#shards tbody tr").count() == 2)
        assert view.page.locator('[data-figure="validation accuracy"]').count() == 1
        (tmp_path / "events.jsonl").unlink()
        recorded.write(tmp_path, *recorded.synchronous(1, 20))
        view.until(lambda: view.page.locator("#figures div").count() and view.figure("step") == 20)
        assert view.page.locator('[data-figure="validation accuracy"]').count() == 0
        assert not view.page.locator("#servers").is_visible()
        assert view.page.locator(".tile").count() == 1


def test_what_a_file_says_is_text_and_no_markup(view: View, tmp_path: Path) -> None:
    evil = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
    start = recorded.start(1, time.time(), strategy=evil, hosts=[evil], settings={evil: evil})
    start["ranks"] = [[evil, evil]]
    values = {evil: 1.0}
    recorded.write(
        tmp_path, start, recorded.step(0, time.time()), recorded.signs({0: evil}, time.time()),
        recorded.validation(1, time.time()) | {"values": values},
        {"kind": evil, "time": time.time(), evil: evil}, recorded.failed(f"rank 0: {evil}"),
    )  # fmt: skip
    with serving(tmp_path) as server:
        view.open(server.url)
        view.until(lambda: view.status() == "failed")
        assert evil in view.page.locator("#alert").inner_text()
        assert view.page.locator("img, main script").count() == 0
        assert "owned" not in view.page.title().replace(evil, "")


def test_a_thousand_workers(view: View, tmp_path: Path) -> None:
    recorded.write(tmp_path, *recorded.synchronous(1000, 40, slow=613))
    with serving(tmp_path) as server:
        began = time.monotonic()
        view.open(server.url)
        view.until(lambda: view.page.locator(".tile").count() == 1000)
        view.until(lambda: view.condition(613) == "slow")
        assert time.monotonic() - began < SECONDS
        assert "rank 613" in view.page.locator("#troubles").inner_text()
        recorded.write(tmp_path, recorded.failed(KILLED.replace("rank 2", "rank 417")))
        view.until(lambda: is_red(view.colour(417)))
        view.tile(417).click()
        assert "was killed by SIGKILL" in view.page.locator("#detail").inner_text()


def test_a_server_that_ends_is_told_and_found_again(view: View, tmp_path: Path) -> None:
    recorded.write(tmp_path, *recorded.synchronous(2, 20))
    with serving(tmp_path) as server:
        view.open(server.url)
        view.until(lambda: view.figure("step") == 20)
    view.until(lambda: "server has ended" in view.page.locator("#alert").inner_text())


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1600])
def test_any_window(view: View, tmp_path: Path, theme: str, width: int) -> None:
    recorded.write(tmp_path, *recorded.crewed(5, 300))
    with serving(tmp_path) as server:
        view.open(server.url, width, theme)
        view.until(lambda: view.page.locator(".tile").count() == 6)
        assert view.value("document.documentElement.scrollWidth") <= width
        lightness = view.value(
            "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)"
        )
        assert (sum(lightness) > 380) == (theme == "light")
        assert contrast(view) >= 4.5


def contrast(view: View) -> float:
    """The least contrast of text in tiles with what is behind it (WCAG 2, section 1.4.3)."""
    pairs = view.value(
        """[...document.querySelectorAll(".tile .doing, .tile .rank, .tile .seen")].map((node) => {
            let back = node;
            const of = (each) => getComputedStyle(each).backgroundColor;
            while (of(back) === "rgba(0, 0, 0, 0)") back = back.parentElement;
            return [getComputedStyle(node).color, of(back)].map(
              (text) => text.match(/[\\d.]+/g).map(Number));
        })"""
    )

    def luminance(colour: list[float]) -> float:
        parts = [value / 255 for value in colour[:3]]
        linear = [
            part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
        ]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    ratios = []
    for text, back in pairs:
        low, high = sorted([luminance(text), luminance(back)])
        ratios.append((high + 0.05) / (low + 0.05))
    return min(ratios)


def test_by_keyboard(view: View, tmp_path: Path) -> None:
    recorded.write(tmp_path, *recorded.synchronous(6, 50))
    with serving(tmp_path) as server:
        view.open(server.url)
        view.until(lambda: view.page.locator(".tile").count() == 6)
        assert view.page.locator('.tile[tabindex="0"]').count() == 1
        view.tile(0).focus()
        view.page.keyboard.press("ArrowRight")
        view.page.keyboard.press("ArrowRight")
        view.page.keyboard.press("Enter")
        assert view.page.locator("#detail").inner_text().startswith("rank 2: working")
        view.page.locator("canvas").first.focus()
        view.page.keyboard.press("Home")
        view.until(lambda: "step 0" in view.page.locator(".readout").first.inner_text())
        first = view.page.locator("canvas").first
        assert "step 0" in first.get_attribute("aria-label")


# --- real runs ----------------------------------------------------------------------------------


@pytest.mark.whole
def test_a_real_rank_that_is_killed_turns_red(view: View, task_file: Path) -> None:
    with Running(task_file, workers=2) as run, serving(run.folder) as server:
        view.open(server.url)
        view.until(lambda: "in step" in view.tile(1).inner_text(), 30)
        os.kill(run.workers[1], signal.SIGKILL)
        view.until(lambda: is_red(view.colour(1)), 10)
        assert view.status() == "failed"
        assert view.condition(0) == "stopped"
        run.end(30)


@pytest.mark.whole
def test_a_real_run_with_its_page(view: View, task_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = [SCRIPTS / "wagontrain", "run", f"{task_file}:slow", "--workers", "2", "--strategy",
             "data-parallel", "--run-dir", run, "--steps", "120", "--dashboard"]  # fmt: skip
    process = Fork(words, tmp_path, clean_environment())
    with serving(run) as server:
        view.open(server.url)
        view.until(lambda: view.status() == "ended", 90)
        out, _ = process.communicate(30)
    assert process.returncode == 0
    assert "live page: http://127.0.0.1:" in out
    assert len(events_of(run, "workers")) >= 2
    assert view.page.locator(".tile").count() == 2


@pytest.mark.whole
def test_a_real_worker_of_a_crew_is_killed_and_replaced(
    view: View, task_file: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    words = [SCRIPTS / "wagontrain", "run", f"{task_file}:slow", "--workers", "2", "--strategy",
             "parameter-server", "--run-dir", run, "--steps", "500"]  # fmt: skip
    process = Fork(words, tmp_path, clean_environment(), starts=8)
    with serving(run) as server:
        view.open(server.url)
        view.until(lambda: view.page.locator(".tile").count() == 2, 60)
        view.until(lambda: view.figure("step") > 20, 60)
        first = events_of(run, "joined")[0]
        os.kill(first["process"], signal.SIGKILL)
        view.until(lambda: is_red(view.colour(first["worker"])), 10)
        assert "was killed by SIGKILL" in view.page.locator("#troubles").inner_text()
        view.until(lambda: view.page.locator(".tile").count() == 3, 60)
        assert view.page.locator("#shards tbody tr").count() == 1
        view.until(lambda: view.condition(3) == "working", 30)
        process.send_signal(signal.SIGINT)
        process.communicate(30)
        view.until(lambda: view.status() == "failed")
