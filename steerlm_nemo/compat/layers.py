"""The layer specification for machines without Transformer Engine: Megatron Core's local layers, torch attention.

On disk its keys equal those of the Transformer Engine specification (mcore's `sharded_state_dict_keys_map`).
Axes: S sequence, B batch, N heads of this tensor-parallel rank, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec


class TorchNorm(torch.nn.Module):
    """RMSNorm or LayerNorm of torch, also under sequence parallelism.

    Megatron Core's own torch norm refuses sequence parallelism; all it needs is that the weight is marked, so that
    its gradient is summed over the tensor-parallel ranks.
    """

    def __new__(cls, config: Any, hidden_size: int, eps: float = 1e-5, **unused: Any) -> torch.nn.Module:  # type: ignore[misc]
        norm_class = {"RMSNorm": torch.nn.RMSNorm, "LayerNorm": torch.nn.LayerNorm}[config.normalization]
        norm = norm_class(hidden_size, eps=eps)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        return norm


class TorchAttention(MegatronModule):
    """Core attention through `scaled_dot_product_attention`.

    Megatron Core's local attention materialises the scores and, on a CPU, is slower than torch's kernel.
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
    ) -> None:
        super().__init__(config=config)
        if config.context_parallel_size != 1:
            raise ValueError("context parallelism needs Transformer Engine; set model.context_parallel_size=1")
        self.window = window_of(config)
        self.attn_mask_type = attn_mask_type
        self.softmax_scale = softmax_scale
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout

    def forward(
        self,
        query_SBND: torch.Tensor,
        key_SBND: torch.Tensor,
        value_SBND: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> torch.Tensor:
        """[S,B,N,D] queries to [S,B,N*D]. `attention_mask` is True where attending is forbidden."""
        if packed_seq_params is not None or attention_bias is not None:
            raise ValueError("packed sequences and attention bias need Transformer Engine")
        mask_type = attn_mask_type or self.attn_mask_type
        query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query_SBND, key_SBND, value_SBND))
        causal = mask_type == AttnMaskType.causal and query.shape[2] > 1
        # A causal mask of a right-padded batch forbids nothing that is_causal does not: only padding looks at padding.
        allowed = None if causal or attention_mask is None else ~attention_mask
        num_queries, num_keys = query.shape[2], key.shape[2]
        if self.window is not None and num_keys > self.window:
            ages = torch.arange(num_keys - num_queries, num_keys, device=query.device)[:, None]
            ages = ages - torch.arange(num_keys, device=query.device)
            within = ages < self.window
            if causal:
                within, causal = within & (ages >= 0), False
            allowed = within if allowed is None else allowed & within
        dropout = self.dropout if self.training else 0.0
        with tensor_parallel.get_cuda_rng_tracker().fork() if dropout else _nothing():
            context = F.scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=allowed,
                dropout_p=dropout,
                is_causal=causal,
                scale=self.softmax_scale,
                enable_gqa=query.shape[1] != key.shape[1],
            )
        return context.permute(2, 0, 1, 3).flatten(2)


def window_of(config: Any) -> int | None:
    """How many tokens each token attends to, itself included; None: all before it.

    Raises:
        ValueError: a window that looks ahead.
    """
    if config.window_size is None:
        return None
    before, after = config.window_size
    if after != 0 or before < 0:
        raise ValueError(f"window_size {list(config.window_size)}: only [tokens before, 0] is known")
    return before + 1


def _nothing() -> Any:
    import contextlib

    return contextlib.nullcontext()


def complete_qk_norm_gradients(nemo_model: Any) -> None:
    """Let the gradients of query and key norms be summed over the tensor-parallel ranks, of which each has some heads.

    NeMo 2.3.2 and NeMo-Aligner 0.7.0 sum those of norms under sequence parallelism only, so that the copies of such a
    weight would drift apart; Megatron Core's own optimizer sums them. On a GPU as on a CPU. To be removed when NeMo's
    `allreduce_sequence_parallel_gradients` looks at `qk_layernorm`, as Megatron Core's does.
    """
    group = parallel_state.get_tensor_model_parallel_group()
    if not nemo_model.transformer_config.qk_layernorm or group.size() == 1 or nemo_model.use_mcore_dist_optim:
        return

    def summed(gradient: torch.Tensor) -> torch.Tensor:
        total = gradient.clone()
        torch.distributed.all_reduce(total, group=group)
        return total

    chunks = nemo_model.model if isinstance(nemo_model.model, list) else [nemo_model.model]
    for name, parameter in (pair for chunk in chunks for pair in chunk.named_parameters()):
        is_qk_norm = "q_layernorm." in name or "k_layernorm." in name
        if is_qk_norm and parameter.requires_grad and not getattr(parameter, "sequence_parallel", False):
            parameter.register_hook(summed)


def cpu_layer_spec(qk_norm: bool) -> ModuleSpec:
    """Megatron Core's local layer with torch's attention and norms; `qk_norm`: of each query and key head, too."""
    spec = get_gpt_layer_local_spec()
    spec.submodules.input_layernorm = TorchNorm
    spec.submodules.pre_mlp_layernorm = TorchNorm
    attention = spec.submodules.self_attention.submodules
    attention.core_attention = TorchAttention
    if qk_norm:
        attention.q_layernorm = attention.k_layernorm = TorchNorm
    return spec
