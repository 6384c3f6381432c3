"""Training on a Ray cluster: one actor for each rank, which starts a worker process there.

lead       the launching end: starts the leader, bounds its time, and raises what it says
leader     the leader, a process of its own that talks to Ray, so that what Ray prints, hangs on
           and ends with is not the user's
placing    actors for the ranks, spread over the nodes
rank       what an actor does on its node
crewing    the launching end where workers come and go
crew_leader, notes   its leader, and what the two tell each other
scratch    the folder it has there
mirror     the files of a run on a node, copied as they grow
sources    the Python files of a task, for nodes that do not have them
"""

from wagontrain.ray_engine.lead import require_ray, start_workers
from wagontrain.ray_engine.sources import RUN, SOURCES, carry

__all__ = ["RUN", "SOURCES", "carry", "require_ray", "start_workers"]
