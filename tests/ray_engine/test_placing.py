from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("ray")

from wagontrain.ray_engine.leader import variables
from wagontrain.ray_engine.placing import members, spread
from wagontrain.ray_engine.rank import Where


def test_ranks_of_a_node_are_neighbours_and_see_its_gpus() -> None:
    where = [
        Where(node, f"host-{node}", f"10.0.0.{node}", gpus, {}, 1)
        for node, gpus in (("1", ["3"]), ("2", ["0"]), ("1", ["1"]))
    ]
    found = members(["a", "b", "c"], where)
    assert [member.actor for member in found] == ["a", "c", "b"]
    assert [(member.local_rank, member.local_size) for member in found] == [(0, 2), (1, 2), (0, 1)]
    given = [variables(member, rank, 3, "10.0.0.1", 5) for rank, member in enumerate(found)]
    assert [each["CUDA_VISIBLE_DEVICES"] for each in given] == ["3,1", "3,1", "0"]
    assert given[1] == {
        "RANK": "1", "WORLD_SIZE": "3", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "5", "TORCHELASTIC_USE_AGENT_STORE": "True",
        "CUDA_VISIBLE_DEVICES": "3,1",
    }  # fmt: skip


def node(name: str, cpus: float = 1.0, alive: bool = True) -> dict[str, Any]:
    """As Ray tells of one."""
    resources = {"CPU": cpus} if cpus else {}
    return {"NodeID": name, "NodeManagerAddress": name, "Alive": alive, "Resources": resources}


def test_a_shard_and_its_mirror_are_on_two_nodes() -> None:
    nodes = [node("10.0.0.1"), node("10.0.0.3"), node("10.0.0.2"), node("10.0.0.4", alive=False)]
    assert spread(nodes, 3) == ["10.0.0.3", "10.0.0.2", "10.0.0.1"]
    assert spread(nodes, 1) == ["10.0.0.3"]
    assert spread([node("10.0.0.1", cpus=0), *nodes[1:3]], 2) == ["10.0.0.3", "10.0.0.2"]
    assert spread([node("10.0.0.1", cpus=0)], 2) == ["10.0.0.1", "10.0.0.1"]


@pytest.mark.parametrize("nodes", [2, 3, 4, 5])
@pytest.mark.parametrize("shards", [2, 3, 4, 5, 6, 7])
def test_no_shard_is_beside_its_mirror_where_that_can_be(nodes: int, shards: int) -> None:
    """The mirror of a shard is with the next one, that of the last with the first."""
    places = spread([node(f"10.0.0.{number}") for number in range(nodes)], shards)
    beside = sum(places[each] == places[(each + 1) % shards] for each in range(shards))
    assert beside == (1 if nodes == 2 and shards % 2 else 0)
