"""Fully connected layers that belong together in models of known make: nothing travels within.

    attention   query, key and value by columns, a rank's own heads, the output by rows
    gated       gate and up by columns, their product, down by rows

They are what the observed order of calls alone cannot show: between them lie rotary embeddings,
softmax and products. So the classes are named here, of Hugging Face's transformers, whose forwards
take the number of heads from the width that they are given. Only where all ranks have all samples.

Source: Shoeybi et al. 2019, "Megatron-LM", section 3.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from wagontrain.layout import full_name
from wagontrain.profile import Cut
from wagontrain.split.observe import Observed

_ATTENTION = ("LlamaAttention", "MistralAttention", "Qwen2Attention", "ViTAttention")
_GATED = ("LlamaMLP", "MistralMLP", "Qwen2MLP")


@dataclass(frozen=True)
class Family:
    """Layers that belong together.

    Args:
        columns: names of those split by columns, in the order of their calls.
        row: name of the one split by rows.
        draws: whether random numbers are drawn in between.
        heads: every rank has to get as many of them; 0 where there are none.
    """

    columns: tuple[str, ...]
    row: str
    draws: bool
    heads: int = 0

    @property
    def placement(self) -> dict[str, Cut]:
        """How each is to be split."""
        return {**dict.fromkeys(self.columns, "column"), self.row: "row"}

    def is_placed(self, cuts: Mapping[str, Cut]) -> bool:
        """Whether all of them are split so."""
        return all(cuts.get(name) == cut for name, cut in self.placement.items())


def families(model: nn.Module, observed: Observed, size: int = 1) -> Iterator[Family]:
    """Those of a model that can be divided over so many ranks."""
    for path, module in model.named_modules():
        kind = type(module)
        if not kind.__module__.startswith("transformers.models."):
            continue
        whole: Any = module
        # Weights of attention that somebody sees are whole.
        if kind.__name__ in _ATTENTION and whole.config._attn_implementation == "sdpa":
            draws, heads = whole.attention_dropout > 0, _heads(whole)
            found = _family(path, ("q_proj", "k_proj", "v_proj"), "o_proj", draws, heads)
        elif kind.__name__ in _GATED:
            found = _family(path, ("gate_proj", "up_proj"), "down_proj", False, 0)
        else:
            continue
        names = [*found.columns, found.row]
        called = [name for name in observed.layers if name in names]
        if (
            found.heads % size == 0
            and called == names
            and all(type(model.get_submodule(each)) is nn.Linear for each in names)
        ):
            yield found


def _family(path: str, columns: tuple[str, ...], row: str, draws: bool, heads: int) -> Family:
    return Family(
        tuple(full_name(path, each) for each in columns), full_name(path, row), draws, heads
    )


def _heads(attention: Any) -> int:
    """Of which every rank has to get as many: of queries as well as of keys."""
    return math.gcd(
        *(each.out_features // attention.head_dim for each in (attention.q_proj, attention.k_proj))
    )
