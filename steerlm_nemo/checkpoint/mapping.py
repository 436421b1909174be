"""Hugging Face Llama names <-> Megatron's global keys: one table, read in both directions.

Megatron stacks layers: a key with a leading axis of `num_layers` and no layer index. Axes in shapes: L layers,
H hidden, F ffn, V padded vocabulary, A query heads, G query groups (key/value heads), D head size.
Rotary embeddings need no permutation: both sides rotate halves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    Tensors = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Layout:
    """The sizes that decide every shape."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    vocab_size: int  # rows on the Hugging Face side
    padded_vocab_size: int  # rows on the Megatron side

    def hf_shape(self, axes: str) -> tuple[int, ...]:
        """`axes` names one size each: H F V (Hugging Face's vocabulary), Q = A*D, K = G*D."""
        sizes = {
            "H": self.hidden_size,
            "F": self.ffn_hidden_size,
            "V": self.vocab_size,
            "Q": self.num_attention_heads * self.head_dim,
            "K": self.num_query_groups * self.head_dim,
        }
        return tuple(sizes[axis] for axis in axes)

    def global_shape(self, rule: Rule) -> tuple[int, ...]:
        """Shape of a Megatron tensor, the leading L included where layers are stacked."""
        rows = sum(self.hf_shape(axes)[0] for axes in rule.hf_axes)
        if rule.is_vocabulary:
            rows = self.padded_vocab_size
        shape = (rows, *self.hf_shape(rule.hf_axes[0])[1:])
        return (self.num_layers, *shape) if rule.is_stacked else shape


def interleave_qkv(parts: Tensors, layout: Layout) -> torch.Tensor:
    """Per query group its A/G query heads, then its key head, then its value head."""
    import torch

    groups, dim = layout.num_query_groups, layout.head_dim
    by_group = [part.reshape(groups, -1, dim, layout.hidden_size) for part in parts]
    return torch.cat(by_group, dim=1).reshape(-1, layout.hidden_size)


def split_qkv(qkv: torch.Tensor, layout: Layout) -> Tensors:
    """Inverse of `interleave_qkv`."""
    per_group = layout.num_attention_heads // layout.num_query_groups
    by_group = qkv.reshape(layout.num_query_groups, per_group + 2, layout.head_dim, layout.hidden_size)
    parts = by_group[:, :per_group], by_group[:, per_group : per_group + 1], by_group[:, per_group + 1 :]
    return tuple(part.reshape(-1, layout.hidden_size) for part in parts)


def stack_rows(parts: Tensors, layout: Layout) -> torch.Tensor:
    """Gate rows, then up rows. A tensor-parallel rank holds a shard of each, not a run of rows of the whole."""
    import torch

    return torch.cat(parts)


def halve_rows(stacked: torch.Tensor, layout: Layout) -> Tensors:
    """Inverse of `stack_rows`."""
    return stacked[: layout.ffn_hidden_size], stacked[layout.ffn_hidden_size :]


def same(parts: Tensors, layout: Layout) -> torch.Tensor:
    return parts[0]


def alone(tensor: torch.Tensor, layout: Layout) -> Tensors:
    """Inverse of `same`."""
    return (tensor,)


def pad_vocabulary(parts: Tensors, layout: Layout) -> torch.Tensor:
    """Zero rows up to the padded size. No token id reaches them."""
    import torch

    missing = layout.padded_vocab_size - parts[0].shape[0]
    return torch.nn.functional.pad(parts[0], (0, 0, 0, missing)) if missing else parts[0]


def trim_vocabulary(padded: torch.Tensor, layout: Layout) -> Tensors:
    """Inverse of `pad_vocabulary`."""
    return (padded[: layout.vocab_size],)


@dataclass(frozen=True)
class Rule:
    """One Megatron tensor and the Hugging Face tensors that it holds.

    `tp_axis` is the axis that tensor parallelism splits, of one layer's tensor; None: every rank has all of it.
    """

    hf: tuple[str, ...]
    hf_axes: tuple[str, ...]  # one string per name, see `Layout.hf_shape`
    mcore: str
    tp_axis: int | None
    pack: Callable[[Any, Layout], Any] = same
    unpack: Callable[[Any, Layout], Any] = alone

    @property
    def is_stacked(self) -> bool:
        return "{i}" in self.hf[0]

    @property
    def is_vocabulary(self) -> bool:
        return self.pack is pad_vocabulary

    @property
    def is_concatenation(self) -> bool:
        """Whether the Megatron tensor is the Hugging Face ones one after the other in memory."""
        return self.pack in (same, stack_rows)

    def hf_names(self, layer: int | None) -> tuple[str, ...]:
        return tuple(name.format(i=layer) for name in self.hf)


_HF, _MC = "model.layers.{i}", "model.decoder.layers"
_ATTENTION, _MLP = f"{_HF}.self_attn", f"{_HF}.mlp"
_QKV = tuple(f"{_ATTENTION}.{part}_proj.weight" for part in "qkv")
_FC1 = (f"{_MLP}.gate_proj.weight", f"{_MLP}.up_proj.weight")
_VOCABULARY = (pad_vocabulary, trim_vocabulary)

EMBEDDING = Rule(("model.embed_tokens.weight",), ("VH",), "model.embedding.word_embeddings.weight", 0, *_VOCABULARY)
OUTPUT = Rule(("lm_head.weight",), ("VH",), "model.output_layer.weight", 0, *_VOCABULARY)
# fmt: off
RULES = (
    # Hugging Face names and their axes, Megatron key, tp axis
    EMBEDDING,
    Rule((f"{_HF}.input_layernorm.weight",), ("H",), f"{_MC}.self_attention.linear_qkv.layer_norm_weight", None),
    Rule(_QKV, ("QH", "KH", "KH"), f"{_MC}.self_attention.linear_qkv.weight", 0, interleave_qkv, split_qkv),
    Rule((f"{_ATTENTION}.o_proj.weight",), ("HQ",), f"{_MC}.self_attention.linear_proj.weight", 1),
    Rule((f"{_HF}.post_attention_layernorm.weight",), ("H",), f"{_MC}.mlp.linear_fc1.layer_norm_weight", None),
    Rule(_FC1, ("FH", "FH"), f"{_MC}.mlp.linear_fc1.weight", 0, stack_rows, halve_rows),
    Rule((f"{_MLP}.down_proj.weight",), ("HF",), f"{_MC}.mlp.linear_fc2.weight", 1),
    Rule(("model.norm.weight",), ("H",), "model.decoder.final_layernorm.weight", None),
    OUTPUT,
)
# fmt: on

# Transformer Engine modules ask for their FP8 state by these names. There is none in a Hugging Face checkpoint; the
# stock converter stores empty ones, and without them a stock GPU load stops at the first missing key.
EXTRA_STATE_STACKED = tuple(
    f"{_MC}.{module}._extra_state"
    for module in (
        *("self_attention.core_attention", "self_attention.linear_qkv", "self_attention.linear_proj"),
        *("mlp.linear_fc1", "mlp.linear_fc2"),
    )
)
EXTRA_STATE = ("model.decoder.final_layernorm._extra_state",)


def rules_for(*, tied: bool) -> tuple[Rule, ...]:
    """The rules of a model; tied embeddings have no output tensor of their own."""
    return tuple(rule for rule in RULES if not (tied and rule is OUTPUT))
