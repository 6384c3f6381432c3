"""Plain data as JSON and back: numbers, text, lists, tuples, dicts with any keys, counters.

A scheduler's state is such data. JSON alone would turn the keys 30 and 60 of its milestones into
text, and the rate would never fall again. Nothing here runs code when it is read.
"""

from __future__ import annotations

import collections
import json
from typing import Any

from torch import Tensor

from wagontrain.errors import UsageError

_KIND = "!kind"


def encode(value: Any) -> str:
    """JSON text.

    Raises:
        UsageError: the value holds an object that is no plain data.
    """
    return json.dumps(_out(value))


def decode(text: str) -> Any:
    """What `encode` was given; a tensor has become a number or a list.

    Raises:
        ValueError: the text is not what `encode` writes.
    """
    try:
        return _in(json.loads(text))
    except (KeyError, TypeError, RecursionError) as error:  # JSON, of another form or bottomless
        raise ValueError(f"{type(error).__name__}: {error}") from error


def _out(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list):
        return [_out(item) for item in value]
    if isinstance(value, tuple):
        return {_KIND: "tuple", "items": [_out(item) for item in value]}
    if isinstance(value, collections.Counter | dict):
        kind = "counter" if isinstance(value, collections.Counter) else "dict"
        if kind == "dict" and all(isinstance(key, str) for key in value) and _KIND not in value:
            return {key: _out(item) for key, item in value.items()}
        return {_KIND: kind, "items": [[_out(key), _out(item)] for key, item in value.items()]}
    if isinstance(value, Tensor):
        return value.tolist()
    raise UsageError(
        f"the state of optimizer, scheduler or callback holds a {type(value).__name__}, which is "
        "no plain data and cannot be kept in a checkpoint: keep numbers, text, lists and dicts"
    )


def _in(value: Any) -> Any:
    if isinstance(value, list):
        return [_in(item) for item in value]
    if not isinstance(value, dict):
        return value
    kind = value.get(_KIND)
    if kind is None:
        return {key: _in(item) for key, item in value.items()}
    if kind == "tuple":
        return tuple(_in(item) for item in value["items"])
    pairs = {_in(key): _in(item) for key, item in value["items"]}
    return collections.Counter(pairs) if kind == "counter" else pairs
