"""The index of a zarr checkpoint, the default of NeMo 1.21 to 1.23, in the terms of torch_dist.py.

One folder per global tensor: `.zarray` (JSON) and one file of bare bytes per chunk, named by its place in the grid of
chunks, such as `2.0.0`. Megatron writes no compressor, C order and chunks that divide the shape; anything else is
refused. Transformer Engine's `..._extra_state/shard_*.pt` beside them are not read.
"""

from __future__ import annotations

import itertools
import math
import posixpath

from steerlm_nemo.checkpoint.archive import NemoFile
from steerlm_nemo.checkpoint.safetensors_io import ITEM_SIZE
from steerlm_nemo.checkpoint.safety import ZARR_ARRAY, zarr_array
from steerlm_nemo.checkpoint.torch_dist import Chunk, Index, StoredTensor
from steerlm_nemo.errors import CheckpointError

_DTYPES = {"<f4": "float32", "<f2": "float16", "bfloat16": "bfloat16"}


def zarr_index(nemo: NemoFile, folder: str) -> Index:
    """Every array under `folder` of an opened `.nemo`.

    Raises:
        CheckpointError: an array that Megatron would not have written, or a chunk that is missing or cut off.
    """
    arrays = [name for name in nemo.members if name.startswith(f"{folder}/") and name.endswith(f"/{ZARR_ARRAY}")]
    tensors = {}
    for name in sorted(arrays):
        key = posixpath.relpath(posixpath.dirname(name), folder)
        tensors[key] = _read_array(nemo, folder, key)
    return Index(tensors, {})


def _read_array(nemo: NemoFile, folder: str, key: str) -> StoredTensor:
    where = f"{nemo.path}:{folder}/{key}/{ZARR_ARRAY}"
    array = zarr_array(nemo.read(f"{folder}/{key}/{ZARR_ARRAY}"), where)
    try:
        shape, chunk_shape = tuple(map(int, array["shape"])), tuple(map(int, array["chunks"]))
        dtype, separator = _DTYPES.get(array["dtype"]), array.get("dimension_separator", ".")
    except (ValueError, KeyError, TypeError) as err:
        raise CheckpointError(f"{where}: not the description of a zarr array ({err!r})") from err
    if dtype is None or separator != ".":
        raise CheckpointError(f"{where}: only arrays of {', '.join(_DTYPES.values())} as Megatron writes them are read")
    if any(size < 1 for size in (*shape, *chunk_shape)):
        raise CheckpointError(f"{where}: a shape of {list(shape)} in chunks of {list(chunk_shape)}. It is damaged.")
    if len(shape) != len(chunk_shape) or any(size % part for size, part in zip(shape, chunk_shape, strict=True)):
        raise CheckpointError(f"{where}: chunks of {list(chunk_shape)} do not divide the shape {list(shape)}")
    num_bytes = math.prod(chunk_shape) * ITEM_SIZE[dtype]
    chunks = []
    for place in itertools.product(*(range(size // part) for size, part in zip(shape, chunk_shape, strict=True))):
        file = f"{key}/{'.'.join(map(str, place))}"
        if nemo.members.get(f"{folder}/{file}") != num_bytes:
            found = nemo.members.get(f"{folder}/{file}", "no")
            raise CheckpointError(f"{nemo.path}:{folder}/{file}: {found} bytes found, {num_bytes} expected")
        offset = tuple(index * part for index, part in zip(place, chunk_shape, strict=True))
        chunks.append(Chunk(offset, chunk_shape, file, 0, num_bytes, is_bare=True))
    return StoredTensor(dtype, shape, tuple(chunks))
