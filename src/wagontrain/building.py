"""Building a model on a rank that may be too small for the whole of it.

Where the whole model fits it is built from the task's seed, and then divided. Where it does not,
it is built without memory (on torch's meta device), divided, and initialised module by module:
each from a seed that follows from the task's seed and the module's name, so that every strategy
and any number of workers begin with the same weights. No rank holds more than one module whole.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import gc
import resource
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from wagontrain.batches import mix
from wagontrain.compiling import is_compiled
from wagontrain.errors import TaskError, UsageError
from wagontrain.layout import Layout, full_name, local
from wagontrain.optimizers import values_per_weight
from wagontrain.seeding import seeded_numbers
from wagontrain.task import Task
from wagontrain.transport import Context


def skeleton(task: Task) -> nn.Module | None:
    """The model without memory; None where it cannot be built so (it reads its own weights)."""
    try:
        with torch.device("meta"):
            return task.build_model()
    except (TaskError, NotImplementedError, RuntimeError):
        return None


def bytes_to_train(model: nn.Module, task: Task) -> int:
    """Bytes for weights, gradients and optimizer state of a whole copy; activations come on top."""
    copies = 2 + values_per_weight(task.build_optimizer(model))  # weights and gradients, too
    copies += task.ema is not None
    parameters = sum(value.nbytes for value in model.parameters() if value.requires_grad)
    others = sum(value.nbytes for value in model.parameters() if not value.requires_grad)
    return round(copies * parameters) + others + sum(value.nbytes for value in model.buffers())


def usable_bytes(device: torch.device) -> int | None:
    """Memory that this process may use: of the GPU, or what control groups leave of the host's.

    None where the system does not say.
    """
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    limits = [*_group_limits()]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        total = next(line for line in meminfo.read_text().splitlines() if "MemTotal" in line)
        limits.append(int(total.split()[1]) * 1024)
    return min(limits, default=None)


def peak_memory(device: torch.device) -> int:
    """Most bytes in use so far: of the GPU where there is one, else resident in the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def resident_bytes(device: torch.device) -> int:
    """Memory in use now, as `peak_memory` counts it: on the device, or resident in the process."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    resident = next((line for line in lines if line.startswith("VmRSS:")), None)
    return int(resident.split()[1]) * 1024 if resident else peak_memory(device)


def forget_peak(device: torch.device) -> None:
    """Have `peak_memory` begin anew, where the system can; what was freed is given back first."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError, AttributeError):  # another C library, or another system
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")


