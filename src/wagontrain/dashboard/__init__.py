"""The live page of a run: a small server that reads the run's events and nothing else.

    tail      new lines of events.jsonl, as they come
    curves    a curve that never has more than so many points, however long the run is
    tiles     workers and server shards as a person sees them
    log       what happened, the last few hundred lines of it
    state     events folded into all that the page shows
    feed      ... sent to browsers: first the whole, then what changes
    app       who may ask, and for what
    serving   the server of `wagontrain dashboard`
    beside    ... and of `wagontrain run --dashboard`, in a process of its own
    static/   the page

Nothing here imports torch, or what trains: `beside` starts it without.
"""
