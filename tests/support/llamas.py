"""Helpers that the tests of checkpoints share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from steerlm_nemo.checkpoint.archive import open_nemo
from steerlm_nemo.checkpoint.from_hf import convert, plan_conversion
from steerlm_nemo.checkpoint.to_hf import export, plan_export

ROOT = Path(__file__).resolve().parents[2]
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,  # far below the length of the test's texts, so that scaling shows
}
MakeLlama = Callable[..., Path]
# One small model of every row of `architectures`, with what sets it apart from a Llama.
FAMILY: dict[str, dict[str, Any]] = {
    "all biases": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"architecture": "MistralForCausalLM", "sliding_window": 24, "head_dim": 24},
    "qwen2": {"architecture": "Qwen2ForCausalLM", "tie_word_embeddings": True, "rope_theta": 1e6},
    "qwen3": {"architecture": "Qwen3ForCausalLM", "head_dim": 32, "rope_theta": 1e6},
    "phi3": {"architecture": "Phi3ForCausalLM", "sliding_window": None, "pad_token_id": 0},
}


def convert_quietly(folder: Path, out: Path, precision: str | None = None) -> Path:
    convert(plan_conversion(folder, precision), out, lambda line: None)
    return out


def export_quietly(nemo_path: Path, out: Path, **settings: Any) -> Path:
    with open_nemo(nemo_path) as nemo:
        export(plan_export(nemo), out, lambda line: None, **settings)
    return out
