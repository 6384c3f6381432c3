"""The simulator: every law that a timeline has to obey, whatever strategy the step is of."""

from __future__ import annotations

import itertools
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wagontrain.simulate import Graph, Interference, Resource, Shares, Timeline, simulate


def busy(timeline: Timeline) -> dict[Resource, float]:
    """Seconds of work that each resource has, undisturbed."""
    found: dict[Resource, float] = {}
    for operation in timeline.graph.operations:
        for resource in operation.resources:
            found[resource] = found.get(resource, 0.0) + operation.seconds
    return found


def longest_path(graph: Graph) -> float:
    """Seconds of the longest chain of operations that wait for each other."""
    ends: list[float] = []
    for operation in graph.operations:
        start = max((ends[other] for other in operation.after), default=0.0)
        ends.append(start + operation.seconds)
    return max(ends, default=0.0)


def test_an_empty_step_takes_no_time() -> None:
    assert simulate(Graph()).seconds == 0


def test_what_waits_for_nothing_overlaps() -> None:
    graph = Graph()
    first = graph.compute("forward", 2.0, 0)
    graph.exchange("sum", 3.0, [0], [first], sent=7.0)
    graph.compute("backward", 4.0, 0, [first])
    timeline = simulate(graph)
    assert timeline.seconds == 6.0
    assert timeline.spans[1] == (2.0, 5.0)
    shares = timeline.shares(0)
    assert (shares.compute, shares.exposed, shares.waiting) == (6.0, 0.0, 0.0)


def test_what_is_exposed_and_what_is_waiting() -> None:
    graph = Graph()
    slow = graph.compute("slow", 5.0, 1)
    quick = graph.compute("quick", 1.0, 0)
    graph.exchange("sum", 2.0, [0, 1], [slow, quick], sent=1.0)
    timeline = simulate(graph)
    assert timeline.seconds == 7.0
    assert timeline.shares(0) == Shares(1.0, 2.0, 4.0, 7.0)
    assert timeline.shares(1) == Shares(5.0, 2.0, 0.0, 7.0)
    assert timeline.shares(2) == Shares(0.0, 0.0, 7.0, 7.0)


def test_a_resource_does_one_thing_at_a_time_in_the_graphs_order() -> None:
    graph = Graph()
    for label in "abc":
        graph.compute(label, 1.0, 0)
    graph.compute("elsewhere", 1.0, 1)
    timeline = simulate(graph)
    assert [span.start for span in timeline.spans] == [0.0, 1.0, 2.0, 0.0]


def test_two_that_become_ready_at_once_begin_in_the_graphs_order() -> None:
    graph = Graph()
    one, other = graph.compute("one", 1.0, 1), graph.compute("other", 1.0, 2)
    graph.compute("first", 1.0, 0, [other])
    graph.compute("second", 1.0, 0, [one])
    timeline = simulate(graph)
    assert timeline.spans[2] == (1.0, 2.0)
    assert timeline.spans[3] == (2.0, 3.0)


def test_sends_that_share_a_link_queue() -> None:
    graph = Graph()
    for source in (1, 2, 3):
        graph.send("push", 1.0, source, 0, [], sent=10.0)
    graph.send("push", 1.0, 4, 5, [], sent=10.0)
    timeline = simulate(graph)
    assert timeline.seconds == 3.0
    assert timeline.spans[3].end == 1.0


def test_a_server_serves_one_after_the_other() -> None:
    graph = Graph()
    for worker in range(4):
        pushed = graph.send("push", 0.5, worker, 100 + worker, [], sent=1.0)
        graph.serve("apply", 2.0, 0, [pushed])
    assert simulate(graph).seconds == 0.5 + 4 * 2.0


