"""DistributedDataParallel by hand: torchrun --nproc-per-node 2 ddp_before.py"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from shared import Net, digits
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

if __name__ == "__main__":
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    data = digits()
    sampler = DistributedSampler(data, shuffle=False)  # in order, to compare with the other file
    loader = DataLoader(data, batch_size=64 // dist.get_world_size(), sampler=sampler)
    model = DistributedDataParallel(Net())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    for epoch in range(3):
        sampler.set_epoch(epoch)
        for x, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()

    if dist.get_rank() == 0:
        with torch.no_grad():
            x, y = data.tensors
            print(f"loss {F.cross_entropy(model.module(x), y):.6f}")
        torch.save(model.module.state_dict(), "weights.pt")
    dist.destroy_process_group()
