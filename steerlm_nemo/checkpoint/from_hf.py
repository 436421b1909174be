"""Hugging Face folder -> `.nemo`: no model is built, and neither NeMo nor torch is imported.

Refusals come first. A Megatron tensor is the rows of its Hugging Face parts in another order, so the rest is copying:
pieces of 4 MiB are read, summed up and appended to the archive, whatever the size of the model. Only another precision
needs torch.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import yaml

from steerlm_nemo.checkpoint.archive import WEIGHTS_DIR, NemoWriter
from steerlm_nemo.checkpoint.beside import json_if_there
from steerlm_nemo.checkpoint.hf_weights import find_tensors
from steerlm_nemo.checkpoint.llama_config import (
    HFConfig,
    nemo_config,
    read_hf_config,
    vocabulary_padding,
)
from steerlm_nemo.checkpoint.mapping import (
    EMBEDDING,
    EXTRA_STATE,
    OUTPUT,
    Layout,
    Rule,
    extra_state_of_layers,
    rules_for,
)
from steerlm_nemo.checkpoint.safetensors_io import INDEX as INDEX_OF_SHARDS
from steerlm_nemo.checkpoint.safetensors_io import ITEM_SIZE, SINGLE, TensorPlace
from steerlm_nemo.checkpoint.safety import CONFIG_NAME, parse_config
from steerlm_nemo.checkpoint.streaming import PIECE_BYTES, in_pieces, read_ahead
from steerlm_nemo.checkpoint.tokenizer_files import TokenizerFiles, find_tokenizer
from steerlm_nemo.checkpoint.torch_dist import DATA_FILE, INDEX, TorchDistWriter, common_and_backend
from steerlm_nemo.errors import CheckpointError, InputError

DTYPES = {"32": "float32", "16": "float16", "bf16": "bfloat16"}
# Older transformers stored this constant with the weights, often in another dtype; Megatron computes it.
_IGNORED_SUFFIX = ".rotary_emb.inv_freq"


@dataclass(frozen=True)
class Conversion:
    """A conversion that nothing refuses, ready to be written."""

    config: HFConfig
    tensors: dict[str, TensorPlace]
    tokenizer: TokenizerFiles
    layout: Layout
    divisor: int
    precision: str
    generation: dict[str, Any]

    @property
    def rules(self) -> tuple[Rule, ...]:
        return rules_for(self.config.traits)

    @property
    def dtype(self) -> str:
        return DTYPES[self.precision]

    @property
    def num_parameters(self) -> int:
        """Of the result, padded vocabulary rows included."""
        return sum(math.prod(self.layout.global_shape(rule)) for rule in self.rules)

    @property
    def num_bytes(self) -> int:
        """Weights of the result."""
        return self.num_parameters * ITEM_SIZE[self.dtype]


def plan_conversion(folder: Path, precision: str | None) -> Conversion:
    """Read everything but the weights, and refuse what cannot be converted.

    `precision` is 32, 16 or bf16; None keeps the dtype of the source.

    Raises:
        InputError: files that are missing or damaged.
        CheckpointError: a model that cannot be converted, or whose tensors are not those of its config.
    """
    config = read_hf_config(folder)
    tensors = find_tensors(folder, _IGNORED_SUFFIX)
    tokenizer = find_tokenizer(folder)
    padded, divisor = vocabulary_padding(config.raw["vocab_size"], tokenizer.size, tokenizer.num_rows, config.tp_sizes)
    layout = config.layout(padded)
    _check_tensors(config, tensors, layout, folder)
    if precision is None:
        dtypes = {place.dtype for place in tensors.values()}
        if len(dtypes) > 1:
            raise InputError(f"{folder}: has tensors of {', '.join(sorted(dtypes))}; choose one with --precision")
        precision = next(name for name, dtype in DTYPES.items() if dtype in dtypes)
    generation = json_if_there(folder / "generation_config.json") or {}
    return Conversion(config, tensors, tokenizer, layout, divisor, precision, generation)


def _check_tensors(config: HFConfig, tensors: dict[str, TensorPlace], layout: Layout, folder: Path) -> None:
    if layout.num_layers > len(tensors):
        raise CheckpointError(
            f"{folder}: num_hidden_layers is {layout.num_layers} in config.json, but there are {len(tensors)} tensors"
        )
    expected = {
        name: layout.hf_shape(axes)
        for rule in rules_for(config.traits)
        for layer in (range(layout.num_layers) if rule.is_stacked else (None,))
        for name, axes in zip(rule.hf_names(layer), rule.hf_axes, strict=True)
    }
    problems = [f"{name} is missing" for name in expected if name not in tensors]
    for name, place in tensors.items():
        if name in expected:
            if place.shape != expected[name]:
                problems.append(f"{name} has shape {list(place.shape)}, config.json asks for {list(expected[name])}")
        elif name == OUTPUT.hf[0]:  # tied, and stored all the same
            embedding = tensors.get(EMBEDDING.hf[0])  # reported above where it is missing
            if embedding is not None and not _same_bytes(place, embedding):
                problems.append(f"{name} differs from the embedding, but tie_word_embeddings is true")
        else:
            problems.append(f"{name} is not a tensor of this architecture")
    if problems:
        shown = problems[:10] + ([f"... and {len(problems) - 10} more"] if len(problems) > 10 else [])
        raise CheckpointError(f"{folder}: tensors and config.json do not fit together:\n  " + "\n  ".join(shown))


def _same_bytes(one: TensorPlace, other: TensorPlace) -> bool:
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    for start in range(0, one.num_bytes, PIECE_BYTES):
        size = min(PIECE_BYTES, one.num_bytes - start)
        ours, theirs = bytearray(size), bytearray(size)
        one.read(start, memoryview(ours))
        other.read(start, memoryview(theirs))
        if ours != theirs:
            return False
    return True


def convert(
    conversion: Conversion,
    out: Path,
    report: Callable[[str], None],
    approve: Callable[[Path], None] | None = None,
) -> None:
    """Write the `.nemo`. `report` gets one line per layer and a closing line.

    `approve` is called with the complete file before it gets its name; what it raises leaves the old file, or none.

    Raises:
        CheckpointError: the disk is too small or fails, or a value does not fit into fp16.
    """
    started = time.monotonic()
    _require_space(out, conversion.num_bytes)
    layout, tensors = conversion.layout, conversion.tensors
    for note in (*conversion.config.notes, *_passed_over(conversion.tensors), *conversion.tokenizer.notes):
        report(f"NOTE: {note}")
    report(
        f"{conversion.config.raw['architectures'][0]}, {len(tensors)} tensors, {layout.num_layers} layers; writing "
        f"{gigabytes(conversion.num_bytes)} of {conversion.dtype}"
    )
    model_config = nemo_config(
        conversion.config, layout, conversion.divisor, conversion.precision, conversion.tokenizer, conversion.generation
    )
    config_data = yaml.safe_dump(model_config, sort_keys=False).encode()
    # config.json and generation_config.json are in it: what they say must not make a file that nothing opens.
    parse_config(config_data, f"{conversion.config.where}: as {CONFIG_NAME}")
    seconds = 0.0

    def approve_timed(path: Path) -> None:
        nonlocal seconds
        seconds = time.monotonic() - started
        if approve is not None:
            approve(path)

    with NemoWriter(out, approve_timed) as archive:
        archive.add(CONFIG_NAME, config_data)
        for name, data in sorted(conversion.tokenizer.files.items()):
            archive.add(name, data)
        with archive.member(f"{WEIGHTS_DIR}/{DATA_FILE}") as stream:
            writer = TorchDistWriter(stream)
            _write_tensors(conversion, writer, report)
            _write_extra_state(writer, conversion)
        common, backend = common_and_backend()
        archive.add(f"{WEIGHTS_DIR}/{INDEX}", writer.index())
        archive.add(f"{WEIGHTS_DIR}/common.pt", common)
        archive.add(f"{WEIGHTS_DIR}/metadata.json", backend)
    report(
        f"wrote {out}: {gigabytes(out.stat().st_size)} in {seconds:.1f} s; vocabulary "
        f"{vocabulary_text(layout, conversion.config.tp_sizes)}"
    )


def _passed_over(tensors: dict[str, TensorPlace]) -> list[str]:
    """That other weights lie beside those converted."""
    notes = []
    index = next(iter(tensors.values())).path.with_name(INDEX_OF_SHARDS)
    if index.with_name(SINGLE).exists() and index.exists():
        notes.append(
            f"{SINGLE} is converted, as transformers would load it; {index.name} and its shards are passed over"
        )
    if index.with_name("adapter_config.json").exists():
        notes.append("the adapter beside the weights is passed over; merge it with peft (merge_and_unload) to have it")
    return notes


@dataclass(frozen=True)
class _Source:
    """Bytes that follow one another in a Hugging Face tensor, or zeros, and in the result."""

    name: str
    place: TensorPlace
    start: int | None  # in the tensor; None: zeros
    num_bytes: int


def _write_tensors(conversion: Conversion, writer: TorchDistWriter, report: Callable[[str], None]) -> None:
    """Append every Megatron tensor."""
    layout = conversion.layout
    stacked = [rule for rule in conversion.rules if rule.is_stacked]
    units: list[tuple[Rule, int | None]] = [(rule, None) for rule in conversion.rules if not rule.is_stacked]
    units += [(rule, layer) for layer in range(layout.num_layers) for rule in stacked]
    # One being read, one being summed up, one being written.
    buffers = cycle([memoryview(bytearray(PIECE_BYTES)) for _ in range(3)])

    def read(piece: list[_Source]) -> memoryview:
        buffer, end = next(buffers), 0
        for source in piece:
            start, end = end, end + source.num_bytes
            if source.start is None:
                buffer[start:end] = bytes(source.num_bytes)
            else:
                source.place.read(source.start, buffer[start:end])
        first = piece[0]
        return buffer[:end] if first.place.dtype == conversion.dtype else _cast(first, buffer[:end], conversion.dtype)

    pieces = read_ahead(read, (piece for unit in units for piece in _pieces(conversion, *unit)))
    for rule, layer in units:
        shape = layout.global_shape(rule)
        offset, chunk_shape = tuple(0 for _ in shape), shape
        if layer is not None:
            offset, chunk_shape = (layer, *offset[1:]), (1, *shape[1:])
        num_pieces = sum(1 for _ in _pieces(conversion, rule, layer))
        data = (piece for _, piece in islice(pieces, num_pieces))
        writer.add(rule.mcore, shape, offset, chunk_shape, conversion.dtype, data)
        if rule is stacked[-1] and layer is not None:
            report(f"layer {layer + 1} of {layout.num_layers}")


def _pieces(conversion: Conversion, rule: Rule, layer: int | None) -> Iterator[list[_Source]]:
    """The bytes of a Megatron tensor in order; what has to be cast is a piece of its own."""
    sources = _sources(conversion, rule, layer)
    return in_pieces(sources, PIECE_BYTES, lambda source: source.place.dtype != conversion.dtype)


def _sources(conversion: Conversion, rule: Rule, layer: int | None) -> Iterator[_Source]:
    names = rule.hf_names(layer)
    for run in rule.runs(conversion.layout):
        name = names[run.part or 0]
        place = conversion.tensors[name]
        first, end = (row * place.row_bytes for row in (run.start, run.start + run.count))
        for start in range(first, end, PIECE_BYTES):
            yield _Source(name, place, None if run.part is None else start, min(PIECE_BYTES, end - start))


def _cast(source: _Source, data: memoryview, dtype: str) -> memoryview:
    import torch

    tensor = torch.frombuffer(data, dtype=getattr(torch, source.place.dtype))
    result = tensor.to(getattr(torch, dtype))
    if dtype == "float16" and not torch.equal(torch.isfinite(result), torch.isfinite(tensor)):
        raise CheckpointError(
            f"{source.place.path}: {source.name} has values beyond 65504, the largest of float16. "
            "Use --precision bf16 or 32."
        )
    return memoryview(result.view(torch.uint8).numpy())  # type: ignore[arg-type]


def _write_extra_state(writer: TorchDistWriter, conversion: Conversion) -> None:
    num_layers = conversion.layout.num_layers
    for key in extra_state_of_layers(conversion.config.traits):
        for layer in range(num_layers):
            writer.add_object(f"{key}/shard_{layer}_{num_layers}", None)
    for key in EXTRA_STATE:
        writer.add_object(f"{key}/shard_0_1", None)


def _require_space(out: Path, num_bytes: int) -> None:
    folder = out.absolute().parent
    try:
        while not folder.exists():
            folder = folder.parent
        free = shutil.disk_usage(folder).free
    except OSError as err:
        raise CheckpointError(f"{out}: cannot be written: {err.strerror or err}") from err
    if num_bytes > free:
        raise CheckpointError(f"{out}: needs {gigabytes(num_bytes)}, but {folder} has {gigabytes(free)} left")


def gigabytes(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.2f} MB"


def vocabulary_text(layout: Layout, tp_sizes: tuple[int, ...]) -> str:
    sizes = ", ".join(map(str, tp_sizes[:-1])) + f" and {tp_sizes[-1]}"
    return f"{layout.vocab_size} padded to {layout.padded_vocab_size} (the same at TP {sizes})"
