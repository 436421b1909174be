"""Megatron Core's GPT over a cache of keys and values in which rows of any length share one forward pass.

Upstream's two inference contexts do not serve here: the static one keeps all rows of a batch at one position, the
dynamic one needs kernels that only GPUs have. So the self-attention of a loaded model is given a second way through:
called with a `CachedForward`, it attends over the cache by `scaled_dot_product_attention`, on a CPU and a GPU alike.
Without one it is upstream's, so NeMo's own `generate` still works on the same model.

Needed with megatron-core 0.12; to be removed when upstream batches rows of different lengths without CUDA.
Axes: T tokens of all rows of a step, B rows of a group, Q new tokens and L tokens in all of its longest row,
G query groups (key and value heads), R query heads per group, D head size.
"""

from __future__ import annotations

import types
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from megatron.core.inference.contexts import BaseInferenceContext
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    gather_from_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)

from steerlm_nemo.compat.layers import window_of


@dataclass(frozen=True)
class Group:
    """Rows that attend together, being of similar length. Their tokens lie one after the other in the step."""

    tokens: slice  # of the T tokens
    num_rows: int
    longest: int  # new tokens
    padded_BQ: torch.Tensor | None  # flat; which of these tokens; None where every row has `longest` new ones
    filled: torch.Tensor | None  # which places of [B*Q] are no padding, in the step's order
    cache_BL: torch.Tensor  # places in the cache, flat [B*L]
    mask: torch.Tensor | None  # additive [B,1,R*Q,L]; None where every token sees every place


class CachedForward(BaseInferenceContext):
    """One forward pass: where each token stands, where its keys and values go, and what it may look at."""

    def __init__(self, rope: tuple[torch.Tensor, torch.Tensor] | None, places_T: torch.Tensor, groups: Sequence[Group]):
        self.rope = rope  # see `rotate`
        self.places_T = places_T
        self.groups = groups

    def is_static_batching(self) -> bool:
        return True


class CachedModel:
    """A Megatron Core GPT of this rank with a cache of `num_places` tokens."""

    def __init__(self, model: Any, num_places: int, context_length: int) -> None:
        gpt = model.module if hasattr(model, "module") else model  # Float16Module wraps bf16 weights
        config = gpt.config
        if config.multi_latent_attention:
            raise ValueError("models with latent attention cannot be served")
        if gpt.position_embedding_type not in ("rope", "learned_absolute", "none"):
            raise ValueError(f"models with {gpt.position_embedding_type} position embeddings cannot be served")
        self._gpt = gpt
        attentions = [layer.self_attention for layer in gpt.decoder.layers]
        parameter = next(gpt.parameters())
        self.device = parameter.device
        self.dtype = attentions[0].linear_qkv.weight.dtype
        self.repeats = config.num_attention_heads // config.num_query_groups
        self.window = window_of(config)
        for attention in attentions:
            groups, size = attention.num_query_groups_per_partition, attention.hidden_size_per_attention_head
            attention.cache = torch.zeros((num_places, 2, groups, size), dtype=self.dtype, device=self.device)
            attention.forward = types.MethodType(_attend_cached, attention)
        for module in gpt.modules():
            if type(module) in _LINEAR and not module.sequence_parallel and not module.explicit_expert_comm:
                module.forward = types.MethodType(_LINEAR[type(module)], module)
        self._rope: tuple[torch.Tensor, torch.Tensor] | None = None  # of every position
        if gpt.position_embedding_type == "rope":
            angles = gpt.rotary_pos_emb(context_length)
            self._rope = rotation(angles, config.rotary_interleaved, self.dtype)

    @staticmethod
    def bytes_per_token(model: Any) -> int:
        """What a token takes in this rank's cache."""
        gpt = model.module if hasattr(model, "module") else model
        attention = gpt.decoder.layers[0].self_attention
        heads = attention.num_query_groups_per_partition * attention.hidden_size_per_attention_head
        return 2 * heads * len(gpt.decoder.layers) * attention.linear_qkv.weight.dtype.itemsize

    def logits(
        self,
        tokens_T: torch.Tensor,
        positions_T: torch.Tensor,
        places_T: torch.Tensor,
        groups: Sequence[Group],
        wanted: torch.Tensor,
    ) -> torch.Tensor:
        """Logits [len(wanted), V] in fp32 of the whole padded vocabulary, on every rank; the cache takes the tokens."""
        gpt = self._gpt
        rope = self._rope and (self._rope[0][positions_T], self._rope[1][positions_T])
        hidden = gpt.embedding(input_ids=tokens_T[None], position_ids=positions_T[None])
        context = CachedForward(rope, places_T, groups)
        hidden = gpt.decoder(hidden_states=hidden, attention_mask=None, inference_context=context)
        weight = gpt.shared_embedding_or_output_weight() if gpt.share_embeddings_and_output_weights else None
        logits, _ = gpt.output_layer(hidden[wanted], weight=weight, runtime_gather_output=False)
        return gather_from_tensor_model_parallel_region(logits)[:, 0].float()


