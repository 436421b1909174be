"""A small Llama with random weights, and what it must compute, found with numpy alone.

Of the sizes of the genuine tiny Llama (grouped queries, tied embeddings), in a folder of the same files:
`expected_logits.safetensors` has `seqN.input_ids` and `seqN.logits`, `expected.json` the greedy text after BOS.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from steerlm_nemo.tokenizer import SentencePieceTokenizer

HIDDEN, LAYERS, HEADS, KV_HEADS, FFN, CONTEXT, VOCABULARY = 64, 5, 8, 4, 172, 512, 512
EPSILON, THETA = 1e-5, 10000.0
CONFIG = {
    **{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "torch_dtype": "float32"},
    **{"hidden_size": HIDDEN, "intermediate_size": FFN, "num_hidden_layers": LAYERS, "vocab_size": VOCABULARY},
    **{"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "max_position_embeddings": CONTEXT},
    **{"rms_norm_eps": EPSILON, "rope_theta": THETA, "rope_scaling": None, "tie_word_embeddings": True},
    **{"bos_token_id": 1, "eos_token_id": 2, "attention_bias": False},
}
Weights = dict[str, np.ndarray]


def write_made_llama(folder: Path, tokenizer_model: Path) -> None:
    """`tokenizer_model` has at most 512 pieces."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(4)
    weights = random_weights(rng)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(tokenizer_model, folder / "tokenizer.model")
    for name, content in (
        ("config.json", CONFIG),
        ("generation_config.json", {"bos_token_id": 1, "eos_token_id": 2}),
        ("tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "legacy": True}),
    ):
        (folder / name).write_text(json.dumps(content, indent=2))
    tokenizer = SentencePieceTokenizer(tokenizer_model)
    greedy = [1]
    while len(greedy) < 120:
        greedy.append(int(logits_of(weights, greedy)[-1, : tokenizer.vocab_size].argmax()))
    (folder / "expected.json").write_text(json.dumps({"greedy_text": tokenizer.decode(greedy)}))
    sequences = ([1], [1, *tokenizer.encode("What is the capital?")], greedy, rng.integers(0, VOCABULARY, CONTEXT))
    expected = {}
    for number, ids in enumerate(sequences):
        expected[f"seq{number}.input_ids"] = np.asarray(ids, np.int64)
        expected[f"seq{number}.logits"] = logits_of(weights, ids).astype(np.float32)
    save_file(expected, folder / "expected_logits.safetensors")


def random_weights(rng: np.random.Generator) -> Weights:
    def normal(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) / shape[-1] ** 0.5 * 1.3).astype(np.float32)

    head = HIDDEN // HEADS
    weights = {
        "model.embed_tokens.weight": (0.1 * rng.standard_normal((VOCABULARY, HIDDEN))).astype(np.float32),
        "model.norm.weight": (1 + 0.1 * rng.standard_normal(HIDDEN)).astype(np.float32),
    }
    weights["model.embed_tokens.weight"][:259] *= 0.3  # control pieces and single bytes: hardly ever chosen
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{prefix}{norm}.weight"] = (1 + 0.1 * rng.standard_normal(HIDDEN)).astype(np.float32)
        for name, rows in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS), ("o", HEADS)):
            weights[f"{prefix}self_attn.{name}_proj.weight"] = normal(rows * head, HIDDEN)
        weights[f"{prefix}mlp.gate_proj.weight"] = normal(FFN, HIDDEN)
        weights[f"{prefix}mlp.up_proj.weight"] = normal(FFN, HIDDEN)
        weights[f"{prefix}mlp.down_proj.weight"] = normal(HIDDEN, FFN)
    return weights


def logits_of(weights: Weights, token_ids: list[int] | np.ndarray) -> np.ndarray:
    """Logits [S, vocabulary] in float64, as the paper has it (LLaMA, arXiv:2302.13971); half-rotated rotary form."""
    num_tokens, head = len(token_ids), HIDDEN // HEADS
    angles = np.outer(np.arange(num_tokens), THETA ** (-np.arange(0, head, 2) / head))
    cos, sin = (np.concatenate([turned, turned], -1)[:, None] for turned in (np.cos(angles), np.sin(angles)))
    future = np.triu(np.full((num_tokens, num_tokens), -np.inf), 1)

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return x @ weights[f"{name}.weight"].astype(np.float64).T

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + EPSILON) * weights[f"{name}.weight"]

    def rotated(x: np.ndarray) -> np.ndarray:
        return x * cos + np.concatenate([-x[..., head // 2 :], x[..., : head // 2]], -1) * sin

    x = weights["model.embed_tokens.weight"].astype(np.float64)[np.asarray(token_ids)]
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        h = norm(x, f"{prefix}.input_layernorm")
        q, k, v = (linear(h, f"{prefix}.self_attn.{name}_proj").reshape(num_tokens, -1, head) for name in "qkv")
        k, v = (np.repeat(each, HEADS // KV_HEADS, 1) for each in (rotated(k), v))
        scores = np.einsum("shd,thd->hst", rotated(q), k) / head**0.5 + future
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        attended = np.einsum("hst,thd->shd", shares / shares.sum(-1, keepdims=True), v).reshape(num_tokens, HIDDEN)
        x = x + linear(attended, f"{prefix}.self_attn.o_proj")
        h = norm(x, f"{prefix}.post_attention_layernorm")
        gate = linear(h, f"{prefix}.mlp.gate_proj")
        x = x + linear(gate / (1 + np.exp(-gate)) * linear(h, f"{prefix}.mlp.up_proj"), f"{prefix}.mlp.down_proj")
    return norm(x, "model.norm") @ weights["model.embed_tokens.weight"].T
