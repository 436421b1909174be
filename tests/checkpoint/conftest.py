"""Tiny Llamas made by transformers, and their `.nemo`."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from llamas import FAMILY, LLAMA3_ROPE, ROOT, MakeLlama, convert_quietly

from steerlm_nemo.tokenizer import SentencePieceTokenizer


@pytest.fixture(scope="session")
def make_llama(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> MakeLlama:
    """A function that saves a random Llama with grouped-query attention; keywords go to its config class."""

    def make(
        *,
        architecture: str = "LlamaForCausalLM",
        dtype: str = "float32",
        max_shard_size: str = "5GB",
        safe_serialization: bool = True,
        **overrides: Any,
    ) -> Path:
        import torch
        import transformers

        model_class = getattr(transformers, architecture)

        settings: dict[str, Any] = {
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": SentencePieceTokenizer(small_model).vocab_size + 3,  # rows that no token has, as in the wild
            "max_position_embeddings": 256,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "tie_word_embeddings": False,
        }
        torch.manual_seed(len(overrides))
        model = model_class(model_class.config_class(**{**settings, **overrides}))
        for parameter in model.parameters():  # larger than at initialisation, so that mistakes show in the logits
            if parameter.ndim == 1:
                parameter.data.uniform_(0.5, 1.5)
            else:
                parameter.data.normal_(std=0.15)
        folder = tmp_path_factory.mktemp("llama")
        model.to(getattr(torch, dtype)).save_pretrained(
            folder, max_shard_size=max_shard_size, safe_serialization=safe_serialization
        )
        shutil.copy(small_model, folder / "tokenizer.model")
        return folder

    return make


@pytest.fixture(scope="session")
def llama(make_llama: MakeLlama) -> Path:
    return make_llama()


@pytest.fixture(scope="session")
def family(make_llama: MakeLlama) -> dict[str, Path]:
    return {name: make_llama(**settings) for name, settings in FAMILY.items()}


@pytest.fixture(scope="session")
def llama_nemo(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert_quietly(llama, tmp_path_factory.mktemp("nemo") / "llama.nemo")


@pytest.fixture(scope="session")
def stories(genuine_checkpoint: Path) -> Path:
    """A small Llama: grouped-query attention, tied embeddings, with logits from another implementation."""
    return genuine_checkpoint


@pytest.fixture(scope="session")
def llama3_style(make_llama: MakeLlama) -> Path:
    """A Llama with nothing but a `tokenizer.json`, of Llama 3's kind: byte-level BPE, BOS added by a template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=384 - len(special), initial_alphabet=alphabet, show_progress=False)
    tokenizer.train([str(ROOT / "LICENSE")], trainer)
    tokenizer.add_special_tokens(special)
    bos_id = tokenizer.token_to_id(special[0])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{special[0]} $A", special_tokens=[(special[0], bos_id)]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=special[0], eos_token=special[1])
    rope = {"rope_scaling": LLAMA3_ROPE, "rope_theta": 5e5, "vocab_size": len(fast), "bos_token_id": bos_id}
    folder = make_llama(**rope, eos_token_id=bos_id + 1)
    (folder / "tokenizer.model").unlink()
    fast.save_pretrained(folder)
    return folder
