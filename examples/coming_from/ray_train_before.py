"""With Ray Train: python ray_train_before.py"""

import sys
import tempfile
from pathlib import Path

import ray.train
import torch
import torch.nn.functional as F
from ray.train import Checkpoint, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer, prepare_data_loader, prepare_model
from torch.utils.data import DataLoader

FOLDER = str(Path(__file__).parent)


def work() -> None:
    sys.path.insert(0, FOLDER)
    from shared import Net, digits

    torch.manual_seed(0)
    data = digits()
    workers = ray.train.get_context().get_world_size()
    loader = prepare_data_loader(DataLoader(data, batch_size=64 // workers))
    model = prepare_model(Net())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    for _ in range(3):
        for x, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()

    with torch.no_grad():
        x, y = data.tensors
        loss = float(F.cross_entropy(model.module(x), y))
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = None
        if ray.train.get_context().get_world_rank() == 0:
            torch.save(model.module.state_dict(), Path(folder) / "weights.pt")
            checkpoint = Checkpoint.from_directory(folder)
        ray.train.report({"loss": loss}, checkpoint=checkpoint)


if __name__ == "__main__":
    workers, kept = ScalingConfig(num_workers=2), RunConfig(storage_path=str(Path.cwd() / "ray"))
    result = TorchTrainer(work, scaling_config=workers, run_config=kept).fit()
    print(f"loss {result.metrics['loss']:.6f}")
