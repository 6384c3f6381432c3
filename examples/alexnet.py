"""AlexNet as "one weird trick" has it: convolutions data parallel, wide layers split.

Which of twelve photographs is a patch from? Small patches and narrower layers by default, so that
it finishes on a laptop; the real one has 224 x 224 inputs and layers of 4096.

    wagontrain run examples/alexnet.py --strategy hybrid --workers 2
    python examples/alexnet.py --size 224 --steps 3
"""

import argparse
import importlib.util
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import wagontrain as wt

PHOTOGRAPHS = [
    "astronaut.png", "brick.png", "camera.png", "chelsea.png", "coffee.png", "coins.png",
    "grass.png", "gravel.png", "hubble_deep_field.jpg", "ihc.png", "motorcycle_left.png",
    "rocket.jpg",
]  # fmt: skip
PATCHES = 60  # of each photograph to train on, and a quarter of that to validate


class AlexNet(nn.Module):
    """AlexNet of one tower (Krizhevsky 2014): [n, 3, size, size] -> [n, classes].

    For small images the first convolution takes steps of 2 pixels rather than 4.
    """

    def __init__(self, size: int, width: int, classes: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 64, 11, stride=4 if size >= 128 else 2, padding=2), nn.ReLU(),
            nn.MaxPool2d(3, 2),
            nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2),
            nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(),
            nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(),
            nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2),
        )  # fmt: skip
        with torch.no_grad():
            device = self.features[0].weight.device
            features = self.features(torch.zeros(1, 3, size, size, device=device)).numel()
        self.classifier = nn.Sequential(
            nn.Linear(features, width), nn.ReLU(), nn.Dropout(),
            nn.Linear(width, width), nn.ReLU(), nn.Dropout(),
            nn.Linear(width, classes),
        )  # fmt: skip

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.features(images).flatten(1))


def photographs() -> list[Tensor]:
    """The photographs that scikit-image carries: each [3, height, width], from -1 to 1."""
    package = importlib.util.find_spec("skimage")
    if package is None or package.origin is None:
        raise SystemExit("examples/alexnet.py cuts its patches out of scikit-image's pictures: "
                         "pip install scikit-image")  # fmt: skip
    folder = Path(package.origin).parent / "data"
    found = []
    for name in PHOTOGRAPHS:
        with Image.open(folder / name) as image:
            pixels = torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8)
            found.append(pixels.view(image.height, image.width, 3).permute(2, 0, 1) / 127.5 - 1)
    return found


def patches(size: int, count: int, seed: int, part: str) -> TensorDataset:
    """`count` patches from the left two thirds of each photograph, or from the right third."""
    generator = torch.Generator().manual_seed(seed)
    images, targets = [], []
    for target, picture in enumerate(photographs()):
        border = picture.shape[2] * 2 // 3
        half = picture[:, :, :border] if part == "left" else picture[:, :, border:]
        side = min(size, half.shape[1], half.shape[2])  # some are small: their patches are enlarged
        for _ in range(count):
            top = int(torch.randint(half.shape[1] - side + 1, (), generator=generator))
            left = int(torch.randint(half.shape[2] - side + 1, (), generator=generator))
            images.append(half[:, top : top + side, left : left + side])
            targets.append(target)
    whole = [F.interpolate(image[None], (size, size))[0] for image in images]
    return TensorDataset(torch.stack(whole), torch.tensor(targets))


def accuracy(output: Tensor, target: Tensor) -> Tensor:
    """Fraction of the patches given whose photograph is found."""
    return (output.argmax(1) == target).float().mean()


def task(size: int = 64, width: int = 1024) -> wt.Task:
    return wt.Task(
        model=partial(AlexNet, size, width, len(PHOTOGRAPHS)),
        loss=F.cross_entropy,
        optimizer=partial(torch.optim.AdamW, lr=5e-4),
        train=patches(size, PATCHES, 0, "left"),
        validation=patches(size, PATCHES // 4, 1, "right"),
        metrics={"accuracy": accuracy},
        batch_size=64,
        epochs=6,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=64, help="pixels of a patch's side")
    parser.add_argument("--strategy", default="hybrid")
    parser.add_argument("--workers", type=int, help="where not given one, or those of torchrun")
    parser.add_argument("--steps", type=int, help="stop after so many")
    asked = parser.parse_args()
    made = task(asked.size, 4096 if asked.size >= 128 else 1024)
    wt.fit(made, asked.strategy, workers=asked.workers, steps=asked.steps)


if __name__ == "__main__":
    main()
