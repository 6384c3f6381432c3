"""Every event that happens is told in words, wherever it is shown."""

from __future__ import annotations

import re

import pytest

from wagontrain import events
from wagontrain.sentences import FIGURES, LONGEST, OWN_WILL, is_trouble, sentence

TOLD: list[tuple[dict[str, object], str, bool]] = [
    ({"kind": "start", "strategy": "hybrid", "world_size": 1},
     "training begins: hybrid over 1 worker", False),
    ({"kind": "validation", "epoch": 0, "step": 9, "values": {"loss": 0.5, "accuracy": 1}},
     "epoch 1: validation loss 0.5000, accuracy 1.0000", False),
    ({"kind": "checkpoint", "step": 9}, "checkpoint after 9 steps", False),
    ({"kind": "stopped", "step": 9, "reason": "no better"},
     "training stops after 9 steps: no better", False),
    ({"kind": "end", "summary": {"steps": 9}}, "training has ended after 9 steps", False),
    ({"kind": "failed", "message": "LossError: nan"}, "training failed: LossError: nan", True),
    ({"kind": "failed", "message": "KeyboardInterrupt: "},
     "training failed: stopped by Ctrl-C", True),
    ({"kind": "joined", "worker": 3, "host": "anna", "process": 7, "device": "cpu"},
     "worker 3 joined, on anna (process 7)", False),
    ({"kind": "left", "worker": 3, "host": "anna", "process": 7, "why": "was killed by SIGKILL",
      "doing": "in lease 5"},
     "worker 3 on anna is gone: was killed by SIGKILL while in lease 5", True),
    ({"kind": "left", "worker": 3, "host": "anna", "process": 7, "why": OWN_WILL, "doing": ""},
     "worker 3 on anna is gone: left of its own will", False),
    ({"kind": "lost", "worker": 3, "leases": [4]},
     "what worker 3 had in hand goes to others: 1 batch", True),
    ({"kind": "lost", "worker": 3, "leases": []}, "worker 3 had nothing in hand", False),
    ({"kind": "restarted", "what": "worker 0", "process": 7, "why": "was killed by SIGKILL"},
     "process 7 (worker 0 of those started) was killed by SIGKILL; another begins", True),
    ({"kind": "shard_restarted", "shard": 1, "version": 40},
     "server shard 1 is back, with update 40", False),
    ({"kind": "shard_placed", "shard": 1, "host": "anna", "process": 7},
     "server shard 1 is to be on anna", False),
    ({"kind": "shard_lost", "shard": 1, "host": "anna", "why": "nothing heard for 30 s"},
     "server shard 1 on anna is lost: nothing heard for 30 s", True),
    ({"kind": "dropped", "worker": 3, "sequence": 1, "reason": "late", "leases": [4]},
     "a gradient of worker 3 does not count: late", False),
    ({"kind": "mislaid", "pushes": [[3, 1], [3, 2]]},
     "a server shard has lost 2 gradients, computed once more", True),
    ({"kind": "again", "worker": 3, "lease": 4, "epoch": 0, "step": 9, "purpose": "train"},
     "worker 3 takes over work of step 9", False),
    ({"kind": "spoiled", "worker": 3, "lease": 4, "of": "step 9", "reason": "not finite"},
     "worker 3 has no gradient: not finite", True),
    ({"kind": "too_far", "step": 9, "reason": "not finite"},
     "a trial step after 9 steps went too far: not finite", True),
    ({"kind": "refused", "reason": "no such worker"}, "somebody was refused: no such worker", True),
    ({"kind": "of_tomorrow", "time": 1.0, "worker": 3}, "of tomorrow: worker 3", False),
]  # fmt: skip


@pytest.mark.parametrize(("event", "words", "trouble"), TOLD)
def test_an_event_is_told(event: dict[str, object], words: str, trouble: bool) -> None:
    assert (sentence(event), is_trouble(event)) == (words, trouble)


def test_every_kind_that_the_package_lists_is_known() -> None:
    rows = re.findall(r"^\| ([a-z][a-z_, ]*) \|", events.__doc__ or "", re.MULTILINE)
    listed = {kind for row in rows for kind in row.strip().split(", ")} - {"kind"}
    assert len(listed) > 15
    assert listed - FIGURES == {event["kind"] for event, _, _ in TOLD} - {"of_tomorrow"}


def test_what_a_file_says_is_no_template_and_has_an_end() -> None:
    assert sentence({"kind": "refused", "reason": "{kind}"}) == "somebody was refused: {kind}"
    assert len(sentence({"kind": "refused", "reason": "x" * 9999})) == LONGEST
    assert len(sentence({"kind": "odd", **{f"{n}": "x" * 99 for n in range(99)}})) == LONGEST
