"""What is kept of a run: bytes, speeds and leases."""

from __future__ import annotations

from pathlib import Path

import pytest

import wagontrain as wt
from tests.servers import counting
from tests.servers.crews import Threads
from wagontrain import events
from wagontrain.servers.commands import Give
from wagontrain.servers.messages import Done
from wagontrain.servers.observing import Member


def test_bytes_pushes_and_leases_are_told(tmp_path: Path) -> None:
    """Two events a second apart, of a worker whose signs of life come between its pushes."""
    run = Threads(counting.task(1), wt.make_strategy("parameter-server"), 1, tmp_path / "run")
    record, decide, fleet = run.record, run.coordinator.decisions, run.coordinator.fleet
    member = Member(1, b"", "here", 1, 0.0)
    record._began -= 1000.0
    record._last -= 1000.0
    record.noted("joined", {"worker": 1, "host": "here", "process": 1})
    decide.joined(1)
    began, _, _ = record._told
    for number in range(2):
        (lease,) = [each.lease for each in decide.asked(1) if isinstance(each, Give)]
        member.sent = 100 * (number + 1)
        record.seen(member)  # while it pushes: these bytes are the same as those of the push
        size = lease.stop - lease.start
        done = Done(
            1, number, (lease.number,), lease.version, 1.0, size, 1.0, 0.5, 100 * (number + 1)
        )
        record.pushed(done)
        decide.done(done)
    decide.asked(1)
    record.looked([member], fleet, began + 0.5)
    record._signs._due = 0.0
    record.looked([member], fleet, began + 1.5)
    told = record.summary(1)
    run.events.close()
    run.network.close()
    first, second = [
        event for event, _ in events.read(run.folder.events) if event["kind"] == "workers"
    ]
    assert first["work"] == {"1": [2, 2 * counting.BATCH, 0.5, 200]}
    assert first["leases"] == {"given": 3, "again": 0, "out": 1, "waiting": 0}
    assert (first["pushes_per_second"], first["bytes_per_second"]) == (4.0, 400)
    assert (second["pushes_per_second"], second["bytes_per_second"]) == (0.0, 0)
    assert told["bytes_sent_per_rank"] == [200]
    assert told["leases"] == first["leases"]
    assert told["workers"][1]["samples_per_second"] == 2 * counting.BATCH
    assert told["seconds"] > 1000.0
    assert told["pushes_per_second"] > 0.1  # starting processes is not training
    assert told["bytes_per_second"] == pytest.approx(100 * told["pushes_per_second"])
