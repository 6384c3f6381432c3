"""Starting processes, finding one's place among them, and ending all when one ends.

cores       how many CPU cores there are for it
place       where am I? torchrun's variables, Slurm's, or what a launcher says
network     which of this host's addresses the others can reach
meeting     the ranks meet, and part
ending      ... and their processes end
rendezvous  the store where they meet
local       processes on this machine
pages       memory for tensors in large pages
failure     why workers ended, and which of it was the cause
"""

from wagontrain.launch.cores import cores
from wagontrain.launch.failure import Failure, cause, read_failures
from wagontrain.launch.local import end, end_with, start_workers, work, worker_command
from wagontrain.launch.meeting import WAIT, Terms, join, leave, meet
from wagontrain.launch.network import named, reaching
from wagontrain.launch.pages import ask_for_large_pages
from wagontrain.launch.place import (
    SECRET,
    Place,
    cache_folder,
    device_for,
    environment_of,
    place_from_environment,
    secret_of_job,
)

__all__ = [
    "SECRET",
    "WAIT",
    "Failure",
    "Place",
    "Terms",
    "ask_for_large_pages",
    "cache_folder",
    "cause",
    "cores",
    "device_for",
    "end",
    "end_with",
    "environment_of",
    "join",
    "leave",
    "meet",
    "named",
    "place_from_environment",
    "reaching",
    "read_failures",
    "secret_of_job",
    "start_workers",
    "work",
    "worker_command",
]
