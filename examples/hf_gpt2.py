"""GPT-2 from a configuration, untrained and small, on the King James Bible, byte by byte.

wagontrain run examples/hf_gpt2.py --workers 2 --steps 100

The model is Hugging Face's, unchanged: samples are dicts, labels among them, and the loss comes out
of its output. Nothing is downloaded. Verses are of uneven lengths, and the loss is a mean over
the bytes that are guessed, not over verses: `weight` says how many these are.
"""

import dataclasses
import re
from functools import partial

import torch
from char_lm import bible
from torch import Tensor
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel

import wagontrain as wt

LENGTH = 128
BYTES = 256
END = 0
SENTENCES = 8_000
VALIDATION_SENTENCES = 400


class Sentences(Dataset):
    """Sentences as bytes, cut or filled up to LENGTH; what is filled up has the label -100."""

    def __init__(self, sentences: list[str]) -> None:
        self.sentences = sentences

    def __len__(self) -> int:
        return len(self.sentences)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        text = [*self.sentences[index].encode()[: LENGTH - 1], END]
        codes = torch.tensor(text + [END] * (LENGTH - len(text)))
        real = torch.arange(LENGTH) < len(text)
        return {
            "input_ids": codes,
            "attention_mask": real.long(),
            "labels": torch.where(real, codes, -100),
        }


def model(**changes: bool) -> GPT2LMHeadModel:
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=BYTES, n_positions=LENGTH, n_embd=128, n_layer=4, n_head=4,
            bos_token_id=END, eos_token_id=END, **changes,
        )
    )  # fmt: skip


def without_decay(model: torch.nn.Module) -> torch.optim.Optimizer:
    """AdamW that pulls matrices towards zero, but neither biases nor norms."""
    matrices = [value for value in model.parameters() if value.ndim > 1]
    others = [value for value in model.parameters() if value.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=1e-3)


def task() -> wt.Task:
    sentences = [each for each in re.split(r"(?<=[.:;?!])\s+", bible()) if len(each) > 1]
    return wt.Task(
        model=model,
        loss=wt.loss_of_output,
        weight=partial(wt.count_labels, shifted=True),
        optimizer=without_decay,
        clip_grad_norm=1.0,
        train=Sentences(sentences[:SENTENCES]),
        validation=Sentences(sentences[SENTENCES:][:VALIDATION_SENTENCES]),
        batch_size=32,
        epochs=1,
    )


def for_pipeline() -> wt.Task:
    """With a head of its own and no cache for generation, it can be cut into stages."""
    untied = partial(model, use_cache=False, tie_word_embeddings=False)
    return dataclasses.replace(task(), model=untied)


if __name__ == "__main__":
    wt.fit(task)
