"""The model config as this machine can run it. What is saved stays the config the user asked for."""

from __future__ import annotations

from omegaconf import DictConfig, open_dict

from steerlm_nemo.compat.capabilities import Capabilities

# Fused kernels and the layers of Transformer Engine exist on CUDA only.
_ON_CPU = {
    "transformer_engine": False,
    "persist_layer_norm": False,
    "masked_softmax_fusion": False,
    "apply_rope_fusion": False,
    "bias_activation_fusion": False,
    "bias_dropout_add_fusion": False,
    "bias_dropout_fusion": False,
    "bias_gelu_fusion": False,
    "gradient_accumulation_fusion": False,
    "gradient_as_bucket_view": True,
    "get_attention_mask_from_fusion": True,
    "use_flash_attention": False,
    "use_cpu_initialization": True,
    "overlap_p2p_comm": False,
    "batch_p2p_comm": False,
}
CPU_OPTIMIZER = "cpu_adam"
_FUSED_ADAMS = ("distributed_fused_adam", "fused_adam", "megatron_fused_adam", "mcore_distributed_optim")


def for_this_machine(cfg: DictConfig, capabilities: Capabilities) -> DictConfig:
    """A copy of a model config in which only what this device lacks is switched off; with CUDA, an equal copy."""
    adapted = cfg.copy()
    if capabilities.device == "cuda":
        return adapted
    with open_dict(adapted):
        adapted.update(_ON_CPU)
        if adapted.get("optim") is not None and adapted.optim.name in _FUSED_ADAMS:
            adapted.optim.name = CPU_OPTIMIZER
    return adapted