def _group_limits() -> list[int]:
    """Memory limits (v1 and v2) of the control groups that this process is in."""
    found = []
    groups = Path("/proc/self/cgroup")
    for line in groups.read_text().splitlines() if groups.exists() else ():
        number, controllers, path = line.split(":", 2)
        if number != "0" and "memory" not in controllers.split(","):
            continue
        for root in (Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")):
            for folder in (root / path.lstrip("/"), root):
                for name in ("memory.max", "memory.limit_in_bytes"):
                    file = folder / name
                    if file.is_file() and (text := file.read_text().strip()).isdigit():
                        found.append(int(text))
    return [limit for limit in found if limit < 1 << 60]  # v1 writes a huge number for "none"


def taken_bytes() -> int:
    """Memory that this process has taken already: torch alone takes some 200 MB.

    Without what it shares with files, which the system can drop. 0 where it does not say.
    """
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    anonymous = next((line for line in lines if line.startswith("RssAnon:")), None)
    return int(anonymous.split()[1]) * 1024 if anonymous else 0


def fits(task: Task, context: Context) -> tuple[bool, int, int]:
    """Whether a whole copy fits on every rank; bytes it takes, and the least that one has left.

    Where nobody can say it is taken to fit. Every rank has to call this.
    """
    model = skeleton(task)
    needed = 0 if model is None else bytes_to_train(model, task)
    world, left = context.world, _UNKNOWN
    usable = usable_bytes(world.device)
    if usable is not None and world.device.type == "cuda":
        left = usable
    elif usable is not None:
        left = max(0, usable // world.local_size - taken_bytes())
    known = [row[0] for row in context.gather_integers([left]) if row[0] != _UNKNOWN]
    least = min(known, default=_UNKNOWN)
    return not needed or least == _UNKNOWN or needed <= least, needed, least


_UNKNOWN = -1


def whole_or_skeleton(task: Task, context: Context) -> nn.Module:
    """The model with its weights where a whole copy fits on every rank, else without memory.

    Every rank has to call this.
    """
    if fits(task, context)[0]:
        return task.build_model()
    model = skeleton(task)
    assert model is not None  # it was measured by one
    return model


def initialise(
    model: nn.Module, plain: nn.Module, layouts: Mapping[str, Layout], seed: int
) -> None:
    """Give a divided model, built without memory, its first weights.

    Args:
        model: the divided one, its memory not yet written.
        plain: the same, whole and on the meta device.
        layouts: which part of everything in the model's `state_dict` is held here.
        seed: the task's.

    Raises:
        TaskError: a module has tensors of its own and no `reset_parameters` to fill them.
    """
    state = model.state_dict(keep_vars=True)
    done: set[int] = set()
    for path, module in plain.named_modules():
        own = {key: value for key, value in _own(module).items() if id(value) not in done}
        done.update(map(id, own.values()))
        held = [key for key in own if full_name(path, key) in layouts]
        fleeting = module._non_persistent_buffers_set
        if fleeting:
            raise TaskError(
                f"the model does not fit on one host, and module {path or 'the model itself'!r} "
                f"computes its buffer {min(fleeting)!r} while the whole is built: register it as "
                "a persistent one, and fill it in reset_parameters()"
            )
        if not held:
            continue
        with seeded_numbers(mix(seed, "module", path)):
            filled = _filled(module)
        if filled is None:
            raise TaskError(
                f"the model does not fit on one host, and module {path or 'the model itself'!r} "
                f"({type(module).__name__}) has {next(iter(own))!r} but no reset_parameters() to "
                "fill it without building the whole: give it one"
            )
        with torch.no_grad():
            for key in held:
                name = full_name(path, key)
                local(state[name]).copy_(layouts[name].take(filled[key]))


def _own(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers that are a module's own; attention fills its output layer's, too."""
    inside = isinstance(module, nn.MultiheadAttention)
    return {
        **dict(module.named_parameters(recurse=inside)),
        **dict(module.named_buffers(recurse=inside)),
    }


def _filled(module: nn.Module) -> dict[str, Tensor] | None:
    """A module's own tensors with their first numbers; None where it cannot tell them."""
    if isinstance(module, nn.MultiheadAttention):
        whole: Any = copy.deepcopy(module).to_empty(device="cpu")
        whole.out_proj.reset_parameters()
        whole._reset_parameters()
        return _own(whole)
    if getattr(module, "reset_parameters", None) is None:
        return None
    whole = _alone(module)
    whole.reset_parameters()
    return _own(whole)


def _alone(module: nn.Module) -> nn.Module:
    """A copy of a module, with memory, without those in it."""
    children = dict(module._modules)
    module._modules.clear()
    try:
        return copy.deepcopy(module).to_empty(device="cpu")
    finally:
        module._modules.update(children)


def require_room(task: Task, context: Context) -> None:
    """Refuse a strategy that needs a whole copy on every rank, where one does not fit.

    Raises:
        UsageError: with the numbers.
    """
    enough, needed, least = fits(task, context)
    if not enough:
        raise UsageError(
            f"a whole copy with gradients and optimizer state takes {gigabytes(needed)} GB, but a "
            f"worker has {gigabytes(least)} GB left: take a strategy that divides it (sharded, "
            "split-weights, hybrid or pipeline)"
        )


def require_uncompiled(model: nn.Module, why: str) -> None:
    """Refuse torch.compile where layers are changed: what was compiled would know nothing of it.

    Args:
        model: of a task.
        why: what the strategy does to it.

    Raises:
        UsageError: it, or a module in it, is compiled.
    """
    for name, module in model.named_modules():
        if is_compiled(module):
            what = f"module {name!r}" if name else "the model"
            raise UsageError(
                f"{what} is compiled (torch.compile), and this strategy {why}, which the compiled "
                "code would not see: leave torch.compile out, or use data-parallel or sharded with "
                "stage=1"
            )


def require_uncompiled_norms(model: nn.Module) -> None:
    """Refuse a compiled model with batch norm, which takes the statistics of all ranks.

    Raises:
        UsageError: it has one.
    """
    if not any(map(is_compiled, model.modules())):
        return
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm):
            raise UsageError(
                f"the model is compiled (torch.compile), and layer {name!r} is a batch norm, which "
                "takes its statistics over all workers' samples: leave torch.compile out, or use "
                "another norm (GroupNorm, LayerNorm)"
            )


def require_same_groups(task: Task, model: nn.Module, optimizer: Optimizer) -> None:
    """Refuse groups of parameters that come out otherwise where a rank has parts of tensors.

    Args:
        task: what is trained.
        model: with this rank's parts, all under the names of the plain model.
        optimizer: over its parameters.

    Raises:
        TaskError: they hang on the sizes of tensors.
    """
    plain = skeleton(task) if len(optimizer.param_groups) > 1 else None
    if plain is None:
        return
    expected = task.build_optimizer(plain, closures=True)
    if _members(model, optimizer) != _members(plain, expected):
        raise TaskError(
            "Task.optimizer makes other groups of parameters here than on one process, because "
            "it goes by their sizes, and a rank has parts of them: go by their names, or by their "
            "number of dims"
        )


def _members(model: nn.Module, optimizer: Optimizer) -> list[set[str]]:
    """Names of the parameters in each group."""
    names: dict[Tensor, str] = {value: name for name, value in model.named_parameters()}
    return [{names[value] for value in group["params"]} for group in optimizer.param_groups]


def gigabytes(count: int) -> str:
    """A number of bytes in 10⁹."""
    return f"{count / 1e9:.2f}" if count < 10**10 else f"{count / 1e9:.0f}"
