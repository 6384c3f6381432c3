"""Models that torch.compile has compiled."""

from __future__ import annotations

from typing import Any

from torch import nn


def is_compiled(module: nn.Module) -> bool:
    """Whether a module was compiled, by torch.compile or by its own `compile`."""
    return getattr(module, "_compiled_call_impl", None) is not None


def compiled_in_place(model: nn.Module) -> nn.Module:
    """A compiled model as the module that it was made of, which calls what was compiled.

    torch.compile wraps a module, and `_orig_mod.` comes before all names: a checkpoint would be of
    another model than without it.
    """
    inner = getattr(model, "_orig_mod", None)
    if type(model).__name__ != "OptimizedModule" or not isinstance(inner, nn.Module):
        return model
    compiling: Any = model
    inner._compiled_call_impl = compiling.dynamo_ctx(inner._call_impl)
    return inner
