"""The tensors of a Hugging Face folder: one file or shards, safetensors or the older `pytorch_model.bin`.

Which of them count is transformers' order: a single safetensors file, its shards, a single .bin, its shards. A .bin is
a pickle; it is read without building what it names, and refused for any name beyond those of tensors (see `pickles`).
"""

from __future__ import annotations

import json
import math
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from steerlm_nemo.checkpoint.beside import is_there
from steerlm_nemo.checkpoint.pickles import Inert, load_torch_file
from steerlm_nemo.checkpoint.recognise import by_content, what_it_is
from steerlm_nemo.checkpoint.safetensors_io import INDEX, ITEM_SIZE, SINGLE, TensorPlace, places_in
from steerlm_nemo.checkpoint.torch_files import PickledTensor, Records, pickled_tensor
from steerlm_nemo.errors import CheckpointError, InputError
from steerlm_nemo.records import unreadable

BIN_SINGLE, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
_PARAMETER = "torch._utils._rebuild_parameter"
_MALFORMED = (AttributeError, LookupError, TypeError, ValueError, struct.error, zipfile.BadZipFile)


def is_safetensors(folder: Path) -> bool:
    """Whether the weights that count are safetensors."""
    return is_there(folder / SINGLE) or is_there(folder / INDEX)


def find_tensors(folder: Path, ignored: str) -> dict[str, TensorPlace]:
    """Where every tensor of the folder lies; not those whose name ends in `ignored`, whatever their dtype.

    Raises:
        InputError: no weights there, a file or shard is missing or damaged, or index and shards disagree.
        CheckpointError: a .bin asks for more than tensors.
    """
    single, index, read = (
        (SINGLE, INDEX, places_in) if is_safetensors(folder) else (BIN_SINGLE, BIN_INDEX, places_in_bin)
    )
    if is_there(folder / single):
        return read(folder / single, ignored)
    if is_there(folder / index):
        return _in_shards(folder / index, ignored, read)
    found = what_it_is(folder)
    raise InputError(f"{folder}: has neither {SINGLE} nor {INDEX}, nor {BIN_SINGLE}{f': {found}' if found else ''}")


def _in_shards(
    index: Path, ignored: str, read: Callable[[Path, str | None], dict[str, TensorPlace]]
) -> dict[str, TensorPlace]:
    try:
        weight_map: dict[str, str] = json.loads(index.read_bytes())["weight_map"]
    except OSError as err:
        raise unreadable(index, err) from err
    except (ValueError, KeyError, TypeError, RecursionError) as err:
        raise InputError(f"{index}: {what_it_is(index) or f'not an index of shards ({err!r})'}") from err
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index}: not an index of shards (weight_map is {str(weight_map)[:60]})")
    if wrong := [name for name, shard in weight_map.items() if not isinstance(shard, str)]:
        raise InputError(
            f"{index}: not an index of shards (weight_map gives {wrong[0]} no file name, but "
            f"{weight_map[wrong[0]]!r}); download it again"
        )
    shards = sorted(set(weight_map.values()))
    if outside := [shard for shard in shards if Path(shard).name != shard]:
        raise InputError(f"{index}: names the shard {outside[0]!r}, which is not a file of this folder")
    if absent := [shard for shard in shards if not is_there(index.parent / shard)]:
        raise InputError(
            f"{index}: {len(absent)} of its {len(shards)} shards are not there, {absent[0]} the first; "
            "download them again"
        )
    places: dict[str, TensorPlace] = {}
    for shard in shards:
        places |= read(index.parent / shard, ignored)
    if missing := sorted(name for name in weight_map if name not in places and not name.endswith(ignored)):
        raise InputError(f"{index}: lists {missing[0]} in {weight_map[missing[0]]}, which does not have it")
    return places


def places_in_bin(path: Path, ignored: str | None = None) -> dict[str, TensorPlace]:
    """Where every tensor of one `torch.save` file lies; not those whose name ends in `ignored`.

    Raises:
        InputError: not a file of tensors by name, damaged, or a dtype that is not a float of 16 or 32 bits.
        CheckpointError: it could run code, or is older than torch 1.6.
    """
    try:
        with path.open("rb") as file:
            if (found := by_content(path)) is not None:
                raise InputError(f"{path}: {found}")
            content = load_torch_file(file, str(path))
            records = Records(file)
            if not records.is_of_this_byte_order:
                raise InputError(f"{path}: written on a machine of another byte order; save it again with torch here")
            return {
                name: _place(path, records, name, tensor)
                for name, tensor in _named(content, path).items()
                if not (ignored and name.endswith(ignored))
            }
    except OSError as err:
        raise unreadable(path, err) from err
    except _MALFORMED as err:
        raise InputError(f"{path}: its description of tensors is malformed ({err!r}); download it again") from err


def _named(content: Any, path: Path) -> dict[str, PickledTensor]:
    if isinstance(content, Inert) and content.global_name == "collections.OrderedDict":
        content = dict(content.entries)
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise InputError(f"{path}: holds no tensors by name. Save the model with save_pretrained")
    named = {}
    for name, value in content.items():
        if getattr(value, "global_name", None) == _PARAMETER:
            value = value.args[0]
        tensor = pickled_tensor(value)
        if tensor is None:
            raise InputError(
                f"{path}: {name} is no dense tensor; a training checkpoint, or quantised weights. Load the model with "
                "what made it, and save it with save_pretrained"
            )
        named[name] = tensor
    return named


def _place(path: Path, records: Records, name: str, tensor: PickledTensor) -> TensorPlace:
    if tensor.dtype not in ITEM_SIZE:
        raise InputError(
            f"{path}: {name} is of {tensor.dtype}; quantised and integer weights are not supported, "
            f"only {', '.join(ITEM_SIZE)}"
        )
    if not tensor.is_plain:
        raise InputError(f"{path}: {name} is stored transposed. Load it with transformers and save it as safetensors")
    start, size = records.place(tensor.record)
    first, num_bytes = tensor.first * ITEM_SIZE[tensor.dtype], math.prod(tensor.shape) * ITEM_SIZE[tensor.dtype]
    if first < 0 or num_bytes < 0 or first + num_bytes > size:
        raise CheckpointError(f"{path}: {name} lies outside its record; the file is damaged, download it again")
    return TensorPlace(path, start + first, num_bytes, tensor.dtype, tensor.shape)
