"""With Lightning Fabric: torchrun --nproc-per-node 2 fabric_before.py"""

import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from shared import Net, digits
from torch.utils.data import DataLoader

if __name__ == "__main__":
    fabric = Fabric(accelerator="cpu", strategy="ddp", devices=2)
    fabric.launch()
    fabric.seed_everything(0)
    data = digits()
    loader = fabric.setup_dataloaders(DataLoader(data, batch_size=64 // fabric.world_size))
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model, optimizer = fabric.setup(model, optimizer)

    for _ in range(3):
        for x, y in loader:
            optimizer.zero_grad()
            fabric.backward(F.cross_entropy(model(x), y))
            optimizer.step()

    if fabric.is_global_zero:
        with torch.no_grad():
            x, y = data.tensors
            print(f"loss {F.cross_entropy(model.module(x), y):.6f}")