@pytest.mark.parametrize("stages", [1, 2, 3, 8])
@pytest.mark.parametrize("count", [1, 2, 5, 32])
def test_the_bubble_of_gpipe(stages: int, count: int) -> None:
    """(p - 1) / (m + p - 1) of a step, with p equal stages and m micro-batches (GPipe, 2.3)."""
    graph = Graph()
    last: dict[int, list[int]] = {stage: [] for stage in range(stages)}
    for order, seconds in ((range(stages), 1.0), (range(stages)[::-1], 2.0)):
        for _ in range(count):
            before: list[int] = []
            for stage in order:
                done = graph.compute("pass", seconds, stage, [*last[stage], *before])
                last[stage] = before = [done]
    timeline = simulate(graph)
    assert timeline.seconds == 3.0 * (count + stages - 1)
    for stage in range(stages):
        idle = timeline.shares(stage).waiting / timeline.seconds
        assert idle == pytest.approx((stages - 1) / (count + stages - 1))


def test_interference_slows_both_while_they_overlap() -> None:
    graph = Graph()
    graph.compute("backward", 4.0, 0)
    graph.exchange("sum", 1.0, [0], [], sent=1.0)
    timeline = simulate(graph, {0: Interference(compute=1.5, exchange=3.0)})
    # The exchange takes 3 s, in which 2 s of computing are done; the other 2 s are undisturbed.
    assert timeline.spans[1].end == pytest.approx(3.0)
    assert timeline.seconds == pytest.approx(5.0)


def test_interference_begins_and_ends_in_the_middle() -> None:
    graph = Graph()
    first = graph.compute("forward", 1.0, 0)
    graph.compute("backward", 2.0, 0, [first])
    wait = graph.compute("elsewhere", 2.0, 1)
    graph.send("on", 2.0, 0, 1, [wait], sent=1.0)
    timeline = simulate(graph, {rank: Interference(2.0, 2.0) for rank in (0, 1)})
    # At 2 s half of "backward" is left: 1 s becomes 2. "On" has done 1 s of 2 by then.
    assert timeline.spans[1].end == pytest.approx(4.0)
    assert timeline.spans[3].end == pytest.approx(5.0)


def test_others_are_not_slowed() -> None:
    graph = Graph()
    graph.compute("backward", 4.0, 0)
    graph.exchange("sum", 2.0, [1], [], sent=1.0)
    graph.serve("apply", 3.0, 0)
    timeline = simulate(graph, {rank: Interference(2.0, 2.0) for rank in (0, 1)})
    assert [span.end for span in timeline.spans] == [4.0, 2.0, 3.0]


def test_interference_of_every_rank_is_needed() -> None:
    graph = Graph()
    graph.exchange("sum", 1.0, [0, 3], [], sent=1.0)
    with pytest.raises(ValueError, match="no interference of rank 3"):
        simulate(graph, {0: Interference()})


def test_bytes_are_counted_where_they_leave() -> None:
    graph = Graph()
    graph.exchange("sum", 1.0, [0, 1], [], sent=3.0)
    graph.send("on", 1.0, 1, 2, [], sent=4.0)
    assert [graph.sent_by(rank) for rank in range(4)] == [3.0, 7.0, 0.0, 0.0]


def test_what_cannot_be_is_refused() -> None:
    graph = Graph()
    with pytest.raises(ValueError, match="'a' takes -1"):
        graph.compute("a", -1.0, 0)
    with pytest.raises(ValueError, match="'b' takes nan"):
        graph.compute("b", float("nan"), 0)
    with pytest.raises(ValueError, match="'c' waits for what is not there yet"):
        graph.compute("c", 1.0, 0, [0])


def test_what_computes_alone_is_quicker_on_crowded_cores() -> None:
    graph = Graph()
    first = graph.compute("first stage", 4.0, 0)
    graph.compute("second stage", 4.0, 1, [first])
    crowded = Interference(crowded=2.0)
    assert simulate(graph, dict.fromkeys(range(2), crowded)).seconds == pytest.approx(4.0)
    # All at once: what operations take is told for that.
    graph = Graph()
    for rank in range(3):
        graph.compute("forward", 4.0, rank)
    assert simulate(graph, dict.fromkeys(range(3), crowded)).seconds == 4.0
    # One that ends early makes it quicker for the others, by half of what being alone does.
    graph = Graph()
    for rank, seconds in enumerate((1.0, 4.0, 4.0)):
        graph.compute("forward", seconds, rank)
    timeline = simulate(graph, dict.fromkeys(range(3), crowded))
    assert timeline.seconds == pytest.approx(1.0 + 3.0 * 0.75)


