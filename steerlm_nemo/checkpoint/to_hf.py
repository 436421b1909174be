"""`.nemo` -> Hugging Face Llama folder: no model is built and NeMo is not imported.

Rows that lie whole in the data files are copied in pieces. Only what ranks have split within rows is put together by
torch, one tensor at a time.

The folder holds safetensors (several files and an index above 5 GB), config.json, generation_config.json and the
tokenizer, and appears under its name only when it is complete.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

from steerlm_nemo.checkpoint.archive import NemoFile, check_weights, remove_stale
from steerlm_nemo.checkpoint.chat_template import TOKENIZER_CONFIG
from steerlm_nemo.checkpoint.from_hf import gigabytes
from steerlm_nemo.checkpoint.llama_config import SOURCE_KEY, hf_config, layout_of, traits_of
from steerlm_nemo.checkpoint.mapping import EMBEDDING, Layout, Rule, Traits, rules_for
from steerlm_nemo.checkpoint.safetensors_io import INDEX, ITEM_SIZE, SINGLE, header
from steerlm_nemo.checkpoint.streaming import PIECE_BYTES, EagerFile, in_pieces, read_ahead, read_into
from steerlm_nemo.checkpoint.tokenizer_files import (
    HUGGINGFACE,
    PACKED_NAMES,
    SENTENCEPIECE,
    sentencepiece_facts,
    tokenizer_json_size,
)
from steerlm_nemo.checkpoint.torch_dist import StoredRows
from steerlm_nemo.checkpoint.weights import DistributedWeights
from steerlm_nemo.errors import CheckpointError
from steerlm_nemo.outputs import target_of

MAX_SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True)
class Export:
    """An export that nothing refuses, ready to be written."""

    weights: DistributedWeights
    layout: Layout
    traits: Traits
    files: dict[str, bytes]  # everything but the weights

    @property
    def units(self) -> list[tuple[Rule, int | None]]:
        """Megatron tensors in the order of a forward pass, one entry per layer where they are stacked."""
        rules = rules_for(self.traits)
        stacked = [rule for rule in rules if rule.is_stacked]
        first = rules.index(stacked[0])
        before, after = rules[:first], [rule for rule in rules[first:] if not rule.is_stacked]
        return [
            *((rule, None) for rule in before),
            *((rule, layer) for layer in range(self.layout.num_layers) for rule in stacked),
            *((rule, None) for rule in after),
        ]

    def num_bytes(self, rule: Rule) -> int:
        """Of one layer's Hugging Face tensors of this rule."""
        return sum(math.prod(self.layout.hf_shape(axes)) for axes in rule.hf_axes) * ITEM_SIZE[self.weights.dtype]


def plan_export(nemo: NemoFile) -> Export:
    """Read everything but the weights, and refuse what is not a Llama or is incomplete.

    Raises:
        CheckpointError: naming what does not fit.
    """
    config = nemo.config
    check_weights(nemo)
    weights = DistributedWeights(nemo)
    if weights.dtype not in ITEM_SIZE:
        raise CheckpointError(
            f"{weights.where}: tensors are {weights.dtype}; only {', '.join(ITEM_SIZE)} can be exported"
        )
    tokenizer, facts = _tokenizer(nemo)
    embedding = weights.index.tensors.get(EMBEDDING.mcore)
    if embedding is None:
        raise CheckpointError(f"{weights.where}: has no {EMBEDDING.mcore}; it is not a GPT model, or incomplete")
    layout = layout_of(config, embedding.shape[0], facts["size"], str(nemo.path))
    if not layout.vocab_size <= layout.padded_vocab_size:
        raise CheckpointError(
            f"{nemo.path}: the vocabulary has {layout.vocab_size} tokens, but {EMBEDDING.mcore} only "
            f"{layout.padded_vocab_size} rows"
        )
    traits = traits_of(config)
    weights.require(rules_for(traits), layout)
    exported = hf_config(config, layout, traits, weights.dtype, facts["bos_id"], facts["eos_id"], str(nemo.path))
    ids = {key: exported[key] for key in ("bos_token_id", "eos_token_id") if exported.get(key) is not None}
    generation = (config.get(SOURCE_KEY) or {}).get("generation_config") or ids
    files = {**tokenizer, "config.json": _json(exported), "generation_config.json": _json(generation)}
    return Export(weights, layout, traits, files)


def _tokenizer(nemo: NemoFile) -> tuple[dict[str, bytes], dict[str, Any]]:
    """The tokenizer files under Hugging Face names; size and special ids as its main file has them."""
    section = nemo.config.get("tokenizer") or {}
    member = nemo.resolve(section.get("model"))
    if member is None:
        raise CheckpointError(
            f"{nemo.path}: its tokenizer ({section.get('model') or section.get('type')!r}) is not packed in it, "
            "so the export would have none. Members: " + ", ".join(sorted(nemo.members)[:8])
        )
    files = {name: nemo.read(name) for name in PACKED_NAMES if name in nemo.members}
    data = nemo.read(member)
    if section.get("library") == "huggingface":
        files[HUGGINGFACE] = data
        return files, {"size": tokenizer_json_size(f"{nemo.path}:{member}", data), "bos_id": None, "eos_id": None}
    files[SENTENCEPIECE] = data
    facts = sentencepiece_facts(data, f"{nemo.path}:{member}")
    files.setdefault(
        TOKENIZER_CONFIG,
        _json(
            {
                "tokenizer_class": "LlamaTokenizer",
                "add_bos_token": True,
                "add_eos_token": False,
                "legacy": False,
                "bos_token": facts["bos"],
                "eos_token": facts["eos"],
                "unk_token": facts["unk"],
            }
        ),
    )
    return files, facts


