"""`config.json` of a Hugging Face Llama, or of a class like it, <-> `model_config.yaml` of a NeMo GPT model.

Everything a converted model depends on is read from the config, never from a flag: rope scaling, tied embeddings,
head size, biases, window. What Megatron's GPT cannot express is refused with its name.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steerlm_nemo.checkpoint.architectures import (
    LLAMA,
    Architecture,
    Unsupported,
    architecture_of,
    architecture_with,
)
from steerlm_nemo.checkpoint.beside import json_if_there
from steerlm_nemo.checkpoint.mapping import Layout, Traits
from steerlm_nemo.checkpoint.recognise import what_it_is
from steerlm_nemo.checkpoint.tokenizer_files import TokenizerFiles
from steerlm_nemo.errors import CheckpointError, InputError, shown
from steerlm_nemo.records import unreadable

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
_ROPE_ADVICE = {
    "dynamic": ". Up to max_position_embeddings tokens it is the default: set rope_scaling to null for these",
    "yarn": ". Where it was put in for long texts only (Qwen's advice), take it out, and set max_position_embeddings "
    "to original_max_position_embeddings",
    "longrope": ". The models of the same family with a short context have none",
    "su": ". The models of the same family with a short context have none",
}
_NEWER_KEYS = ("rope_parameters", "dtype")  # of transformers 5: rope_theta and rope_scaling, torch_dtype
_NOT_EXPORTED = (*_NEWER_KEYS, "auto_map")  # the code that auto_map names is not carried


@dataclass(frozen=True)
class HFConfig:
    """A `config.json` that has been checked; `raw` is the file, with the defaults of its class for absent keys."""

    raw: dict[str, Any]
    where: str
    architecture: Architecture = LLAMA
    silent: frozenset[str] = frozenset()  # keys of `raw` that are not in the file

    @property
    def traits(self) -> Traits:
        row, raw = self.architecture, self.raw
        attention_bias, mlp_bias = (
            key in row.bias_keys and bool(raw.get(key)) for key in ("attention_bias", "mlp_bias")
        )
        if attention_bias != mlp_bias:
            one, other = ("attention_bias", "mlp_bias") if attention_bias else ("mlp_bias", "attention_bias")
            cure = f". Set {other} to true and add such biases of zero: that computes the same"
            raise Unsupported(
                f"{one} is true and {other} is not; in NeMo either all linear layers have a bias, or those of query, "
                f"key and value (Qwen2ForCausalLM), or none{cure if other in row.bias_keys else ''}"
            )
        return Traits(
            tied=bool(raw.get("tie_word_embeddings", False)),
            qkv_bias=row.qkv_bias or attention_bias,
            linear_bias=attention_bias,
            qk_norm=row.qk_norm,
            fused=row.fused,
        )

    @property
    def window(self) -> int | None:
        """How many tokens each token attends to, itself included; None: all before it.

        Raises:
            Unsupported: the layers differ, or the class has no window and the config names one.
        """
        layers = self.raw.get("layer_types") or ["full_attention"]
        kinds = set(layers) if isinstance(layers, list) and all(isinstance(kind, str) for kind in layers) else set()
        if len(kinds) != 1 or not kinds <= {"full_attention", "sliding_attention"}:
            raise Unsupported(f"layer_types is {shown(layers)}; in NeMo's GPT all layers are of one type")
        window = self.architecture.window.read(self.raw)
        if window is not None and (type(window) is not int or window < 1):
            raise Unsupported(f"sliding_window is {shown(window)}, not a positive whole number")
        if self.raw.get("layer_types") and (window is not None) != (kinds == {"sliding_attention"}):
            raise Unsupported(f"layer_types is {shown(layers)}, but the other keys say that the window is {window}")
        return window

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know of how the config was read."""
        row, named = self.architecture, self.raw["architectures"][0]
        notes = [f"{named} is converted as the {row.name} that it is, and exported as one"] if named != row.name else []
        if self.raw.get("auto_map"):
            notes.append(f"the code that auto_map names is not run: the model is {row.name} as transformers has it")
        if self.window is not None:
            source = f"the default of {row.name}, config.json being silent" if "sliding_window" in self.silent else ""
            notes.append(
                f"sliding_window is {self.window}{source and f' ({source})'}: each token attends to that many tokens, "
                "itself included, in training and when served"
            )
        return tuple(notes)

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
            "head_dim": self.head_dim,  # a null is worked out by some classes only
        }

    @property
    def tp_sizes(self) -> tuple[int, ...]:
        """Tensor-parallel sizes for which its vocabulary is padded."""
        return tp_sizes(self.raw["num_attention_heads"], self.num_query_groups, self.raw["intermediate_size"])

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


