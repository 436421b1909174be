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


def convert_quietly(folder: Path, out: Path, precision: str | None = None) -> Path:
    convert(plan_conversion(folder, precision), out, lambda line: None)
    return out


def export_quietly(nemo_path: Path, out: Path, **settings: Any) -> Path:
    with open_nemo(nemo_path) as nemo:
        export(plan_export(nemo), out, lambda line: None, **settings)
    return out