def test_one_that_stands_for_all_is_never_alone() -> None:
    graph = Graph()
    graph.compute("forward", 4.0, 0)
    assert simulate(graph, {0: Interference(crowded=2.0)}).seconds == 4.0


@st.composite
def graphs(draw: st.DrawFn) -> Graph:
    graph = Graph()
    ranks = st.integers(0, 3)
    for number in range(draw(st.integers(1, 25))):
        after = draw(st.sets(st.integers(0, number - 1), max_size=3)) if number else set()
        seconds = draw(st.integers(0, 8)) / 4
        match draw(st.sampled_from(["compute", "exchange", "send", "serve"])):
            case "compute":
                graph.compute("c", seconds, draw(ranks), after)
            case "exchange":
                members = draw(st.sets(ranks, min_size=1))
                graph.exchange("x", seconds, sorted(members), after, sent=1.0)
            case "send":
                graph.send("s", seconds, draw(ranks), 4 + draw(ranks), after, sent=1.0)
            case "serve":
                graph.serve("a", seconds, draw(ranks), after)
    return graph


FACTORS = st.integers(4, 12).map(lambda number: number / 4)


@settings(max_examples=150, deadline=None)
@given(graphs(), st.lists(st.tuples(FACTORS, FACTORS), min_size=8, max_size=8))
def test_laws_of_every_timeline(graph: Graph, slowed: list[tuple[float, float]]) -> None:
    interference = {rank: Interference(*each) for rank, each in enumerate(slowed)}
    plain, disturbed = simulate(graph), simulate(graph, interference)
    for timeline in (plain, disturbed):
        tolerance = 1e-9 * (1 + timeline.seconds)
        assert timeline.seconds >= longest_path(graph) - tolerance
        assert timeline.seconds >= max(busy(timeline).values(), default=0.0) - tolerance
        holders: dict[Resource, list[tuple[float, float]]] = {}
        for operation, span in zip(graph.operations, timeline.spans, strict=True):
            assert span.end - span.start >= operation.seconds - tolerance
            for other in operation.after:
                assert span.start >= timeline.spans[other].end
            for resource in operation.resources:
                holders.setdefault(resource, []).append(span)
        for spans in holders.values():
            spans.sort()
            assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans))
        for rank in range(8):
            shares = timeline.shares(rank)
            parts = (shares.compute, shares.exposed, shares.waiting)
            assert sum(parts) == pytest.approx(shares.total)
            assert min(parts) >= -tolerance
    for operation, span in zip(graph.operations, plain.spans, strict=True):
        assert span.end == span.start + operation.seconds
    most = max(max(each) for each in slowed)
    for operation, span in zip(graph.operations, disturbed.spans, strict=True):
        assert span.end - span.start <= operation.seconds * most + 1e-6
    assert simulate(graph).spans == plain.spans
    assert simulate(graph, interference).spans == disturbed.spans


@settings(max_examples=50, deadline=None)
@given(graphs())
def test_no_interference_is_interference_of_one(graph: Graph) -> None:
    graph.compute("alone", 0.25, 99)
    interference = dict.fromkeys(range(8), Interference()) | {99: Interference(2.0, 2.0)}
    assert simulate(graph, interference).spans == simulate(graph).spans


def test_a_thousand_workers_at_servers_take_under_a_second() -> None:
    """1,000 workers compute, push to 16 shards and fetch from them: 49,000 operations."""
    graph = Graph()
    for worker in range(1000):
        done = graph.compute("gradient", 1.0, worker)
        for shard in range(16):
            pushed = graph.send("push", 1e-3, worker, 1000 + shard, [done], sent=1.0)
            applied = graph.serve("apply", 1e-4, shard, [pushed])
            graph.send("fetch", 1e-3, 1000 + shard, worker, [applied], sent=1.0)
    began = time.perf_counter()
    timeline = simulate(graph)
    assert time.perf_counter() - began < 3.0  # a second, on a machine that others use
    assert timeline.seconds >= 1.0 + 1000 * 1e-3