def group_rows(
    num_new: np.ndarray,
    totals: np.ndarray,
    cache_of_rows: torch.Tensor,
    repeats: int,
    dtype: torch.dtype,
    window: int | None,
) -> list[Group]:
    """Put the rows of a step, in their order, into groups that pad little.

    `num_new` and `totals` [rows]: new tokens of each row and its length with them. `cache_of_rows` [rows, context] on
    the device: the place of each of a row's tokens in the cache. `window`: how many tokens each one attends to.
    """
    new, total = num_new.tolist(), totals.tolist()
    device = cache_of_rows.device
    groups, first, start = [], 0, 0
    for end in range(1, len(new) + 1):
        if end < len(new) and _similar(new[first], new[end], 2) and _similar(total[first], total[end], 16):
            continue
        longest, length, rows = max(new[first:end]), max(total[first:end]), end - first
        count = sum(new[first:end])
        new_B, total_B = num_new[first:end], totals[first:end]
        place_Q = np.arange(longest)
        padded = filled = None
        if count != rows * longest:
            within = place_Q < new_B[:, None]
            before = new_B.cumsum() - new_B
            padded = torch.from_numpy(np.where(within, before[:, None] + place_Q, 0).ravel()).to(device)
            filled = torch.from_numpy(np.flatnonzero(within)).to(device)
        mask = None
        if longest > 1 or min(total[first:end]) != length or (window is not None and length > window):
            last_seen = (total_B - new_B)[:, None] + place_Q  # the position of each new token
            age = last_seen[:, :, None] - np.arange(length)
            hidden = torch.from_numpy(age < 0 if window is None else (age < 0) | (age >= window))
            mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -torch.inf)
            mask = mask[:, None, None].expand(-1, -1, repeats, -1, -1).reshape(rows, 1, repeats * longest, length)
            mask = mask.to(device)
        cache_BL = cache_of_rows[first:end, :length].reshape(-1)
        groups.append(Group(slice(start, start + count), rows, longest, padded, filled, cache_BL, mask))
        first, start = end, start + count
    return groups


def _similar(one: int, other: int, slack: int) -> bool:
    """Little enough apart that padding costs less than a call of its own."""
    return abs(one - other) <= slack + max(one, other) // 4


