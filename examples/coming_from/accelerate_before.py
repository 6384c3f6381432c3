"""With Accelerate: torchrun --nproc-per-node 2 accelerate_before.py"""

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from shared import Net, digits
from torch.utils.data import DataLoader

if __name__ == "__main__":
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0)
    data = digits()
    loader = DataLoader(data, batch_size=64 // accelerator.num_processes)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    for _ in range(3):
        for x, y in loader:
            optimizer.zero_grad()
            accelerator.backward(F.cross_entropy(model(x), y))
            optimizer.step()

    if accelerator.is_main_process:
        with torch.no_grad():
            x, y = data.tensors
            print(f"loss {F.cross_entropy(accelerator.unwrap_model(model)(x), y):.6f}")
    accelerator.end_training()
