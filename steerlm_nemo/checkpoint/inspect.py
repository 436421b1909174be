"""What a `.nemo` is and whether it is whole: the facts of `scripts/inspect_nemo.py`.

Every part is looked at by itself, so a damaged file still shows what can be read, and a list of what cannot.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from steerlm_nemo.checkpoint.archive import NemoFile, check_weights, open_nemo
from steerlm_nemo.checkpoint.from_hf import gigabytes
from steerlm_nemo.checkpoint.identity import name_of
from steerlm_nemo.checkpoint.llama_config import SOURCE_KEY
from steerlm_nemo.checkpoint.mapping import RULES
from steerlm_nemo.checkpoint.safety import CONFIG_NAME
from steerlm_nemo.checkpoint.tokenizer_files import sentencepiece_facts, tokenizer_json_size
from steerlm_nemo.checkpoint.torch_dist import changed_chunks
from steerlm_nemo.checkpoint.weights import DistributedWeights
from steerlm_nemo.errors import SteerLMError
from steerlm_nemo.model_kind import KINDS, PROVENANCE_KEY, SteerLMFormat

_ARCHITECTURE_KEYS = (
    *("target", "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups"),
    *("encoder_seq_length", "rotary_base", "seq_len_interpolation_factor", "scale_positional_embedding"),
    *("share_embeddings_and_output_weights", "make_vocab_size_divisible_by", "bias", "qkv_bias", "qk_layernorm"),
    "window_size",
)  # fmt: skip
_PARALLEL_KEYS = ("tensor_model_parallel_size", "pipeline_model_parallel_size")
_SMALL_BYTES = 64 * 2**20  # hashed without being asked; weights only with `verify`


def inspect_nemo(path: Path, verify: bool) -> dict[str, Any]:
    """Facts about a `.nemo`; `damage` lists what is wrong with it, and is empty for a sound file.

    With `verify`, every tensor is read and counted for values that are not finite, every chunk is compared with the
    CRC-32 stored when it was written (torch_dist only; zarr has none), and every member is hashed.
    """
    facts: dict[str, Any] = {"path": str(path)}
    damage: list[str] = []

    def attempt(name: str, read: Callable[[], Any]) -> None:
        try:
            facts[name] = read()
        except (SteerLMError, OSError) as err:
            damage.append(str(err))

    try:
        with open_nemo(path) as nemo:
            facts["num_bytes"] = sum(nemo.members.values())
            attempt("architecture", lambda: {key: nemo.config[key] for key in _ARCHITECTURE_KEYS if key in nemo.config})
            attempt("written_at", lambda: {key: nemo.config.get(key) for key in (*_PARALLEL_KEYS, "nemo_version")})
            attempt("weights", lambda: _weights(nemo, verify, damage))
            attempt("tokenizer", lambda: _tokenizer(nemo))
            attempt("name", lambda: name_of(nemo))
            attempt("steerlm", lambda: _steerlm(nemo))
            attempt("converted_from", lambda: nemo.config.get(SOURCE_KEY))
            attempt("trained_from", lambda: nemo.config.get(PROVENANCE_KEY))
            attempt("members", lambda: _members(nemo, verify))
            attempt("pickles", lambda: _pickles(nemo))
    except SteerLMError as err:
        damage.append(str(err))
    # Several parts need the config; when it is bad they all say the same.
    return {**facts, "damage": list(dict.fromkeys(damage))}


def _weights(nemo: NemoFile, verify: bool, damage: list[str]) -> dict[str, Any]:
    weights = DistributedWeights(nemo)
    tensors = weights.index.tensors
    facts: dict[str, Any] = {
        "format": weights.format,
        "dtypes": sorted({tensor.dtype for tensor in tensors.values()}),
        "num_parameters": sum(math.prod(tensor.shape) for tensor in tensors.values()),
        "tensor_parallel_ranks": _tensor_parallel_ranks(weights),
        "tensors": {key: list(tensor.shape) for key, tensor in sorted(tensors.items())},
    }
    if verify:
        facts["num_not_finite"] = 0
        for key, tensor in sorted(tensors.items()):
            stacked = ".layers." in key
            for layer in range(tensor.shape[0]) if stacked else (None,):
                try:
                    values = weights.read(key, layer)
                    facts["num_not_finite"] += int((~values.isfinite()).sum())
                except SteerLMError as err:
                    damage.append(f"{key}{'' if layer is None else f' layer {layer}'}: {err}")
        facts["checksums"] = "none in this format"
        if weights.format == "torch_dist":
            changed = list(changed_chunks(weights.index, weights.open_file, weights.where))
            damage.extend(changed)
            facts["checksums"] = f"{len(changed)} chunks differ" if changed else "CRC-32 of every chunk agrees"
        if facts["num_not_finite"]:
            damage.append(f"{facts['num_not_finite']} weights are NaN or infinite")
    return facts


def _tensor_parallel_ranks(weights: DistributedWeights) -> int | None:
    """Across how many ranks the weights were split when they were saved; None for what is not a Llama."""
    for rule in RULES:
        tensor = weights.index.tensors.get(rule.mcore)
        if rule.tp_axis == 1 and tensor is not None and tensor.chunks:
            axis = rule.tp_axis + len(tensor.shape) - 2  # the layers come first where they are stacked
            return tensor.shape[axis] // tensor.chunks[0].shape[axis]
    return None


def _tokenizer(nemo: NemoFile) -> dict[str, Any]:
    section = nemo.config.get("tokenizer") or {}
    member = nemo.resolve(section.get("model"))
    facts = {"library": section.get("library"), "type": section.get("type"), "member": member}
    if member is None:
        raise SteerLMError(f"{nemo.path}: the tokenizer {section.get('model')!r} of {CONFIG_NAME} is not in it")
    data, where = nemo.read(member), f"{nemo.path}:{member}"
    is_json = section.get("library") == "huggingface"
    size = tokenizer_json_size(where, data) if is_json else sentencepiece_facts(data, where)["size"]
    return {**facts, "size": size}


def _steerlm(nemo: NemoFile) -> dict[str, Any] | None:
    stored = SteerLMFormat.of_config(nemo.config)
    return stored.to_dict() if stored is not None else None


def _pickles(nemo: NemoFile) -> str:
    check_weights(nemo)
    return "safe"


def _members(nemo: NemoFile, verify: bool) -> dict[str, dict[str, Any]]:
    members: dict[str, dict[str, Any]] = {}
    for name, size in sorted(nemo.members.items()):
        members[name] = {"num_bytes": size}
        if verify or size <= _SMALL_BYTES:
            with nemo.open(name) as stream:
                digest = hashlib.sha256()
                while block := stream.read(2**20):
                    digest.update(block)
                members[name]["sha256"] = digest.hexdigest()
    return members


def render(facts: dict[str, Any]) -> str:
    """The facts as text for a terminal, damage last."""
    called = f"  {facts['name']}" if "name" in facts else ""
    lines = [f"{facts['path']}  {gigabytes(facts.get('num_bytes', 0))}{called}"]

    def section(title: str, entries: dict[str, Any]) -> None:
        if not entries:  # damaged; what is wrong with it follows
            return
        lines.append(f"\n{title}")
        lines.extend(f"  {key:38} {value}" for key, value in entries.items())

    section("architecture", facts.get("architecture") or {})
    section("written at", facts.get("written_at") or {})
    if weights := facts.get("weights"):
        section("weights", {key: value for key, value in weights.items() if key != "tensors"})
        section("tensors", weights["tensors"])
    section("tokenizer", facts.get("tokenizer") or {})
    if steerlm := facts.get("steerlm"):
        schema, kind = steerlm["schema"], KINDS[steerlm["kind"]]
        ranges = " ".join(f"{a['name']}:{a['minimum']}-{a['maximum']}" for a in schema["attributes"])
        markers = {f"template.{key}": repr(value) for key, value in steerlm["template"].items()}
        section(
            "SteerLM format",
            {
                "kind": f"{kind.name}: {kind.title}; it can {', '.join(sorted(kind.abilities))}",
                "schema": f"{schema['name']}  {ranges}",
                "languages": len(schema["languages"]),
                **markers,
                "digest": steerlm["digest"],
            },
        )
    elif "steerlm" in facts:
        lines.append("\nSteerLM format: none (not trained by this project)")
    if training := facts.get("trained_from"):
        section("trained from", training)
    if source := facts.get("converted_from"):
        converted = source.get("config") or {}
        section(
            "converted from", {key: converted.get(key) for key in ("_name_or_path", "architectures", "torch_dtype")}
        )
    section(
        "members",
        {name: f"{info['num_bytes']:>14}  {info.get('sha256', '')}" for name, info in facts.get("members", {}).items()},
    )
    unread = "" if "checksums" in (facts.get("weights") or {}) else "; the weights were not read, --verify does"
    lines.append(f"\ndamage: none found{unread}" if not facts["damage"] else "\nDAMAGE")
    lines.extend(f"  {problem}" for problem in facts["damage"])
    return "\n".join(lines)
