"""Memory in large pages, where training runs on the CPU."""

from __future__ import annotations

import os


def ask_for_large_pages() -> None:
    """Have torch ask the kernel for pages of 2 MB, in this process and in those that it starts.

    A step frees its activations and asks for as many again. In pages of 4 kB that costs a fault
    for each: an eighth of the CPU time of AlexNet's step, and a third of that of the speech
    network's with sharded weights. torch reads the variable when it first makes a tensor, so that
    this comes before anything else, the task's data too. Who has set it, is heeded.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
