"""Parameter servers: parameters live on server shards, workers come and go.

    coordinator   hands out samples as leases, decides which gradients count and in which order
    shard         holds a part of every tensor, stages gradients, applies what was decided
    worker        pulls parameters, computes a gradient on its lease, pushes it

A push goes to all shards, which only put it aside. Then the worker tells the coordinator, and
the coordinator's order of commits is what every shard applies: a gradient counts on all shards or
on none, once, and the state after commit v is the same cut through all of them.

Source: Dean et al. 2012, "Large Scale Distributed Deep Networks" (Downpour); Li et al. 2014,
"Scaling Distributed Machine Learning with the Parameter Server" (OSDI).
"""
