"""wagontrain: train one PyTorch model over the machines you have."""

from wagontrain import nn
from wagontrain.callbacks import Callback, EarlyStopping
from wagontrain.errors import (
    LossError,
    ModelError,
    ReplicaError,
    TaskError,
    TrainingError,
    UsageError,
    WagontrainError,
    WorkerError,
)
from wagontrain.jobs import Result, connect, fit
from wagontrain.mesh import World
from wagontrain.objective import Evaluation
from wagontrain.outputs import count_labels, loss_of_output
from wagontrain.registry import discover, make_strategy
from wagontrain.strategy import Runner, StepReport, StepTimes, Strategy
from wagontrain.task import Task
from wagontrain.trainer import Run
from wagontrain.transport import Context
from wagontrain.version import __version__

__all__ = [
    "Callback",
    "Context",
    "EarlyStopping",
    "Evaluation",
    "LossError",
    "ModelError",
    "ReplicaError",
    "Result",
    "Run",
    "Runner",
    "StepReport",
    "StepTimes",
    "Strategy",
    "Task",
    "TaskError",
    "TrainingError",
    "UsageError",
    "WagontrainError",
    "WorkerError",
    "World",
    "__version__",
    "connect",
    "count_labels",
    "discover",
    "fit",
    "loss_of_output",
    "make_strategy",
    "nn",
]
