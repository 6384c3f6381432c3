"""DistBelief's speech network, its weights split over machines: which vowel is this frame of?

Frames of made-up speech: vowels as Peterson and Barney measured their formants (1952), spoken by
voices of different pitch and size, as 40 filter-bank energies with five frames before and after.
The network is that of Dean et al. (2012, section 5) with narrower layers; `python
examples/speech.py --width 2560` has the real ones.

    wagontrain run examples/speech.py --strategy split-weights --workers 2
"""

import argparse
import itertools
import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import wagontrain as wt

# First three formants in Hz, means of men, in the order of Peterson and Barney's table II.
VOWELS = {
    "heed": (270, 2290, 3010), "hid": (390, 1990, 2550), "head": (530, 1840, 2480),
    "had": (660, 1720, 2410), "hod": (730, 1090, 2440), "hawed": (570, 840, 2410),
    "hood": (440, 1020, 2240), "who'd": (300, 870, 2240), "hud": (640, 1190, 2390),
    "heard": (490, 1350, 1690),
}  # fmt: skip
BANDS, CONTEXT = 40, 5


def energies(formants: Tensor, pitch: Tensor, generator: torch.Generator) -> Tensor:
    """Log energies of 40 mel bands, [n, 40], of voices with the given formants and pitch in Hz."""
    mel = torch.linspace(100, 2600, BANDS)
    hertz = 700 * (10 ** (mel / 2595) - 1)
    width = 60 + 0.06 * formants
    peaks = 1 / (1 + ((hertz - formants[:, :, None]) / width[:, :, None]) ** 2)
    ripple = 0.3 * torch.cos(2 * math.pi * hertz / pitch[:, None])
    noise = 0.5 * torch.randn(len(formants), BANDS, generator=generator)
    return peaks.sum(1).add(1e-3).log() + ripple + noise


def frames(count: int, seed: int) -> TensorDataset:
    """`count` frames with their neighbours, [count, 440], and the number of the vowel."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(len(VOWELS), (count,), generator=generator)
    means = torch.tensor(list(VOWELS.values()), dtype=torch.float32)[target]
    voice = 1 + 0.18 * torch.rand(count, 1, generator=generator)  # women's and children's: higher
    formants = means * voice * (1 + 0.05 * torch.randn(count, 3, generator=generator))
    pitch = 100 + 150 * torch.rand(count, generator=generator)
    around = [energies(formants, pitch, generator) for _ in range(2 * CONTEXT + 1)]
    x = torch.cat(around, 1)
    return TensorDataset((x - x.mean()) / x.std(), target)


def network(width: int, classes: int) -> nn.Module:
    """440 -> four layers of sigmoids -> classes, begun so that signals pass through sigmoids."""
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise([BANDS * (2 * CONTEXT + 1), *[width] * 4]):
        layers += [nn.Linear(before, after), nn.Sigmoid()]
    layers.append(nn.Linear(width, classes))
    for layer in layers:
        if isinstance(layer, nn.Linear) and not layer.weight.is_meta:
            nn.init.xavier_normal_(layer.weight, gain=4)
    return nn.Sequential(*layers)


def accuracy(output: Tensor, target: Tensor) -> Tensor:
    """Fraction of the frames given whose vowel is heard."""
    return (output.argmax(1) == target).float().mean()


def task(width: int = 256) -> wt.Task:
    return wt.Task(
        model=partial(network, width, len(VOWELS)),
        loss=F.cross_entropy,
        optimizer=partial(torch.optim.Adagrad, lr=0.01),
        train=frames(8000, 0),
        validation=frames(2000, 1),
        metrics={"accuracy": accuracy},
        batch_size=128,
        epochs=4,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=256, help="of the hidden layers")
    parser.add_argument("--strategy", default="split-weights")
    parser.add_argument("--workers", type=int, help="where not given one, or those of torchrun")
    parser.add_argument("--steps", type=int, help="stop after so many")
    asked = parser.parse_args()
    wt.fit(task(asked.width), asked.strategy, workers=asked.workers, steps=asked.steps)


if __name__ == "__main__":
    main()