def read_hf_config(folder: Path) -> HFConfig:
    """Read and check `config.json`.

    Raises:
        InputError: the folder or the file is not there, or it is not a JSON object.
        CheckpointError: listing everything about the model that cannot be converted.
    """
    path = folder / "config.json"
    try:
        is_folder = folder.is_dir()
    except OSError as err:
        raise unreadable(folder, err) from err
    if not is_folder:
        raise InputError(
            f"{folder}: not a folder ({what_it_is(folder) or 'a file'}). Give the folder of a Hugging Face checkpoint "
            "(config.json, *.safetensors)."
        )
    raw = json_if_there(path)
    if raw is None:
        found = what_it_is(folder)
        raise InputError(
            f"{folder}: has no config.json, so it is not a Hugging Face checkpoint{f': {found}' if found else ''}"
        )
    try:
        row = architecture_of(raw)
    except Unsupported as err:
        raise CheckpointError(f"{path}: this model cannot be converted:\n  {err}") from err
    config = HFConfig({**row.defaults, **raw}, str(path), row, frozenset(row.defaults.keys() - raw.keys()))
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
    problems = [
        f"{key} is {raw[key]!r}, not a number, or a negative one" for key in _NUMBERS if not _is_number(raw[key], 0)
    ]
    if not isinstance(raw["tie_word_embeddings"], bool):
        problems.append(f"tie_word_embeddings is {raw['tie_word_embeddings']!r}, neither true nor false")
    for key in ("attention_bias", "mlp_bias"):
        if not isinstance(raw.get(key) or False, bool):
            problems.append(f"{key} is {shown(raw[key])}, neither true nor false")
        elif raw.get(key) and key not in config.architecture.bias_keys:
            problems.append(
                f"{key} is true, but {config.architecture.name} does not read it; take it out of config.json"
            )
    for read in (lambda: config.traits, lambda: config.window):
        try:
            read()
        except Unsupported as err:
            problems.append(str(err))
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
    if not _is_number(rope["rope_theta"], 0) or not rope["rope_theta"]:
        problems.append(f"rope_theta is {rope['rope_theta']!r}, not a positive number")
    for rotary in (raw.get("partial_rotary_factor", 1.0), rope.get("partial_rotary_factor", 1.0)):
        if rotary not in (None, 1.0):
            problems.append(f"partial_rotary_factor is {rotary}; only 1.0 is known")
    needed = {"default": (), "linear": ("factor",), "llama3": tuple(_LLAMA3_KEYS)}.get(str(rope["rope_type"]))
    if needed is None:
        advice = _ROPE_ADVICE.get(str(rope["rope_type"]), "")
        problems.append(f"rope type is {rope['rope_type']!r}; only default, linear and llama3 are known{advice}")
    elif absent := [key for key in needed if key not in rope]:
        problems.append(f"rope type {rope['rope_type']} lacks {', '.join(absent)}")
    else:
        problems += [
            f"{key} of the rope is {rope[key]!r}, not a number above 0"
            for key in needed
            if not _is_number(rope[key], 0) or not rope[key]
        ]
    return problems


def _is_number(value: object, least: float) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and least <= value < math.inf


def tp_sizes(num_attention_heads: int, num_query_groups: int, ffn_hidden_size: int) -> tuple[int, ...]:
    """Powers of two, as machines have devices; odd numbers where none but those divide what ranks share (9 heads)."""
    shared = math.gcd(num_attention_heads, num_query_groups, ffn_hidden_size)
    return TP_SIZES if shared % 2 == 0 or shared == 1 else tuple(n for n in range(1, 10, 2) if shared % n == 0)


