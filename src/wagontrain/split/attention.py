"""Attention of which every rank has some heads (Megatron-LM, section 3).

    Q_h = X W_q,h   K_h = X W_k,h   V_h = X W_v,h        columns: nothing travels
    A_h = softmax(Q_h K_hᵀ / √d + mask) V_h              each rank its own heads h
    Y   = Σ_h A_h W_o,h + b                              rows: one sum
    dX  = Σ_h (dQ_h W_q,hᵀ + dK_h W_k,hᵀ + dV_h W_v,hᵀ)  one sum for each tensor that came in

Heads need not divide by ranks: shares differ by at most one, and may be empty. Only where all
ranks have all samples: with samples of their own they would have to gather whole sequences and
their masks, which is more than the weights.

Source: Shoeybi et al. 2019, "Megatron-LM", section 3 (attention).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wagontrain.mesh import even_shares, ranges
from wagontrain.split.border import Border, Gather, LeaveColumns, Total
from wagontrain.split.linear import ColumnProduct, Region, as_precise, as_rows


def divisible(layer: nn.Module) -> bool:
    """Whether a layer is attention that can be divided by heads."""
    return (
        type(layer) is nn.MultiheadAttention
        and layer.bias_k is None
        and not layer.add_zero_attn
        and "weight" in layer.out_proj._parameters  # nothing is computed into its place
    )


def heads_of(layer: nn.MultiheadAttention, size: int) -> list[range]:
    """The heads of each rank."""
    return ranges(even_shares(layer.num_heads, size))


def parts(
    layer: nn.MultiheadAttention, size: int, index: int
) -> dict[str, tuple[int, tuple[range, ...]]]:
    """Of each divided tensor the dim, and the indices along it that a rank holds."""
    heads, width, whole = heads_of(layer, size)[index], layer.head_dim, layer.embed_dim
    own = range(heads.start * width, heads.stop * width)
    packed = tuple(range(own.start + at, own.stop + at) for at in (0, whole, 2 * whole))
    found = {
        "in_proj_weight": (0, packed), "in_proj_bias": (0, packed), "q_proj_weight": (0, (own,)),
        "k_proj_weight": (0, (own,)), "v_proj_weight": (0, (own,)),
    }  # fmt: skip
    present = {key: part for key, part in found.items() if layer._parameters.get(key) is not None}
    return present | {"out_proj.weight": (1, (own,))}


class Heads:
    """Stands in for `nn.MultiheadAttention.forward` where heads are divided.

    Args:
        layer: the layer, whose parameters are this rank's part already; the output's bias is whole.
        border: one with replicated samples.
    """

    def __init__(self, layer: nn.MultiheadAttention, border: Border) -> None:
        self.layer, self.border = layer, border
        self.shares = heads_of(layer, border.axis.size)
        self.own = self.shares[border.axis.index]
        self.width = len(self.own) * layer.head_dim

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As `nn.MultiheadAttention.forward`, with the same shapes.

        The weights that it returns by default travel as well: `need_weights=False` saves that.
        """
        layer = self.layer
        if is_causal and attn_mask is None:
            raise RuntimeError("attention with is_causal needs the attn_mask, too")
        causal = is_causal and key_padding_mask is None and not need_weights
        q, k, v = self._projected([query, key, value])
        mask = self._mask(None if causal else attn_mask, key_padding_mask, len(q), query.dtype)
        dropout = layer.dropout if layer.training else 0.0
        # Heads of other ranks are dropped by other random numbers.
        region = Region(self.border.axis.index, dropout > 0)
        region.enter(query, self.border)
        try:
            if need_weights or not self.own:
                scores = (q / math.sqrt(layer.head_dim)) @ k.transpose(-2, -1)
                scores = scores if mask is None else scores + mask
                weights = F.dropout(scores.softmax(-1), dropout)
                attended = weights @ v
            else:
                attended = F.scaled_dot_product_attention(
                    q, k, v, mask, dropout_p=dropout, is_causal=causal
                )
        finally:
            region.leave()
        result = self._summed(attended, query)
        if not need_weights:
            return result, None
        shown: Tensor
        if average_attn_weights:
            shown = Total.apply(weights.sum(1) / layer.num_heads, self.border)
        else:
            shown = LeaveColumns.apply(weights, self.border, [len(each) for each in self.shares])
        return result, shown if query.dim() == 3 else shown.squeeze(0)

    def _projected(self, given: list[Tensor]) -> list[Tensor]:
        """Query, key and value of the own heads: each [samples, own heads, length, head size].

        What is given twice is multiplied once, so that one gradient of it travels.
        """
        alike: dict[int, list[int]] = {}
        for number, x in enumerate(given):
            alike.setdefault(id(x), []).append(number)
        found: list[Any] = [None] * len(given)
        for members in alike.values():
            x = given[members[0]]
            rows = as_rows(x)
            weight, bias = (as_precise(rows, each) for each in self._projections(members))
            widths = [self.width] * len(members)
            product: Any = ColumnProduct.apply(rows.to(weight.dtype), weight, bias, self.border)
            for member, part in zip(members, product.split(widths, 1), strict=True):
                found[member] = self._by_head(part, x)
        return found

    def _projections(self, members: list[int]) -> tuple[Any, Any]:
        """Weight and bias that some of query, key and value are multiplied by."""
        layer: Any = self.layer
        weights = [layer.q_proj_weight, layer.k_proj_weight, layer.v_proj_weight]
        biases: Any = [None] * 3
        if layer.in_proj_weight is not None:
            if len(members) == 3:
                return layer.in_proj_weight, layer.in_proj_bias
            weights = layer.in_proj_weight.split([self.width] * 3)
        if layer.in_proj_bias is not None:
            biases = layer.in_proj_bias.split([self.width] * 3)
        chosen = [weights[each] for each in members], [biases[each] for each in members]
        if len(members) == 1:
            return chosen[0][0], chosen[1][0]
        return torch.cat(chosen[0]), None if biases[0] is None else torch.cat(chosen[1])

    def _by_head(self, part: Tensor, x: Tensor) -> Tensor:
        y = part.reshape(*x.shape[:-1], len(self.own), self.layer.head_dim)
        if x.dim() == 2:
            y = y.unsqueeze(0)
        elif not self.layer.batch_first:
            y = y.transpose(0, 1)
        return y.transpose(1, 2)

    def _summed(self, attended: Tensor, query: Tensor) -> Tensor:
        """The output's own rows times what was attended to, added up over ranks."""
        y = attended.transpose(1, 2)
        if query.dim() == 3 and not self.layer.batch_first:
            y = y.transpose(0, 1)
        flat = y.reshape(query.shape[:-1].numel(), self.width)
        out: Any = self.layer.out_proj
        weight = as_precise(flat, out.weight)
        result: Tensor = Total.apply(F.linear(flat.to(weight.dtype), weight), self.border)
        if out.bias is not None:
            result = result + as_precise(result, out.bias)
        return result.view(*query.shape[:-1], self.layer.embed_dim)

    def _mask(
        self, attention: Tensor | None, padding: Tensor | None, samples: int, dtype: torch.dtype
    ) -> Tensor | None:
        """What is added to scores: [1 or samples, 1 or own heads, 1 or length, keys]."""
        found = []
        if attention is not None:
            attention = self._additive(attention, dtype)
            if attention.dim() == 3:  # one for each head of each sample
                shape = (samples, self.layer.num_heads, *attention.shape[1:])
                found.append(attention.view(shape)[:, self.own.start : self.own.stop])
            else:
                found.append(attention[None, None])
        if padding is not None:
            found.append(self._additive(padding, dtype).view(samples, 1, 1, -1))
        return sum(found[1:], found[0]) if found else None

    def _additive(self, mask: Tensor, dtype: torch.dtype) -> Tensor:
        if mask.dtype is torch.bool:
            return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -torch.inf)
        if mask.requires_grad:  # a learned bias: each rank has the gradient of its own heads
            mask = Gather.apply(mask, self.border)
        return mask


def without_fast_path(
    model: nn.Module, divided: Collection[nn.Module], undo: contextlib.ExitStack
) -> None:
    """Have torch's encoder layers call their parts in validation, too.

    By themselves they then take the weights out of divided layers and compute with those alone.

    Args:
        model: the whole one.
        divided: its layers that are divided.
        undo: puts everything back.
    """
    for module in model.modules():
        for kind, name in (
            (nn.TransformerEncoderLayer, "activation_relu_or_gelu"),
            (nn.TransformerEncoder, "use_nested_tensor"),
        ):
            if isinstance(module, kind) and not set(divided).isdisjoint(module.modules()):
                undo.callback(setattr, module, name, getattr(module, name, False))
                setattr(module, name, False)
