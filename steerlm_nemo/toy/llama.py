"""A tiny, randomly initialised Llama with a tokenizer of its own, for runs on a laptop.

The tokenizer is trained on the trees that the run uses, so a record becomes few tokens. Needs no torch.
"""

from __future__ import annotations

import io
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steerlm_nemo.attributes import AttributeSchema
from steerlm_nemo.conversation import ASSISTANT, SYSTEM_PROMPT, USER
from steerlm_nemo.errors import InputError
from steerlm_nemo.outputs import target_of
from steerlm_nemo.template import SYSTEM_ROLE


@dataclass(frozen=True)
class TinyLlama:
    """Sizes of the model. Everything divides by two, so that tensor parallelism of two fits."""

    vocab_size: int
    max_position: int
    hidden_size: int = 128
    num_layers: int = 3
    num_heads: int = 8
    num_key_value_heads: int = 4
    ffn_size: int = 384
    initializer_range: float = 0.05

    def config(self) -> dict[str, Any]:
        """The `config.json` of Hugging Face's LlamaForCausalLM."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.ffn_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "max_position_embeddings": self.max_position,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "rope_scaling": None,
            "initializer_range": self.initializer_range,
            "attention_bias": False,
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "torch_dtype": "float32",
            "use_cache": True,
        }

    def num_parameters(self) -> int:
        return sum(math.prod(shape) for _, shape in self.shapes())

    def shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and shape of every weight, in Hugging Face's names."""
        head_size = self.hidden_size // self.num_heads
        kv_size = self.num_key_value_heads * head_size
        yield "model.embed_tokens.weight", (self.vocab_size, self.hidden_size)
        for layer in range(self.num_layers):
            prefix = f"model.layers.{layer}."
            yield prefix + "self_attn.q_proj.weight", (self.hidden_size, self.hidden_size)
            yield prefix + "self_attn.k_proj.weight", (kv_size, self.hidden_size)
            yield prefix + "self_attn.v_proj.weight", (kv_size, self.hidden_size)
            yield prefix + "self_attn.o_proj.weight", (self.hidden_size, self.hidden_size)
            yield prefix + "mlp.gate_proj.weight", (self.ffn_size, self.hidden_size)
            yield prefix + "mlp.up_proj.weight", (self.ffn_size, self.hidden_size)
            yield prefix + "mlp.down_proj.weight", (self.hidden_size, self.ffn_size)
            yield prefix + "input_layernorm.weight", (self.hidden_size,)
            yield prefix + "post_attention_layernorm.weight", (self.hidden_size,)
        yield "model.norm.weight", (self.hidden_size,)
        yield "lm_head.weight", (self.vocab_size, self.hidden_size)


def write_random_llama(folder: Path, llama: TinyLlama, tokenizer_model: bytes, seed: int) -> None:
    """Write a Hugging Face folder; equal arguments give equal bytes. An older folder of that name is replaced."""
    import numpy as np
    from safetensors.numpy import save_file

    rng = np.random.default_rng(seed)
    weights = {
        name: np.ones(shape, np.float32)
        if len(shape) == 1
        else (llama.initializer_range * rng.standard_normal(shape)).astype(np.float32)
        for name, shape in llama.shapes()
    }
    target = target_of(folder, folder=True)
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        save_file(weights, partial / "model.safetensors", metadata={"format": "pt"})
        (partial / "tokenizer.model").write_bytes(tokenizer_model)
        _write_json(partial / "config.json", llama.config())
        _write_json(partial / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2})
        tokenizer_config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": False, "legacy": False}
        _write_json(partial / "tokenizer_config.json", tokenizer_config)
        if target.exists():
            shutil.rmtree(target)
        partial.replace(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def train_tokenizer(texts: Iterable[str], schema: AttributeSchema, vocab_size: int) -> bytes:
    """A SentencePiece model as Llama 2 has it: BPE, bytes for what is unknown, digits apart, text left as it is.

    `:` and `,` are pieces that never merge, so an attribute line is always name, colon, digit, comma. Content is
    joined by the constant parts of every record (system prompt, role names, attribute names).

    Raises:
        InputError: the texts cannot fill a vocabulary of that size.
    """
    import sentencepiece

    keys = schema.keys()
    values = [f"{key}:{value}" for key in keys for value in schema.legal_values(key)]
    constant = [SYSTEM_ROLE, USER, ASSISTANT, *values]
    lines = [line for text in texts for line in text.splitlines() if line.strip()]
    # Rare enough to leave the content its share of the vocabulary, frequent enough for one piece a word.
    repeats = max(20, len(lines) // 20)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            # In a record these stand behind a marker, with no space in front. The comma, a piece of its own, takes
            # the space that training puts in front of every line.
            sentence_iterator=iter("," + line for line in lines + constant * repeats),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=True,
            split_by_unicode_script=False,  # a word keeps its full stop: shorter records
            user_defined_symbols=[":", ",", SYSTEM_PROMPT.strip().replace(" ", "▁")],
            character_coverage=1.0 if vocab_size <= 1024 else 0.9995,
            max_sentence_length=100_000,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as err:
        raise InputError(f"these trees cannot fill a vocabulary of {vocab_size} pieces: {err}") from err
    return model.getvalue()


def tree_texts(trees: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """Every message text of OpenAssistant trees, depth first."""
    stack: list[Any]
    for tree in trees:
        stack = [tree.get("prompt")]
        while stack:
            message = stack.pop()
            if isinstance(message, Mapping) and isinstance(message.get("text"), str):
                yield message["text"]
                replies = message.get("replies")
                stack += reversed(replies if isinstance(replies, list) else ())