def vocabulary_padding(num_rows: int, tokenizer_size: int, rows_needed: int, sizes: tuple[int, ...]) -> tuple[int, int]:
    """(padded size, make_vocab_size_divisible_by) such that NeMo computes that size at each of the TP `sizes`.

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
    shares = math.lcm(*sizes)
    for doublings in range(7, -1, -1):  # multiples of 64 keep GPU matrix products on their fast path; tiny ones cannot
        multiple = math.lcm(shares, 2**doublings)
        padded = -(-num_rows // multiple) * multiple
        if padded - tokenizer_size < padded // shares:
            return padded, padded // shares
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
        "bias": config.traits.linear_bias,
        "activation": "fast-swiglu",
        "headscale": False,
        "transformer_block_type": "pre_ln",
        "openai_gelu": False,
        "normalize_attention_scores": True,
        "position_embedding_type": "rope",
        "rotary_percentage": 1.0,
        "rotary_base": rope["rope_theta"],
        "attention_type": "multihead",
        "share_embeddings_and_output_weights": config.traits.tied,
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
    if config.traits.qkv_bias and not config.traits.linear_bias:
        model["qkv_bias"] = True
    if config.traits.qk_norm:
        # NeMo's other layer specifications pass over `qk_layernorm`.
        model |= {"qk_layernorm": True, "name": "decoder_block_gpt"}
    if config.window is not None:
        model["window_size"] = [config.window - 1, 0]  # tokens before and after the one that attends
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
        "mcore_gpt": (True,),
        "normalization": ("rmsnorm",),
        "position_embedding_type": ("rope",),
        "rotary_percentage": (1.0,),
        "activation": ("fast-swiglu", "swiglu"),
    }
    problems = [
        f"{key} is {config.get(key)!r}, a Llama has {' or '.join(map(repr, accepted))}"
        for key, accepted in expected.items()
        if config.get(key) not in accepted
    ]
    sizes = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "max_position_embeddings")
    problems += [f"{key} is {config.get(key)!r}" for key in sizes if not isinstance(config.get(key), int)]
    if not isinstance(config.get("layernorm_epsilon"), float):
        problems.append(f"layernorm_epsilon is {config.get('layernorm_epsilon')!r}")
    window = config.get("window_size")
    if window is not None and not (isinstance(window, list) and len(window) == 2 and window[1] == 0):
        problems.append(f"window_size is {window!r}; [tokens before, 0] can be exported")
    target = str(config.get("target", ""))
    if problems and target and not target.endswith(("GPTModel", "GPTSFTModel")):
        problems.insert(0, f"target is {target!r}: a model of another kind; only GPT models have a Llama in them")
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


def traits_of(config: dict[str, Any]) -> Traits:
    """Which tensors a NeMo model has; where keys are absent NeMo's defaults hold."""
    all_biases = bool(config.get("bias", True))
    source = _row_of_source(config)
    return Traits(
        tied=bool(config.get("share_embeddings_and_output_weights", True)),
        qkv_bias=all_biases or bool(config.get("qkv_bias", False)),
        linear_bias=all_biases,
        qk_norm=bool(config.get("qk_layernorm", False)),
        fused=source is not None and source.fused,
    )


def _row_of_source(config: dict[str, Any]) -> Architecture | None:
    """The class that the model was converted from, where that is known."""
    source = (config.get(SOURCE_KEY) or {}).get("config") or {}
    try:
        return architecture_of(source) if source else None
    except Unsupported as err:
        raise CheckpointError(f"{SOURCE_KEY} of model_config.yaml: {err}") from err


def hf_config(
    config: dict[str, Any], layout: Layout, traits: Traits, dtype: str, bos_id: int, eos_id: int, where: str
) -> dict[str, Any]:
    """`config.json` of an exported model. Fields that NeMo has no word for come from the source, where it is known.

    Raises:
        CheckpointError: the class that it would have cannot say what the model has.
    """
    source = (config.get(SOURCE_KEY) or {}).get("config") or {}
    window = config["window_size"][0] + 1 if config.get("window_size") else None
    row = _row_of_source(config) or architecture_with(
        qkv_bias=traits.qkv_bias and not traits.linear_bias, qk_norm=traits.qk_norm, window=window
    )
    rope: dict[str, Any] | None = None
    if config.get("seq_len_interpolation_factor"):
        factor = float(config["seq_len_interpolation_factor"])
        rope = {"type": "linear", "rope_type": "linear", "factor": factor}
    elif config.get("scale_positional_embedding"):
        defaults = {"scale_factor": 8, "low_freq_factor": 1, "high_freq_factor": 4, "old_context_len": 8192}
        rope = {"rope_type": "llama3"} | {key: config.get(nemo, defaults[nemo]) for key, nemo in _LLAMA3_KEYS.items()}
    rope_theta = config.get("rotary_base", 10000.0)
    exported = {
        "attention_dropout": 0.0,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "hidden_act": "silu",
        "use_cache": True,
    } | {key: value for key, value in source.items() if key not in _NOT_EXPORTED}
    exported |= {
        "architectures": [row.name],
        "model_type": row.model_type,
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
        **dict.fromkeys(row.bias_keys, traits.linear_bias),
        **row.window.write(window),
        "tie_word_embeddings": traits.tied,
        # Each twice: as transformers 4 spells it, and as 5 does, which prefers its own names.
        "rope_theta": rope_theta,
        "rope_scaling": rope,
        "rope_parameters": {"rope_type": "default", "rope_theta": rope_theta}
        | {key: value for key, value in (rope or {}).items() if key != "type"},
        "torch_dtype": dtype,
        "dtype": dtype,
    }
    _require_same_model(HFConfig(exported, where, row), traits, window)
    return exported


def _require_same_model(exported: HFConfig, traits: Traits, window: int | None) -> None:
    try:
        found = (exported.traits, exported.window)
    except Unsupported as err:
        raise CheckpointError(f"{exported.where}: cannot be exported as {exported.architecture.name}: {err}") from err
    if found != (traits, window):
        raise CheckpointError(
            f"{exported.where}: cannot be exported as {exported.architecture.name}: the model has {traits} and window "
            f"{window}, and config.json would say {found[0]} and {found[1]}"
        )