def _attend_cached(attention: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """Self-attention of [T,1,H]; upstream's where it is not called with a `CachedForward`."""
    context = kwargs.get("inference_context")
    if not isinstance(context, CachedForward):
        return type(attention).forward(attention, hidden_states, *args, **kwargs)
    query, key, value = attention.get_query_key_value_tensors(hidden_states, None)
    if context.rope is not None:
        interleaved = attention.config.rotary_interleaved
        query, key = rotate(query, *context.rope, interleaved), rotate(key, *context.rope, interleaved)
    new = torch.stack([key[:, 0], value[:, 0]], dim=1).to(attention.cache.dtype)
    attention.cache.index_copy_(0, context.places_T, new)  # on a CPU twice as fast as indexing, as is index_select
    T, _, _, D = query.shape
    G = attention.num_query_groups_per_partition
    query_TGRD = query.reshape(T, G, -1, D)
    R = query_TGRD.shape[2]
    scale = attention.config.softmax_scale  # None: one over the root of D
    outputs = []
    for group in context.groups:
        B, Q = group.num_rows, group.longest
        mine = query_TGRD[group.tokens]
        if group.padded_BQ is not None:
            mine = mine.index_select(0, group.padded_BQ)
        # The query heads of a group become more queries of one head, so that keys need no copy per query head.
        mine = mine.reshape(B, Q, G, R, D).permute(0, 2, 3, 1, 4).reshape(B, G, R * Q, D)
        cached = attention.cache.index_select(0, group.cache_BL).view(B, -1, 2, G, D)
        out = F.scaled_dot_product_attention(
            mine.to(cached.dtype),
            cached[:, :, 0].transpose(1, 2),
            cached[:, :, 1].transpose(1, 2),
            attn_mask=group.mask,
            scale=scale,
        )
        out = out.view(B, G, R, Q, D).permute(0, 3, 1, 2, 4).reshape(B * Q, 1, G * R * D)
        outputs.append(out if group.filled is None else out.index_select(0, group.filled))
    return attention.linear_proj(outputs[0] if len(outputs) == 1 else torch.cat(outputs))


def rotation(angles: torch.Tensor, interleaved: bool, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines, and sines with the signs that upstream gives to the halves of a head; `rotate` only exchanges those."""
    sin = angles.sin()
    negative = sin[..., ::2] if interleaved else sin[..., : sin.shape[-1] // 2]
    negative.neg_()
    return angles.cos().to(dtype), sin.to(dtype)


def rotate(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """Rotary embedding of [T,1,heads,D], given what `rotation` makes of its positions, [T,1,1,rotary dim] each."""
    size = cos.shape[-1]
    turned = heads if size == heads.shape[-1] else heads[..., :size]
    if interleaved:
        exchanged = turned.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    else:
        exchanged = torch.cat(turned.chunk(2, dim=-1)[::-1], dim=-1)
    turned = turned * cos + exchanged * sin
    return turned if size == heads.shape[-1] else torch.cat([turned, heads[..., size:]], dim=-1)


def _column_linear(
    linear: Any, input_: torch.Tensor, weight: torch.Tensor | None = None, runtime_gather_output: bool | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`ColumnParallelLinear.forward` without its autograd functions, which take longer than a small product."""
    if torch.is_grad_enabled():
        return ColumnParallelLinear.forward(linear, input_, weight, runtime_gather_output)
    bias = None if linear.skip_bias_add else linear.bias
    output = torch.matmul(input_, (linear.weight if weight is None else weight).t())
    if bias is not None:
        output = output + bias
    if linear.gather_output if runtime_gather_output is None else runtime_gather_output:
        output = gather_from_tensor_model_parallel_region(output)
    return output, linear.bias if linear.skip_bias_add else None


def _row_linear(linear: Any, input_: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`RowParallelLinear.forward`, likewise."""
    if torch.is_grad_enabled() or not linear.input_is_parallel:
        return RowParallelLinear.forward(linear, input_)
    output = torch.matmul(input_, linear.weight.t())
    if linear.config.tensor_model_parallel_size > 1:
        output = reduce_from_tensor_model_parallel_region(output)
    if linear.skip_bias_add or linear.bias is None:
        return output, linear.bias
    # The bias joins after the all-reduce: added on every rank first, it would count tp_size times.
    return output + linear.bias, None


# Transformer Engine's are other classes, and stay as they are.
_LINEAR = {ColumnParallelLinear: _column_linear, RowParallelLinear: _row_linear}
