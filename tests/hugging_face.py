"""Small Hugging Face models, built from their configurations: nothing is downloaded.

Sequences are of very different lengths, so that a mean over tokens is none over samples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import wagontrain as wt
from tests.problems import BATCH, SAMPLES, adam, classes, numbers

WORDS, LENGTH, CLASSES = 37, 10, 3


class Records(Dataset[Any]):
    """Samples as Hugging Face's data sets have them: one dict each, labels included."""

    def __init__(self, **columns: Tensor) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: column[index] for name, column in self.columns.items()}


def sentences(shown: float = 1.0) -> Records:
    """Words, a mask of padding, and labels: -100 where there is nothing to guess."""
    words = classes(SAMPLES * LENGTH, WORDS).view(SAMPLES, LENGTH)
    lengths = 2 + (torch.arange(SAMPLES) * 5) % (LENGTH - 1)
    mask = (torch.arange(LENGTH) < lengths[:, None]).long()
    guessed = mask.bool() & (numbers(SAMPLES, LENGTH, seed=7).sigmoid() < shown)
    guessed[:, 1] = True
    return Records(
        input_ids=words, attention_mask=mask, labels=torch.where(guessed, words.roll(3, 0), -100)
    )


def _task(model: Callable[[], nn.Module], train: Records, **fields: Any) -> wt.Task:
    return wt.Task(
        model=model, loss=wt.loss_of_output, optimizer=adam, train=train, batch_size=BATCH,
        epochs=2, validation=train, **fields,
    )  # fmt: skip


def _gpt2(**changes: Any) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": WORDS, "n_positions": LENGTH, "n_embd": 16, "n_layer": 2, "n_head": 4}
    sizes |= {"bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(**(sizes | changes)))


def gpt2() -> wt.Task:
    """Its table is the head's weight, too; `Conv1D` in place of `Linear`."""
    return _task(_gpt2, sentences(), weight=partial(wt.count_labels, shifted=True))


def _bert(width: int = 16) -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    return BertForMaskedLM(
        BertConfig(
            vocab_size=WORDS, hidden_size=width, num_hidden_layers=2, num_attention_heads=4,
            intermediate_size=24, max_position_embeddings=LENGTH,
        )
    )  # fmt: skip


def bert() -> wt.Task:
    return _task(_bert, sentences(0.4), weight=wt.count_labels)


def _vit(width: int = 16) -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(
        ViTConfig(
            hidden_size=width, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24,
            image_size=8, patch_size=4, num_channels=2, num_labels=CLASSES,
        )
    )  # fmt: skip


def vit() -> wt.Task:
    images = Records(pixel_values=numbers(SAMPLES, 2, 8, 8), labels=classes(SAMPLES, CLASSES))
    return _task(_vit, images)


def _llama(width: int = 16, **changes: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=WORDS, hidden_size=width, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, intermediate_size=24, max_position_embeddings=LENGTH,
            **changes,
        )
    )  # fmt: skip


def llama() -> wt.Task:
    """Rotary embeddings, keys that several heads share, a gate beside the layer."""
    return _task(_llama, sentences(), weight=partial(wt.count_labels, shifted=True))


def untied_gpt2() -> wt.Task:
    """Without a cache for generation, and with a head of its own: it can be cut into stages."""
    return replace(gpt2(), model=partial(_gpt2, use_cache=False, tie_word_embeddings=False))


def llama_without_cache() -> wt.Task:
    return replace(llama(), model=partial(_llama, use_cache=False))


WIDE: dict[str, Callable[[], wt.Task]] = {
    "gpt2": lambda: replace(gpt2(), model=partial(_gpt2, n_embd=64)),
    "bert": lambda: replace(bert(), model=partial(_bert, 64)),
    "vit": lambda: replace(vit(), model=partial(_vit, 64)),
    "llama": lambda: replace(llama(), model=partial(_llama, 64)),
}
"""Where activations are more than the headers of messages."""

MODELS: dict[str, Callable[[], wt.Task]] = {
    function.__name__: function
    for function in (gpt2, bert, vit, llama, untied_gpt2, llama_without_cache)
}
