"""What a user would otherwise write: the loops of PyTorch's own tutorials, by hand."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

import wagontrain as wt


def bare_loop(task: wt.Task) -> Iterator[float]:
    """One process: yields the loss after every step, for ever."""
    torch.manual_seed(task.seed)
    model = task.model()
    optimizer = task.optimizer(model.parameters())
    loader = DataLoader(task.train, batch_size=task.batch_size, shuffle=True)
    model.train()
    while True:
        for inputs, target in loader:
            optimizer.zero_grad()
            loss = task.loss(model(inputs), target)
            loss.backward()
            if task.clip_grad_norm is not None:
                nn.utils.clip_grad_norm_(model.parameters(), task.clip_grad_norm)
            optimizer.step()
            yield loss.item()


def ddp_script(task: wt.Task) -> Iterator[float]:
    """Several processes: yields this rank's loss after every step, for ever."""
    torch.manual_seed(task.seed)
    model = DistributedDataParallel(task.model())
    optimizer = task.optimizer(model.parameters())
    sampler = DistributedSampler(task.train)
    loader = DataLoader(
        task.train, batch_size=task.batch_size // dist.get_world_size(), sampler=sampler
    )
    model.train()
    epoch = 0
    while True:
        sampler.set_epoch(epoch)
        for inputs, target in loader:
            optimizer.zero_grad()
            loss = task.loss(model(inputs), target)
            loss.backward()
            if task.clip_grad_norm is not None:
                nn.utils.clip_grad_norm_(model.parameters(), task.clip_grad_norm)
            optimizer.step()
            yield loss.item()
        epoch += 1
