"""Quantities as people read them."""

from __future__ import annotations


def size(count: float) -> str:
    """Bytes, readable: 3.2 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def duration(seconds: float) -> str:
    """Seconds, readable: 4.2 s, 3:20 min, 5:07 h."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(int(seconds), 60)
    if minutes < 60:
        return f"{minutes}:{rest:02} min"
    return f"{minutes // 60}:{minutes % 60:02} h"


def short_time(seconds: float) -> str:
    """Seconds, readable, down to milliseconds: 0.82 ms, 12.3 ms, 4.21 s, 312 s."""
    if seconds >= 100:
        return f"{seconds:.0f} s"
    if seconds >= 1:
        return f"{seconds:.3g} s"
    digits = 3 if seconds >= 1e-3 else 2
    return f"{round(seconds * 1e3, 2):.{digits}g} ms"


def off_by(happened: float, foretold: float) -> str:
    """By how much something differs from what was predicted of it: +12 %."""
    return f"{100 * (happened / max(foretold, 1e-12) - 1):+.0f} %"
