"""A tiny converted Llama and a few hundred records, for runs of the real training script."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from runs import ROOT, write_records
from version_1 import stored_format

from steerlm_nemo.checkpoint.archive import extract_nemo, write_nemo
from steerlm_nemo.tokenizer import SentencePieceTokenizer


@pytest.fixture(scope="session")
def base_nemo(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3: grouped-query attention, and norms of its heads. Converted by the script users call."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    config = Qwen3Config(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=SentencePieceTokenizer(small_model).vocab_size,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
        initializer_range=0.15,  # so that a gradient that lacks the other rank's heads shows in the losses
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    shutil.copy(small_model, folder / "tokenizer.model")
    out = folder / "base.nemo"
    subprocess.run(
        [
            sys.executable,
            ROOT / "scripts/convert_hf_llama_to_nemo.py",
            "--in-file",
            folder,
            "--out-file",
            out,
            "--no_check",
        ],
        check=True,
        capture_output=True,
    )
    return out


@pytest.fixture(scope="session")
def version_1_nemo(base_nemo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A value model as a training of ours left it while formats had version 1."""
    folder = tmp_path_factory.mktemp("version-1")
    config = extract_nemo(base_nemo, folder / "staged") / "model_config.yaml"
    stored = {"steerlm": stored_format(), "steerlm_provenance": {"base": "llama.nemo", "seed": 1234}}
    config.write_text(yaml.safe_dump({**yaml.safe_load(config.read_text()), **stored}))
    write_nemo(folder / "staged", folder / "old_value.nemo")
    return folder / "old_value.nemo"


@pytest.fixture(scope="session")
def records(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """`train` 160 and `val` 32 TEXT_TO_VALUE records."""
    folder = tmp_path_factory.mktemp("records")
    return {
        "train": write_records(folder / "train.jsonl", 160, "TEXT_TO_VALUE"),
        "val": write_records(folder / "val.jsonl", 32, "TEXT_TO_VALUE", seed=1),
    }