def export(plan: Export, out: Path, report: Callable[[str], None], max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Write the Hugging Face folder `out`, which must not exist or be empty.

    Raises:
        CheckpointError: the folder is not empty, the disk is too small or fails, or a chunk is damaged.
    """
    started = time.monotonic()
    total = sum(plan.num_bytes(rule) for rule, _ in plan.units)
    try:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise CheckpointError(f"{out}: exists and is not an empty folder. Choose another one, or remove it first.")
        target = target_of(out.absolute(), folder=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        if total > (free := shutil.disk_usage(target.parent).free):
            raise CheckpointError(f"{out}: needs {gigabytes(total)}, but the disk has {gigabytes(free)} left")
        report(f"writing {gigabytes(total)} of {plan.weights.dtype}, {plan.layout.num_layers} layers")
        remove_stale(target.parent, target.name)
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
        lock = os.open(staging, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)  # tells `remove_stale` that somebody still writes it
            _write_folder(plan, staging, total, max_shard_bytes, report)
            staging.chmod(0o777 & ~_umask())
            if target.exists():
                target.rmdir()
            staging.rename(target)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        finally:
            os.close(lock)
    except OSError as err:
        raise CheckpointError(f"{out}: writing failed: {err.strerror or err}. Nothing was left there.") from err
    report(f"wrote {out}: {gigabytes(total)} in {time.monotonic() - started:.1f} s")


def _write_folder(plan: Export, folder: Path, total: int, max_shard_bytes: int, report: Callable[[str], None]) -> None:
    for name, data in plan.files.items():
        (folder / name).write_bytes(data)
    shards: list[list[tuple[Rule, int | None]]] = [[]]
    size = 0
    for rule, layer in plan.units:
        if shards[-1] and size + plan.num_bytes(rule) > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append((rule, layer))
        size += plan.num_bytes(rule)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys(_write_shard(plan, folder / name, shard), name)
        report(f"file {number} of {len(shards)}")
    if len(shards) > 1:
        (folder / INDEX).write_bytes(_json({"metadata": {"total_size": total}, "weight_map": weight_map}))


def _write_shard(plan: Export, path: Path, shard: list[tuple[Rule, int | None]]) -> list[str]:
    """Write one safetensors file; returns the names in it."""
    entries = {
        name: (plan.weights.dtype, plan.layout.hf_shape(axes))
        for rule, layer in shard
        for name, axes in zip(rule.hf_names(layer), rule.hf_axes, strict=True)
    }

    # One being read, two being written or waiting for it.
    buffers = cycle([memoryview(bytearray(PIECE_BYTES)) for _ in range(3)])

    def read(piece: list[_Source] | tuple[Rule, int | None]) -> list[memoryview]:
        if isinstance(piece, tuple):
            return _load(plan, *piece)
        buffer, end = next(buffers), 0
        for source in piece:
            start, end = end, end + source.num_bytes
            with plan.weights.open_file(source.file) as file:
                if not read_into(file.raw, source.start, buffer[start:end]):  # type: ignore[attr-defined]
                    raise CheckpointError(f"{plan.weights.where}/{source.file}: ends too early. The file is damaged.")
        return [buffer[:end]]

    # Known before anything is read: the reading thread has the archive to itself.
    pieces = [piece for rule, layer in shard for piece in _pieces(plan, rule, layer)]
    with EagerFile(path) as file:
        file.write(header(entries))
        for _, found in read_ahead(read, pieces):
            for data in found:
                file.write(data)
        file.sync()
    return list(entries)


@dataclass(frozen=True)
class _Source:
    """Bytes of a data file that are bytes of the result."""

    file: str
    start: int
    num_bytes: int


def _pieces(plan: Export, rule: Rule, layer: int | None) -> Iterator[list[_Source] | tuple[Rule, int | None]]:
    """What to copy for the Hugging Face tensors of a rule, in their order; or the rule itself, for torch to load."""
    stored = plan.weights.rows(rule.mcore, layer)
    if stored is None:
        yield rule, layer
        return
    shape = plan.layout.hf_shape(rule.hf_axes[0])
    row_bytes = math.prod(shape[1:]) * ITEM_SIZE[plan.weights.dtype]
    yield from in_pieces(_sources(rule.rows_of_parts(plan.layout), stored, row_bytes), PIECE_BYTES)


def _sources(parts: list[list[tuple[int, int]]], stored: list[StoredRows], row_bytes: int) -> Iterator[_Source]:
    for first, count in (rows for part in parts for rows in part):
        for rows in stored:
            start, end = (
                rows.start + (max(rows.first, min(row, rows.first + rows.count)) - rows.first) * row_bytes
                for row in (first, first + count)
            )
            for place in range(start, end, PIECE_BYTES):
                yield _Source(rows.file, place, min(PIECE_BYTES, end - place))


def _load(plan: Export, rule: Rule, layer: int | None) -> list[memoryview]:
    import torch

    tensors = rule.unpack(plan.weights.read(rule.mcore, layer), plan.layout)
    # numpy has no bfloat16; bytes are bytes
    return [memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy()) for tensor in tensors]  # type: ignore[arg-type]


def _json(data: dict[str, Any]) -> bytes:
    return (json.dumps(data, indent=2) + "\n").encode()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
