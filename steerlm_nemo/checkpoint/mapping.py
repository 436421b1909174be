"""Hugging Face names <-> Megatron's global keys: one table, read in both directions.

Megatron stacks layers: a key with a leading axis of `num_layers` and no layer index. Axes in shapes: L layers,
H hidden, F ffn, V padded vocabulary, A query heads, G query groups (key/value heads), D head size.
Rotary embeddings need no permutation: both sides rotate halves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


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
        """`axes` names one size each: H F D V (Hugging Face's vocabulary), Q = A*D, K = G*D, P = Q + 2K, U = 2F."""
        sizes = {
            "H": self.hidden_size,
            "F": self.ffn_hidden_size,
            "V": self.vocab_size,
            "D": self.head_dim,
            "Q": self.num_attention_heads * self.head_dim,
            "K": self.num_query_groups * self.head_dim,
            "P": (self.num_attention_heads + 2 * self.num_query_groups) * self.head_dim,
            "U": 2 * self.ffn_hidden_size,
        }
        return tuple(sizes[axis] for axis in axes)

    def global_shape(self, rule: Rule) -> tuple[int, ...]:
        """Shape of a Megatron tensor, the leading L included where layers are stacked."""
        rows = sum(self.hf_shape(axes)[0] for axes in rule.hf_axes)
        if rule.is_vocabulary:
            rows = self.padded_vocab_size
        shape = (rows, *self.hf_shape(rule.hf_axes[0])[1:])
        return (self.num_layers, *shape) if rule.is_stacked else shape


@dataclass(frozen=True)
class Traits:
    """What decides which tensors a model has; see `architectures`."""

    tied: bool
    qkv_bias: bool = False
    linear_bias: bool = False  # of every other linear layer
    qk_norm: bool = False
    fused: bool = False  # Hugging Face's query, key and value in one tensor, gate and up in one

    @property
    def untied(self) -> bool:
        return not self.tied

    @property
    def separate(self) -> bool:
        return not self.fused


@dataclass(frozen=True)
class Run:
    """Rows that follow one another on both sides. `part` counts the Hugging Face tensors of a rule; None: zeros."""

    part: int | None
    start: int  # first row of that Hugging Face tensor
    count: int


Rows = tuple[int, ...]  # of each Hugging Face tensor of a rule


def in_order(rows: Rows, layout: Layout) -> Iterator[Run]:
    """One tensor after the other. Of gate and up a tensor-parallel rank holds a shard of each, not a shard of both."""
    for part, count in enumerate(rows):
        yield Run(part, 0, count)


def by_query_group(rows: Rows, layout: Layout) -> Iterator[Run]:
    """Per query group its A/G query heads, then its key head, then its value head."""
    for group in range(layout.num_query_groups):
        for part, count in enumerate(count // layout.num_query_groups for count in rows):
            yield Run(part, group * count, count)


def fused_by_query_group(rows: Rows, layout: Layout) -> Iterator[Run]:
    """The same rows from one tensor that has all queries, then all keys, then all values."""
    heads, groups = layout.num_attention_heads, layout.num_query_groups
    for group in range(groups):
        for first, count in (
            (group * heads // groups, heads // groups),
            (heads + group, 1),
            (heads + groups + group, 1),
        ):
            yield Run(0, first * layout.head_dim, count * layout.head_dim)


def padded(rows: Rows, layout: Layout) -> Iterator[Run]:
    """Zero rows up to the padded vocabulary. No token id reaches them."""
    yield Run(0, 0, rows[0])
    if missing := layout.padded_vocab_size - rows[0]:
        yield Run(None, 0, missing)


@dataclass(frozen=True)
class Rule:
    """One Megatron tensor and the Hugging Face tensors that it holds: the same rows in the order of `runs`.

    `tp_axis` is the axis that tensor parallelism splits, of one layer's tensor; None: every rank has all of it.
    `needs` names the one of `Traits` that a model has the tensor by; None: all have it.
    """

    hf: tuple[str, ...]
    hf_axes: tuple[str, ...]  # one string per name, see `Layout.hf_shape`
    mcore: str
    tp_axis: int | None
    order: Callable[[Rows, Layout], Iterator[Run]] = in_order
    needs: str | None = None

    @property
    def is_stacked(self) -> bool:
        return "{i}" in self.hf[0]

    @property
    def is_vocabulary(self) -> bool:
        return self.order is padded

    def hf_names(self, layer: int | None) -> tuple[str, ...]:
        return tuple(name.format(i=layer) for name in self.hf)

    def runs(self, layout: Layout) -> list[Run]:
        """All rows of the Megatron tensor (of one layer, where they are stacked), from its first to its last."""
        return list(self.order(tuple(layout.hf_shape(axes)[0] for axes in self.hf_axes), layout))

    def rows_of_parts(self, layout: Layout) -> list[list[tuple[int, int]]]:
        """The way back: per Hugging Face tensor its rows in the Megatron tensor, as (first, count) in order."""
        parts: list[list[tuple[int, int, int]]] = [[] for _ in self.hf]
        first = 0
        for run in self.runs(layout):
            if run.part is not None:
                parts[run.part].append((run.start, first, run.count))
            first += run.count
        return [[(first, count) for _, first, count in sorted(part)] for part in parts]

    def unpack(self, packed: torch.Tensor, layout: Layout) -> list[torch.Tensor]:
        """The Hugging Face tensors of a Megatron tensor, as views where their rows lie together."""
        import torch

        parts = [[packed[first : first + count] for first, count in rows] for rows in self.rows_of_parts(layout)]
        return [torch.cat(part) if len(part) > 1 else part[0] for part in parts]


_HF, _MC = "model.layers.{i}", "model.decoder.layers"
_ATTENTION, _MLP = f"{_HF}.self_attn", f"{_HF}.mlp"
_MC_ATTENTION = f"{_MC}.self_attention"


def _each(module: str, names: str, kind: str) -> tuple[str, ...]:
    return tuple(f"{module}.{name}_proj.{kind}" for name in names.split())


_WEIGHTS, _BIASES = (_each(_ATTENTION, "q k v", kind) for kind in ("weight", "bias"))
_FC1, _FC1_BIASES = (_each(_MLP, "gate up", kind) for kind in ("weight", "bias"))
_QKV, _QKV_BIAS = (f"{_MC_ATTENTION}.linear_qkv.{kind}" for kind in ("weight", "bias"))

EMBEDDING = Rule(("model.embed_tokens.weight",), ("VH",), "model.embedding.word_embeddings.weight", 0, padded)
OUTPUT = Rule(("lm_head.weight",), ("VH",), "model.output_layer.weight", 0, padded, "untied")
# fmt: off
RULES = (
    # Hugging Face names and their axes, Megatron key, tp axis, order of the rows, what has it
    EMBEDDING,
    Rule((f"{_HF}.input_layernorm.weight",), ("H",), f"{_MC_ATTENTION}.linear_qkv.layer_norm_weight", None),
    Rule(_WEIGHTS, ("QH", "KH", "KH"), _QKV, 0, by_query_group, "separate"),
    Rule((f"{_ATTENTION}.qkv_proj.weight",), ("PH",), _QKV, 0, fused_by_query_group, "fused"),
    Rule(_BIASES, ("Q", "K", "K"), _QKV_BIAS, 0, by_query_group, "qkv_bias"),
    Rule((f"{_ATTENTION}.q_norm.weight",), ("D",), f"{_MC_ATTENTION}.q_layernorm.weight", None, needs="qk_norm"),
    Rule((f"{_ATTENTION}.k_norm.weight",), ("D",), f"{_MC_ATTENTION}.k_layernorm.weight", None, needs="qk_norm"),
    Rule((f"{_ATTENTION}.o_proj.weight",), ("HQ",), f"{_MC_ATTENTION}.linear_proj.weight", 1),
    Rule((f"{_ATTENTION}.o_proj.bias",), ("H",), f"{_MC_ATTENTION}.linear_proj.bias", None, needs="linear_bias"),
    Rule((f"{_HF}.post_attention_layernorm.weight",), ("H",), f"{_MC}.mlp.linear_fc1.layer_norm_weight", None),
    Rule(_FC1, ("FH", "FH"), f"{_MC}.mlp.linear_fc1.weight", 0, needs="separate"),
    Rule((f"{_MLP}.gate_up_proj.weight",), ("UH",), f"{_MC}.mlp.linear_fc1.weight", 0, needs="fused"),
    Rule(_FC1_BIASES, ("F", "F"), f"{_MC}.mlp.linear_fc1.bias", 0, needs="linear_bias"),
    Rule((f"{_MLP}.down_proj.weight",), ("HF",), f"{_MC}.mlp.linear_fc2.weight", 1),
    Rule((f"{_MLP}.down_proj.bias",), ("H",), f"{_MC}.mlp.linear_fc2.bias", None, needs="linear_bias"),
    Rule(("model.norm.weight",), ("H",), "model.decoder.final_layernorm.weight", None),
    OUTPUT,
)
# fmt: on

# Transformer Engine modules ask for their FP8 state by these names. There is none in a Hugging Face checkpoint; the
# stock converter stores empty ones, and without them a stock GPU load stops at the first missing key.
_EXTRA_STATE_MODULES = (
    *("self_attention.core_attention", "self_attention.linear_qkv", "self_attention.linear_proj"),
    *("mlp.linear_fc1", "mlp.linear_fc2"),
)
_QK_NORM_MODULES = ("self_attention.q_layernorm", "self_attention.k_layernorm")
EXTRA_STATE = ("model.decoder.final_layernorm._extra_state",)


def extra_state_of_layers(traits: Traits) -> tuple[str, ...]:
    """Keys of which each layer has an empty entry."""
    modules = (*_EXTRA_STATE_MODULES, *(_QK_NORM_MODULES if traits.qk_norm else ()))
    return tuple(f"{_MC}.{module}._extra_state" for module in modules)


def rules_for(traits: Traits) -> tuple[Rule, ...]:
    """The rules of a model: one per Megatron tensor that it has."""
    return tuple(rule for rule in RULES if rule.needs is None or getattr(traits, rule.needs))
