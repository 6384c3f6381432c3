"""Cluster files: what they say, what is wrong in them, and what follows for an exchange."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wagontrain.cluster import (
    KINDS,
    Cluster,
    Host,
    Kind,
    Measured,
    dump,
    find,
    load,
    scaled,
    shipped,
    traffic,
)
from wagontrain.errors import UsageError
from wagontrain.simulate import Interference

HOSTS = """
[[hosts]]
count = 2
workers = 1
device = "cpu"
memory_gb = 8
gflops = 100
compute_slowed = 1.1
exchange_slowed = 1.5
"""
LINKS = """
[between.all_reduce]
bandwidth_gbit = 1
latency_us = 100
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "cluster.toml"
    path.write_text(text)
    return path


def test_what_is_dumped_is_loaded(tmp_path: Path) -> None:
    links: dict[Kind, Measured] = {
        kind: Measured(((2, 1024, 0.125 * number), (4, 2**20, 0.25 * number)))
        for number, kind in enumerate(KINDS, 1)
    }
    cluster = Cluster(
        'a "name"',
        (
            Host(2, 3, "cpu", 8 * 10**9, 12.5, Interference(1.25, 1.5, 1.75)),
            Host(1, 1, "cuda", 80 * 10**9, 1e5),
        ),
        links,
        {"send": links["send"]},
    )
    assert load(written(tmp_path, dump(cluster))) == cluster


