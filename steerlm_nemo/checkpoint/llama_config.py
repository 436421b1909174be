"""`config.json` of a Hugging Face Llama <-> `model_config.yaml` of a NeMo GPT model.

Everything a converted model depends on is read from the config, never from a flag: rope scaling, tied embeddings,
head size. What Megatron's Llama cannot express is refused with its name.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steerlm_nemo.checkpoint.mapping import Layout
from steerlm_nemo.checkpoint.tokenizer_files import TokenizerFiles, json_of
from steerlm_nemo.errors import CheckpointError, InputError

# What an absent key means: the defaults of transformers' class.
_LLAMA_DEFAULTS: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
_DEFAULTS = {
    "LlamaForCausalLM": _LLAMA_DEFAULTS,
    "MistralForCausalLM": _LLAMA_DEFAULTS
    | {
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
}
ARCHITECTURES = tuple(_DEFAULTS)
NEMO_CLASS = "nemo.collections.nlp.models.language_modeling.megatron_gpt_model.MegatronGPTModel"
NEMO_VERSION = "2.3.2"
SOURCE_KEY = "hf_checkpoint"  # in model_config.yaml: what the checkpoint was converted from
TP_SIZES = (1, 2, 4, 8)

_SIZES = (
    *("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size"),
    "max_position_embeddings",
)
_OPTIONAL_SIZES = ("num_key_value_heads", "head_dim")
_NUMBERS = ("rms_norm_eps", "initializer_range")
_LLAMA3_KEYS = {  # Hugging Face name -> NeMo name
    "factor": "scale_factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_position_embeddings": "old_context_len",
}
_NEWER_KEYS = ("rope_parameters", "dtype")  # of transformers 5: rope_theta and rope_scaling, torch_dtype


@dataclass(frozen=True)
class HFConfig:
    """A `config.json` that has been checked; `raw` is the file, with the defaults of its class for absent keys."""

    raw: dict[str, Any]
    where: str

    @property
    def tied(self) -> bool:
        return bool(self.raw.get("tie_word_embeddings", False))

    @property
    def num_query_groups(self) -> int:
        return int(self.raw.get("num_key_value_heads") or self.raw["num_attention_heads"])

    @property
    def head_dim(self) -> int:
        return int(self.raw.get("head_dim") or self.raw["hidden_size"] // self.raw["num_attention_heads"])

    @property
    def rope(self) -> dict[str, Any]:
        """Rope parameters under the newer names: rope_type, rope_theta and what the type needs."""
        rope = dict(self.raw.get("rope_scaling") or self.raw.get("rope_parameters") or {})
        rope.setdefault("rope_type", rope.pop("type", "default"))
        rope.setdefault("rope_theta", self.raw.get("rope_theta", 10000.0))
        return rope

    def for_transformers_4(self) -> dict[str, Any]:
        """The config in the spelling that transformers 4 reads.

        It passes over `rope_parameters`, computes with a `rope_theta` of 10000 instead, and says nothing.
        """
        scaling = {key: value for key, value in self.rope.items() if key != "rope_theta"}
        return {key: value for key, value in self.raw.items() if key not in _NEWER_KEYS} | {
            "rope_theta": self.rope["rope_theta"],
            "rope_scaling": None if scaling["rope_type"] == "default" else scaling,
        }

    def layout(self, padded_vocab_size: int) -> Layout:
        return Layout(
            self.raw["num_hidden_layers"],
            self.raw["hidden_size"],
            self.raw["intermediate_size"],
            self.raw["num_attention_heads"],
            self.num_query_groups,
            self.head_dim,
            self.raw["vocab_size"],
            padded_vocab_size,
        )


def read_json_object(path: Path) -> dict[str, Any]:
    """Raises InputError: the file cannot be read, or is not a JSON object."""
    try:
        return json_of(path, path.read_bytes())
    except OSError as err:
        raise InputError(f"{path}: cannot be read: {err.strerror}") from err


def read_hf_config(folder: Path) -> HFConfig:
    """Read and check `config.json`.

    Raises:
        InputError: the folder or the file is not there, or it is not a JSON object.
        CheckpointError: listing everything about the model that cannot be converted.
    """
    path = folder / "config.json"
    if not folder.is_dir():
        raise InputError(
            f"{folder}: not a folder. Give the folder of a Hugging Face checkpoint (config.json, *.safetensors)."
        )
    if not path.is_file():
        raise InputError(f"{folder}: has no config.json, so it is not a Hugging Face checkpoint")
    raw = read_json_object(path)
    architectures = raw.get("architectures")
    if architectures not in [[name] for name in ARCHITECTURES]:
        raise CheckpointError(
            f"{path}: this model cannot be converted:\n  architectures is {architectures}; only "
            f"{' and '.join(ARCHITECTURES)} are known"
        )
    config = HFConfig(_DEFAULTS[architectures[0]] | raw, str(path))
    if problems := list(_problems(config)):
        raise CheckpointError(f"{path}: this model cannot be converted:\n  " + "\n  ".join(problems))
    return config


def _problems(config: HFConfig) -> list[str]:
    raw = config.raw
    if missing := [key for key in _SIZES if type(raw[key]) is not int or raw[key] <= 0]:
        return [f"{', '.join(missing)}: missing, or not a positive whole number"]
    if wrong := [
        key for key in _OPTIONAL_SIZES if raw[key] is not None and (type(raw[key]) is not int or raw[key] < 1)
    ]:
        return [f"{key} is {raw[key]!r}, not a positive whole number" for key in wrong]
    problems = [f"{key} is {raw[key]!r}, not a number" for key in _NUMBERS if not _is_number(raw[key])]
    if not isinstance(raw["tie_word_embeddings"], bool):
        problems.append(f"tie_word_embeddings is {raw['tie_word_embeddings']!r}, neither true nor false")
    for key in ("attention_bias", "mlp_bias"):
        if raw.get(key):
            problems.append(f"{key} is true; NeMo's Llama has no biases")
    if raw.get("sliding_window") is not None:
        problems.append(
            f"sliding_window is {raw['sliding_window']} (the default of Mistral where it is absent; null means none); "
            "the converted model would attend to everything"
        )
    if raw["hidden_act"] != "silu":
        problems.append(f"hidden_act is {raw['hidden_act']!r}; only 'silu' is known")
    if raw.get("quantization_config"):
        problems.append("quantization_config is set; convert the unquantised checkpoint")
    if raw["num_attention_heads"] % config.num_query_groups:
        problems.append(
            f"num_attention_heads {raw['num_attention_heads']} is not a multiple of "
            f"num_key_value_heads {config.num_query_groups}"
        )
    for key in ("rope_scaling", "rope_parameters"):
        if not isinstance(raw.get(key) or {}, dict):
            return [*problems, f"{key} is {raw[key]!r}, not a mapping"]
    rope = config.rope
    if nested := [key for key, value in rope.items() if isinstance(value, dict)]:
        return [*problems, f"rope_parameters differ by layer ({', '.join(nested)}); NeMo's Llama has one rope for all"]
    if raw.get("rope_theta") not in (None, rope["rope_theta"]):
        problems.append(f"rope_theta is {raw['rope_theta']}, but {rope['rope_theta']} in rope_parameters; keep one")
    if not _is_number(rope["rope_theta"]) or not rope["rope_theta"] > 0:
        problems.append(f"rope_theta is {rope['rope_theta']!r}, not a positive number")
    for rotary in (raw.get("partial_rotary_factor", 1.0), rope.get("partial_rotary_factor", 1.0)):
        if rotary not in (None, 1.0):
            problems.append(f"partial_rotary_factor is {rotary}; only 1.0 is known")
    needed = {"default": (), "linear": ("factor",), "llama3": tuple(_LLAMA3_KEYS)}.get(str(rope["rope_type"]))
    if needed is None:
        problems.append(f"rope type is {rope['rope_type']!r}; only default, linear and llama3 are known")
    elif absent := [key for key in needed if key not in rope]:
        problems.append(f"rope type {rope['rope_type']} lacks {', '.join(absent)}")
    else:
        problems += [f"{key} of the rope is {rope[key]!r}, not a number" for key in needed if not _is_number(rope[key])]
    return problems


def _is_number(value: object) -> bool:
    return type(value) in (int, float)


def vocabulary_padding(num_rows: int, tokenizer_size: int, rows_needed: int) -> tuple[int, int]:
    """(padded size, make_vocab_size_divisible_by) such that NeMo computes that size at every TP in `TP_SIZES`.

    NeMo rounds the *tokenizer's* size up to a multiple of `make_vocab_size_divisible_by * tp`, so a usual choice
    gives another size at each TP, and a checkpoint loads at one only. With `padded / 8` as the divisor all of
    1, 2, 4 and 8 round to `padded`, as long as fewer than `padded / 8` rows are padding. `rows_needed` is the
    tokenizer's largest id and one: with gaps between ids it is more than the tokens that NeMo counts.

    Raises:
        CheckpointError: the tokenizer has more tokens than the embedding rows, or far fewer.
    """
    if rows_needed > num_rows:
        raise CheckpointError(
            f"the tokenizer has {tokenizer_size} tokens with ids up to {rows_needed - 1}, but the embedding only "
            f"{num_rows} rows (vocab_size): text with the last tokens could not be embedded. "
            "Use the tokenizer that belongs to the model."
        )
    largest = max(TP_SIZES)
    multiple = 128  # a multiple of 64 keeps GPU matrix products on their fast path; tiny vocabularies cannot afford it
    while multiple >= largest:
        padded = -(-num_rows // multiple) * multiple
        if padded - tokenizer_size < padded // largest:
            return padded, padded // largest
        multiple //= 2
    raise CheckpointError(
        f"the embedding has {num_rows} rows (vocab_size) but the tokenizer only {tokenizer_size} tokens; NeMo derives "
        "the rows from the tokenizer and cannot reach that many. Put the model's whole tokenizer there, with its added "
        "tokens (a tokenizer.json, without tokenizer.model). Only rows that belong to no token may go, with "
        "resize_token_embeddings."
    )


def nemo_config(
    config: HFConfig,
    layout: Layout,
    divisor: int,
    precision: str,
    tokenizer: TokenizerFiles,
    generation: dict[str, Any],
) -> dict[str, Any]:
    """`model_config.yaml` with the keys of the stock converter, for this model.

    `precision` is 32, 16 or bf16. What only the way back to Hugging Face needs is kept under `hf_checkpoint`.
    """
    raw, rope = config.raw, config.rope
    model: dict[str, Any] = {
        "mcore_gpt": True,
        "micro_batch_size": 4,
        "global_batch_size": 8,
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "virtual_pipeline_model_parallel_size": None,
        "encoder_seq_length": raw["max_position_embeddings"],
        "max_position_embeddings": raw["max_position_embeddings"],
        "num_layers": layout.num_layers,
        "hidden_size": layout.hidden_size,
        "ffn_hidden_size": layout.ffn_hidden_size,
        "num_attention_heads": layout.num_attention_heads,
        "num_query_groups": layout.num_query_groups,
        # null means hidden_size / num_attention_heads, as the stock converter writes it
        "kv_channels": None if layout.head_dim * layout.num_attention_heads == layout.hidden_size else layout.head_dim,
        "init_method_std": raw.get("initializer_range", 0.02),
        "use_scaled_init_method": True,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "ffn_dropout": 0.0,
        "apply_query_key_layer_scaling": True,
        "normalization": "rmsnorm",
        "layernorm_epsilon": raw["rms_norm_eps"],
        "do_layer_norm_weight_decay": False,
        "make_vocab_size_divisible_by": divisor,
        "pre_process": True,
        "post_process": True,
        "persist_layer_norm": True,
        "bias": False,
        "activation": "fast-swiglu",
        "headscale": False,
        "transformer_block_type": "pre_ln",
        "openai_gelu": False,
        "normalize_attention_scores": True,
        "position_embedding_type": "rope",
        "rotary_percentage": 1.0,
        "rotary_base": rope["rope_theta"],
        "attention_type": "multihead",
        "share_embeddings_and_output_weights": config.tied,
        "tokenizer": tokenizer.nemo_config(),
        "native_amp_init_scale": 4294967296,
        "native_amp_growth_interval": 1000,
        "hysteresis": 2,
        "fp32_residual_connection": False,
        "fp16_lm_cross_entropy": False,
        "megatron_amp_O2": False,
        "grad_allreduce_chunk_size_mb": 125,
        "grad_div_ar_fusion": True,
        "gradient_accumulation_fusion": False,
        "bias_activation_fusion": False,
        "bias_dropout_add_fusion": False,
        "masked_softmax_fusion": True,
        "get_attention_mask_from_fusion": True,
        "seed": 1234,
        "resume_from_checkpoint": None,
        "use_cpu_initialization": False,
        "onnx_safe": False,
        "gradient_as_bucket_view": True,
        "sync_batch_comm": False,
        "activations_checkpoint_granularity": None,
        "activations_checkpoint_method": None,
        "activations_checkpoint_num_layers": None,
        "num_micro_batches_with_partial_activation_checkpoints": None,
        "activations_checkpoint_layers_per_pipeline": None,
        "sequence_parallel": False,
        "transformer_engine": True,
        "fp8": False,
        "data": {},
        "optim": {"name": "fused_adam", "lr": 2e-4, "weight_decay": 0.01, "betas": [0.9, 0.98]},
        "precision": int(precision) if precision.isdigit() else precision,
        "target": NEMO_CLASS,
        "nemo_version": NEMO_VERSION,
        SOURCE_KEY: {"config": raw, "generation_config": generation},
    }
    if rope["rope_type"] == "linear":
        model["seq_len_interpolation_factor"] = rope["factor"]
    elif rope["rope_type"] == "llama3":
        model["scale_positional_embedding"] = True
        model |= {nemo: rope[key] for key, nemo in _LLAMA3_KEYS.items()}
    return model


def layout_of(config: dict[str, Any], padded_vocab_size: int, tokenizer_size: int, where: str) -> Layout:
    """The sizes of a NeMo Llama, to be exported.

    Raises:
        CheckpointError: listing everything that is not a Llama.
    """
    expected = {
        "mcore_gpt": True,
        "normalization": "rmsnorm",
        "position_embedding_type": "rope",
        "rotary_percentage": 1.0,
        "bias": False,
        "activation": ("fast-swiglu", "swiglu"),
    }
    problems = [
        f"{key} is {config.get(key)!r}, a Llama has {want!r}"
        for key, want in expected.items()
        if config.get(key) not in (want if isinstance(want, tuple) else (want,))
    ]
    sizes = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "max_position_embeddings")
    problems += [f"{key} is {config.get(key)!r}" for key in sizes if not isinstance(config.get(key), int)]
    if not isinstance(config.get("layernorm_epsilon"), float):
        problems.append(f"layernorm_epsilon is {config.get('layernorm_epsilon')!r}")
    if problems:
        raise CheckpointError(f"{where}: this model is not a Llama:\n  " + "\n  ".join(problems))
    heads = config["num_attention_heads"]
    source = (config.get(SOURCE_KEY) or {}).get("config") or {}
    return Layout(
        config["num_layers"],
        config["hidden_size"],
        config["ffn_hidden_size"],
        heads,
        config.get("num_query_groups") or heads,
        config.get("kv_channels") or config["hidden_size"] // heads,
        source.get("vocab_size") or tokenizer_size,
        padded_vocab_size,
    )


def hf_config(
    config: dict[str, Any], layout: Layout, dtype: str, tied: bool, bos_id: int, eos_id: int
) -> dict[str, Any]:
    """`config.json` of an exported model. Fields that NeMo has no word for come from the source, where it is known."""
    source = (config.get(SOURCE_KEY) or {}).get("config") or {}
    rope: dict[str, Any] | None = None
    if config.get("seq_len_interpolation_factor"):
        factor = float(config["seq_len_interpolation_factor"])
        rope = {"type": "linear", "rope_type": "linear", "factor": factor}
    elif config.get("scale_positional_embedding"):
        defaults = {"scale_factor": 8, "low_freq_factor": 1, "high_freq_factor": 4, "old_context_len": 8192}
        rope = {"rope_type": "llama3"} | {key: config.get(nemo, defaults[nemo]) for key, nemo in _LLAMA3_KEYS.items()}
    exported = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "hidden_act": "silu",
        "pretraining_tp": 1,
        "use_cache": True,
    } | {key: value for key, value in source.items() if key not in _NEWER_KEYS}
    return exported | {
        "hidden_size": layout.hidden_size,
        "intermediate_size": layout.ffn_hidden_size,
        "num_attention_heads": layout.num_attention_heads,
        "num_key_value_heads": layout.num_query_groups,
        "num_hidden_layers": layout.num_layers,
        "head_dim": layout.head_dim,
        "vocab_size": layout.vocab_size,
        "max_position_embeddings": config["max_position_embeddings"],
        "initializer_range": config.get("init_method_std", 0.02),
        "rms_norm_eps": config["layernorm_epsilon"],
        "rope_theta": config.get("rotary_base", 10000.0),
        "rope_scaling": rope,
        "tie_word_embeddings": tied,
        "torch_dtype": dtype,
        "dtype": dtype,  # for transformers 5, which prefers it
    }
