"""Choosing a strategy: what a task costs, what the cluster can do, and what follows from both.

facts, profiling    what a task costs, layer by layer
probing             what the cluster can do
search              every candidate, timed by the simulator
choosing            all of it together, and a trial of the best
"""
