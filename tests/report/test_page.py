"""The page says what the files say, takes nothing from them for markup, and needs no network."""

from __future__ import annotations

import html
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import plotly.graph_objects
import pytest
from plotly.offline import get_plotlyjs

from tests.report.made import (
    BEGAN,
    CREW_SUMMARY,
    START,
    SUMMARY,
    candidate,
    crew,
    plan,
    run_directory,
    step,
    times,
    usual,
    validation,
    whole,
)
from wagontrain.report import page
from wagontrain.report.reading import read_run


class Parsed(HTMLParser):
    """The tables of a page, its text, its scripts and its figures."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.rows: list[list[str]] = []
        self.scripts: list[str] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        self.figures: dict[str, Any] = json.loads(self.scripts[0])

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag in ("script", "style", "td", "th"):
            self._open.append(tag)
        if tag == "script":
            self.scripts.append("")
        elif tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        if self._open and tag == self._open[-1]:
            self._open.pop()

    def handle_data(self, data: str) -> None:
        inside = self._open[-1] if self._open else ""
        if inside == "script":
            self.scripts[-1] += data
        elif inside in ("td", "th"):
            self.rows[-1][-1] += data
        if inside not in ("script", "style"):
            self.text += data

    def row(self, name: str) -> list[str]:
        return next(row[1:] for row in self.rows if row and row[0] == name)

    def traces(self, name: str) -> list[dict[str, Any]]:
        return [
            trace
            for figure in self.figures.values()
            for trace in figure["data"]
            if trace.get("name") == name
        ]


def parsed(*folders: Path) -> Parsed:
    found = Parsed(page.render([read_run(folder) for folder in folders]))
    for figure in found.figures.values():  # refuses what plotly does not know
        for layout in (figure["layout"], {**figure["layout"], **figure["narrow"]}):
            told = json.dumps({"data": figure["data"], "layout": layout})
            told = re.sub(r'"@[a-z0-9-]+"', '"#123456"', told)
            plotly.graph_objects.Figure(json.loads(told))
    return found


def test_the_figures_of_the_summary_are_on_the_page(tmp_path: Path) -> None:
    found = parsed(whole(tmp_path / "run"))
    assert found.row("samples/s") == ["25", "–", "19", "-24 %"]
    assert found.row("time of a step") == ["320 ms", "360 ms", "400 ms", "+25 %"]
    assert found.row("sent in a step, by who sends most") == ["900 B", "–", "950 B", "+6 %"]
    assert found.row("memory at the peak, of who takes most") == [
        "110.0 MB", "–", "123.0 MB", "+12 %",
    ]  # fmt: skip
    assert found.row("rank 0")[:2] == ["one", "6.0 s"]
    assert SUMMARY["straggler"] in found.text
    assert "Ended after 20 steps and 10.2 s." in found.text
    assert "0.1235" in found.text  # training loss
    assert found.row("hybrid")[0] == "480 ms"
    assert "1.5× as long: reasons; would win below 0.6 Gbit/s" in found.text


def test_where_the_time_goes_is_that_of_the_slowest_rank(tmp_path: Path) -> None:
    found = parsed(whole(tmp_path / "run"))
    assert found.row("of it computing")[2] == "210 ms"  # the mean of 0.201 to 0.219
    assert found.row("of it exchange that nothing hides")[2] == "50 ms"


def test_the_curves_are_those_of_the_events(tmp_path: Path) -> None:
    found = parsed(whole(tmp_path / "run"))
    by_samples, by_time = found.traces("training")
    assert by_samples["y"] == by_time["y"] == [2.0 / (number + 1) for number in range(20)]
    assert by_samples["x"][9:11] == [76, 84]
    assert by_time["x"] == pytest.approx([0.5 * (number + 1) for number in range(20)])
    assert found.traces("validation")[0]["y"] == [0.1, 0.05]
    joined = found.traces("checkpoint")
    assert joined[0]["x"] == pytest.approx([5.06, 10.06])


def test_the_step_is_drawn_as_predicted_and_as_measured(tmp_path: Path) -> None:
    found = parsed(whole(tmp_path / "run"))
    foretold, measured = found.traces("compute")
    assert foretold["x"] == pytest.approx([100, 150])  # milliseconds
    assert foretold["base"] == pytest.approx([0, 100])
    assert measured["x"] == pytest.approx([210, 100])
    assert measured["base"] == pytest.approx([100, 110])  # after the data
    (waiting,) = found.traces("waiting")
    assert (waiting["x"], waiting["base"]) == ([pytest.approx(100)], [pytest.approx(210)])
    _, exchange = found.traces("exchange")
    assert [base + x for base, x in zip(exchange["base"], exchange["x"], strict=True)] == (
        pytest.approx([360, 360])  # they end together
    )


def test_step_times_by_bandwidth_with_the_own_network(tmp_path: Path) -> None:
    found = parsed(whole(tmp_path / "run"))
    (own,) = found.traces("data-parallel")
    assert own["x"] == pytest.approx([0.2, 1, 5])
    assert own["y"] == pytest.approx([900, 320, 270])
    assert "your network: 1 Gbit/s" in json.dumps(found.figures)
    (turn,) = found.traces("the quickest changes")
    assert 0.2 < turn["x"][0] < 1


def test_a_run_that_crashed_has_a_page(tmp_path: Path) -> None:
    failed = {"kind": "failed", "time": BEGAN + 4, "message": "LossError: not finite"}
    found = parsed(run_directory(tmp_path / "run", [*usual(7), failed], tail='{"kind": "st'))
    assert "Failed after 7 steps and 4.0 s: LossError: not finite" in found.text
    assert "was not written to its end" in found.text
    assert found.row("samples/s") == ["20"]  # 8 samples in 0.4 s
    assert found.row("rank 0")[0] == "–"  # no host is known


def test_why_a_run_was_stopped_is_said(tmp_path: Path) -> None:
    stopped = {"kind": "stopped", "time": BEGAN + 10, "step": 20, "reason": "no better"}
    folder = run_directory(
        tmp_path / "run", [*usual(), stopped], SUMMARY | {"stopped": "no better"}
    )
    found = parsed(folder)
    assert "Ended after 20 steps and 10.2 s: no better" in found.text
    assert "training stops after 20 steps: no better" in found.row("10.0 s")


def test_a_run_of_which_nothing_is_known_has_a_page(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_text("")
    assert "No end is recorded" in parsed(tmp_path).text


def test_a_parameter_server(tmp_path: Path) -> None:
    found = parsed(crew(tmp_path / "run"))
    bars = next(
        trace for figure in found.figures.values() for trace in figure["data"]
        if trace["type"] == "bar"
    )  # fmt: skip
    told = CREW_SUMMARY["staleness"]["histogram"]
    assert {str(x): y for x, y in zip(bars["x"], bars["y"], strict=True)} == told
    assert found.row("worker 2") == ["9", "64", "43 ms", "0"]
    (left,) = found.traces("leaves")
    assert (left["x"], left["marker"]["color"]) == ([pytest.approx(6.6)], ["@bad"])
    assert any("killed by SIGKILL" in cell for row in found.rows for cell in row)
    assert "relaxed" in found.text
    assert "Bytes are all that was sent, over the number of steps." in found.text


def test_staleness_of_a_crew_that_crashed_is_counted_from_its_updates(tmp_path: Path) -> None:
    events = [START, *(step(number, number, staleness=number % 2) for number in range(5))]
    found = parsed(run_directory(tmp_path / "run", events))
    bars = next(
        trace for figure in found.figures.values() for trace in figure["data"]
        if trace["type"] == "bar"
    )  # fmt: skip
    assert (bars["x"], bars["y"]) == ([0, 1], [3, 2])


def test_several_runs_side_by_side(tmp_path: Path) -> None:
    folders = [whole(tmp_path / "first"), crew(tmp_path / "second")]
    found = parsed(*folders)
    assert found.row("strategy") == ["data-parallel", "parameter-server"]
    assert found.row("samples/s") == ["19", "19"]
    assert found.row("samples/s predicted") == ["25", "–"]
    assert found.row("validation accuracy") == ["0.5", "0.5"]
    first, second = (found.traces(name)[0] for name in ("first", "second"))
    assert first["line"]["color"] != second["line"]["color"]
    assert first["y"] == [2.0 / (number + 1) for number in range(20)]


EVIL = "<script>alert(1)</script><b onclick='x'>&\"'@accent %{x}"


def evil(folder: Path) -> Path:
    start = START | {"strategy": EVIL, "settings": {EVIL: EVIL}, "hosts": [EVIL, "b"],
                     "device": EVIL, "world_size": 2}  # fmt: skip
    summary = SUMMARY | {
        "strategy": EVIL, "straggler": EVIL, "validation": {EVIL: 0.5}, "versions": {EVIL: EVIL},
        "times_per_rank": [row | {"host": EVIL} for row in SUMMARY["times_per_rank"]],
    }  # fmt: skip
    planned = plan(
        strategy=EVIL, notes=[EVIL], chosen=candidate(EVIL, 0.3, title=EVIL),
        others=[candidate(EVIL, 0.5, title=EVIL, why=EVIL, flip=EVIL)],
        timeline=[{"label": EVIL, "rank": 0, "resource": "device", "start": 0.0, "seconds": 0.1}],
        curves=[{"strategy": EVIL, "title": EVIL, "points": [[1e9, 1.0], [2e9, 0.5]]}],
    )  # fmt: skip
    events = [
        start, step(0, 0.5), times(0, 0.6), validation(1, 0.7, **{EVIL: 0.5}),
        {"kind": EVIL, "time": BEGAN + 1, EVIL: EVIL},
        {"kind": "left", "time": BEGAN + 2, "why": EVIL, "worker": EVIL},
        {"kind": "failed", "time": BEGAN + 3, "message": EVIL},
    ]  # fmt: skip
    made = run_directory(folder, events, summary, planned)
    (made / "logs" / "rank1.traceback").write_text(EVIL)
    return made


@pytest.mark.parametrize("count", [1, 2])
def test_nothing_from_files_is_markup(tmp_path: Path, count: int) -> None:
    folders = [evil(tmp_path / f"run{number}<i>") for number in range(count)]
    text = page.render([read_run(folder) for folder in folders])
    own = text.replace(get_plotlyjs(), "")
    assert "<script>alert" not in own
    assert "<i>" not in own
    found = parsed(*folders)
    assert found.tags.count("script") == 3  # the figures, plotly, and the page's own
    assert not any(name.startswith("on") for name, _ in found.attributes)
    assert EVIL in found.text  # it is there to read
    # Plotly takes tags in labels, and in texts that are put into them.
    drawn = json.dumps(found.figures)
    assert html.escape(EVIL, quote=False).replace('"', '\\"') in drawn
    assert "<script" not in drawn
    assert "<b onclick" not in drawn


def test_the_failure_is_escaped_too(tmp_path: Path) -> None:
    failed = {"kind": "failed", "time": BEGAN + 3, "message": EVIL}
    found = parsed(run_directory(tmp_path / "run", [START, failed]))
    assert EVIL in found.text
    assert found.tags.count("script") == 3


def test_the_page_needs_no_network_and_has_plotly_once(tmp_path: Path) -> None:
    text = page.render([read_run(whole(tmp_path / "run"))])
    script = get_plotlyjs()
    assert text.count(script) == 1
    found = Parsed(text)
    assert not {"link", "img", "iframe", "object", "embed"} & set(found.tags)
    assert not {"src", "href", "action"} & {name for name, _ in found.attributes}
    assert not re.search(r"https?://|@import|url\(", text.replace(script, ""))


def test_a_long_run_makes_no_long_page(tmp_path: Path) -> None:
    def events() -> Any:
        yield START
        for number in range(30_000):
            yield step(number, 0.5 * number, loss=1 + number % 7)
            if number % 10 == 9:
                yield validation(number, 0.5 * number, loss=1.0, accuracy=0.5)

    text = page.render([read_run(run_directory(tmp_path / "run", events()))])
    assert len(text) - len(get_plotlyjs()) < 500_000
    curve = Parsed(text).traces("training")[0]
    assert len(curve["x"]) == 1000
    band = Parsed(text).traces("greatest")[0]
    assert max(band["y"]) == 7  # none of the extremes is lost


def test_what_is_not_finite_is_said_and_not_drawn(tmp_path: Path) -> None:
    events = [START, step(0, 0.5), step(1, 1.0, loss=float("inf")), step(2, 1.5)]
    found = parsed(run_directory(tmp_path / "run", events))
    assert found.traces("training")[0]["x"] == [8, 24]
    assert "1 losses are not finite, and are not drawn." in found.text


def test_many_ranks_are_not_all_drawn(tmp_path: Path) -> None:
    many = [0.1 + 0.001 * rank for rank in range(1000)]
    told = times(0, 0.5, compute=many, waiting=[0.0] * 1000, data=[0.0] * 1000)
    found = parsed(run_directory(tmp_path / "run", [START, step(0, 0.4), told]))
    (bars,) = found.traces("compute")
    assert len(bars["x"]) == 16
    assert max(bars["x"]) == pytest.approx(1.099)
    assert "980 quicker ones are not listed" in found.text


def test_a_page_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    run = read_run(whole(tmp_path / "run"))
    page.write([run], tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == page.render([run])
    with pytest.raises(page.UsageError, match="cannot be written"):
        page.write([run], tmp_path / "nowhere" / "report.html")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "run"]
