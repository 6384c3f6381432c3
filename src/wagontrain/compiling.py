"""Models that torch.compile has compiled."""

from __future__ import annotations

from typing import Any

from torch import nn


def is_compiled(module: nn.Module) -> bool:
    """Whether a module was compiled, by torch.compile or by its own `compile`."""
    return getattr(module, "_compiled_call_impl", None) is not None


def compiled_in_place(model: nn.Module) -> nn.Module:
    """A model as it was before it, or modules in it, were compiled; they call what was compiled.

    torch.compile wraps a module, and `_orig_mod.` comes into all names: a checkpoint would be of
    another model than without it.
    """
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if child is not None:
                module._modules[name] = _unwrapped(child)
    return _unwrapped(model)


def _unwrapped(module: nn.Module) -> nn.Module:
    inner = getattr(module, "_orig_mod", None)
    if type(module).__name__ != "OptimizedModule" or not isinstance(inner, nn.Module):
        return module
    compiling: Any = module
    inner._compiled_call_impl = compiling.dynamo_ctx(inner._call_impl)
    return inner