def test_a_link_with_one_pace(tmp_path: Path) -> None:
    cluster = load(written(tmp_path, HOSTS + LINKS))
    assert (cluster.name, cluster.size) == ("unnamed", 2)
    # A gigabit is 125 MB a second; of two ranks each sends the whole of what is summed once.
    assert cluster.seconds("all_reduce", 125e6, (0, 1)) == pytest.approx(1.0001)
    assert cluster.seconds("all_reduce", 1, (0, 1)) == pytest.approx(100e-6, rel=0.1)
    assert cluster.seconds("all_reduce", 125e6, (0,)) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("[[hosts]]", "[hosts]"), "there is no [[hosts]]: say what machines there are"),
        (("count = 2", "count = 0"), "number 1 says count = 0: give a whole number from 1"),
        (("count = 2", "count = true"), "says count = True: give a whole number from 1"),
        (("count = 2", "count = 2.5"), "says count = 2.5: give a whole number from 1"),
        (("workers = 1", ""), "[[hosts]] number 1 does not say workers"),
        (("workers = 1", "workers = 2\ncrowded = 1.5"), "and no [within.all_reduce]"),
        (("workers = 1", "workers = 2"), "[[hosts]] number 1 does not say crowded"),
        (
            ("workers = 1", "workers = 1\ncrowded = 0.5"),
            "crowded = 0.5: give a number of 1 or more",
        ),
        (('device = "cpu"', ""), "does not say device"),
        (("memory_gb = 8", "memory_gb = 0"), "says memory_gb = 0: give a number above 0"),
        (("memory_gb = 8", "memory_gb = inf"), "says memory_gb = inf: give a number above 0"),
        (("gflops = 100", 'gflops = "quick"'), "says gflops = 'quick': give a number above 0"),
        (("gflops = 100", "gflops = nan"), "says gflops = nan: give a number above 0"),
        (("gflops = 100", "gflop = 100"), "has 'gflop': did you mean 'gflops'?"),
        (("slowed = 1.1", "slowed = 0.9"), "compute_slowed = 0.9: give a number of 1 or more"),
        (("exchange_slowed = 1.5", ""), "does not say exchange_slowed"),
        (("[between.all_reduce]", "[betwen.all_reduce]"), "has 'betwen': did you mean 'between'?"),
        (("[between.all_reduce]", "[between.all_reduced]"), "is no kind of exchange: did you mean"),
        (("[between.all_reduce]", "[within.all_reduce]"), "several hosts, and no [between."),
        (("latency_us = 100", ""), "[between.all_reduce] does not say latency_us"),
        (("latency_us = 100", "latency_us = 0"), "latency_us = 0: give a number above 0"),
        (("bandwidth_gbit = 1", "bandwidth = 1"), "has 'bandwidth': did you mean 'bandwidth_gbit'"),
        (("bandwidth_gbit = 1\nlatency_us = 100", "points = []"), "has no points: give rows of"),
        (
            ("bandwidth_gbit = 1\nlatency_us = 100", "points = [[1, 2, 3]]"),
            "[1, 2, 3] is no [ranks, bytes, seconds] with 2 ranks or more",
        ),
        (
            ("bandwidth_gbit = 1\nlatency_us = 100", "points = [[2, 1024, 0]]"),
            "[2, 1024, 0] is no [ranks, bytes, seconds]",
        ),
        (
            ("bandwidth_gbit = 1", "points = [[2, 1024, 1]]"),
            "[between.all_reduce] has 'latency_us': known: points",
        ),
        (
            (
                "[between.all_reduce]\nbandwidth_gbit = 1\nlatency_us = 100",
                "[between]\nall_reduce = 1",
            ),
            "[between.all_reduce] is no table",
        ),
        (("count = 2", "count = "), "Invalid value (at line 3"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(
    tmp_path: Path, change: tuple[str, str], message: str
) -> None:
    text = HOSTS + LINKS
    assert change[0] in text
    path = written(tmp_path, text.replace(*change, 1))
    with pytest.raises(UsageError) as caught:
        load(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read: No such file"):
        load(tmp_path / "none.toml")
    (tmp_path / "model.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="is no cluster file, for it is no text"):
        load(tmp_path / "model.toml")


def test_missing_figures_are_errors(tmp_path: Path) -> None:
    cluster = load(written(tmp_path, HOSTS + LINKS))
    with pytest.raises(UsageError, match=r"no figures for send between hosts.*\[between.send\]"):
        cluster.seconds("send", 1, (0, 1))


MEASURED = Measured(((2, 1000, 1.0), (2, 3000, 2.0), (8, 1000, 4.0), (8, 3000, 9.0)))


@pytest.mark.parametrize(
    ("ranks", "count", "seconds"),
    [
        (2, 0, 1.0),  # nothing is free
        (2, 1000, 1.0),
        (2, 2000, 1.5),
        (2, 3000, 2.0),
        (2, 6000, 4.0),
        (8, 2000, 6.5),
        (1, 10**9, 0.0),
    ],
)
def test_between_what_was_measured(ranks: int, count: int, seconds: float) -> None:
    assert MEASURED.seconds("all_reduce", ranks, count) == pytest.approx(seconds)


def test_numbers_of_ranks_that_were_not_measured() -> None:
    # 3 is nearest to 2: each sends 4 / 3 of the bytes instead of 1, in 2 rounds instead of one.
    assert MEASURED.seconds("all_reduce", 3, 1500) == pytest.approx(1.5 + 1.0)
    # 16 is nearest to 8; what a rank of 8 sends of 15/14 as much, and 8 rounds more than 7.
    count = 2000 * (14 / 8) / (30 / 16)
    assert MEASURED.seconds("all_reduce", 16, count) == pytest.approx(6.5 + 4.0 * 8 / 7)
    # 5 is nearest to 8, and its fewer rounds are not counted.
    assert MEASURED.seconds("all_reduce", 5, 1000 * 1.75 / 1.6) == pytest.approx(4.0)
    assert MEASURED.seconds("send", 64, 2000) == pytest.approx(6.5)


@given(
    st.sampled_from(KINDS),
    st.integers(2, 2000),
    st.floats(0, 1e10),
    st.floats(1, 10),
)
def test_more_bytes_never_take_less(kind: Kind, ranks: int, count: float, times: float) -> None:
    found = MEASURED.seconds(kind, ranks, count)
    assert found > 0
    assert MEASURED.seconds(kind, ranks, count * times) >= found * (1 - 1e-12)


def test_bytes_that_a_rank_sends() -> None:
    assert [traffic(kind, 4) for kind in ("all_reduce", "exchange", "broadcast", "send")] == [
        1.5, 0.75, 1.0, 1.0
    ]  # fmt: skip
    assert all(traffic(kind, 1) == 0 for kind in KINDS)


def test_workers_are_numbered_host_by_host() -> None:
    hosts = (Host(2, 3, "cpu", 1, 1.0), Host(1, 2, "cpu", 1, 2.0))
    cluster = Cluster("c", hosts)
    assert [cluster.node_of(rank) for rank in range(8)] == [0, 0, 0, 1, 1, 1, 2, 2]
    assert [cluster.host_of(rank).speed for rank in (0, 5, 6, 7)] == [1.0, 1.0, 2.0, 2.0]
    for rank in (-1, 8):
        with pytest.raises(IndexError):
            cluster.node_of(rank)


def test_groups_that_share_a_hosts_link() -> None:
    pace = Measured(((2, 1000, 1.0), (4, 1000, 1.0), (8, 1000, 1.0), (16, 1000, 1.0)))
    links: dict[Kind, Measured] = dict.fromkeys(KINDS, pace)
    cluster = Cluster("c", (Host(4, 4, "cuda", 1, 1.0),), links, links)

    def times(ranks: range, kind: Kind = "exchange") -> float:
        return cluster.seconds(kind, 1000, ranks) / 1.0

    assert times(range(16)) == 1
    assert times(range(8)) == 1  # two whole hosts
    assert times(range(0, 16, 4)) == 4  # one of each host: three more such groups
    assert times(range(0, 16, 2)) == 2
    assert times(range(4)) == 1  # within a host
    assert times(range(3, 5), "send") == 1  # only neighbours send across


def test_faster_links_keep_their_latency(tmp_path: Path) -> None:
    cluster = load(written(tmp_path, HOSTS + LINKS))
    faster = scaled(cluster, 10)
    assert faster.seconds("all_reduce", 125e6, (0, 1)) == pytest.approx(0.1, rel=0.01)
    assert faster.seconds("all_reduce", 1, (0, 1)) == cluster.seconds("all_reduce", 1, (0, 1))


@pytest.mark.parametrize("name", sorted(shipped()))
def test_shipped_clusters_have_every_figure(name: str) -> None:
    cluster = find(name)
    assert cluster.name == name
    last = cluster.size - 1
    for kind in KINDS:
        for ranks in ((0, 1), range(cluster.size), (0, last)):  # within a host, too
            small, large = (cluster.seconds(kind, count, ranks) for count in (1024, 2**30))
            assert 0 < small < large
    assert len({cluster.host_of(rank).device for rank in (0, last)}) == 1


def test_there_are_the_clusters_that_are_promised() -> None:
    assert set(shipped()) == {
        "8-workstations-1gbe", "4x8-a100", "1000-h100", "distbelief-2012", "krizhevsky-8-k20",
        "microsoft-8-k20x",
    }  # fmt: skip


def test_a_cluster_is_found_by_its_name_or_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert find("8-workstations-1gbe").size == 8
    own = written(tmp_path, HOSTS + LINKS)
    assert find(own).size == find("cluster.toml").size == 2
    (tmp_path / "4x8-a100").write_text(HOSTS + LINKS)
    assert find("4x8-a100").size == 2  # the own file of that name
    with pytest.raises(UsageError) as caught:
        find("8-workstation-1gbe")
    assert "there is no cluster '8-workstation-1gbe'" in str(caught.value)
    assert "did you mean '8-workstations-1gbe'?" in str(caught.value)
    with pytest.raises(UsageError, match="'mine.toml' cannot be read"):
        find("mine.toml")
