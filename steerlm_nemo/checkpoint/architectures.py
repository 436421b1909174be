"""The model classes of Hugging Face that convert: one row each, with what sets them apart from a Llama.

A row holds for the class as transformers computes it. What is close to a Llama and yet another model is named below,
with the reason, so that nobody has to find it out from tensors that do not fit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from steerlm_nemo.errors import shown

_LLAMA: dict[str, Any] = {
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
_MISTRAL = {"intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 131072}
_QWEN = {
    **{"vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32, "max_position_embeddings": 32768},
    **{"bos_token_id": None, "eos_token_id": None},
    **{"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28},
}
_PHI3 = {
    **{"vocab_size": 32064, "hidden_size": 3072, "intermediate_size": 8192, "max_position_embeddings": 4096},
    **{"rms_norm_eps": 1e-5, "eos_token_id": 32000, "sliding_window": None},
}


class Unsupported(ValueError):
    """What a config asks for cannot be expressed; the text says why, and what to do."""


def _no_window(raw: Mapping[str, Any]) -> int | None:
    if raw.get("sliding_window") is not None:
        raise Unsupported(
            f"sliding_window is {shown(raw['sliding_window'])}, which this class has not: transformers passes over it "
            "and other programs do not. Take it out of config.json, or name the class that has it (MistralForCausalLM)"
        )
    return None


def _every_layer(raw: Mapping[str, Any]) -> int | None:
    return raw.get("sliding_window")


def _from_a_layer_on(raw: Mapping[str, Any]) -> int | None:
    first, num_layers = raw.get("max_window_layers"), raw["num_hidden_layers"]
    if not isinstance(raw.get("use_sliding_window") or False, bool):
        raise Unsupported(f"use_sliding_window is {shown(raw['use_sliding_window'])}, neither true nor false")
    if not raw.get("use_sliding_window") or raw.get("sliding_window") is None:
        return None
    if type(first) is not int or 0 < first < num_layers:
        raise Unsupported(
            f"sliding_window {shown(raw['sliding_window'])} holds from layer max_window_layers {shown(first)} of "
            f"{num_layers} on, but in NeMo all layers have one window or none. Up to that many tokens the model is the "
            "same without: set use_sliding_window to false and max_position_embeddings to the window in config.json"
        )
    return raw["sliding_window"] if first <= 0 else None


def _write_nothing(window: int | None) -> dict[str, Any]:
    return {}


def _write_window(window: int | None) -> dict[str, Any]:
    return {"sliding_window": window}


def _write_from_layer_0(window: int | None) -> dict[str, Any]:
    return {"use_sliding_window": True, "sliding_window": window, "max_window_layers": 0} if window else {}


@dataclass(frozen=True)
class Window:
    """Where a class keeps how many tokens each token attends to, itself included; and the way back."""

    read: Callable[[Mapping[str, Any]], int | None]
    write: Callable[[int | None], dict[str, Any]]


NO_WINDOW = Window(_no_window, _write_nothing)
ALL_LAYERS = Window(_every_layer, _write_window)
LATER_LAYERS = Window(_from_a_layer_on, _write_from_layer_0)


@dataclass(frozen=True)
class Architecture:
    """A class of transformers; `defaults` is what absent keys of its config.json mean."""

    name: str
    model_type: str
    defaults: Mapping[str, Any] = field(repr=False)
    window: Window = NO_WINDOW
    qkv_bias: bool = False  # always there, whatever the config says
    bias_keys: tuple[str, ...] = ()  # of attention_bias (query, key, value and output) and mlp_bias, those it reads
    qk_norm: bool = False  # a norm over each query and key head, before the rotation
    fused: bool = False  # one tensor for query, key and value, one for gate and up


ROWS = (
    Architecture("LlamaForCausalLM", "llama", _LLAMA, bias_keys=("attention_bias", "mlp_bias")),
    Architecture("MistralForCausalLM", "mistral", _LLAMA | _MISTRAL | {"sliding_window": 4096}, ALL_LAYERS),
    Architecture("Qwen2ForCausalLM", "qwen2", _LLAMA | _QWEN, LATER_LAYERS, qkv_bias=True),
    Architecture(
        "Qwen3ForCausalLM",
        "qwen3",
        _LLAMA | _QWEN | {"head_dim": 128},
        LATER_LAYERS,
        bias_keys=("attention_bias",),
        qk_norm=True,
    ),
    Architecture("Phi3ForCausalLM", "phi3", _LLAMA | _PHI3, ALL_LAYERS, fused=True),
)
LLAMA = ROWS[0]
BY_NAME = {row.name: row for row in ROWS}

# Llamas that say otherwise: with transformers they run by code of their own, with vLLM as the Llamas they are. What
# their classes take absent keys for is not known here, so every size has to be there.
LLAMAS_UNDER_ANOTHER_NAME = ("LLaMAForCausalLM", "AquilaForCausalLM", "AquilaModel", "XverseForCausalLM")

_EXPERTS = "a mixture of experts"
_LAYER_NORM = "it has LayerNorm, with biases, where a Llama has RMSNorm"
_GEMMA = "it adds one to the weights of its norms and scales its embeddings"
_SEES = "a model of images and text; only its language model could be converted, saved by itself"
# What people take for a Llama, and why it is none.
REFUSED = {
    **dict.fromkeys(
        ("MixtralForCausalLM", "Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM", "PhiMoEForCausalLM"), _EXPERTS
    ),
    **dict.fromkeys(
        ("DeepseekForCausalLM", "GraniteMoeForCausalLM", "OlmoeForCausalLM", "JetMoeForCausalLM"), _EXPERTS
    ),
    **dict.fromkeys(("GptOssForCausalLM", "Glm4MoeForCausalLM", "Llama4ForCausalLM", "DbrxForCausalLM"), _EXPERTS),
    **dict.fromkeys(("SolarOpenForCausalLM", "MellumForCausalLM", "Dots1ForCausalLM", "AfmoeForCausalLM"), _EXPERTS),
    **dict.fromkeys(
        ("DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM", "Mistral4ForCausalLM"),
        "a mixture of experts with latent attention",
    ),
    **dict.fromkeys(("MiniCPM3ForCausalLM", "YoutuForCausalLM"), "it has latent attention"),
    **dict.fromkeys(("GemmaForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM", "VaultGemmaForCausalLM"), _GEMMA),
    **dict.fromkeys(
        ("GraniteForCausalLM", "GraniteSWAForCausalLM", "HyperCLOVAXForCausalLM"),
        "it multiplies embeddings, residuals, attention scores and logits by factors of its own",
    ),
    "MiniCPMForCausalLM": "it scales embeddings, residuals and logits",
    **dict.fromkeys(
        ("CohereForCausalLM", "Cohere2ForCausalLM", "PhiForCausalLM", "FalconForCausalLM"),
        "attention and MLP of a layer work side by side, after one LayerNorm",
    ),
    "OlmoForCausalLM": "its norms have no weights",
    **dict.fromkeys(
        ("Olmo2ForCausalLM", "Olmo3ForCausalLM", "Exaone4ForCausalLM"),
        "its norms come after attention and MLP, not before",
    ),
    **dict.fromkeys(
        ("GlmForCausalLM", "Glm4ForCausalLM", "ChatGLMModel", "ChatGLMForConditionalGeneration", "HeliumForCausalLM"),
        "it rotates neighbouring numbers of a head, or half of them, where a Llama rotates halves",
    ),
    "Ernie4_5ForCausalLM": "it rotates neighbouring numbers of a head, where a Llama rotates halves",
    **dict.fromkeys(("StableLmForCausalLM", "Starcoder2ForCausalLM", "NemotronForCausalLM"), _LAYER_NORM),
    **dict.fromkeys(("PersimmonForCausalLM", "OrionForCausalLM", "GPT2LMHeadModel", "GPTNeoXForCausalLM"), _LAYER_NORM),
    **dict.fromkeys(("OPTForCausalLM", "BloomForCausalLM", "MptForCausalLM", "GPTBigCodeForCausalLM"), _LAYER_NORM),
    **dict.fromkeys(
        ("HunYuanDenseV1ForCausalLM", "MolmoForCausalLM"), "its query and key norms come after the rotation"
    ),
    "SmolLM3ForCausalLM": "every fourth layer has no rotary positions (no_rope_layers). SmolLM2 and Qwen3 of about its "
    "size convert",
    "ArceeForCausalLM": "its MLP has no gate",
    "ApertusForCausalLM": "its MLP has no gate",
    "BitNetForCausalLM": "its linear layers are ternary, with norms inside",
    "DiffLlamaForCausalLM": "its attention is the difference of two",
    "DeciLMForCausalLM": "its layers differ in shape",
    "SeedOssForCausalLM": "query, key and value have biases, and the output of the attention may have one",
    "CwmForCausalLM": "some of its layers have a sliding window, others none",
    **dict.fromkeys(("MinistralForCausalLM", "Ministral3ForCausalLM"), "its layers may differ in window and rotation"),
    **dict.fromkeys(
        ("InternLMForCausalLM", "InternLM2ForCausalLM", "InternLM3ForCausalLM"),
        "it has biases or a tensor for query, key and value of its own. Copies saved as LlamaForCausalLM convert",
    ),
    **dict.fromkeys(
        ("BaichuanForCausalLM", "BaiChuanForCausalLM"),
        "it has one tensor for query, key and value, and may normalise its output layer",
    ),
    "YiForCausalLM": "its norms have other names. 01-ai's later folders, saved as LlamaForCausalLM, convert",
    "QWenLMHeadModel": "the first Qwen; Qwen1.5, 2 and 2.5 are Qwen2ForCausalLM, which converts",
    **dict.fromkeys(("MambaForCausalLM", "Mamba2ForCausalLM", "FalconMambaForCausalLM"), "it has no attention"),
    **dict.fromkeys(
        ("JambaForCausalLM", "BambaForCausalLM", "ZambaForCausalLM", "Zamba2ForCausalLM", "Lfm2ForCausalLM"),
        "some of its layers have no attention",
    ),
    **dict.fromkeys(("GraniteMoeHybridForCausalLM", "NemotronHForCausalLM"), "some of its layers have no attention"),
    **dict.fromkeys(
        ("Qwen3NextForCausalLM", "Qwen3_5ForCausalLM", "KimiLinearForCausalLM", "FalconH1ForCausalLM"),
        "most of its layers have linear attention, or a state instead of it. Qwen2, 2.5 and 3 (dense) convert",
    ),
    **dict.fromkeys(("Emu3ForCausalLM", "AriaTextForCausalLM"), _SEES),
}
_BY_ENDING = (  # of a name that is not listed
    ("ForSequenceClassification", "it has a classification head; convert the language model it was made from"),
    ("ForTokenClassification", "it has a classification head; convert the language model it was made from"),
    ("ForRewardModel", "it has a reward head; convert the language model it was made from"),
    ("ForConditionalGeneration", _SEES.replace("images and text", "images or sound and text, or of two halves")),
    ("ForMaskedLM", "it fills gaps, where a GPT continues"),
    ("Model", "it has no output layer: the body of a model, or one for embeddings"),
    ("MoeForCausalLM", _EXPERTS),
)


def architecture_of(raw: Mapping[str, Any]) -> Architecture:
    """The row of a config.json.

    Raises:
        Unsupported: it names no class, several, or one that is not in the table.
    """
    named = raw.get("architectures")
    if named is None and "_class_name" in raw:
        raise Unsupported(f"a part of a diffusion pipeline ({shown(raw['_class_name'])}), not a language model")
    known = f"nown are {', '.join(BY_NAME)}"
    if not isinstance(named, list) or len(named) != 1 or not isinstance(named[0], str):
        if named is None and (of_type := [row for row in ROWS if row.model_type == raw.get("model_type")]):
            row = of_type[0]
            raise Unsupported(
                f"architectures is missing; a model_type of {row.model_type!r} is mostly {row.name}: write "
                f'"architectures": ["{row.name}"] into config.json'
            )
        raise Unsupported(f"architectures is {shown(named)}; one class is needed, and k{known}")
    name = named[0]
    if name in BY_NAME:
        return BY_NAME[name]
    if name in LLAMAS_UNDER_ANOTHER_NAME:
        needed = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
        if absent := [key for key in (*needed, "max_position_embeddings", "rms_norm_eps") if key not in raw]:
            raise Unsupported(f"architectures is {named}, a Llama by another name, but {', '.join(absent)} is missing")
        return LLAMA
    reason = REFUSED.get(name) or next((why for ending, why in _BY_ENDING if name.endswith(ending)), None)
    raise Unsupported(
        f"architectures is {shown(named)}; "
        + (f"that is no Llama: {reason.rstrip('.')}. " if reason else "nothing is known here of that class. ")
        + f"K{known}"
    )


def architecture_with(*, qkv_bias: bool, qk_norm: bool, window: int | None) -> Architecture:
    """The first row that a model can be written as of which no source is known."""
    return next(
        row
        for row in ROWS
        if row.qk_norm == qk_norm
        and row.qkv_bias == (qkv_bias and not qk_norm)
        and (window is None or row.window is not NO_WINDOW)
    )
